"""Reading pairs and labelled prompts from every kind of source, and what is said about rows that are wrong."""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mech_align.errors import BadPrompts
from mech_align.prompts import load_pairs, load_prompts

ROWS: list[dict[str, Any]] = [
    {
        "clean": "Lily, went",
        "corrupt": "Tim went",
        "answer": [" She", "She"],
        "wrong": [" He"],
        "group": "a",
        "id": "x",
    },
    {"clean": 'the "park"', "corrupt": "the\npark", "answer": ["Yes"], "wrong": ["No", " No"], "group": "b", "id": "y"},
]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sources(folder: Path) -> dict[str, Any]:
    import datasets

    frame = pd.DataFrame(ROWS)
    bars = frame.assign(answer=[" She|She", "Yes"], wrong=[" He", '["No", " No"]'])
    (folder / "list.json").write_text(json.dumps(ROWS, indent=1))
    (folder / "held.json").write_text(json.dumps({"version": 1, "pairs": ROWS}))
    (folder / "columns.json").write_text(json.dumps(frame.to_dict("list")))
    (folder / "lines.json").write_text(jsonl(folder / "a.jsonl", ROWS).read_text())
    (folder / "a.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    (folder / "windows.jsonl").write_bytes(
        b"\xef\xbb\xbf" + (folder / "a.jsonl").read_bytes().replace(b"\n", b"\r\n\r\n")
    )
    bars.to_csv(folder / "a.csv", index=False)
    bars.to_csv(folder / "a.tsv", index=False, sep="\t")
    bars.to_csv(folder / "semicolon.csv", index=False, sep=";")
    bars.to_csv(folder / "excel.csv", index=False, encoding="utf-16")
    (folder / "bom.csv").write_bytes(b"\xef\xbb\xbf" + (folder / "a.csv").read_bytes().replace(b'"\n', b'"\r\n'))
    frame.to_parquet(folder / "a.parquet")
    data_set = datasets.Dataset.from_list(ROWS)
    data_set.save_to_disk(folder / "saved")
    names = ["list.json", "held.json", "columns.json", "lines.json", "a.jsonl", "a.jsonl.gz", "windows.jsonl", "a.csv"]
    names += ["a.tsv", "semicolon.csv", "excel.csv", "bom.csv", "a.parquet", "saved"]
    named = {name: folder / name for name in names}
    return named | {
        "string": str(folder / "a.jsonl"),
        "DataFrame": frame,
        "shuffled index": frame.set_index(np.array([7, 3])),
        "dicts": ROWS,
        "dict of lists": frame.to_dict("list"),
        "Dataset": data_set,
        "DatasetDict": datasets.DatasetDict({"train": data_set}),
    }


def test_every_source_gives_the_same_pairs(tmp_path: Path) -> None:
    expected = load_pairs(ROWS)
    assert expected.answer == ((" She", "She"), ("Yes",))
    assert expected.clean == ("Lily, went", 'the "park"')
    assert (expected.group, expected.id) == (("a", "b"), ("x", "y"))
    for name, source in sources(tmp_path).items():
        got = load_pairs(source)
        assert got.fingerprint == expected.fingerprint, name
        assert got == expected, name


def test_splits_are_asked_for_by_name(tmp_path: Path) -> None:
    import datasets

    parts = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    )
    assert len(load_pairs(parts, split="test")) == 1
    with pytest.raises(BadPrompts) as caught:
        load_pairs(parts)
    assert "train, test" in caught.value.hints[0]
    parts.save_to_disk(tmp_path / "saved")
    assert len(load_pairs(tmp_path / "saved", split="test")) == 1


def test_all_bad_lines_are_reported_with_line_field_and_remedy(tmp_path: Path) -> None:
    good = {"clean": "a", "corrupt": "b", "answer": "x", "wrong": "y"}
    lines = [
        json.dumps(good),
        "",
        "{not json",
        json.dumps({**good, "clean": "  \n"}),
        json.dumps({**good, "answer": 52}),
        json.dumps([1, 2]),
        json.dumps({**good, "wrong": []}),
        json.dumps({**good, "corrupt": None}),
        json.dumps({**good, "wrong": "x"}),
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(BadPrompts) as caught:
        load_pairs(path)
    error = caught.value
    assert error.what == "p.jsonl: 7 of 8 lines cannot be used."
    shown = error.why.splitlines()
    assert len(shown) == 6
    assert shown[-1].strip() == "... and 2 more"
    assert "line 3: not JSON" in error.why
    assert "line 6" in error.why
    assert "line 4, field `clean`: found only white space" in error.why
    assert 'line 5, field `answer`: found the number 52; write it as text, "52"' in error.why


def test_lines_of_csv_are_counted_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('clean,corrupt,answer,wrong\n"two\nlines",b,x,y\n\na,b,,y\na,b,x,y,z\n')
    with pytest.raises(BadPrompts) as caught:
        load_pairs(path)
    assert "line 5, field `answer`: found nothing" in caught.value.why
    assert "line 6: 5 cells, and the header has 4" in caught.value.why


def test_missing_cells_of_tables_are_missing_and_not_nan_text() -> None:
    frame = pd.DataFrame(ROWS).assign(wrong=[np.nan, " No"], group=[1.0, np.nan], id=[1.0, 2.0])
    with pytest.raises(BadPrompts) as caught:
        load_pairs(frame)
    assert "row 0, field `wrong`: found nothing" in caught.value.why
    assert "row 1, field `group`: found nothing, and other rows have one" in caught.value.why
    with pytest.raises(BadPrompts, match="field `answer`: found nothing"):
        load_pairs(pd.DataFrame(ROWS).assign(answer=pd.array([" She", pd.NA])))
    assert load_pairs(pd.DataFrame(ROWS).assign(id=[1.0, 2.0])).id == ("1", "2")
    numbered = load_pairs(pd.DataFrame(ROWS).assign(id=["x", None]))
    assert numbered.id == ("x", "1")
    assert any(note.startswith("1 rows without an id") for note in numbered.notes)


def test_duplicate_ids_name_both_lines(tmp_path: Path) -> None:
    with pytest.raises(BadPrompts, match="line 2, field `id`: 'x' is also the id of line 1"):
        load_pairs(jsonl(tmp_path / "p.jsonl", [ROWS[0], {**ROWS[1], "id": "x"}]))


@pytest.mark.parametrize(("name", "content"), [("p.jsonl", ""), ("p.csv", "\n \n"), ("p.json", "[]")])
def test_empty_files(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(BadPrompts, match=f"{name} is empty"):
        load_pairs(tmp_path / name)
    (tmp_path / "head.csv").write_text("clean,corrupt,answer,wrong\n")
    with pytest.raises(BadPrompts, match=r"head.csv is empty"):
        load_pairs(tmp_path / "head.csv")


def test_missing_columns_name_the_near_ones(tmp_path: Path) -> None:
    rows = [{"clean": "a", "counterfactual": "b", "label": "x", "wrong": "y"}]
    with pytest.raises(BadPrompts) as caught:
        load_pairs(jsonl(tmp_path / "p.jsonl", rows))
    assert caught.value.what == "p.jsonl has no `corrupt`, `answer`."
    assert "columns={'corrupt': 'counterfactual', 'answer': 'label'}" in caught.value.hints[0]
    pairs = load_pairs(tmp_path / "p.jsonl", columns={"corrupt": "counterfactual", "answer": "label"})
    assert (pairs.corrupt, pairs.answer) == (("b",), (("x",),))
    with pytest.raises(BadPrompts) as missing:
        load_pairs([{"clean": "a", "corrupt": "b", "answer": "x"}])
    assert "Add `wrong`: the right next token after `corrupt`" in missing.value.hints[0]


def test_columns_argument_is_checked() -> None:
    with pytest.raises(BadPrompts, match="no column 'nope'"):
        load_pairs(ROWS, columns={"clean": "nope"})
    with pytest.raises(BadPrompts, match="turn it round"):
        load_pairs(ROWS, columns={"corrupted": "corrupt"})


def test_well_known_names_are_read_and_said_and_other_columns_are_said() -> None:
    rows = [{"clean": "a", "corrupted": "b", "Answer": "x", "wrong": "y", "difficulty": 3}]
    pairs = load_pairs(rows)
    assert (pairs.corrupt, pairs.answer) == (("b",), (("x",),))
    assert "column 'corrupted' was read as 'corrupt'" in pairs.notes
    assert "columns not used: difficulty" in pairs.notes
    both = [{"clean": "a", "corrupted": "b", "patch_prefix": "c", "answer": "x", "wrong": "y"}]
    with pytest.raises(BadPrompts, match="has no `corrupt`"):  # which of the two is meant cannot be known
        load_pairs(both)


def test_messages_and_positions_come_through_files(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi Lily"}]
    row = {**ROWS[0], "clean": chat, "positions": {"who": ["Lily", "Tim"], "last_word": -1}}
    pairs = load_pairs(jsonl(tmp_path / "p.jsonl", [row]))
    assert pairs.clean == ((("user", "Hi Lily"),),)
    assert pairs.positions == ({"who": ("Lily", "Tim"), "last_word": -1},)
    cells = {**row, "clean": json.dumps(chat), "positions": json.dumps(row["positions"]), "answer": "x", "wrong": "y"}
    pd.DataFrame([cells]).to_csv(tmp_path / "p.csv", index=False)
    read = load_pairs(tmp_path / "p.csv")
    assert (read.clean, read.positions) == (pairs.clean, pairs.positions)
    frame = pd.DataFrame([{**ROWS[0], "positions": {"who": 1}}, {**ROWS[1], "positions": {"what": 2}}])
    frame.to_parquet(tmp_path / "p.parquet")  # gives every row every name, with nothing in it
    assert load_pairs(tmp_path / "p.parquet").positions == ({"who": 1}, {"what": 2})
    for bad in ("who", {"last": 3}, {"who": 1.5}, {"who": ["a", "b", "c"]}):
        with pytest.raises(BadPrompts, match="field `positions`"):
            load_pairs([{**ROWS[0], "positions": bad}])


def test_missing_files_name_the_near_ones_and_touch_no_network(tmp_path: Path) -> None:
    jsonl(tmp_path / "pairs.jsonl", ROWS)
    with pytest.raises(BadPrompts, match=r"Did you mean .*pairs\.jsonl"):
        load_pairs(tmp_path / "pair.jsonl")
    with pytest.raises(BadPrompts, match="does not exist"):
        load_pairs("some/where/else.csv")
    with pytest.raises(BadPrompts, match="is a folder"):
        load_pairs(tmp_path)
    with pytest.raises(BadPrompts, match="none that is known"):
        (tmp_path / "p.docx").write_text("hello")
        load_pairs(tmp_path / "p.docx")
    with pytest.raises(BadPrompts, match="cannot be read from int"):
        load_pairs(3)


def test_hub_names_are_loaded_lazily_with_their_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, subset: str | None, split: str | None) -> Any:
        asked.append((name, subset, split))
        if name == "who/gone":
            raise ConnectionError("no route to host\nmore")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_pairs("who/pairs:test")) == 2
    assert len(load_pairs("who/pairs", split="dev", subset="hard")) == 2
    assert asked == [("who/pairs", None, "test"), ("who/pairs", "hard", "dev")]
    with pytest.raises(BadPrompts, match="ConnectionError: no route to host"):
        load_pairs("who/gone")


def test_import_loads_nothing_heavy() -> None:
    import subprocess

    code = (
        "import sys, mech_align.prompts; "
        "print([m for m in ('torch', 'pandas', 'datasets', 'transformers', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b'{"clean": "a"}\n{"clean": "caf\xe9"}\n')
    with pytest.raises(BadPrompts, match=r"not UTF-8 text \(line 2\)"):
        load_pairs(tmp_path / "p.jsonl")


def test_unicode_line_separators_stay_inside_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({**ROWS[0], "clean": "a\u2028b"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_pairs(path).clean == ("a\u2028b",)


def test_labelled_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": "a b", "label": True, "topic": "t"}, {"prompt": "c", "label": 1.0, "topic": "u"}]
    prompts = load_prompts(jsonl(tmp_path / "p.jsonl", rows), columns={"group": "topic"})
    assert (prompts.text, prompts.label, prompts.group) == (("a b", "c"), ("True", "1"), ("t", "u"))
    assert load_prompts([{"text": "a"}], label="harmful").label == ("harmful",)
    with pytest.raises(BadPrompts) as caught:
        load_prompts([{"instruction": "a", "category": None}])
    assert "columns={'text': 'instruction', 'label': 'category'}" in caught.value.hints[0]
    with pytest.raises(BadPrompts, match="row 1, field `label`: found nothing"):
        load_prompts([{"text": "a", "label": 1}, {"text": "b", "label": None}])


def test_real_files(data_dir: Path) -> None:
    circuits = data_dir / "circuits"
    verbs = load_pairs(circuits / "simple_train.json", columns={"group": "case"})
    assert len(verbs) == 480
    assert verbs.clean is not None
    assert (verbs.clean[0], verbs.answer[0], verbs.wrong[0]) == ("The friends", (" have",), (" has",))
    assert any("repeat the prompts" in note for note in verbs.notes)
    with pytest.raises(BadPrompts) as years:
        load_pairs(circuits / "greater_than_data.csv")
    assert any("columns={'answer': 'label'}" in hint for hint in years.value.hints)
    with pytest.raises(BadPrompts) as names:
        load_pairs(circuits / "ioi_llama.csv")
    assert any("from_tokens" in hint for hint in names.value.hints)
    assert load_prompts(data_dir / "xstest" / "xstest_prompts.csv").counts() == {"safe": 250, "unsafe": 200}
    anatomy = load_prompts(
        data_dir / "mmlu_redux" / "mmlu_anatomy.csv", columns={"text": "question", "label": "answer"}
    )
    assert len(anatomy) == 100
