"""What is written into a run folder, and how: whole files or none, plain JSON, names that stay inside."""

import json
import os
import platform
import re
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from mech_align.errors import BadRun
from mech_align.results import Result

FORMAT = 1
TABLE = ("effect", "ci_low", "ci_high", "p", "q", "n", "p_maxt")
"""Columns of a table after the coordinates."""
MANIFEST = "manifest.json"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_PACKAGES = (
    "mech-align", "torch", "transformer-lens", "transformers", "sae-lens", "peft", "numpy", "scipy", "xarray", "plotly",
)  # fmt: skip


def summary_table(mean: Result) -> pd.DataFrame:
    """An averaged result as its table: coordinates first, then ``effect``, its interval, tests and n."""
    table = mean.frame()
    for name in TABLE:
        if name not in table:
            table[name] = np.nan
    coordinates = [str(column) for column in table.columns if column not in TABLE]
    for name in coordinates:
        if table[name].dtype == object:
            table[name] = table[name].astype(str)
    return cast(pd.DataFrame, table[[*coordinates, *TABLE]])


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, without importing any of it."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def plain(value: Any) -> Any:
    """The value as JSON reads it back: tuples become lists, keys strings, numpy numbers plain ones, NaN null."""
    return json.loads(json.dumps(value, default=_plain), parse_constant=lambda _: None)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(cast(Any, value), key=str)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written into a run folder as JSON")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run folder; ``BadRun`` where there is none, or one that something else wrote."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["tool"] != "mech_align" or not isinstance(manifest["steps"], dict):
            raise ValueError("the manifest was written by something else")
        if manifest["format"] > FORMAT:
            raise ValueError("written by a newer mech_align")
    except (OSError, ValueError, KeyError, TypeError) as problem:
        missing = not (folder / MANIFEST).exists()
        raise BadRun(
            f"no run in {folder}" if missing else f"the run in {folder} cannot be read",
            why="there is no manifest.json" if missing else str(problem),
            hint="give a folder that a mech-align command wrote with --out",
        ) from problem
    return manifest


def write_json(file: Path, value: Any) -> Path:
    """Write JSON, the whole file or nothing."""
    return write_text(file, json.dumps(value, indent=1, default=_plain, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> Path:
    """Write text, the whole file or nothing: a reader never sees half of it, whenever the process is killed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    with part.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    return part.replace(file)


def checked(name: str) -> str:
    """The name, if it can name a file inside the run folder."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a file: letters, digits, '_', '-' and '.' only")
    return name


def verb(command: str) -> str:
    """The program and its subcommand: the words before the first option."""
    words: list[str] = []
    for word in command.split():
        if word.startswith("-"):
            break
        words.append(word)
    return " ".join([Path(words[0]).name, *words[1:]]) if words else ""


def quote(word: str) -> str:
    """A word of a command as a shell takes it."""
    return word if re.fullmatch(r"[\w@%+=:,./-]+", word) else "'" + word.replace("'", "'\"'\"'") + "'"


def difference(key: str, old: Any, new: Any) -> str:
    """What differs between two plans or fingerprints, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        before, after = cast(dict[str, Any], old), cast(dict[str, Any], new)
        keys = [k for k in {**before, **after} if before.get(k) != after.get(k)]
        return f"{key} differs in " + ", ".join(
            f"{k} ({_short(before.get(k))} there, {_short(after.get(k))} now)" for k in keys[:4]
        )
    return f"{key} is {_short(old)} there, {_short(new)} now"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."


def now() -> str:
    """This moment, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
