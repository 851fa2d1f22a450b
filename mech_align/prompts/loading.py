"""The two loaders: which columns hold what, and what else they may be called."""

import json
from collections.abc import Mapping
from typing import Any

from mech_align.prompts.cells import pair_columns, prompt_columns
from mech_align.prompts.labelled import LabelledPrompts
from mech_align.prompts.pairs import Pairs
from mech_align.prompts.problems import resolve_columns
from mech_align.prompts.rows import Table, read_table

# Names that can mean nothing else, read without being asked (and noted). Anything else must be named with columns=.
_PAIR_ALIASES = {
    "clean": ("clean_prompt", "clean_prefix", "clean_text"),
    "corrupt": ("corrupted", "corrupt_prompt", "corrupted_prompt", "corrupt_prefix", "patch_prefix", "corrupt_text"),
    "answer": ("clean_answer", "correct_answer"),
    "wrong": ("wrong_answer", "incorrect_answer", "corrupt_answer", "corrupted_answer", "patch_answer"),
}
_PAIR_NEAR = {
    "clean": ("prompt", "original", "base", "text", "x"),
    "corrupt": ("counterfactual", "counterfactual_prompt", "source", "patched", "corrupted_hard", "x_prime"),
    "answer": ("label", "answers", "target", "correct", "correct_idx", "clean_label", "y", "answer_matching_behavior"),
    "wrong": (
        "incorrect",
        "incorrect_idx",
        "foil",
        "distractor",
        "wrongs",
        "corrupt_label",
        "answer_not_matching_behavior",
    ),
}
_PAIR_FIELDS = {
    "clean": "the prompt after which `answer` is right",
    "corrupt": "the prompt after which `wrong` is right",
    "answer": "the right next token after `clean`, or a list of them",
    "wrong": "the right next token after `corrupt`, or a list of them; effects are measured between the two",
}
_PROMPT_ALIASES = {"text": ("prompt",)}
_PROMPT_NEAR = {
    "text": ("instruction", "question", "statement", "sentence", "input", "goal", "item", "messages"),
    "label": ("class", "target", "category", "type", "y", "value", "labels"),
}
_PROMPT_FIELDS = {
    "text": "the prompt",
    "label": "the class of the prompt; or say label='harmful' where all of them have the same",
}


def load_pairs(
    source: Any, *, split: str | None = None, subset: str | None = None, columns: Mapping[str, str] | None = None
) -> Pairs:
    r"""Which contrast pairs does this file, table or data set hold?

    Fields: ``clean``, ``corrupt``, ``answer``, ``wrong``; optional ``group``, ``id``, ``positions``. In CSV and TSV a
    set of answers is written as a JSON list or with ``|`` between them.

    Args:
        source: A path (jsonl, json, csv, tsv, parquet), a hub name (``owner/name`` or ``owner/name:split``), a
            DataFrame, a data set, a list of dicts, or a dict of lists. Only a hub name touches the network.
        split: The split of a data set.
        subset: The configuration of a hub data set.
        columns: Which column holds which field, where the names differ: ``{"answer": "label"}``.

    Returns:
        The pairs; ``notes`` says what was read under another name, repeated, or left unread.

    Raises:
        BadPrompts: Rows that cannot be used; all are reported, with line, field, what was found and what to write.
    """
    table = read_table(source, split=split, subset=subset)
    optional = ("group", "id", "positions")
    rows, notes = _fields(table, _PAIR_FIELDS, optional, columns, _PAIR_ALIASES, _PAIR_NEAR, sets=("answer", "wrong"))
    return Pairs(
        **pair_columns(rows, table.where, source=table.name, unit=table.unit, notes=notes, problems=table.problems)
    )


def load_prompts(
    source: Any,
    *,
    split: str | None = None,
    subset: str | None = None,
    columns: Mapping[str, str] | None = None,
    label: str | None = None,
) -> LabelledPrompts:
    """Which labelled prompts does this file, table or data set hold?

    Fields: ``text``, ``label``; optional ``group``, ``id``.

    Args:
        source: As for :func:`load_pairs`.
        split: The split of a data set.
        subset: The configuration of a hub data set.
        columns: Which column holds which field, where the names differ: ``{"text": "instruction"}``.
        label: One label for every prompt, for files that hold one class; put classes together with ``+``.

    Raises:
        BadPrompts: Rows that cannot be used; all are reported, with line, field, what was found and what to write.
    """
    table = read_table(source, split=split, subset=subset)
    wanted = _PROMPT_FIELDS if label is None else {"text": _PROMPT_FIELDS["text"]}
    rows, notes = _fields(table, wanted, ("group", "id"), columns, _PROMPT_ALIASES, _PROMPT_NEAR, sets=())
    if label is not None:
        rows = [{**row, "label": label} for row in rows]
    return LabelledPrompts(
        **prompt_columns(rows, table.where, source=table.name, unit=table.unit, notes=notes, problems=table.problems)
    )


def _fields(
    table: Table,
    wanted: Mapping[str, str],
    optional: tuple[str, ...],
    columns: Mapping[str, str] | None,
    aliases: Mapping[str, tuple[str, ...]],
    near: Mapping[str, tuple[str, ...]],
    *,
    sets: tuple[str, ...],
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of the table by field, cells of delimited files unpacked where the field is a set."""
    if not table.rows:
        return [], table.notes  # nothing could be read: the problems say why
    chosen, notes = resolve_columns(
        table.name,
        table.columns,
        required=tuple(wanted),
        optional=optional,
        given=columns,
        aliases=aliases,
        near=near,
        what_for=wanted,
    )
    rows: list[dict[str, Any]] = []
    for row in table.rows:
        cells = {name: row.get(column) for name, column in chosen.items()}
        if table.delimited:
            cells = {name: _unpacked(cell) if name in sets else _chat(cell) for name, cell in cells.items()}
        rows.append(cells)
    return rows, [*table.notes, *notes]


def _chat(cell: Any) -> Any:
    """A cell of text that holds messages as JSON, as those messages; any other cell as it is."""
    if not isinstance(cell, str) or not cell.lstrip().startswith("[{"):
        return cell
    try:
        messages = json.loads(cell)
    except json.JSONDecodeError:
        return cell
    return messages if all(isinstance(one, dict) and "role" in one for one in messages) else cell


def _unpacked(cell: Any) -> Any:
    """A set of answers in one cell of text: a JSON list, or texts with ``|`` between."""
    if not isinstance(cell, str):
        return cell
    if cell.lstrip().startswith("["):
        try:
            items = json.loads(cell)
        except json.JSONDecodeError:
            return cell  # an answer may begin with a bracket
        # In a file of text a bare number is text as well.
        return [str(item) if isinstance(item, int | float) else item for item in items]
    parts = cell.split("|")
    return parts if len(parts) > 1 and all(part.strip() for part in parts) else cell
