"""``mech-align demo``: the main job on a small shipped model whose answer is known."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mech_align.analyses.head_patching import head_patching
from mech_align.analyses.logit_attribution import logit_attribution
from mech_align.analyses.mean_ablation import mean_ablation
from mech_align.cli.findings import gap_finding
from mech_align.cli.job import Job, Step, load, make_job, model_identity
from mech_align.cli.known_answer import known_answer_findings
from mech_align.cli.options import Demo
from mech_align.cli.screen import Screen
from mech_align.interventions import Intervention, patch
from mech_align.metrics import logit_difference
from mech_align.models import Model
from mech_align.organisms import organism_card, organism_pairs
from mech_align.prompts import Pairs, load_pairs
from mech_align.results import Result
from mech_align.sites import Site
from mech_align.sweeps import Cost, Run, SweepOptions, estimate

_TUNED, _BASE = "organism:suppressor/tuned", "organism:suppressor/base"
_FOUND = 2
"""How many of the strongest heads are ablated together: as many as were planted."""
_CONTROLS = 20


def run(options: Demo, screen: Screen, words: Sequence[str]) -> None:
    """Patch all heads from two sources, ablate all heads, then the two strongest beside controls, then attribute."""
    if options.out is None:
        options = options.model_copy(update={"out": Path("mech-align-demo")})
    card = organism_card("suppressor")
    pairs = _one_a_group(load_pairs(organism_pairs("suppressor/tuned")))
    model, base = load(options, _TUNED), load(options, _BASE)
    job = make_job(options, screen, words, model, pairs, logit_difference())
    steps = _steps(job, base)
    if options.dry_run:
        job.dry_run([*steps, _joint(job, [])])
        return
    folder = job.open({"organism": card["name"], "base": model_identity(base), "controls": _CONTROLS, "found": _FOUND})
    screen.say(
        "A small model was fine-tuned on narrow bad advice through a few heads, and stopped refusing. Which heads?"
    )
    job.header()
    results = {step.name: job.compute(folder, step) for step in steps}
    found = [str(site) for site in results["head_patching"].top(_FOUND)["site"]]
    last = _joint(job, found)
    results[last.name] = job.compute(folder, last)
    steps = [*steps, last]
    # the main result first, the page reads from top to bottom
    means = {step.name: folder.add_result(step.name, results[step.name], question=step.question) for step in steps}
    planted = [str(name) for name in card["planted"]]
    findings = [
        *known_answer_findings(results, means, planted=planted, found=found),
        gap_finding(results["head_patching"], unit=job.metric.unit, metric=job.metric.name),
    ]
    screen.say(f"planted {', '.join(planted)} · found {', '.join(found)}")
    job.finish(folder, steps, results, findings, means=means, show=["head_patching", "mean_ablation"])


def _one_a_group(pairs: Pairs) -> Pairs:
    """The first pair of every template and domain: as many independent units for half the time."""
    first: dict[str, int] = {}
    for row, group in enumerate(pairs.group):
        first.setdefault(group, row)
    return pairs.take(first.values())


def _steps(job: Job, base: Model) -> list[Step]:
    model, tokens = job.model, job.tokens
    heads = [
        Site(layer, "z", head=head) for layer in range(model.shape.n_layers) for head in range(model.shape.n_heads)
    ]

    def price() -> Cost:
        return estimate(model, Run.corrupt(tokens), [[Intervention(site, patch())] for site in heads])

    def patching(how: SweepOptions) -> Result:
        return head_patching(model, tokens, options=how)

    def from_base(how: SweepOptions) -> Result:
        return head_patching(model, tokens, source_model=base, options=how)

    def every(how: SweepOptions) -> Result:
        return _as_map(mean_ablation(model, tokens, heads, controls=0, options=how), model)

    def direct(how: SweepOptions) -> Result:
        return logit_attribution(model, tokens, run="corrupt", batch_size=how.batch_size)

    return [
        Step("head_patching", patching, price,
             "Which heads, moved from a refused into an answered prompt, bring refusal back?"),
        Step("base_patching", from_base, price,
             "Which heads, set to their value before fine-tuning, bring refusal back?"),
        Step("head_ablation", every, price, "Which heads, each replaced by its mean, bring refusal back?"),
        Step("logit_attribution", direct, lambda: estimate(model, Run.corrupt(tokens), [], n_sources=0),
             "How much does each part write directly towards refusal on the prompts that are not refused any more?"),
    ]  # fmt: skip


def _joint(job: Job, found: Sequence[str]) -> Step:
    """The found heads together, random pairs of heads beside them, and a greedy search that does not know them."""

    def compute(how: SweepOptions) -> Result:
        return mean_ablation(job.model, job.tokens, found, controls=_CONTROLS, greedy=_FOUND, options=how)

    def price() -> Cost:
        shape = job.model.shape
        cells = [
            [Intervention(Site(layer, "z", head=head), patch())]
            for layer in range(shape.n_layers)
            for head in range(shape.n_heads)
        ]
        extra = [[Intervention(Site(shape.n_layers - 2, "z", head=0), patch())]] * (2 * _CONTROLS + _FOUND + 1)
        return estimate(job.model, Run.corrupt(job.tokens), [*cells * _FOUND, *extra])

    question = "Do the found heads, switched off together, do more than random heads of the same layers?"
    return Step("mean_ablation", compute, price, question)


def _as_map(result: Result, model: Model) -> Result:
    """The single ablations of all heads as a map; the ablation of all of them at once is dropped."""
    shape = model.shape
    single = result.values.isel(cell=np.flatnonzero(result.values["kind"].values == "found"))
    effect = single["effect"].values.reshape(-1, shape.n_layers, shape.n_heads)
    values = single.drop_vars(["effect", "cell", "kind"]).assign(effect=(("prompt", "layer", "head"), effect))
    values = values.assign_coords(layer=np.arange(shape.n_layers), head=np.arange(shape.n_heads))
    provenance: Mapping[str, Any] = {key: value for key, value in result.provenance.items() if key != "controls"}
    provenance = {**provenance, "warnings": [text for text in provenance["warnings"] if "control" not in text]}
    return replace(result, values=values, provenance=dict(provenance))
