"""Everything wrong with a table of prompts, said at once: which line, which field, what was found, what to write."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from mech_align.errors import BadPrompts

_SHOWN = 5
_CELL = 40


@dataclass(frozen=True)
class Problem:
    """One cell that cannot be used. ``write`` is what would be right there."""

    where: str
    field: str
    found: str
    write: str = ""

    def __str__(self) -> str:
        text = f"{self.where}, field `{self.field}`: {self.found}" if self.field else f"{self.where}: {self.found}"
        return f"{text}; {self.write}" if self.write else text


def raise_problems(source: str, problems: Sequence[Problem], n_rows: int, unit: str = "lines") -> None:
    """Raise one error for all problems: the first few in full and the count of the rest.

    Raises:
        BadPrompts: There is at least one.
    """
    if not problems:
        return
    n_bad = len({problem.where for problem in problems})
    lines = [str(problem) for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        lines.append(f"... and {len(problems) - _SHOWN} more")
    total = max(n_rows, n_bad)
    raise BadPrompts(
        f"{source}: {n_bad} of {total} {unit if total != 1 else unit.removesuffix('s')} cannot be used.",
        why="\n  ".join(["", *lines]).strip("\n"),
        hint="Correct them and run again; nothing was skipped.",
    )


def say_some(names: Sequence[str], limit: int = 5) -> str:
    """The first few names and the count of the rest."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def is_missing(value: object) -> bool:
    """Is this cell empty: None, NaN, NA, or a text without characters?"""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, str) and not value)


def plain(value: Any) -> Any:
    """The same value without arrays, tensors and numpy scalars: plain lists, numbers and texts."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return value


def found(value: object) -> str:
    """What stands there, in a few words: the type, and the value where it is short and no prompt."""
    if is_missing(value):
        return "found nothing"
    if isinstance(value, bool | int | float):
        return f"found the {'truth value' if isinstance(value, bool) else 'number'} {value}"
    if isinstance(value, str):
        return f"found {value!r}" if len(value) <= _CELL else f"found a text of {len(value)} characters"
    if isinstance(value, list | tuple | dict):
        return f"found a {type(value).__name__} of {len(value)}"  # pyright: ignore[reportUnknownArgumentType]
    return f"found {type(value).__name__}"


def resolve_columns(
    source: str,
    present: Sequence[str],
    *,
    required: Sequence[str],
    optional: Sequence[str],
    given: Mapping[str, str] | None,
    aliases: Mapping[str, Sequence[str]],
    near: Mapping[str, Sequence[str]],
    what_for: Mapping[str, str],
) -> tuple[dict[str, str], list[str]]:
    """Which column of the source holds each field?

    The one that ``given`` names; or one of the field's own name; or, where exactly one well-known other name is
    present, that.

    Args:
        given: From field to column, by the user.
        aliases: Other names that can mean nothing else.
        near: Names that may mean the field, for hints only.
        what_for: What each required field holds, for hints.

    Returns:
        Field to column, and notes on what was read under another name or left unread.

    Raises:
        BadPrompts: A required field has no column, or ``given`` names a column or a field that is not there.
    """
    fields = [*required, *optional]
    given = dict(given or {})
    for field, column in given.items():
        if field not in fields:
            meant = f" (did you turn it round? {{{column!r}: {field!r}}})" if column in fields else ""
            raise BadPrompts(f"columns= names the field {field!r}, which does not exist{meant}.", hint=_are(fields))
        if column not in present:
            raise BadPrompts(
                f"{source} has no column {column!r}, which columns= names for {field!r}.", hint=_has(present)
            )
    chosen: dict[str, str] = {}
    notes: list[str] = []
    for field in fields:
        if field in given:
            chosen[field] = given[field]
        elif field in present:
            chosen[field] = field
        else:
            known = [name for name in aliases.get(field, ()) if name in present and name not in given.values()]
            if field in required:  # "Clean" means clean; an "ID" may be of something else
                known += [name for name in present if name.lower() == field and name not in given.values()]
            if len(known) == 1:
                chosen[field] = known[0]
                notes.append(f"column {known[0]!r} was read as {field!r}")
    missing = [field for field in required if field not in chosen]
    if missing:
        free = [name for name in present if name not in chosen.values()]
        raise _missing_columns(source, missing, free, present, near, what_for)
    unread = [name for name in present if name not in chosen.values()]
    if unread:
        notes.append(f"columns not used: {', '.join(unread)}")
    return chosen, notes


def _missing_columns(
    source: str,
    missing: Sequence[str],
    free: Sequence[str],
    present: Sequence[str],
    near: Mapping[str, Sequence[str]],
    what_for: Mapping[str, str],
) -> BadPrompts:
    hints: list[str] = []
    guesses: dict[str, str] = {}
    for field in missing:
        close = [name for name in near.get(field, ()) if name in free and name not in guesses.values()]
        close = close or get_close_matches(field, [name for name in free if name not in guesses.values()], n=1)
        if close:
            guesses[field] = close[0]
    ids = [name for name in guesses.values() if name.endswith(("_idx", "_id", "_ids"))]
    guesses = {field: name for field, name in guesses.items() if name not in ids}
    if guesses:
        hints.append(f"If these columns mean it, say columns={guesses!r}.")
    if ids:
        hints.append(f"{', '.join(ids)} may hold token ids: those go into Pairs.from_tokens(...), not into a file.")
    hints.extend(f"Add `{field}`: {what_for[field]}." for field in missing if field not in guesses)
    names = ", ".join(f"`{field}`" for field in missing)
    return BadPrompts(f"{source} has no {names}.", why=_has(present), hint=hints)


def _has(present: Sequence[str]) -> str:
    return f"Its columns are: {', '.join(map(repr, present))}." if present else "It has no columns."


def _are(fields: Sequence[str]) -> str:
    return f"The fields are: {', '.join(fields)}."


def fingerprint_of(content: Any) -> str:
    """16 hex digits of the canonical JSON of plain data."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
