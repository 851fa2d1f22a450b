"""Rows of prompts from wherever they are: jsonl, JSON, CSV, TSV, parquet, DataFrames, ``datasets``, lists of dicts.

Reading says nothing about what the columns mean: that is the business of :mod:`mech_align.prompts.cells`.
"""

import csv
import gzip
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mech_align.errors import BadPrompts
from mech_align.prompts.problems import Problem, found, plain, say_some

_FORMATS = "jsonl, json, csv, tsv or parquet"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.+-]+)?")


@dataclass(frozen=True)
class Table:
    """Rows as they stand in the source.

    Args:
        name: What to call the source in messages.
        rows: Column to cell, one mapping a row.
        where: What to call each row ("line 3").
        unit: "lines" or "rows".
        delimited: Cells are text only, as in CSV: a list is written with ``|`` or as JSON.
        problems: Rows that could not be read at all.
        notes: What a reader should know.
    """

    name: str
    rows: list[dict[str, Any]]
    where: list[str]
    unit: str = "rows"
    delimited: bool = False
    problems: list[Problem] = field(default_factory=list[Problem])
    notes: list[str] = field(default_factory=list[str])

    @property
    def columns(self) -> list[str]:
        """Every column that some row has, in order of appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))


def read_table(source: Any, *, split: str | None = None, subset: str | None = None) -> Table:
    """Which rows does this source hold?

    Args:
        source: A path, the name of a data set on the hub (``owner/name``, ``owner/name:split``), a DataFrame, a data
            set, a list of dicts, or a dict of lists.
        split: The split of a data set that has several.
        subset: The configuration of a hub data set.

    Raises:
        BadPrompts: There is nothing of that name, or it holds no rows.
    """
    if isinstance(source, str | Path):
        table = _read_named(source, split, subset)
    else:
        table = _read_object(source, split)
    if not table.rows and not table.problems:
        raise BadPrompts(f"{table.name} is empty.", hint="It must hold at least one row.")
    return table


def _read_named(source: str | Path, split: str | None, subset: str | None) -> Table:
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, split)
    if path.exists():
        return _read_file(path)
    text = str(source)
    looks_like_a_file = path.suffix.lower().lstrip(".") in {
        "jsonl",
        "ndjson",
        "json",
        "csv",
        "tsv",
        "parquet",
        "txt",
        "gz",
    }
    if isinstance(source, Path) or looks_like_a_file or not _HUB_NAME.fullmatch(text):
        raise _no_such_file(path)
    name, _, named_split = text.partition(":")
    return _read_hub(name, split or named_split or None, subset, path)


def _no_such_file(path: Path) -> BadPrompts:
    folder = path.parent
    if not folder.is_dir():
        return BadPrompts(
            f"There is no file {path}.", why=f"The folder {folder} does not exist.", hint="Check the path."
        )
    there = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    near = get_close_matches(path.name, there, n=3)
    hint = f"Did you mean {', '.join(str(folder / name) for name in near)}?" if near else "Check the path."
    return BadPrompts(f"There is no file {path}.", hint=hint)


def _read_file(path: Path) -> Table:
    name = path.name
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = bool(suffixes) and suffixes[-1] == ".gz"
    kind = (suffixes[:-1] if zipped else suffixes)[-1:] or [""]
    if kind[0] in (".parquet", ".pq"):
        return _read_parquet(path)
    raw = path.read_bytes()
    text = _decoded(gzip.decompress(raw) if zipped else raw, name)
    if not text.strip():
        raise BadPrompts(f"{name} is empty.", hint="It must hold one pair or prompt a line.")
    if kind[0] in (".csv", ".tsv"):
        return _read_delimited(text, name, "\t" if kind[0] == ".tsv" else None)
    if kind[0] in (".jsonl", ".ndjson"):
        return _read_jsonl(text, name)
    if kind[0] == ".json" or text.lstrip()[0] in "[{":
        return _read_json(text, name)
    raise BadPrompts(f"{name}: the ending {kind[0]!r} is none that is known.", hint=f"Use {_FORMATS}.")


def _decoded(raw: bytes, name: str) -> str:
    # Spreadsheets write a byte order mark, and some of them UTF-16.
    encoding = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise BadPrompts(f"{name} is not UTF-8 text (line {line}).", hint="Save it as UTF-8.") from error


def _read_jsonl(text: str, name: str) -> Table:
    table = Table(name, [], [], unit="lines")
    # Not splitlines(): it would also cut at the separators that Unicode allows inside a JSON text.
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            what = f"not JSON ({error.msg}, column {error.colno})"
            table.problems.append(Problem(where, "", what, 'write one object a line: {"clean": "...", ...}'))
            continue
        _add_row(table, row, where)
    return table


def _read_json(text: str, name: str) -> Table:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" or (text.lstrip()[0] == "{" and "\n{" in text.lstrip()):
            return _read_jsonl(text, name)  # one object a line under the name .json is common
        raise BadPrompts(
            f"{name} is not JSON: {error.msg}, line {error.lineno}, column {error.colno}.",
            hint="Write a list of objects, or one object a line and call it .jsonl.",
        ) from error
    return _from_plain(content, name)


def _read_delimited(text: str, name: str, delimiter: str | None) -> Table:
    header = text.lstrip().split("\n", 1)[0]
    if delimiter is None:
        delimiter = max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    table = Table(name, [], [], unit="lines", delimited=True)
    if delimiter not in ",\t":
        table.notes.append(f"cells are separated by {delimiter!r}")
    columns: list[str] = []
    start = 1
    try:
        for cells in reader:
            where, start = f"line {start}", reader.line_num + 1
            if not cells or not any(cell.strip() for cell in cells):
                continue
            if not columns:
                columns = _header(cells, name)
            elif len(cells) != len(columns):
                what = f"{len(cells)} cells, and the header has {len(columns)}"
                table.problems.append(
                    Problem(where, "", what, f'put cells that hold {delimiter!r} or a line end in "quotes"')
                )
            else:
                table.rows.append(dict(zip(columns, cells, strict=True)))
                table.where.append(where)
    except csv.Error as error:
        raise BadPrompts(
            f"{name}, line {start}: {error}.", hint='Close every quote, and write a quote inside a cell twice ("").'
        ) from error
    return table


def _header(cells: Sequence[str], name: str) -> list[str]:
    columns = [cell.strip() or f"column {i}" for i, cell in enumerate(cells)]
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise BadPrompts(f"{name} has two columns named {', '.join(map(repr, twice))}.", hint="Rename one of them.")
    return columns


def _read_parquet(path: Path) -> Table:
    import pyarrow.parquet as parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise BadPrompts(f"{path.name} cannot be read as parquet.", why=str(error)) from error
    return _from_plain(rows, path.name)


def _read_folder(path: Path, split: str | None) -> Table:
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        import datasets

        return _read_dataset(datasets.load_from_disk(str(path)), str(path), split)
    files = sorted(entry.name for entry in path.iterdir())
    raise BadPrompts(f"{path} is a folder.", why=f"It holds {say_some(files)}.", hint=f"Name one file: {_FORMATS}.")


def _read_hub(name: str, split: str | None, subset: str | None, path: Path) -> Table:
    try:
        import datasets

        loaded = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the hub, the network, the builder and the cache all raise their own
        raise BadPrompts(
            f"There is no file {path}, and the data set {name!r} could not be loaded from the hub.",
            why=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            hint=[
                "For a file, check the path.",
                f"For a data set, check the name, split={split!r} and subset={subset!r}.",
            ],
        ) from error
    return _read_dataset(loaded, name, None)


def _read_dataset(loaded: Any, name: str, split: str | None) -> Table:
    """A ``datasets`` Dataset, or a dict of them by split."""
    if isinstance(loaded, Mapping):
        splits: list[str] = list(loaded)
        if split is None and len(splits) == 1:
            split = splits[0]
        if split not in splits:
            what = f"{name} has several splits" if split is None else f"{name} has no split {split!r}"
            raise BadPrompts(f"{what}.", hint=f"Say split=... with one of: {', '.join(splits)}.")
        loaded, name = loaded[split], f"{name}:{split}"
    return _from_plain([dict(row) for row in loaded], name)


def _read_object(source: Any, split: str | None) -> Table:
    kind = type(source).__module__.split(".")[0]
    if kind == "datasets":
        return _read_dataset(source, "the data set", split)
    if kind == "pandas" and hasattr(source, "to_dict"):
        columns = [str(column) for column in source.columns]
        table = Table("the DataFrame", [], [])
        for label, cells in zip(source.index, source.itertuples(index=False, name=None), strict=True):
            _add_row(table, dict(zip(columns, cells, strict=True)), f"row {label}")
        return table
    if kind == "polars" and hasattr(source, "to_dicts"):
        return _from_plain(source.to_dicts(), "the DataFrame")
    if isinstance(source, Mapping | list | tuple):
        return _from_plain(source, "the rows")
    raise BadPrompts(
        f"Prompts cannot be read from {type(source).__name__}.",
        hint=f"Give a path ({_FORMATS}), a hub name, a DataFrame, a data set, or a list of dicts.",
    )


def _from_plain(content: Any, name: str) -> Table:
    """Rows from a list of objects, an object of lists, or an object that holds one list of objects."""
    table = Table(name, [], [])
    rows: Any = content
    if isinstance(rows, Mapping):
        fields: dict[Any, Any] = dict(rows)
        lists: dict[Any, list[Any]] = {key: list(value) for key, value in fields.items() if _is_list(value)}
        inner = [key for key, value in lists.items() if value and all(isinstance(row, Mapping) for row in value)]
        if len(lists) == len(fields) > 1 and len({len(value) for value in lists.values()}) == 1:
            rows = [dict(zip(lists, cells, strict=True)) for cells in zip(*lists.values(), strict=True)]
        elif len(inner) == 1 and not isinstance(fields.get("clean", fields.get("text")), str):
            rows = lists[inner[0]]
            table.notes.append(f"rows were read from {inner[0]!r}")
        else:
            rows = [fields]
    if not _is_list(rows):
        raise BadPrompts(f"{name}: {found(content)} in place of rows.", hint="Write a list of objects.")
    for number, row in enumerate(rows):
        _add_row(table, row, f"row {number}")
    return table


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) or (hasattr(value, "tolist") and isinstance(value.tolist(), list))


def _add_row(table: Table, row: Any, where: str) -> None:
    if not isinstance(row, Mapping):
        table.problems.append(Problem(where, "", found(row), "write an object with named fields"))
        return
    cells: dict[Any, Any] = dict(row)
    table.rows.append({str(key): plain(value) for key, value in cells.items()})
    table.where.append(where)
