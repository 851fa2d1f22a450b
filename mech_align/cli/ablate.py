"""``mech-align ablate``: what happens when heads are taken out, beside random ones?"""

from collections.abc import Sequence

from mech_align.analyses.mean_ablation import mean_ablation
from mech_align.cli.findings import ablation_findings
from mech_align.cli.job import Job, Step, load, model_identity, open_job
from mech_align.cli.options import Ablate
from mech_align.cli.screen import Screen
from mech_align.errors import MechAlignError
from mech_align.interventions import Intervention, zero
from mech_align.prompts import LabelledPrompts, load_prompts
from mech_align.results import Result
from mech_align.sites import Site, parse_sites
from mech_align.sweeps import Cell, Cost, Run, SweepOptions, estimate

_DRAWS = 5
"""Of resampling, as in mean_ablation."""


def run(options: Ablate, screen: Screen, words: Sequence[str]) -> None:
    """The whole command."""
    if (options.mode == "model") != (options.source_model is not None):
        raise MechAlignError(
            "--mode model and --source-model belong together",
            why="the first takes the values of another model, the second names it",
            hint="give both or neither",
        )
    parse_sites(options.heads)  # before anything that takes long
    prompts = _reference(options.reference)
    job = open_job(options, screen, words)
    source = None if options.source_model is None else load(options, options.source_model)
    sites = parse_sites(options.heads, job.model.shape)

    def compute(how: SweepOptions) -> Result:
        return mean_ablation(
            job.model, job.tokens, sites, metric=job.metric, mode=options.mode, reference=prompts or options.reference,
            run=options.run, positions=options.positions, controls=options.controls, greedy=options.greedy,
            resample_draws=_DRAWS, source_model=source, options=how,
        )  # fmt: skip

    step = Step("mean_ablation", compute, lambda: _cost(job, options, sites))
    if options.dry_run:
        job.dry_run([step])
        return
    plan = {
        **options.plan(), "metric": job.metric.name, "heads": [str(site) for site in sites],
        "source_model": model_identity(source), "encoding": dict(job.tokens.settings),
        "reference": prompts.fingerprint if prompts is not None else options.reference,
    }  # fmt: skip
    folder = job.open(plan)
    job.header()
    result = job.compute(folder, step)
    mean = folder.add_result(step.name, result)
    job.finish(folder, [step], {step.name: result}, ablation_findings(result, mean), means={step.name: mean})


def _reference(given: str) -> LabelledPrompts | None:
    """Prompts from a file; nothing for those of the pairs."""
    return None if given in ("clean", "corrupt", "both") else load_prompts(given, label="reference")


def _cost(job: Job, options: Ablate, sites: Sequence[Site]) -> Cost:
    shape = job.model.shape
    cells: list[Cell] = [[Intervention(site, zero(), options.positions)] for site in sites]
    cells += [[Intervention(site, zero(), options.positions) for site in sites]] * (1 + options.controls)
    if len(sites) > 1:
        cells += [[Intervention(sites[0], zero(), options.positions)]] * options.controls
    for _ in range(options.greedy):
        cells += [
            [Intervention(Site(layer, "z", head=head), zero(), options.positions)]
            for layer in range(shape.n_layers) for head in range(shape.n_heads)
        ]  # fmt: skip
    if options.mode == "resample":
        cells = cells * _DRAWS
    prompts = Run.corrupt(job.tokens) if options.run == "corrupt" else Run.clean(job.tokens)
    return estimate(
        job.model, prompts, cells, n_sources=0 if options.mode == "zero" else 1, batch_size=options.batch_size
    )
