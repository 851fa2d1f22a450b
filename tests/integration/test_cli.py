"""The command line from end to end: run folders, resuming, JSON, errors; the demo on the shipped model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tiny import save_tiny

from mech_align.cli import main
from mech_align.results import load_result
from mech_align.runs import load_run
from mech_align.sweeps.store import ScoreStore

NAMES = (("Lily", "Tim"), ("Anna", "Ben"))
WORDS = [f"w{i}" for i in range(8)]


def write_pairs(path: Path, groups: int = 8) -> Path:
    """Two pairs a group; groups differ in their words and lengths."""
    rows: list[dict[str, str]] = []
    for i in range(groups):
        frame = " ".join(["the", f"w{i % 70}", "{}", "went", "to", f"w{(7 * i + 1) % 70}"][: 4 + i % 3])
        for clean, corrupt in NAMES:
            rows.append({"clean": frame.format(clean), "corrupt": frame.format(corrupt), "answer": "She", "wrong": "He",
                         "group": f"g{i}", "id": f"{i}-{clean}"})  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    save_tiny("llama", folder / "llama")
    save_tiny("qwen3", folder / "qwen3", seed=3)
    write_pairs(folder / "pairs.jsonl")
    return folder


def words(place: Path, *more: object, model: str = "llama", pairs: str = "pairs.jsonl") -> list[str]:
    command, *rest = map(str, more)
    return [command, "--model", str(place / model), "--pairs", str(place / pairs), *rest]


def run_json(capsys: pytest.CaptureFixture[str], arguments: Sequence[str], code: int = 0) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    return {path.stem: pd.read_parquet(path) for path in sorted((folder / "tables").glob("*.parquet"))}


# ---------------------------------------------------------------- what a run leaves


def test_patch_leaves_a_whole_run_folder(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "run"
    assert main(words(place, "patch", "--out", out)) == 0
    said = capsys.readouterr()
    assert "16 in 8 groups" in said.out and "the clean run prefers the right answer in" in said.out
    assert "p_maxt" in said.out and str(out / "report.html") in said.out.replace("\n", "")
    found = tables(out)
    assert list(found) == ["block_patching", "head_patching"]
    heads = found["head_patching"]
    assert list(heads) == ["layer", "head", "effect", "ci_low", "ci_high", "p", "q", "n", "p_maxt"]
    assert len(heads) == 12 and heads["effect"].notna().all() and heads["n"].between(14, 16).all()
    result = load_result(out / "results" / "head_patching")
    assert result.data.dims == ("prompt", "layer", "head")
    np.testing.assert_allclose(result.data.mean("prompt").values.ravel(), heads["effect"], atol=1e-6)
    for name in found:
        assert json.loads((out / "figures" / f"{name}.json").read_text())["data"]
    axes = {
        str(trace.get("xaxis", "x"))
        for trace in json.loads((out / "figures" / "head_patching.json").read_text())["data"]
    }
    assert len(axes) >= 4, "heads, attention, MLP and the list each have their own axis"
    manifest = load_run(out).manifest
    assert {name: step["status"] for name, step in manifest["steps"].items()} == dict.fromkeys(found, "done") | {
        "head_patching": "done"
    }
    assert manifest["plan"]["part"] == "heads" and manifest["data"]["n"] == 16 and manifest["model"]["fingerprint"]
    assert not (out / "partial").exists()
    for finding in load_run(out).findings:
        assert set(finding) == {"claim", "number", "unit", "interval", "n", "controls", "verdict"}
        assert finding["verdict"] in ("supported", "not supported", "undecided")
    everything = said.out + "".join(p.read_text() for p in out.rglob("*") if p.suffix in (".json", ".html"))
    assert "Lily went" not in everything and "the w1 Anna" not in everything, "prompts are private"


@pytest.mark.parametrize(
    ("more", "name", "dims"),
    [
        (["--part", "resid"], "causal_tracing", ("prompt", "part", "layer", "position")),
        (["--part", "attn", "--layers", "1,2", "--positions", "last"], "causal_tracing", ("prompt", "part", "layer")),
        (
            ["--part", "neurons", "--layers", "2", "--positions", "differs"],
            "neuron_patching",
            ("prompt", "layer", "neuron"),
        ),
        (
            ["--part", "heads", "--layers", "-1", "--positions", "each"],
            "head_patching",
            ("prompt", "layer", "head", "position"),
        ),
        (
            ["--part", "mlp", "--direction", "noise", "--metric", "log_odds"],
            "causal_tracing",
            ("prompt", "part", "layer"),
        ),
    ],
)
def test_every_part_of_patch(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], name: str, dims: tuple[str, ...]
):
    document = run_json(capsys, words(place, "patch", *more, "--traceback", "--out", tmp_path / "run"))
    assert document["status"] == "done" and document["findings"]
    assert load_result(tmp_path / "run" / "results" / name).data.dims == dims
    assert f"tables/{name}.parquet" in document["files"] and "report.html" in document["files"]
    assert document["top"][name][0]["site"].startswith("L")


def test_the_whole_stream_of_the_first_layers_restores_everything(place: Path, tmp_path: Path):
    assert (
        main(
            words(
                place, "patch", "--part", "resid", "--positions", "all", "--ragged", "drop", "--out", tmp_path / "run"
            )
        )
        == 0
    )
    table = tables(tmp_path / "run")["causal_tracing"]
    np.testing.assert_allclose(table["effect"], 1.0, atol=1e-4)


def test_both_backends_give_the_same_table(place: Path, tmp_path: Path):
    for backend in ("hooked", "bridge"):
        assert main(words(place, "patch", "--backend", backend, "--out", tmp_path / backend, model="qwen3")) == 0
    first, second = (tables(tmp_path / backend)["head_patching"] for backend in ("hooked", "bridge"))
    np.testing.assert_allclose(first["effect"], second["effect"], atol=1e-4)
    assert np.abs(first["effect"]).max() > 0.01


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (["dla"], "logit_attribution"),
        (["lens", "--patched", "L1H0"], "logit_lens"),
        (["ablate", "--heads", "L2H1,L1H3", "--controls", "20", "--greedy", "1"], "mean_ablation"),
        (["ablate", "--heads", "L2H1", "--mode", "resample", "--controls", "5"], "mean_ablation"),
        (["attribute", "--steps", "2", "--confirm", "3", "--sample", "4"], "attribution_patching"),
        (["attribute", "--part", "neurons", "--confirm", "3", "--sample", "4"], "attribution_patching"),
    ],
)
def test_the_other_commands(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], name: str
):
    document = run_json(capsys, words(place, *more, "--out", tmp_path / "run"))
    result = load_result(tmp_path / "run" / "results" / name)
    assert result.name == name and len(result.data.prompt) == 16
    assert document["findings"] and document["top"][name]
    assert {f"tables/{name}.parquet", f"figures/{name}.json", "findings.json"} <= set(document["files"])
    again = run_json(capsys, words(place, *more, "--out", tmp_path / "run"))
    assert again["findings"] == document["findings"]


def test_values_of_another_model(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_tiny("llama", place / "other", seed=5)
    both = ["--source-model", place / "other", "--out"]
    document = run_json(capsys, words(place, "patch", *both, tmp_path / "patch"))
    settings = load_result(tmp_path / "patch" / "results" / "head_patching").provenance["settings"]
    assert settings["source_model"]["fingerprint"] != document["model"]["fingerprint"]
    assert "other model" in document["findings"][1]["claim"] or "Some single head" in document["findings"][1]["claim"]
    run_json(capsys, words(place, "ablate", "--heads", "L2H1", "--mode", "model", *both, tmp_path / "ablate"))
    error = run_json(capsys, words(place, "ablate", "--heads", "L2H1", "--mode", "model", "--out", tmp_path / "no"), 2)
    assert "belong together" in error["error"]["what"]


def test_a_reference_of_ones_own(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "reference.jsonl").write_text('{"text": "the park w3"}\n{"text": "a w4 went"}\n')
    run_json(
        capsys,
        words(
            place, "ablate", "--heads", "L2H1", "--reference", tmp_path / "reference.jsonl", "--out", tmp_path / "run"
        ),
    )
    settings = load_result(tmp_path / "run" / "results" / "mean_ablation").provenance["settings"]
    assert settings["reference"].startswith("2 ")


def test_report_is_written_anew_without_torch(place: Path, tmp_path: Path):
    assert main(words(place, "dla", "--out", tmp_path / "run")) == 0
    (tmp_path / "run" / "report.html").unlink()
    program = (
        "import sys; from mech_align.cli import main; "
        f"code = main(['report', {str(tmp_path / 'run')!r}]); sys.exit(9 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000


# ---------------------------------------------------------------- stopping and going on


def test_a_finished_run_is_not_computed_again(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    arguments = words(place, "patch", "--out", tmp_path / "run")
    assert main(arguments) == 0
    before = tables(tmp_path / "run")
    monkeypatch.setattr("mech_align.cli.patch.head_patching", lambda *a, **k: pytest.fail("computed again"))
    assert main([*arguments, "--batch-size", "3"]) == 0
    for name, table in tables(tmp_path / "run").items():
        pd.testing.assert_frame_equal(table, before[name], check_exact=True)


def test_another_plan_does_not_touch_the_folder(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "run"
    assert main(words(place, "dla", "--out", out)) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    for other in (["patch"], ["dla", "--run", "corrupt"], ["dla", "--backend", "bridge"]):
        error = run_json(capsys, words(place, *other, "--out", out), 2)["error"]
        assert "holds another run" in error["what"] and error["why"] and error["hints"]
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    assert main(words(place, "dla", "--out", tmp_path / "full")) == 2


def test_interrupted_in_the_middle_it_goes_on_there(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    arguments = words(place, "patch", "--batch-size", "2")
    write = ScoreStore.write
    pieces: list[int] = []
    limit = 10**9

    def counted(self: ScoreStore, rows: Any, cells: Any, scores: Any) -> None:
        if len(pieces) == limit:
            raise KeyboardInterrupt
        pieces.append(np.asarray(scores).size)
        write(self, rows, cells, scores)

    monkeypatch.setattr(ScoreStore, "write", counted)
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    heads, blocks = 16 * 12, 16 * 6
    assert sum(pieces) == heads + blocks
    capsys.readouterr()
    pieces.clear()
    limit = 5
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 130
    kept = sum(pieces)
    assert 0 < kept < heads
    told = f"stopped at {100 * kept // heads}% of this step · nothing lost · the same command goes on"
    assert told in capsys.readouterr().err
    assert load_run(tmp_path / "run").manifest["steps"]["head_patching"]["status"] == "interrupted"
    limit = 10**9
    pieces.clear()
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    assert sum(pieces) == heads + blocks - kept, "what was done is not done again"
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_killed_in_the_middle_it_goes_on_there(place: Path, tmp_path: Path):
    write_pairs(place / "many.jsonl", 40)
    arguments = words(place, "patch", "--part", "neurons", "--layers", "1,2", "--batch-size", "1", pairs="many.jsonl")
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    out = tmp_path / "run"
    command = [sys.executable, "-m", "mech_align", *arguments, "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        done = wait_for_half(process, out / "partial" / "neuron_patching" / "done.npy")
        process.send_signal(signal.SIGKILL)
    assert 0 < done.mean() < 1, "it was killed between some and all"
    kept = np.load(out / "partial" / "neuron_patching" / "done.npy")
    assert 0 < kept.mean() < 1
    assert not (out / "results").exists()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert_same_run(out, tmp_path / "whole")
    assert not (out / "partial").exists()


def wait_for_half(process: "subprocess.Popen[bytes]", marks: Path) -> np.ndarray[Any, Any]:
    """Wait until some scores are on disk, not all."""
    for _ in range(60_000):
        assert process.poll() is None, "it ended before it could be killed"
        if marks.exists():
            try:
                done = np.load(marks)
            except (ValueError, EOFError):  # just being created
                continue
            if done.any():
                return done
        time.sleep(0.002)
    pytest.fail("no score was ever written")


def assert_same_run(one: Path, other: Path) -> None:
    first, second = tables(one), tables(other)
    assert first.keys() == second.keys() and first
    for name, table in first.items():
        pd.testing.assert_frame_equal(table, second[name], check_exact=True)
        a, b = (load_result(folder / "results" / name).values for folder in (one, other))
        assert a.identical(b)
    assert [f["number"] for f in load_run(one).findings] == [f["number"] for f in load_run(other).findings]


# ---------------------------------------------------------------- costs, JSON, errors


@pytest.mark.parametrize("more", [["patch"], ["dla"], ["lens"], ["ablate", "--heads", "L0H1,L2H2"], ["attribute"]])
def test_a_dry_run_writes_nothing(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    document = run_json(capsys, words(place, *more, "--dry-run", "--out", tmp_path / "run"))
    for step in document["steps"].values():
        assert step["prompts"] == 16 and step["seconds"] > 0 and 0 < step["peak_bytes"] < step["free_bytes"]
        assert step["passes"] <= step["naive_passes"] + 16 * 5
    assert main(words(place, *more, "--dry-run")) == 0
    assert "nothing is run or written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_dry_run_counts_scores(place: Path, capsys: pytest.CaptureFixture[str]):
    steps = run_json(capsys, words(place, "patch", "--dry-run"))["steps"]
    assert steps["head_patching"]["cells"] == 12 and steps["head_patching"]["scores"] == 12 * 16
    assert steps["block_patching"]["cells"] == 6
    steps = run_json(capsys, words(place, "patch", "--part", "neurons", "--layers", "1", "--dry-run"))["steps"]
    assert steps["neuron_patching"]["cells"] == 48


def test_json_is_all_that_stdout_gets(place: Path, tmp_path: Path):
    command = [sys.executable, "-m", "mech_align", *words(place, "patch", "--out", tmp_path / "run", "--json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["out"] == str(tmp_path / "run")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--model": "/no/such/model"}, "no folder /no/such/model"),
        ({"--pairs": "/no/such/file.jsonl"}, "There is no file"),
        ({"--metric": "logit_diff"}, "did you mean logit_difference?"),
        ({"--layers": "7"}, "layers are 0 to 2"),
        ({"--positions": "subject"}, "no position named 'subject'"),
        ({"--device": "cuda:99"}, "cuda"),
        ({"--dtype": "int4"}, "no number format 'int4'"),
        ({"--ragged": "error"}, "length"),
        ({"--min-gap": "1000"}, "does not tell clean from corrupt"),
        ({"--chat": None}, "has no chat template"),
        ({"--adapter": "/no/such/adapter"}, "/no/such/adapter"),
    ],
)
def test_bad_input_is_one_panel_and_leaves_nothing(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, str | None], said: str
):
    arguments = words(place, "patch", "--out", tmp_path / "run")
    for option, value in change.items():
        if option in arguments:
            arguments[arguments.index(option) + 1] = str(value)
        else:
            arguments += [option] if value is None else [option, value]
    if "--ragged" in change:
        rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
        rows[0]["clean"] += " w3 w4"
        arguments[arguments.index("--pairs") + 1] = str(tmp_path / "ragged.jsonl")
        (tmp_path / "ragged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert said in " ".join(captured.err.replace("│", " ").split())
    assert "Traceback" not in captured.err + captured.out
    assert not (tmp_path / "run").exists(), "the corrected command may use the folder"


def test_a_bug_is_told_from_bad_input(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("seventh heaven")

    monkeypatch.setattr("mech_align.cli.dla.logit_attribution", broken)
    arguments = words(place, "dla", "--out", tmp_path / "run")
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "a bug in mech_align: ZeroDivisionError: seventh heaven" in said and "--traceback" in said
    assert "Traceback" not in said
    assert main([*arguments, "--traceback"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_full_disk_is_readable(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "x"))

    monkeypatch.setattr("mech_align.runs.folder.Run.add_result", full)
    assert main(words(place, "dla", "--out", tmp_path / "run")) == 2
    assert "the disk is full" in capsys.readouterr().err


def test_damaged_results_are_computed_again(place: Path, tmp_path: Path):
    arguments = words(place, "dla", "--out", tmp_path / "run")
    assert main(arguments) == 0
    before = tables(tmp_path / "run")["logit_attribution"]
    shutil.rmtree(tmp_path / "run" / "results" / "logit_attribution")
    assert main(arguments) == 0
    pd.testing.assert_frame_equal(tables(tmp_path / "run")["logit_attribution"], before, check_exact=True)


# ---------------------------------------------------------------- the shipped model


def test_the_demo_finds_what_was_planted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    document = run_json(capsys, ["demo", "--out", str(tmp_path / "demo")])
    claims = {finding["claim"]: finding for finding in json.loads((tmp_path / "demo" / "findings.json").read_text())}
    assert [f["claim"] for f in document["findings"]] == list(claims)
    for part in (
        "rank first and second by patching",
        "rank first and second by mean ablation",
        "Random heads",
        "write directly against",
    ):
        (finding,) = [
            f for claim, f in claims.items() if claim.endswith(part) or part in claim and "values of" not in claim
        ]
        assert finding["verdict"] == "supported", finding
        assert finding["number"] is not None and finding["interval"] and finding["controls"]
    assert all(finding["verdict"] == "supported" for finding in claims.values())
    assert {"head_patching", "base_patching", "head_ablation", "mean_ablation", "logit_attribution"} == set(
        tables(tmp_path / "demo")
    )
    assert 1e6 < (tmp_path / "demo" / "report.html").stat().st_size < 6e6


def test_doctor_never_shows_a_token(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    code = main(["doctor"])
    said = capsys.readouterr()
    assert "hf_verysecret" not in said.out + said.err
    assert "there is one" in said.out and "padding changes its logits" in said.out
    assert code == 0, said.out


def test_organism_list_names_the_planted_heads(capsys: pytest.CaptureFixture[str]):
    rows = {row["name"]: row for row in run_json(capsys, ["organism", "list"])["organisms"]}
    assert rows["organism:suppressor/tuned"]["planted"] and not rows["organism:suppressor/base"]["planted"]
    assert main(["organism", "verify", "supressor"]) == 2
    assert "suppressor" in capsys.readouterr().err


def test_the_environment_is_offline():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
