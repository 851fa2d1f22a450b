"""Reading the command line: nothing heavy is imported, every mistake is named, exit codes are as promised."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest

from mech_align.cli import main
from mech_align.cli.commands import COMMANDS
from mech_align.cli.execute import _known, _words  # pyright: ignore[reportPrivateUsage]
from mech_align.cli.options import Patch
from mech_align.cli.screen import Screen, finite
from mech_align.errors import BadRun, MechAlignError

HEAVY = ("torch", "transformer_lens", "transformers", "xarray", "pandas", "plotly", "scipy", "datasets")


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from mech_align.cli import main\n"
        "for words in (['--help'], ['patch', '--help'], ['organism', 'list', '--help'], ['patch']): main(words)\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1] == "[]"
    assert "--positions" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_work(name: str, capsys: pytest.CaptureFixture[str]):
    assert main([*name.split(), "--help"]) == 0
    said = capsys.readouterr().out
    assert f"mech-align {name}" in said and "--json" in said
    assert callable(COMMANDS[name].load_work())


def test_usage_lists_working_commands_only(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    for name in (
        "demo",
        "doctor",
        "patch",
        "attribute",
        "dla",
        "lens",
        "ablate",
        "report",
        "organism list|train|verify",
    ):
        assert f"  {name}" in said
    assert not any(f"  {later} " in said for later in ("probe", "sae", "steer", "study"))
    assert main([]) == 2
    assert main(["--version"]) == 0


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["pathc"], "did you mean patch?"),
        (["organism", "trian"], "did you mean train?"),
        (["patch"], "--model M"),
        (["patch", "--model", "m", "--pairs", "p", "--layer", "3"], "did you mean --layers"),
        (["patch", "--model", "m", "--pairs", "p", "--part", "head"], "'heads', 'attn', 'mlp', 'resid', 'neurons'"),
        (["patch", "--model", "m", "--pairs", "p", "--batch-size", "0"], "greater than or equal to 1"),
        (["patch", "--model", "m", "--pairs", "p", "--seed", "x"], "--seed"),
        (["report"], "DIR"),
        (["report", "/no/such/folder"], "there is no folder /no/such/folder"),
    ],
)
def test_mistakes_are_named_on_stderr_or_as_json(words: list[str], named: str, capsys: pytest.CaptureFixture[str]):
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert named in " ".join(said.err.replace("│", " ").split())
    assert "Traceback" not in said.err
    assert main([*words, "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert set(error) == {"what", "why", "hints"}
    assert named in " ".join([error["what"], *error["hints"]])
    assert "errors.pydantic.dev" not in error["what"]


def test_flags_before_the_command_count_as_well(capsys: pytest.CaptureFixture[str]):
    assert main(["--json", "report", "/no/such/folder"]) == 2
    assert "no/such" in json.loads(capsys.readouterr().out)["error"]["what"]


def test_the_plan_holds_what_decides_numbers_and_nothing_else():
    one = Patch(model="a", pairs="b", part="mlp", batch_size=3, device="cpu", as_json=True)
    other = Patch(model="a", pairs="b", part="mlp", batch_size=5, traceback=True)
    assert one.plan() == other.plan()
    assert one.plan()["part"] == "mlp"
    assert one.plan() != Patch(model="a", pairs="b", part="mlp", seed=1).plan()
    with pytest.raises(ValueError, match="extra"):
        Patch(model="a", pairs="b", parts="mlp")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "/x/y"), "the disk is full"),
        (FileNotFoundError(2, "No such file", "/x/y"), "there is no /x/y"),
        (IsADirectoryError(21, "Is a directory", "/x"), "is a folder"),
        (PermissionError(13, "Permission denied", "/x"), "may not be read or written"),
        (ModuleNotFoundError("No module named 'kaleido'", name="kaleido"), "kaleido is missing"),
        (MemoryError(), "memory ran out"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "memory ran out"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "a file cannot be read"),
    ],
)
def test_what_the_system_says_becomes_readable(error: Exception, said: str):
    import torch  # noqa: F401  # memory errors are recognised once torch is there

    known = _known(error)
    assert known is not None and said in known.what


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("x"), RuntimeError("shape mismatch"), KeyError("z"), ImportError("cannot")]
)
def test_a_bug_is_not_taken_for_bad_input(error: Exception):
    import torch  # noqa: F401

    assert _known(error) is None


def test_json_is_strict():
    out = io.StringIO()
    Screen(as_json=True, stdout=out).finish(
        {"x": float("nan"), "y": np.float32(1.5), "z": [np.int64(3), (float("inf"),)]}
    )
    assert json.loads(out.getvalue(), parse_constant=lambda name: pytest.fail(name)) == {
        "x": None,
        "y": 1.5,
        "z": [3, [None]],
    }
    assert finite({"a": np.array([1.0, np.nan])}) == {"a": [1.0, None]}


def test_a_panel_shows_brackets_as_they_are(capsys: pytest.CaptureFixture[str]):
    Screen().fail(BadRun("[bold]x[/bold] is [red]", hint="[/]"))
    said = capsys.readouterr().err
    assert "[bold]x[/bold] is [red]" in said and "[/]" in said
    assert Screen().fail(MechAlignError("x"), 7) == 7


def test_progress_off_a_terminal_is_one_line_in_thirty_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    clock = iter([0.0, 1.0, 20.0, 31.0, 32.0, 62.0])
    monkeypatch.setattr("mech_align.cli.screen.time.monotonic", lambda: next(clock))
    show = Screen().progress("step")
    for done in (10, 20, 30, 40, 50):
        show(done, 100)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == ["step 30%, 30/100 scores, 1:12 left", "step 50%, 50/100 scores, 1:02 left"]


def test_words_of_a_panel_lose_its_frame():
    what, hints = _words("╭─ Parsing error ─╮\n│ Argument --seed: bad │\n│ ──── │\n│ For full helptext, run x │\n╰──╯")
    assert (what, hints) == ("Argument --seed: bad", [])
