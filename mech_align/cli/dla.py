"""``mech-align dla``: which parts write the answer straight into the logits?"""

from collections.abc import Sequence

from mech_align.analyses.logit_attribution import logit_attribution
from mech_align.cli.findings import attribution_findings
from mech_align.cli.job import Step, open_job
from mech_align.cli.options import Dla
from mech_align.cli.screen import Screen
from mech_align.results import Result
from mech_align.sweeps import Run, SweepOptions, estimate


def run(options: Dla, screen: Screen, words: Sequence[str]) -> None:
    """The whole command."""
    job = open_job(options, screen, words)
    prompts = Run.clean(job.tokens) if options.run == "clean" else Run.corrupt(job.tokens)

    def compute(how: SweepOptions) -> Result:
        return logit_attribution(job.model, job.tokens, metric=job.metric, run=options.run, batch_size=how.batch_size)

    step = Step(
        "logit_attribution",
        compute,
        lambda: estimate(job.model, prompts, [], n_sources=0, batch_size=options.batch_size),
    )
    if options.dry_run:
        job.dry_run([step])
        return
    folder = job.open({**options.plan(), "metric": job.metric.name, "encoding": dict(job.tokens.settings)})
    job.header()
    result = job.compute(folder, step)
    mean = folder.add_result(step.name, result)
    job.finish(folder, [step], {step.name: result}, attribution_findings(result, mean), means={step.name: mean})
