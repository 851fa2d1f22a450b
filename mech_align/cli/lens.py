"""``mech-align lens``: after which layer can the answer be read?"""

from collections.abc import Mapping, Sequence

from mech_align.analyses.logit_lens import logit_lens
from mech_align.cli.findings import lens_findings
from mech_align.cli.job import Step, open_job
from mech_align.cli.options import Lens
from mech_align.cli.screen import Screen
from mech_align.interventions import Intervention, patch
from mech_align.results import Result
from mech_align.sites import parse_sites
from mech_align.sweeps import Run, SweepOptions, estimate


def run(options: Lens, screen: Screen, words: Sequence[str]) -> None:
    """The whole command."""
    job = open_job(options, screen, words, metric="log_odds")
    prompts = Run.clean(job.tokens) if options.run == "clean" else Run.corrupt(job.tokens)
    edits: Mapping[str, Sequence[Intervention]] = {}
    if options.patched is not None:
        sites = parse_sites(options.patched, job.model.shape)
        edits = {f"{'+'.join(map(str, sites))} patched": [Intervention(site, patch()) for site in sites]}

    def compute(how: SweepOptions) -> Result:
        return logit_lens(
            job.model, job.tokens, metric=job.metric, part=options.part, run=options.run, interventions=edits,
            batch_size=how.batch_size,
        )  # fmt: skip

    step = Step(
        "logit_lens", compute,
        lambda: estimate(job.model, prompts, [], n_sources=2 * len(edits), batch_size=options.batch_size),
    )  # fmt: skip
    if options.dry_run:
        job.dry_run([step])
        return
    folder = job.open({**options.plan(), "metric": job.metric.name, "encoding": dict(job.tokens.settings)})
    job.header()
    result = job.compute(folder, step)
    mean = folder.add_result(step.name, result)
    job.finish(folder, [step], {step.name: result}, lens_findings(result, mean), means={step.name: mean})
