"""What a command shows: tables and findings on stdout, bars and errors on stderr; or one JSON document."""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.text import Text

from mech_align.errors import MechAlignError

_WIDE = 100
_SECONDS_BETWEEN_LINES = 30.0


class Screen:
    """Where the words of a command go.

    Args:
        as_json: Print nothing but one document, at the end.
        stdout: Left out, the stream of the process at this moment.
    """

    def __init__(self, *, as_json: bool = False, stdout: Any = None) -> None:
        self.as_json = as_json
        self._stdout = stdout or sys.stdout
        self._out, self._err = _console(self._stdout), _console(sys.stderr)
        self._bar: Any = None
        self.done, self.total = 0, 0

    def say(self, *what: RenderableType | str) -> None:
        """Something for the reader; nothing with ``--json``."""
        if not self.as_json:
            for one in what:
                self._out.print(Text(one) if isinstance(one, str) else one)

    def note(self, text: str) -> None:
        """A remark beside the results: on stderr."""
        if not self.as_json:
            self._err.print(Text(text, style="dim"))

    def warn(self, warnings: Sequence[str]) -> None:
        """What to know before trusting the numbers."""
        for warning in dict.fromkeys(warnings):
            self.say(Text.assemble(("! ", "bold yellow"), warning))

    def finish(self, document: Mapping[str, Any]) -> None:
        """The one document of ``--json``."""
        if self.as_json:
            print(json.dumps(finite(document), indent=1, ensure_ascii=False), file=self._stdout, flush=True)

    def fail(self, error: MechAlignError, code: int = 2) -> int:
        """One panel, or one document: what, why, what to do. Returns the exit code."""
        self.close_bar()
        if self.as_json:
            self.finish({"error": {"what": error.what, "why": error.why, "hints": [h for h in error.hints if h]}})
            return code
        lines = [Text(error.what, style="bold")]
        if error.why:
            lines.append(Text.assemble(("why  ", "dim"), error.why))
        lines += [Text.assemble(("→  ", "bold green"), hint) for hint in error.hints if hint]
        self._err.print(
            Panel(Text("\n").join(lines), title="mech-align", title_align="left", border_style="red", expand=False)
        )
        return code

    def progress(self, name: str) -> Callable[[int, int], None]:
        """Takes (done, total): a bar on a terminal, else a line every 30 seconds; nothing with ``--json``."""
        started = time.monotonic()
        told = started

        def show(done: int, total: int) -> None:
            nonlocal told, started
            if done < self.done:  # the step's next sweep
                self.close_bar()
                started = time.monotonic()
            self.done, self.total = done, total
            now = time.monotonic()
            if self.as_json:
                return
            if self._err.is_terminal:
                self._draw(name, done, total)
            elif now - told >= _SECONDS_BETWEEN_LINES:
                told = now
                left = (now - started) * (total - done) / max(done, 1)
                self._err.print(f"{name} {100 * done // max(total, 1)}%, {done:,}/{total:,} scores, {_span(left)} left")

        self.done = self.total = 0
        return show

    def close_bar(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None
        self.done = self.total = 0

    def _draw(self, name: str, done: int, total: int) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, desc=name, unit=" scores", delay=1.0, leave=False, file=sys.stderr, dynamic_ncols=True
            )
        self._bar.total = total
        self._bar.update(done - self._bar.n)


def finite(value: Any) -> Any:
    """The value as strict JSON: what is not a finite number becomes null, numpy numbers plain ones."""
    if isinstance(value, Mapping):
        return {str(key): finite(one) for key, one in value.items()}  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    if isinstance(value, list | tuple | set | frozenset):
        return [finite(one) for one in value]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, bool | str | int) or value is None:
        return value
    if hasattr(value, "tolist"):
        return finite(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def _console(stream: Any) -> Console:
    probe = Console(file=stream)
    return probe if probe.is_terminal else Console(file=stream, width=_WIDE, highlight=False, soft_wrap=False)


def _span(seconds: int | float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


show_span = _span
