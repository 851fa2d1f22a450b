"""What every command on pairs does: load, plan, run steps that survive a kill, and leave a run folder with a report."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from mech_align.cli.findings import control_line, listed, show_number, strongest
from mech_align.cli.options import OnPairs, Running
from mech_align.cli.screen import Screen, show_span
from mech_align.errors import BadRun, MechAlignError, OutOfMemory
from mech_align.metrics import Metric, get_metric
from mech_align.models import Model, load_model
from mech_align.prompts import ChatTemplate, Pairs, TokenPairs, load_pairs
from mech_align.results import Result
from mech_align.runs import Run
from mech_align.sweeps import Cost, SweepOptions, encode


@dataclass(frozen=True)
class Step:
    """One analysis of a command.

    Attributes:
        name: Of the result in the run folder.
        compute: Given how to run (store, progress, seed), the result.
        cost: What it will need.
        question: For the report; the analysis' own when empty.
    """

    name: str
    compute: Callable[[SweepOptions], Result]
    cost: Callable[[], Cost]
    question: str = ""


@dataclass(frozen=True)
class Job:
    """One command under way."""

    options: Running
    screen: Screen
    words: Sequence[str]
    model: Model
    tokens: TokenPairs
    metric: Metric
    data: Mapping[str, Any]

    @property
    def sweep_options(self) -> SweepOptions:
        """How sweeps run, before they have a store."""
        return SweepOptions(batch_size=self.options.batch_size, seed=self.options.seed)

    def header(self) -> None:
        """Model and pairs, in two lines."""
        shape, pairs = self.model.shape, self.tokens
        groups = len(set(pairs.group))
        size = f"{shape.n_layers} layers × {shape.n_heads} heads"
        self.screen.say(
            Text.assemble(
                ("model   ", "dim"), f"{self.model.name} · {self.model.backend} · {size} · {str(self.model.dtype)[6:]}"
            ),
            Text.assemble(
                ("pairs   ", "dim"),
                f"{len(pairs)} in {groups} groups · {self.data['fingerprint']} · {self.metric.name}",
            ),
        )

    def open(self, plan: Mapping[str, Any]) -> Run:
        """The run folder for this plan: a new one, or the one in which the same was stopped."""
        facts = _model_facts(self.model)
        out = self.options.out or _default_folder(self.words, plan, facts, self.data)
        run = Run.create(out, command=self.words, plan=plan, seed=self.options.seed, model=facts, data=self.data)
        if any(run.is_done(name) for name in run.manifest["steps"]):
            self.screen.note("going on with the run in this folder; finished steps are not repeated")
        return run

    def compute(self, run: Run, step: Step) -> Result:
        """The step's result: from the folder when it was finished before, else computed, taking up what a kill left."""
        if run.is_done(step.name):
            try:
                return run.result(step.name)
            except BadRun:
                self.screen.note(f"{step.name} was finished, but cannot be read; it is repeated")
        try:
            result = self._run_step(run, step)
        except OutOfMemory:
            raise  # what is done is kept: the same command goes on
        except MechAlignError:
            _abandon(run)
            raise
        self.screen.close_bar()
        return result

    def _run_step(self, run: Run, step: Step) -> Result:
        with run.step(step.name):
            options = replace(
                self.sweep_options, store=run.partial_dir(step.name), progress=self.screen.progress(step.name)
            )
            try:
                result = step.compute(options)
            except BadRun:
                # the plan is the same, yet what the unfinished sweep depends on is not (another version, say)
                shutil.rmtree(run.partial_dir(step.name))
                run.add_warning(f"unfinished work of {step.name} did not fit any more and was done again")
                result = step.compute(replace(options, store=run.partial_dir(step.name)))
            result.save(run.path / "results" / step.name)
        return result

    def dry_run(self, steps: Sequence[Step]) -> None:
        """What each step would cost. Nothing is written."""
        costs = {step.name: step.cost() for step in steps}
        total = sum(cost.seconds for cost in costs.values())
        table = Table(title="dry run: nothing is run or written", title_justify="left")
        table.add_column("step")
        for name in _COSTS:
            table.add_column(name, justify="right")
        for name, cost in costs.items():
            table.add_row(name, *_cost_row(cost))
        short = [name for name, cost in costs.items() if cost.peak_bytes > cost.free_bytes]
        self.header()
        self.screen.say(table, f"prompts {len(self.tokens)} · about {show_span(total)} in all, from two timed passes")
        warnings = [f"{name} needs more memory than is free; batches will be halved" for name in short]
        self.screen.warn([*self.tokens.notes, *warnings])
        rows = {
            name: {"prompts": len(self.tokens), "cells": cost.scores // max(len(self.tokens), 1), "scores": cost.scores,
                   "passes": cost.passes, "naive_passes": cost.naive_passes, "peak_bytes": cost.peak_bytes,
                   "free_bytes": cost.free_bytes, "seconds": cost.seconds} for name, cost in costs.items()
        }  # fmt: skip
        self.screen.finish({
            "command": " ".join(self.words), "status": "dry run", "steps": rows, "seconds": total,
            "model": _model_facts(self.model), "data": self.data, "warnings": [*self.tokens.notes, *warnings],
        })  # fmt: skip

    def finish(
        self, run: Run, steps: Sequence[Step], results: Mapping[str, Result], findings: Sequence[Mapping[str, Any]], *,
        means: Mapping[str, Result], show: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        """Findings, report, and what is printed at the end."""
        (run.path / "findings.json").unlink(missing_ok=True)  # of an earlier session: written anew from the results
        run.add_findings(findings)
        report = run.write_report()
        for step in steps:
            if step.name in (show or results):
                self._table(step.name, means[step.name])
        for finding in findings:
            self.screen.say(_sentence(finding))
        warnings = list(dict.fromkeys(text for mean in means.values() for text in mean.warnings))
        self.screen.warn([*run.manifest["warnings"], *warnings])
        self.screen.say(Text.assemble(("report  ", "dim"), str(report)))
        files = sorted(str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file())
        self.screen.finish({
            "command": " ".join(self.words), "status": "done", "out": str(run.path), "report": str(report),
            "model": _model_facts(self.model), "data": self.data, "metric": self.metric.name,
            "findings": run.findings, "top": {name: strongest(mean, 10) for name, mean in means.items()},
            "files": files, "warnings": [*run.manifest["warnings"], *warnings],
        })  # fmt: skip

    def _table(self, name: str, mean: Result) -> None:
        rows = listed(mean, 10)
        exact = any(row.get("exact") is not None for row in rows)
        table = Table()
        table.add_column("site")
        for title in ("effect", "95% CI", *(["exact"] if exact else []), "q", "p_maxt", "n"):
            table.add_column(title, justify="right")
        for row in rows:
            interval = f"[{show_number(row['ci_low'])}, {show_number(row['ci_high'])}]"
            numbers = [show_number(row["effect"]), interval, *([show_number(row["exact"])] if exact else [])]
            numbers += [*(_p(row[key]) for key in ("q", "p_maxt")), f"{row['n'] or 0:,.0f}"]
            table.add_row(Text(row["site"]), *(Text(text) for text in numbers))
        title = name.replace("_", " ")
        self.screen.say(Text.assemble((title, "bold"), f" · effect: {mean.unit} · {mean.sign}"), table)
        if told := control_line(mean):
            self.screen.say(told)


def open_job(options: OnPairs, screen: Screen, words: Sequence[str], *, metric: str = "logit_difference") -> Job:
    """Load model and pairs and encode them, once for all steps."""
    chosen = get_metric(options.metric or metric)  # before anything that takes long
    pairs = load_pairs(options.pairs)
    model = load(options, options.model, adapter=options.adapter)
    if options.chat or options.system is not None:
        pairs = pairs.with_chat(ChatTemplate(system=options.system))
    return make_job(options, screen, words, model, pairs, chosen, ragged=options.ragged, answers=options.answers)


def make_job(
    options: Running, screen: Screen, words: Sequence[str], model: Model, pairs: Pairs, metric: Metric, *,
    ragged: Literal["align", "drop", "error"] = "align", answers: Literal["single", "first-token"] = "single",
) -> Job:  # fmt: skip
    """A job on a model and pairs that are loaded already."""
    tokens = encode(model, pairs, ragged=ragged, answers=answers)
    data = {
        "source": pairs.source,
        "n": len(tokens),
        "groups": len(set(tokens.group)),
        "fingerprint": pairs.fingerprint,
    }
    return Job(options, screen, words, model, tokens, metric, data)


def load(options: Running, source: str, *, adapter: str | None = None) -> Model:
    """A model as the options say."""
    return load_model(
        source, adapter=adapter, backend=options.backend, dtype=options.dtype, device=options.device,
        weights=getattr(options, "weights", "raw"), trust_remote_code=getattr(options, "trust_remote_code", False),
    )  # fmt: skip


def _abandon(run: Run) -> None:
    """Take away a folder in which nothing was finished, so that the corrected command may use it."""
    if any(run.is_done(name) for name in run.manifest["steps"]):
        return
    shutil.rmtree(run.path / "partial", ignore_errors=True)
    if [path.name for path in run.path.iterdir()] == ["manifest.json"]:
        (run.path / "manifest.json").unlink()
        run.path.rmdir()


def model_identity(model: Model | None) -> dict[str, Any] | None:
    """A model in a plan."""
    return None if model is None else _model_facts(model)


def _model_facts(model: Model) -> dict[str, Any]:
    keys = ("commit", "architecture", "backend", "weights", "dtype", "fingerprint")
    return {"name": model.name, **{key: model.provenance.get(key) for key in keys}}


def _default_folder(words: Sequence[str], plan: Mapping[str, Any], *facts: Any) -> Path:
    digest = hashlib.sha256(json.dumps([plan, *facts], sort_keys=True, default=str).encode()).hexdigest()[:8]
    return Path("runs") / f"{words[1]}-{digest}"


_COSTS = ("scores", "passes", "a pass a cell", "peak memory", "free", "time")


def _cost_row(cost: Cost) -> list[str]:
    return [
        f"{cost.scores:,}", f"{cost.passes:,.0f}", f"{cost.naive_passes:,.0f}", _bytes(cost.peak_bytes),
        _bytes(cost.free_bytes), show_span(cost.seconds),
    ]  # fmt: skip


def _bytes(size: int | float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit in ("B", "KB") else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def _p(value: Any) -> str:
    if value is None or value != value:
        return "–"
    return "<.001" if value < 0.001 else f"{value:.3f}".lstrip("0") if value < 1 else "1"


def _sentence(finding: Mapping[str, Any]) -> Text:
    style = {"supported": "bold green", "not supported": "bold red"}.get(str(finding["verdict"]), "bold yellow")
    number = f": {show_number(finding['number'])}" if finding.get("number") is not None else ""
    ends = finding.get("interval")
    interval = f" [{show_number(ends[0])}, {show_number(ends[1])}]" if ends and None not in ends else ""
    unit = f" {finding['unit']}" if number and finding.get("unit") else ""
    return Text.assemble((f"{finding['verdict']}  ", style), f"{finding['claim']}{number}{interval}{unit}")
