"""``mech-align attribute``: a gradient screen over very many parts, confirmed exactly."""

from collections.abc import Sequence

from mech_align.analyses.attribution_patching import PARTS, attribution_patching
from mech_align.cli.findings import gap_finding, screen_findings
from mech_align.cli.job import Job, Step, open_job
from mech_align.cli.options import Attribute
from mech_align.cli.screen import Screen
from mech_align.interventions import Intervention, patch
from mech_align.results import Result
from mech_align.sites import Site, parse_layers
from mech_align.sweeps import Cost, Run, SweepOptions, estimate

_BACKWARD = 3
"""A pass with its gradient costs about three without."""


def run(options: Attribute, screen: Screen, words: Sequence[str]) -> None:
    """The whole command."""
    job = open_job(options, screen, words)
    positions = options.positions or "all"
    rows = parse_layers(options.layers, job.model.shape.n_layers)

    def compute(how: SweepOptions) -> Result:
        return attribution_patching(
            job.model, job.tokens, metric=job.metric, part=options.part, steps=options.steps, layers=options.layers,
            positions=positions, direction=options.direction, confirm=options.confirm, sample=options.sample,
            threshold=options.threshold, min_gap=options.min_gap, options=how,
        )  # fmt: skip

    step = Step("attribution_patching", compute, lambda: _cost(job, options, rows, positions))
    if options.dry_run:
        job.dry_run([step])
        return
    plan = {**options.plan(), "metric": job.metric.name, "positions": positions, "encoding": dict(job.tokens.settings)}
    folder = job.open(plan)
    job.header()
    result = job.compute(folder, step)
    mean = folder.add_result(step.name, result)
    findings = [gap_finding(result, unit=job.metric.unit, metric=job.metric.name), *screen_findings(result, mean)]
    job.finish(folder, [step], {step.name: result}, findings, means={step.name: mean})


def _cost(job: Job, options: Attribute, rows: Sequence[int], positions: str) -> Cost:
    shape, part = job.model.shape, PARTS[options.part]
    width = {"heads": shape.n_heads, "neurons": shape.d_mlp}.get(options.part, 1)
    exact = min(options.confirm + options.sample, width * len(rows))
    cells = [
        [Intervention(Site(rows[i % len(rows)], part, **_unit(options.part, i // len(rows))), patch(), positions)]
        for i in range(exact)
    ]
    prompts = Run.corrupt(job.tokens) if options.direction == "denoise" else Run.clean(job.tokens)
    cost = estimate(job.model, prompts, cells, batch_size=options.batch_size)
    gradients = len(job.tokens) * (1 + _BACKWARD * options.steps)
    every = len(job.tokens) * (2 + width * len(rows))
    return Cost(
        scores=cost.scores + len(job.tokens) * width * len(rows), naive_passes=float(every),
        passes=cost.passes + gradients, peak_bytes=2 * cost.peak_bytes, free_bytes=cost.free_bytes,
        seconds=cost.seconds * (1 + gradients / max(cost.passes, 1)),
    )  # fmt: skip


def _unit(part: str, index: int) -> dict[str, int]:
    return {"heads": {"head": index}, "neurons": {"neuron": index}}.get(part, {})
