"""The folder of one run, and what may be written into it."""

import json
import shutil
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mech_align.errors import BadRun
from mech_align.plots import averaged, figure_json, pictures
from mech_align.results import Result, load_result
from mech_align.runs.files import (
    FORMAT,
    MANIFEST,
    checked,
    difference,
    now,
    plain,
    quote,
    read_manifest,
    summary_table,
    verb,
    versions,
    write_json,
    write_text,
)  # fmt: skip
from mech_align.runs.report import Entry, place, render

FINDING = ("claim", "number", "unit", "interval", "n", "controls", "verdict")


@dataclass(frozen=True)
class Run:
    """A run folder. All state is on disk and written atomically, so that a killed run can go on where it stopped."""

    path: Path

    @classmethod
    def create(
        cls, path: str | Path, *, command: str | Sequence[str], plan: Mapping[str, Any], seed: int | None = None,
        model: Mapping[str, Any] | None = None, data: Mapping[str, Any] | None = None,
    ) -> "Run":  # fmt: skip
        """Open a folder for this command and plan: a new one, or the one in which the same run was stopped.

        Args:
            command: As typed, or its words; recorded. Its verb ("mech-align patch") has to match as well.
            plan: Everything that decides the numbers. Plain JSON; tuples, paths and numpy numbers are turned into it.
            model, data: Fingerprints. Where they were recorded before, they have to match.

        Raises:
            BadRun: The folder holds something else, which is never overwritten.
        """
        run = cls(Path(path))
        words = command if isinstance(command, str) else " ".join(quote(word) for word in command)
        asked = {
            "verb": verb(words), "plan": plan, "seed": plan.get("seed") if seed is None else seed, "model": model,
            "data": data,
        }  # fmt: skip
        asked = {key: plain(value) for key, value in asked.items() if value is not None}
        if run.path.exists() and not run.path.is_dir():
            raise BadRun(f"{run.path} is a file", hint="give a folder with --out")
        inside = [p.name for p in run.path.iterdir() if p.name != f"{MANIFEST}.part"] if run.path.exists() else []
        session = {"started": now(), "command": words, "versions": versions()}
        if not inside:
            run.path.mkdir(parents=True, exist_ok=True)
            run._write({
                "tool": "mech_align", "format": FORMAT, "command": words, **asked, "versions": session["versions"],
                "created": session["started"], "updated": session["started"], "sessions": [session], "steps": {},
                "results": {}, "warnings": [],
            })  # fmt: skip
            return run
        if MANIFEST not in inside:
            raise BadRun(
                f"{run.path} is not empty and holds no run",
                why=f"it holds {', '.join([*sorted(inside)[:3], *(['...'] if len(inside) > 3 else [])])}",
                hint="give another folder with --out",
            )
        run._resume(asked, session)
        return run

    @property
    def manifest(self) -> dict[str, Any]:
        """What ``manifest.json`` says."""
        return read_manifest(self.path)

    @property
    def findings(self) -> list[dict[str, Any]]:
        """The claims so far."""
        file = self.path / "findings.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []

    @property
    def names(self) -> list[str]:
        """Names of the results, in the order in which they were first added."""
        return list(self.manifest["results"])

    def matches(self, plan: Mapping[str, Any]) -> bool:
        """Whether this folder was made for exactly this plan."""
        return self.manifest["plan"] == plain(plan)

    def result(self, name: str) -> Result:
        """One result, with its prompts."""
        return load_result(self.path / "results" / checked(name))

    def table(self, name: str) -> pd.DataFrame:
        """One result as a long table, prompts summarised."""
        return pd.read_parquet(self.path / "tables" / f"{checked(name)}.parquet")

    def is_done(self, name: str) -> bool:
        """Whether this step was finished, now or in an earlier session."""
        return self.manifest["steps"].get(name, {}).get("status") == "done"

    @contextmanager
    def step(self, name: str) -> Generator[None, None, None]:
        """Record a step as running, then done, interrupted or failed, with its seconds over all sessions.

        When the step is done, its partial store (``partial_dir(name)``) is removed.
        """
        checked(name)
        started = time.monotonic()
        before = float(self.manifest["steps"].get(name, {}).get("seconds", 0.0))

        def record(status: str, **more: Any) -> None:
            entry = {"status": status, "seconds": round(before + time.monotonic() - started, 3), "at": now(), **more}
            self._change(lambda manifest: manifest["steps"].update({name: entry}))

        record("running")
        try:
            yield
        except Exception as problem:
            # the type only: a message may quote a prompt
            record("failed", error=type(problem).__name__)
            raise
        except BaseException:
            record("interrupted")
            raise
        record("done")
        shutil.rmtree(self.path / "partial" / name, ignore_errors=True)
        self._drop_empty_partial()

    def partial_dir(self, name: str) -> Path:
        """Where a sweep of the step of this name keeps what it has so far."""
        folder = self.path / "partial" / checked(name)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def add_result(
        self, name: str, result: Result, *, figures: Mapping[str, Any] | None = None, question: str = "",
        tokens: bool = False,
    ) -> Result:  # fmt: skip
        """Write a result, its table and its figures; replaces an earlier result of that name.

        Args:
            figures: Plotly figures by name; by default the pictures that suit the result.
            question: What the result answers, for the report.
            tokens: Name positions by the tokens of a prompt in the pictures and the report, where the result does. Left
                out unless asked for, as prompts may be harmful or private.

        Returns:
            The result with prompts averaged.
        """
        mean = averaged(result)
        result.save(self.path / "results" / checked(name))
        table = self.path / "tables" / f"{name}.parquet"
        table.parent.mkdir(exist_ok=True)
        part = table.with_name(f"{table.name}.part")
        summary_table(mean).to_parquet(part, index=False)
        part.replace(table)
        if figures is None:
            drawn = pictures(result, mean=mean) if tokens else pictures(_nameless(result), mean=_nameless(mean))
        else:
            drawn = figures
        own = {key.replace(result.name, name, 1) if figures is None else key: figure for key, figure in drawn.items()}
        for key, figure in own.items():
            write_text(self.path / "figures" / f"{checked(key)}.json", figure_json(figure))
        entry = {
            "analysis": result.name, "question": question, "figures": list(own), "tokens": tokens, "at": now(),
            "warnings": mean.warnings,
            "statistics": plain(mean.provenance.get("statistics") or {}),
        }  # fmt: skip
        self._change(lambda manifest: manifest["results"].update({name: entry}))
        return mean

    def add_findings(self, findings: Sequence[Mapping[str, Any]]) -> None:
        """Add claims to the report; one with the same words is replaced.

        Args:
            findings: Each with ``claim``, ``number``, ``unit``, ``interval``, ``n``, ``controls`` (text, a mapping,
            or a list
                of either) and ``verdict`` (``"supported"``, ``"not supported"``, ...); what is left out is null.
        """
        given = [{**dict.fromkeys(FINDING), **dict(finding)} for finding in findings]
        for finding in given:
            if not finding["claim"]:
                raise ValueError("a finding needs a claim")
        claims = {finding["claim"] for finding in given}
        kept = [finding for finding in self.findings if finding["claim"] not in claims]
        write_json(self.path / "findings.json", plain([*kept, *given]))

    def add_warning(self, text: str) -> None:
        """Something that a reader of the report should know before trusting the numbers."""
        self._change(lambda manifest: manifest.update(warnings=list(dict.fromkeys([*manifest["warnings"], text]))))

    def write_report(self, *, prompts: Sequence[Mapping[str, Any]] = ()) -> Path:
        """Write ``report.html`` from what the folder holds.

        Args:
            prompts: Rows to print at the end. Left out unless given: prompts may be harmful or private.
        """
        if not (self.path / "findings.json").exists():
            write_json(self.path / "findings.json", [])
        manifest = self.manifest
        page = render(
            manifest, self.findings, [self._entry(name, entry) for name, entry in manifest["results"].items()], prompts
        )
        return write_text(self.path / "report.html", page)

    def _entry(self, name: str, entry: Mapping[str, Any]) -> Entry:
        figures = {key: (self.path / "figures" / f"{key}.json").read_text(encoding="utf-8") for key in entry["figures"]}
        told = entry.get("statistics") or {}
        return Entry(
            name, entry["question"], self.result(name), self.table(name), figures, told, entry["warnings"],
            entry.get("tokens", False),
        )  # fmt: skip

    def _resume(self, asked: Mapping[str, Any], session: dict[str, Any]) -> None:
        manifest = self.manifest
        different = [key for key, value in asked.items() if manifest.get(key) is not None and manifest[key] != value]
        if different:
            raise BadRun(
                f"{self.path} holds another run: {manifest['command']}",
                why="; ".join(difference(key, manifest[key], asked[key]) for key in different),
                hint="give another folder with --out, or repeat the command exactly to go on with that run",
            )
        changed = [
            f"{package} {old} → {session['versions'].get(package)}"
            for package, old in manifest["versions"].items()
            if old != session["versions"].get(package)
        ]

        def update(manifest: dict[str, Any]) -> None:
            manifest.update(asked)
            manifest["sessions"].append(session)
            if changed:
                warning = f"continued under other versions than it was begun with: {', '.join(changed)}"
                manifest["warnings"] = list(dict.fromkeys([*manifest["warnings"], warning]))
            for step in manifest["steps"].values():
                if step["status"] == "running":  # killed: nobody was left to write it down
                    step["status"] = "interrupted"

        self._change(update)

    def _change(self, change: Callable[[dict[str, Any]], Any]) -> None:
        manifest = self.manifest
        change(manifest)
        manifest["updated"] = now()
        self._write(manifest)

    def _write(self, manifest: Mapping[str, Any]) -> None:
        write_json(self.path / MANIFEST, manifest)

    def _drop_empty_partial(self) -> None:
        partial = self.path / "partial"
        if partial.exists() and not any(partial.iterdir()):
            partial.rmdir()


def _nameless(result: Result) -> Result:
    """The result with positions numbered, without the tokens that stand there."""
    if "position" not in result.values.coords:
        return result
    places = [place(position) for position in result.values["position"].values.tolist()]
    if len(set(places)) != len(places):
        return result
    return result.map(lambda values: values.assign_coords(position=places))


def load_run(path: str | Path) -> Run:
    """Open a finished or stopped run for reading.

    Raises:
        BadRun: The folder is missing, holds no run, or a damaged one.
    """
    folder = Path(path)
    read_manifest(folder)
    return Run(folder)
