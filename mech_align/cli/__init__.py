"""The ``mech-align`` command. Nothing heavy is imported before the options are read."""

import sys
from collections.abc import Sequence
from difflib import get_close_matches

from mech_align.cli.commands import COMMANDS, GROUPS, usage
from mech_align.errors import MechAlignError

_EVERYWHERE = ("--json", "--dry-run", "--traceback")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 a bug, 2 bad input, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    early: list[str] = []
    while len(words) > 1 and words[0] in _EVERYWHERE:  # `mech-align --json patch ...`
        early.append(words.pop(0))
    words += early
    as_json = "--json" in words
    if words and words[0] == "--version":
        from mech_align import __version__

        print(f"mech-align {__version__}")
        return 0
    name = next((name for name in (" ".join(words[:2]), *words[:1]) if name in COMMANDS), None)
    if name is not None:
        from mech_align.cli.execute import execute

        return execute(COMMANDS[name], words[len(name.split()) :], as_json=as_json)
    group = words[0] if words and words[0] in GROUPS else ""
    rest = words[1:] if group else words
    if any(word in ("-h", "--help") for word in rest) or (not rest and not group):
        print(usage(group))
        return 0 if rest else 2
    return _unknown(group, rest, as_json)


def _unknown(group: str, words: Sequence[str], as_json: bool) -> int:
    from mech_align.cli.screen import Screen

    of = [name.removeprefix(group).strip() for name in COMMANDS if name.startswith(group)]
    near = get_close_matches(words[0], of, n=2) if words else []
    what = f"no command '{' '.join([group, *words[:1]]).strip()}'" if words else f"'{group}' needs one more word"
    hint = [f"did you mean {' or '.join(near)}?"] if near else [f"commands: {', '.join(of)}"]
    return Screen(as_json=as_json).fail(
        MechAlignError(what, hint=[*hint, f"mech-align {group} --help".replace("  ", " ")])
    )
