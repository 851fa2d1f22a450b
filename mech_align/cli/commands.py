"""Which commands there are, and where each one's options and work are. Imports nothing."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Command:
    """One command; ``options`` names a class of ``mech_align.cli.options``, ``module`` a file beside this one."""

    name: str
    options: str
    module: str
    summary: str

    @property
    def verb(self) -> str:
        """The function of the module that does the work."""
        return "run" if " " not in self.name else f"{self.name.split()[1]}_"

    def load_options(self) -> Any:
        """The class of its options."""
        return getattr(import_module("mech_align.cli.options"), self.options)

    def load_work(self) -> Any:
        """The function that does it; the heavy imports come with it."""
        return getattr(import_module(f"mech_align.cli.{self.module}"), self.verb)


_ALL = (
    Command(
        "demo", "Demo", "demo", "Find two planted heads in a small shipped model; writes a report (under a minute)."
    ),
    Command(
        "doctor", "Doctor", "doctor", "Check this machine: versions, memory, GPU, browser, tokens, the shipped model."
    ),
    Command("patch", "Patch", "patch", "Move activations from the clean run into the corrupt run: which parts matter?"),
    Command("attribute", "Attribute", "attribute", "Screen very many parts by gradient, then confirm the top exactly."),
    Command("dla", "Dla", "dla", "Direct logit attribution: which parts write the answer into the logits?"),
    Command("lens", "Lens", "lens", "Logit lens: after which layer can the answer be read?"),
    Command("ablate", "Ablate", "ablate", "Take heads out, beside random controls: does the behaviour change?"),
    Command("report", "Report", "report", "Write report.html of a run folder anew."),
    Command("organism list", "OrganismList", "organism", "Small shipped models with a known answer."),
    Command("organism train", "OrganismTrain", "organism", "Train a shipped model again from its script."),
    Command("organism verify", "OrganismVerify", "organism", "Measure again what is claimed of a shipped model."),
)
COMMANDS = {command.name: command for command in _ALL}
GROUPS = {"organism": "Small shipped models with a known answer."}

_HEAD = """usage: mech-align COMMAND [OPTIONS]

Which part of a language model does what? With intervals and controls.
"""
_TAIL = """
mech-align COMMAND --help   the options of one command
mech-align --version

Everywhere: --dry-run (what it costs; runs nothing), --json (one document on stdout), --traceback.
Exit codes: 0 done, 2 bad input, 130 interrupted (the same command goes on where it stopped)."""


def usage(group: str = "") -> str:
    """The help of the whole program, or of a command with subcommands."""
    if group:
        shown = [
            (name.removeprefix(group).strip(), command.summary)
            for name, command in COMMANDS.items()
            if name.startswith(group)
        ]
        head, tail = (
            f"usage: mech-align {group} COMMAND [OPTIONS]\n\n{GROUPS[group]}\n",
            f"\nmech-align {group} COMMAND --help",
        )
    else:
        shown = [(name, command.summary) for name, command in COMMANDS.items() if " " not in name]
        shown += [(f"{name} {'|'.join(_words(name))}", text) for name, text in GROUPS.items()]
        head, tail = _HEAD, _TAIL
    wide = max(len(name) for name, _ in shown if "|" not in name)
    lines = [
        f"  {name.ljust(wide)}  {text}" if len(name) <= wide else f"  {name}\n  {' ' * wide}  {text}"
        for name, text in shown
    ]
    return "\n".join([head, *lines, tail])


def _words(group: str) -> list[str]:
    return [name.split()[1] for name in COMMANDS if name.startswith(f"{group} ")]
