"""``mech-align report``: the page of a run folder, written anew from its results. No torch."""

import webbrowser
from collections.abc import Sequence

from mech_align.cli.options import Report
from mech_align.cli.screen import Screen
from mech_align.errors import BadRun
from mech_align.runs import load_run


def run(options: Report, screen: Screen, words: Sequence[str]) -> None:
    """The whole command."""
    if not options.folder.exists():
        raise BadRun(f"there is no folder {options.folder}", hint="give the folder that a command wrote with --out")
    folder = load_run(options.folder)
    page = folder.write_report()
    if options.open:
        webbrowser.open(page.resolve().as_uri())
    screen.say(f"report  {page}  ({page.stat().st_size / 1e6:.1f} MB)")
    screen.finish({"command": " ".join(words), "status": "done", "out": str(folder.path), "report": str(page),
                   "findings": folder.findings, "results": folder.names})  # fmt: skip
