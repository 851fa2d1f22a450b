"""``mech-align patch``: which parts, moved from one run into the other, bring the behaviour along?"""

from collections.abc import Mapping, Sequence
from typing import Any

from mech_align.analyses.causal_tracing import causal_tracing
from mech_align.analyses.head_patching import head_patching
from mech_align.analyses.neuron_patching import neuron_patching
from mech_align.cli.findings import gap_finding, patching_findings
from mech_align.cli.job import Job, Step, load, model_identity, open_job
from mech_align.cli.options import Patch
from mech_align.cli.screen import Screen
from mech_align.interventions import Intervention, patch
from mech_align.models import Model
from mech_align.plots import overview
from mech_align.results import Result
from mech_align.runs import Run
from mech_align.sites import Site, parse_layers, part_name
from mech_align.sweeps import Cell, Cost, SweepOptions, estimate
from mech_align.sweeps import Run as Prompts
from mech_align.sweeps.positions import position_axis

_BLOCKS = ("attn_out", "mlp_out")
_WORDS = {"heads": "head", "attn": "attention block", "mlp": "MLP", "resid": "residual stream", "neurons": "neuron"}


def run(options: Patch, screen: Screen, words: Sequence[str]) -> None:
    """The whole command."""
    job = open_job(options, screen, words)
    source = None if options.source_model is None else load(options, options.source_model)
    positions = options.positions or ("each" if options.part == "resid" else "all")
    parse_layers(options.layers, job.model.shape.n_layers)
    steps = _steps(job, options, positions, source)
    if options.dry_run:
        job.dry_run(steps)
        return
    plan = {**options.plan(), "metric": job.metric.name, "positions": positions, "source_model": model_identity(source),
            "encoding": dict(job.tokens.settings)}  # fmt: skip
    folder = job.open(plan)
    job.header()
    results = {step.name: job.compute(folder, step) for step in steps}
    main = results[steps[0].name]
    _clean_and_corrupt(job, main)
    means = {name: _add(folder, name, result, results) for name, result in results.items()}
    findings = [gap_finding(main, unit=job.metric.unit, metric=job.metric.name)]
    findings += patching_findings(main, means[steps[0].name], what=_WORDS[options.part], seed=options.seed)
    job.finish(folder, steps, results, findings, means=means, show=[steps[0].name])


def _steps(job: Job, options: Patch, positions: str, source: Model | None) -> list[Step]:
    shared: dict[str, Any] = {
        "metric": job.metric, "layers": options.layers, "positions": positions, "direction": options.direction,
        "source_model": source, "min_gap": options.min_gap,
    }  # fmt: skip

    def price(sites: list[Site]) -> Cost:
        axis = position_axis(job.model, job.tokens, positions, options.direction)
        cells: list[Cell] = [[Intervention(site, patch(), where)] for site in sites for where in axis.names]
        side = Prompts.corrupt if options.direction == "denoise" else Prompts.clean
        return estimate(job.model, side(axis.pairs), cells, batch_size=options.batch_size)

    rows, shape = parse_layers(options.layers, job.model.shape.n_layers), job.model.shape

    def blocks(name: str, parts: Sequence[str]) -> Step:
        def compute(how: SweepOptions) -> Result:
            return causal_tracing(job.model, job.tokens, parts=parts, options=how, **shared)

        return Step(name, compute, lambda: price([Site(row, part_name(part)) for part in parts for row in rows]))

    def heads(how: SweepOptions) -> Result:
        return head_patching(job.model, job.tokens, options=how, **shared)

    def neurons(how: SweepOptions) -> Result:
        return neuron_patching(job.model, job.tokens, options=how, **shared)

    match options.part:
        case "heads":
            every = [Site(row, "z", head=head) for row in rows for head in range(shape.n_heads)]
            question = "Which whole attention and MLP blocks, moved likewise, bring the clean behaviour back?"
            beside = blocks("block_patching", _BLOCKS)
            return [
                Step("head_patching", heads, lambda: price(every)),
                Step(beside.name, beside.compute, beside.cost, question),
            ]
        case "neurons":
            every = [Site(row, "mlp_post", neuron=neuron) for row in rows for neuron in range(shape.d_mlp)]
            return [Step("neuron_patching", neurons, lambda: price(every))]
        case part:
            return [blocks("causal_tracing", [part])]


def _add(folder: Run, name: str, result: Result, results: Mapping[str, Result]) -> Result:
    """Result, table and figure; the map of heads gets its columns for whole blocks."""
    blocks = results.get("block_patching")
    if name != "head_patching" or blocks is None or "position" in result.data.dims:
        question = "Which whole attention and MLP blocks, moved likewise, bring the clean behaviour back?"
        return folder.add_result(name, result, question=question if name == "block_patching" else "")
    beside = {"attention": blocks.select(part="attn_out"), "MLP": blocks.select(part="mlp_out")}
    return folder.add_result(name, result, figures={name: overview(result, beside=beside)})


def _clean_and_corrupt(job: Job, result: Result) -> None:
    clean, corrupt = result.values["clean"].values, result.values["corrupt"].values
    first, second = (
        ("source model", "this model") if result.provenance["settings"].get("source_model") else ("clean", "corrupt")
    )
    signed = job.metric.name in ("logit_difference", "log_odds")
    better = int((clean > (0 if signed else corrupt)).sum())
    run = "" if first == "source model" else " run"
    side = f"the {first}{run} prefers the right answer" if signed else f"the {first}{run} scores higher"
    job.screen.say(
        f"metric  {first} {clean.mean():+.3f}, {second} {corrupt.mean():+.3f} {job.metric.unit}"
        f" · {side} in {better} of {len(clean)} pairs"
    )
