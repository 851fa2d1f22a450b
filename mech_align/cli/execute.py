"""Read the options of one command, run it, and turn whatever happens into an exit code and readable words."""

import contextlib
import errno
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Generator, Sequence
from typing import Any

import tyro

from mech_align.cli.commands import Command
from mech_align.cli.screen import Screen
from mech_align.errors import MechAlignError

BUG, BAD_INPUT, INTERRUPTED = 1, 2, 130


def execute(command: Command, words: Sequence[str], *, as_json: bool) -> int:
    """Parse and run one command; returns the exit code."""
    options, code = _parse(command, words, as_json)
    if options is None:
        return code
    screen = Screen(as_json=options.as_json)
    with _quiet(options.as_json):
        try:
            result = command.load_work()(options, screen, ["mech-align", *command.name.split(), *words])
            return 0 if result is None else int(result)
        except KeyboardInterrupt:
            return _interrupted(screen)
        except BrokenPipeError:
            # the reader (head, less) has gone; point stdout elsewhere so that the interpreter's last flush is silent
            with contextlib.suppress(OSError, ValueError, io.UnsupportedOperation):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except Exception as error:
            return _failed(screen, error, traceback=options.traceback)


def _parse(command: Command, words: Sequence[str], as_json: bool) -> tuple[Any, int]:
    """The options, or none and the exit code (0 after ``--help``)."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
            options = tyro.cli(
                command.load_options(), args=list(words), prog=f"mech-align {command.name}",
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
            )  # fmt: skip
        return options, 0
    except SystemExit as stop:
        if not stop.code:
            print(told.getvalue(), end="")
            return None, 0
    what, hints = _words(told.getvalue())
    return None, Screen(as_json=as_json).fail(
        MechAlignError(what, hint=[*hints, f"mech-align {command.name} --help shows all options"]), BAD_INPUT
    )


def _words(panel: str) -> tuple[str, list[str]]:
    """What the parser's panel says, and what it proposes."""
    lines = [re.sub(r"[│╭╮╰╯─]+|-{5,}", "", line).strip() for line in panel.splitlines()]
    lines = [re.sub(r" *\[type=.*|^input_value=.*|^input_type=.*", "", line) for line in lines]
    ends = (i for i, line in enumerate(lines) if line.startswith(("For full helptext", "Argument helptext")))
    lines = lines[: next(ends, len(lines))]  # what follows repeats the help
    titles = r"(Unrecognized|Invalid|Parsing|Required|Missing|Value)( \w+)?"
    frame = r"For further information|https://errors\.pydantic|Error parsing [A-Z]"
    kept = [line for line in lines if line and not re.match(frame, line) and not re.fullmatch(titles, line)]
    at = next((i for i, line in enumerate(kept) if line.startswith("Perhaps you meant")), len(kept))
    near = [line for line in kept[at + 1 :] if line.startswith("-")]
    return " ".join(kept[:at]) or "the options cannot be read", [f"did you mean {line}?" for line in near]


@contextlib.contextmanager
def _quiet(as_json: bool) -> Generator[None]:
    """Libraries talk on stderr if at all: what matters of their warnings stands in the results."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if as_json:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if as_json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def _interrupted(screen: Screen) -> int:
    share = f" at {100 * screen.done // screen.total}% of this step" if screen.total else ""
    screen.close_bar()
    if screen.as_json:
        hints = ["the same command goes on where it stopped"]
        error = {"what": f"stopped{share}", "why": "interrupted", "hints": hints}
        screen.finish({"status": "interrupted", "error": error})
    else:
        screen.note(f"stopped{share} · nothing lost · the same command goes on")
    return INTERRUPTED


def _failed(screen: Screen, error: Exception, *, traceback: bool) -> int:
    if traceback:
        import traceback as tracebacks

        screen.close_bar()
        print("".join(tracebacks.format_exception(error)), file=sys.stderr)
    known = _known(error)
    if known is not None:
        return screen.fail(known)
    said = str(error).strip().splitlines()
    return screen.fail(
        MechAlignError(
            f"a bug in mech_align: {type(error).__name__}" + (f": {said[-1][:300]}" if said else ""),
            hint=["the same command with --traceback shows where; please report it", "finished steps are kept"],
        ),
        BUG,
    )


def _known(error: Exception) -> MechAlignError | None:
    """The error in words that say what to do; none for a bug."""
    if isinstance(error, MechAlignError):
        return error
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return MechAlignError(
            "a file cannot be read",
            why=str(error)[:300],
            hint="it has to be UTF-8 text, and valid JSON where JSON is asked for",
        )
    if isinstance(error, ImportError) and error.name and not error.name.startswith("mech_align"):
        return MechAlignError(
            f"the package {error.name} is missing or broken",
            why=str(error)[:300],
            hint=f"pip install {error.name.split('.')[0]}",
        )
    if isinstance(error, MemoryError | RuntimeError) and "torch" in sys.modules:
        from mech_align.memory import is_out_of_memory

        if is_out_of_memory(error):
            return MechAlignError(
                "memory ran out", why=(str(error).splitlines() or [type(error).__name__])[0][:300],
                hint=["--batch-size 1, or shorter prompts", "--dtype bfloat16 halves the model",
                      "--dry-run shows what is needed", "finished steps are kept: the same command goes on"],
            )  # fmt: skip
    return None


def _of_system(error: OSError) -> MechAlignError | None:
    where = str(error.filename) if error.filename else "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MechAlignError(
            "the disk is full",
            why=str(error),
            hint=["make room, or give another --out", "the same command goes on where it stopped"],
        )
    if isinstance(error, FileNotFoundError):
        return MechAlignError(f"there is no {where}", hint="check the path; it is looked up from the current folder")
    if isinstance(error, IsADirectoryError):
        return MechAlignError(f"{where} is a folder, and a file is needed")
    if isinstance(error, NotADirectoryError):
        return MechAlignError(f"{where} needs a folder where there is a file", hint="give another --out")
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return MechAlignError(
            f"{where} may not be read or written", why=str(error), hint="give another --out, or change its permissions"
        )
    if isinstance(error, FileExistsError):
        return MechAlignError(f"{where} is there already, as something else", hint="give another --out")
    return None
