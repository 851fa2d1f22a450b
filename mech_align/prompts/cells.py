"""The cells of a table of prompts: each read into what it should hold, or reported with what to write instead."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mech_align.errors import BadPrompts
from mech_align.prompts.alignment import RESERVED_NAMES
from mech_align.prompts.chat import Prompt, as_prompt
from mech_align.prompts.problems import Problem, found, is_missing, plain, raise_problems

# A token index or a piece of the text; two of them where clean and corrupt differ.
PositionValue = int | str | tuple[int | str, int | str]
Answers = tuple[str, ...]
Tokens = tuple[int, ...]


def no_groups(of: str) -> str:
    """The note for rows without a group."""
    return f"no groups given: the {of} count as independent; give `group` where they share a template or a question"


def pair_columns(
    rows: Sequence[Mapping[str, Any]],
    where: Sequence[str],
    *,
    source: str,
    unit: str,
    notes: Sequence[str] = (),
    problems: Sequence[Problem] = (),
) -> dict[str, Any]:
    """The columns of Pairs from one mapping a pair, every bad cell reported at once.

    Args:
        rows: Field to cell.
        where: What to call each row in messages ("line 3").
        source: What to call them all.
        unit: "lines", "rows" or "pairs".
        notes: Notes from reading, kept.
        problems: Problems from reading, reported with the others.
    """
    bad = list(problems)
    read: dict[str, list[Any]] = {name: [] for name in ("clean", "corrupt", "answer", "wrong", "positions")}
    for row, at in zip(rows, where, strict=True):
        for name in ("clean", "corrupt"):
            read[name].append(read_prompt(row.get(name), at, name, bad))
        for name in ("answer", "wrong"):
            read[name].append(_answers(row.get(name), at, name, bad))
        both = set(read["answer"][-1]) & set(read["wrong"][-1])
        if both:
            bad.append(Problem(at, "wrong", f"{min(both)!r} is in `answer` too", "an answer stands on one side only"))
        read["positions"].append(read_positions(row.get("positions"), at, bad))
    names, groups, said = names_and_groups(rows, where, bad)
    raise_problems(source, bad, len(rows) + len({p.where for p in problems}), unit)
    twice = len(rows) - len({(c, k) for c, k in zip(read["clean"], read["corrupt"], strict=True)})
    if twice:
        said.append(f"{twice} of {len(rows)} pairs repeat the prompts of another pair")
    held = {name: tuple(column) for name, column in read.items()}
    return {**held, "group": groups, "id": names, "notes": (*notes, *said), "source": source}


def names_and_groups(
    rows: Sequence[Mapping[str, Any]], where: Sequence[str], problems: list[Problem], of: str = "pairs"
) -> tuple[tuple[str, ...], tuple[str, ...], list[str]]:
    """The id and group of each row: given, or counted from 0 and every row its own group. Appends to ``problems``."""
    given = [row.get("id") for row in rows]
    names = tuple(str(i) if is_missing(value) else label(value) for i, value in enumerate(given))
    seen: dict[str, str] = {}
    for name, at in zip(names, where, strict=True):
        first = seen.setdefault(name, at)
        if first != at:
            problems.append(Problem(at, "id", f"{name!r} is also the id of {first}", "write another"))
    notes: list[str] = []
    if any(map(is_missing, given)) and not all(map(is_missing, given)):
        notes.append(f"{sum(map(is_missing, given))} rows without an id were given their number, counted from 0")
    groups = [row.get("group") for row in rows]
    if all(map(is_missing, groups)):
        return names, names, [*notes, no_groups(of)]
    for value, at in zip(groups, where, strict=True):
        if is_missing(value):
            problems.append(Problem(at, "group", "found nothing, and other rows have one", "give every row its group"))
    return names, tuple("" if is_missing(value) else label(value) for value in groups), notes


def read_prompt(value: object, where: str, name: str, problems: list[Problem]) -> Prompt:
    """The prompt in this cell; an empty one, and a problem, where there is none."""
    if is_missing(value):
        problems.append(Problem(where, name, "found nothing", "write the prompt"))
        return ""
    try:
        return as_prompt(value)
    except TypeError as error:
        problems.append(Problem(where, name, str(error)))
        return ""


def _answers(value: Any, where: str, name: str, problems: list[Problem]) -> Answers:
    context = "`clean`" if name == "answer" else "`corrupt`"
    write = f"write the right next token after {context}, or a list of them"
    if is_missing(value):
        problems.append(Problem(where, name, "found nothing", write))
        return ()
    if isinstance(value, set | frozenset):
        value = sorted(value, key=str)  # pyright: ignore[reportUnknownArgumentType, reportUnknownLambdaType]
    many = list(value) if isinstance(value, list | tuple) else [value]  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    good = [one for one in many if isinstance(one, str) and one]
    for one in many:
        if isinstance(one, str) and one:
            continue
        quoted = f'write it as text, "{one}"' if isinstance(one, int | float) and not is_missing(one) else write
        problems.append(Problem(where, name, found(one), quoted))
    if not many:
        problems.append(Problem(where, name, "found an empty list", write))
    return tuple(dict.fromkeys(good))


def read_positions(value: Any, where: str, problems: list[Problem]) -> Mapping[str, PositionValue]:
    """The named positions in this cell, which may be JSON text; none where it is empty."""
    write = 'write {"subject": "Lily"}, {"subject": ["Lily", "Tim"]} or {"subject": 3}'
    if is_missing(value):
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            pass
    if not isinstance(value, Mapping):
        problems.append(Problem(where, "positions", found(value), write))
        return {}
    held: dict[str, PositionValue] = {}
    for name, raw in value.items():  # pyright: ignore[reportUnknownVariableType]
        one = plain(raw)
        if is_missing(one):
            continue  # tables give every row every name
        if not isinstance(name, str) or name in RESERVED_NAMES:
            problems.append(Problem(where, "positions", f"the name {name!r} is taken", "choose another"))
        elif _is_position(one):
            held[name] = one
        elif isinstance(one, list) and len(one) == 2 and all(map(_is_position, one)):  # pyright: ignore[reportUnknownArgumentType]
            held[name] = (one[0], one[1])
        else:
            problems.append(Problem(where, "positions", f"{name!r}: {found(one)}", write))
    return held


def _is_position(value: object) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, str) and bool(value))


def token_row(name: str, row: Any, where: str, problems: list[Problem]) -> Tokens:
    """The token ids in this entry; of a set, each once."""
    write = "write token ids: integers from 0"
    if name in ("answer", "wrong") and not isinstance(row, list):
        row = [row]
    if not isinstance(row, list):
        problems.append(Problem(where, name, found(row), "write a list of token ids"))
        return ()
    for token in row:  # pyright: ignore[reportUnknownVariableType]
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            problems.append(Problem(where, name, found(token), write))
            return ()
    if not row:
        problems.append(Problem(where, name, "found an empty list", write))
    return tuple(dict.fromkeys(row)) if name in ("answer", "wrong") else tuple(row)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


def listed(name: str, value: Any) -> list[Any]:
    """The entries of a list, array or column that the user gave under this name.

    Raises:
        BadPrompts: It is one text or number.
    """
    if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
        raise BadPrompts(
            f"`{name}` is one {type(value).__name__}, and not a list.", hint=f"Give {name}=[...], one entry a row."
        )
    return list(plain(list(value)))


def label(value: Any) -> str:
    """A label as text; a whole number that a table has turned into 3.0 is 3."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def prompt_columns(
    rows: Sequence[Mapping[str, Any]],
    where: Sequence[str],
    *,
    source: str,
    unit: str,
    notes: Sequence[str] = (),
    problems: Sequence[Problem] = (),
) -> dict[str, Any]:
    """The columns of LabelledPrompts from one mapping a prompt; arguments as for :func:`pair_columns`."""
    bad = list(problems)
    texts: list[Prompt] = []
    labels: list[str] = []
    for row, at in zip(rows, where, strict=True):
        texts.append(read_prompt(row.get("text"), at, "text", bad))
        value = row.get("label")
        if is_missing(value) or not isinstance(value, str | int | float):
            bad.append(Problem(at, "label", found(value), "write the class as a text or a number"))
            labels.append("")
        else:
            labels.append(label(value))
    names, groups, said = names_and_groups(rows, where, bad, of="prompts")
    raise_problems(source, bad, len(rows) + len({problem.where for problem in problems}), unit)
    twice = len(texts) - len(set(texts))
    if twice:
        said.append(f"{twice} of {len(rows)} prompts repeat the text of another")
    return {
        "text": tuple(texts),
        "label": tuple(labels),
        "group": groups,
        "id": names,
        "notes": (*notes, *said),
        "source": source,
    }
