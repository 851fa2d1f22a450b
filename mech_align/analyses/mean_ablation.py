"""What happens to a behaviour when a part of the network is taken out?"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float

from mech_align import stats
from mech_align.errors import BadPrompts, MechAlignError
from mech_align.interventions import Intervention, patch, zero
from mech_align.metrics import Metric, logit_difference
from mech_align.models import Model
from mech_align.prompts import LabelledPrompts, Pairs, TokenPairs
from mech_align.results import Result
from mech_align.sites import Site, parse_sites
from mech_align.sweeps import Cell, MeanSource, Run, RunSource, Source, SweepOptions, encode, sweep
from mech_align.sweeps.effects import SIGN, describe, describe_sweep, prompt_coords

Mode = Literal["mean", "zero", "resample", "model"]
Reference = Literal["clean", "corrupt", "both"] | LabelledPrompts | Sequence[str]


def mean_ablation(
    model: Model,
    pairs: Pairs | TokenPairs,
    sites: str | Iterable[str | Site],
    *,
    metric: Metric | None = None,
    mode: Mode = "mean",
    reference: Reference = "both",
    run: Literal["corrupt", "clean"] = "corrupt",
    positions: str = "all",
    controls: int = 20,
    greedy: int = 0,
    resample_draws: int = 5,
    source_model: Model | None = None,
    options: SweepOptions = SweepOptions(),
) -> Result:
    r"""Change of the metric when sites are ablated, each alone and all together, beside matched random ones.

    $$e_{i,S} = m_i(\mathrm{run} \mid z_s \leftarrow \bar z_s \ \forall s \in S) - m_i(\mathrm{run})$$

    Positive: the clean behaviour grows when the part is taken out, so the part suppressed it.

    Args:
        sites: Such as ``"L10H7,L10H3"``; heads, or parts (``L3.mlp``).
        mode: What takes the place of the value: its ``"mean"`` over a reference set, ``"zero"``, the value in a random
            ``"resample"`` d prompt of the reference set (averaged over ``resample_draws``), or the value that
            ``source_model`` has on the same prompt (``"model"``). A head that writes a constant is invisible to its
            mean: compare modes.
        reference: Which prompts the mean or the resampling is over: the pairs' ``"clean"`` or ``"corrupt"`` prompts or
            ``"both"``, or prompts of your own. The mean is over their last tokens when ``positions="last"``, else over
            all their tokens.
        run: Which prompts are disturbed.
        controls: How many random sets of heads, as many from the same layers as the found ones, are ablated together
            for comparison with the joint effect; and single heads of the same layers, for the single effects.
        greedy: After the first head that matters most, look again at all heads of the model with it removed, and so on
            for so many steps: secondary heads show only jointly.

    Returns:
        Result with dims ``(prompt, cell)``; coordinate ``kind``: ``found``, ``joint``, ``control`` (joint-sized),
        ``control single``, ``greedy``. Unit: that of the metric. ``provenance["controls"]`` ranks each effect.

    Raises:
        UnknownSite: A site that the model does not have.
        MechAlignError: Mode ``"model"`` without a source model.

    Reference:
        Wang et al. 2022, arXiv:2211.00593, section 2.2 (mean ablation); Li & Janson 2024, arXiv:2409.09951 (its
        limits).
    """
    metric = metric or logit_difference()
    tokens = encode(model, pairs)
    found = parse_sites(sites, model.shape)
    target = Run.corrupt(tokens) if run == "corrupt" else Run.clean(tokens)
    if mode == "model" and source_model is None:
        raise MechAlignError("ablation with another model's values needs that model", hint="give source_model=")
    rng = np.random.default_rng(options.seed)
    plan = _plan(found, model, controls, rng)
    work = _Ablation(model, target, metric, mode, positions, reference, tokens, source_model, resample_draws, options)
    scores, sweeps = work.run([p.sites for p in plan], "sets")
    effect = scores - work.baseline[:, None]
    steps: list[_Planned] = []
    if greedy:
        steps, extra = _greedy(work, model, greedy)
        effect = np.concatenate([effect, extra - work.baseline[:, None]], axis=1)
    plan = [*plan, *steps]
    settings = {
        "mode": mode, "run": run, "positions": positions, "sites": [str(site) for site in found], "controls": controls,
        "reference": work.reference_name, "seed": options.seed,
        "source_model": None if source_model is None else source_model.provenance,
    }  # fmt: skip
    provenance = {
        **describe(model, tokens, metric, settings), **describe_sweep(sweeps), "controls": _ranks(effect, plan),
        "warnings": [*tokens.notes, *sweeps.warnings, *_control_warnings(plan, controls)],
    }  # fmt: skip
    values = xr.Dataset(
        {"effect": (("prompt", "cell"), effect.astype(np.float32)), "baseline": ("prompt", work.baseline)},
        coords={
            "prompt": np.arange(len(tokens)), **prompt_coords(tokens),
            "cell": np.array([p.name for p in plan], dtype=str),
            "kind": ("cell", np.array([p.kind for p in plan], dtype=str)),
        },
    )  # fmt: skip
    return Result(values, "mean_ablation", metric.unit, SIGN, provenance)


@dataclass(frozen=True)
class _Planned:
    name: str
    kind: str
    sites: tuple[Site, ...]


def _plan(found: Sequence[Site], model: Model, controls: int, rng: np.random.Generator) -> list[_Planned]:
    plan = [_Planned(str(site), "found", (site,)) for site in found]
    if len(found) > 1:
        plan.append(_Planned("+".join(map(str, found)), "joint", tuple(found)))
    for number, chosen in enumerate(_matched(found, model, controls, rng)):
        plan.append(_Planned(f"control {number:02d}: {'+'.join(map(str, chosen))}", "control", chosen))
    if len(found) > 1:
        singles = [(site,) for site in _others(found, model) if site.layer in {f.layer for f in found}]
        rng.shuffle(singles)
        plan.extend(_Planned(f"control {site[0]}", "control single", site) for site in singles[:controls])
    return plan


def _others(found: Sequence[Site], model: Model) -> list[Site]:
    """Everything of the same kind as the found sites, except these."""
    out: list[Site] = []
    for part in dict.fromkeys(site.part for site in found):
        counts = {
            "z": model.shape.n_heads,
            "q": model.shape.n_heads,
            "k": model.shape.n_kv_heads,
            "v": model.shape.n_kv_heads,
        }
        for layer in range(model.shape.n_layers):
            if part in counts and all(site.head is not None for site in found if site.part == part):
                out.extend(Site(layer, part, head=head) for head in range(counts[part]))
            elif part == "mlp_post" and all(site.neuron is not None for site in found if site.part == part):
                out.extend(Site(layer, part, neuron=neuron) for neuron in range(model.shape.d_mlp))
            else:
                out.append(Site(layer, part))
    taken = set(found)
    return [site for site in out if site not in taken]


def _matched(found: Sequence[Site], model: Model, count: int, rng: np.random.Generator) -> list[tuple[Site, ...]]:
    """Distinct random sets of the size of ``found``: from the same layers while these have enough, then from any."""
    pool = _others(found, model)
    sets: dict[frozenset[Site], tuple[Site, ...]] = {}
    for anywhere in (False, True):
        for _ in range(50 * count):
            if len(sets) >= count:
                break
            chosen: list[Site] = []
            for site in found:
                options = [
                    o for o in pool if o.part == site.part and o not in chosen and (anywhere or o.layer == site.layer)
                ]
                if options:
                    chosen.append(options[int(rng.integers(len(options)))])
            if len(chosen) == len(found):
                sets.setdefault(frozenset(chosen), tuple(chosen))
    return list(sets.values())


class _Ablation:
    """Turns sets of sites into scores, in one mode."""

    def __init__(
        self, model: Model, run: Run, metric: Metric, mode: Mode, positions: str, reference: Reference,
        pairs: TokenPairs, source_model: Model | None, draws: int, options: SweepOptions,
    ) -> None:  # fmt: skip
        self.model, self.run_, self.metric, self.mode, self.positions = model, run, metric, mode, positions
        self.source_model, self.options = source_model, options
        self.draws = draws if mode == "resample" else 1
        self.reference_rows, self.reference_name = _reference(model, pairs, reference)
        self._means: dict[tuple[int, str], torch.Tensor] = {}
        self.baseline: Float[np.ndarray, " prompt"] = np.zeros(len(run))

    def run(self, sets: Sequence[tuple[Site, ...]], name: str) -> tuple[Float[np.ndarray, "prompt cell"], Any]:
        edit = zero() if self.mode == "zero" else patch()
        cells: list[Cell] = [[Intervention(site, edit, self.positions) for site in chosen] for chosen in sets]
        total: Any = 0.0
        last: Any = None
        for draw in range(self.draws):
            options = self.options.named(f"{name}-{draw}")
            last = sweep(
                self.model, self.run_, cells, metric=self.metric, sources=self._sources(sets, draw),
                engine=options.engine, batch_size=options.batch_size, store=options.store, progress=options.progress,
                seed=options.seed,
            )  # fmt: skip
            total = total + last.scores.astype(np.float64) / self.draws
        self.baseline = last.baseline
        return total, last

    def _sources(self, sets: Sequence[tuple[Site, ...]], draw: int) -> dict[str, Source]:
        if self.mode == "zero":
            return {}
        if self.mode == "model":
            return {"source": RunSource.same(self.run_, self.source_model)}
        if self.mode == "resample":
            return {"source": RunSource.resampled(self.run_, self.reference_rows, self.options.seed + draw)}
        wanted = {(site.layer, site.part) for chosen in sets for site in chosen} - self._means.keys()
        if wanted:
            where = "last" if self.positions == "last" else "all"
            kept = self.model.activations(self.reference_rows, [Site(*key) for key in sorted(wanted)], positions=where)
            self._means.update({(site.layer, site.part): kept[site].float().mean(0) for site in kept.sites})
        return {"source": MeanSource(self._means, self.reference_name)}


def _reference(model: Model, pairs: TokenPairs, reference: Reference) -> tuple[list[list[int]], str]:
    if isinstance(reference, str):
        if reference not in ("clean", "corrupt", "both"):
            raise BadPrompts(f"no reference set '{reference}'", hint="clean, corrupt, both, or prompts of your own")
        rows = [*(pairs.clean if reference != "corrupt" else []), *(pairs.corrupt if reference != "clean" else [])]
        name = {"both": "clean and corrupt prompts"}.get(reference, f"{reference} prompts")
        return [list(row) for row in rows], f"{name} of the pairs ({len(rows)})"
    if isinstance(reference, LabelledPrompts):
        rows = reference.encode(model.tokenizer, n_ctx=model.shape.n_ctx)
    else:
        tokens = model.encode(reference)
        rows = [ids[:n].tolist() for ids, n in zip(tokens.ids, tokens.lengths.tolist(), strict=True)]
    return rows, f"{len(rows)} reference prompts"


def _greedy(work: _Ablation, model: Model, steps: int) -> tuple[list[_Planned], Float[np.ndarray, "prompt step"]]:
    """Take out the head with the largest mean effect, then the next one given that, and so on."""
    pool = [Site(layer, "z", head=head) for layer in range(model.shape.n_layers) for head in range(model.shape.n_heads)]
    gone: tuple[Site, ...] = ()
    planned: list[_Planned] = []
    columns: list[Float[np.ndarray, " prompt"]] = []
    before: Any = None
    for step in range(min(steps, len(pool))):
        left = [site for site in pool if site not in gone]
        scores, _ = work.run([(*gone, site) for site in left], f"greedy{step}")
        start = work.baseline if before is None else before
        best = int(np.abs((scores - start[:, None]).mean(0)).argmax())
        gone, before = (*gone, left[best]), scores[:, best]
        planned.append(_Planned(f"greedy {step + 1}: {'+'.join(map(str, gone))}", "greedy", gone))
        columns.append(scores[:, best])
    return planned, np.stack(columns, axis=1)


def _ranks(effect: Float[np.ndarray, "prompt cell"], plan: Sequence[_Planned]) -> dict[str, Any]:
    """Where each effect lies among the controls of its own size."""
    mean = effect.mean(0)
    of = {
        kind: np.array([m for m, p in zip(mean, plan, strict=True) if p.kind == kind])
        for kind in {p.kind for p in plan}
    }
    out: dict[str, Any] = {}
    joint = any(p.kind == "joint" for p in plan)
    for value, planned in zip(mean, plan, strict=True):
        if planned.kind not in ("found", "joint"):
            continue
        matched = of.get("control single" if joint and planned.kind == "found" else "control", np.array([]))
        if len(matched) >= 2:
            rank = stats.rank_against_controls(float(value), matched)
            out[planned.name] = {"effect": float(value), "n_controls": len(matched), "p": rank.p, "z": rank.z,
                                 "control_mean": float(matched.mean()), "control_low": float(matched.min()),
                                 "control_high": float(matched.max())}  # fmt: skip
    return out


def _control_warnings(plan: Sequence[_Planned], wanted: int) -> list[str]:
    count = sum(p.kind == "control" for p in plan)
    if count >= min(wanted, 20) or not wanted:
        return []
    return [
        f"only {count} matched control sets exist in this model, {wanted} were asked for: p against controls is coarse"
    ]
