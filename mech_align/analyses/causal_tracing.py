"""Through which layers, blocks and positions does a behaviour pass?"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from mech_align import stats
from mech_align.errors import UndefinedEffect
from mech_align.interventions import Intervention, add_source, patch
from mech_align.metrics import Metric, logit_difference
from mech_align.models import Model
from mech_align.models.names import parts_of
from mech_align.prompts import Pairs, TokenPairs
from mech_align.results import Result
from mech_align.sites import Site, parse_layers, part_name
from mech_align.sweeps import Cell, NoiseSource, Run, RunSource, SweepOptions, encode, patch_effects, sweep
from mech_align.sweeps.effects import FRACTION, SIGN, Direction, Effects, describe, describe_sweep
from mech_align.sweeps.positions import PositionAxis, position_axis


def causal_tracing(
    model: Model,
    pairs: Pairs | TokenPairs,
    *,
    metric: Metric | None = None,
    parts: Sequence[str] | None = None,
    layers: str | Iterable[int] | None = None,
    positions: str = "each",
    window: int = 1,
    corruption: Literal["counterfactual", "noise"] = "counterfactual",
    noise_positions: str = "differs",
    noise_scale: float = 3.0,
    noise_draws: int = 10,
    direction: Direction = "denoise",
    source_model: Model | None = None,
    min_gap: float | None = None,
    options: SweepOptions = SweepOptions(),
) -> Result:
    r"""Effect of restoring one part of one layer at one position in a corrupted run.

    $$e_{i,x,l,t} =
        \frac{m_i(\mathrm{corrupt} \mid x_{l,t} \leftarrow x^{\mathrm{clean}}_{l,t}) - m_i(\mathrm{corrupt})}
             {m_i(\mathrm{clean}) - m_i(\mathrm{corrupt})}$$

    Args:
        parts: Among ``attn_out``, ``mlp_out``, ``resid_pre``, ``resid_mid``, ``resid_post``; the first two and the last
            when left out (without ``mlp_out`` in a model that has no MLPs).
        positions: ``"each"`` for a map by position (counted from the end), else one of ``"all"``, ``"last"`` or a name.
        window: Restore so many neighbouring layers together, centred on each layer (10 in Meng et al. for blocks).
        corruption: ``"counterfactual"``: the corrupt prompt. ``"noise"``: the clean prompt with Gaussian noise on the
            embeddings at ``noise_positions``, ``noise_scale`` times their standard deviation; effects are averaged over
            ``noise_draws`` before they are divided by the averaged gap.
        direction, source_model, min_gap: As in ``head_patching``; counterfactual only.

    Returns:
        Result with dims ``(prompt, part, layer, position)``, without ``position`` when it is not ``"each"``; unit:
        fraction of the gap. Slots that a prompt does not have are NaN.

    Raises:
        UndefinedEffect: Corruption does not change the metric.
        UnknownSite: A part that this architecture does not have.

    Reference:
        Meng et al. 2022, arXiv:2202.05262, section 2; Zhang & Nanda 2023, arXiv:2309.16042 (corruption matters).
    """
    metric = metric or logit_difference()
    tokens = encode(model, pairs)
    rows = parse_layers(layers, model.shape.n_layers)
    known = parts_of(model.inner)
    usual = [part for part in ("attn_out", "mlp_out", "resid_post") if part in known]
    kinds = usual if parts is None else [part_name(part) for part in parts]
    axis = position_axis(model, tokens, positions, "noise" if corruption == "noise" else direction)
    cells: list[Cell] = [
        [Intervention(Site(at, kind), patch(), where) for at in _window(layer, window, model.shape.n_layers)]
        for kind in kinds for layer in rows for where in axis.names
    ]  # fmt: skip
    if corruption == "noise":
        found = _noise_effects(model, axis, cells, metric, noise_positions, noise_scale, noise_draws, min_gap, options)
    else:
        found = patch_effects(
            model, axis.pairs, cells, metric=metric, direction=direction, source_model=source_model, min_gap=min_gap,
            options=options,
        )  # fmt: skip
    effect = axis.shape(found.effect.reshape(len(tokens), len(kinds), len(rows), -1))
    values = found.dataset(tokens, effect, {"part": np.array(kinds), "layer": np.array(rows), **axis.coords})
    settings = {**found.provenance["settings"], "positions": positions, "window": window, "corruption": corruption}
    return Result(values, "causal_tracing", FRACTION, SIGN, {**found.provenance, "settings": settings})


def _window(layer: int, width: int, n_layers: int) -> range:
    first = layer - (width - 1) // 2
    return range(max(0, first), min(n_layers, first + width))


def _noise_effects(
    model: Model, axis: PositionAxis, cells: Sequence[Cell], metric: Metric, where: str, scale: float, draws: int,
    min_gap: float | None, options: SweepOptions,
) -> Effects:  # fmt: skip
    """Restoration in a run that is the clean prompt with noise on its embeddings."""
    pairs = axis.pairs
    run = Run.clean(pairs)
    noise = Intervention(Site(0, "resid_pre"), add_source(), where, source="noise")
    disturbed: list[Cell] = [[noise], *([noise, *cell] for cell in cells)]
    total: Any = 0.0
    clean = np.zeros(len(pairs))
    last: Any = None
    for draw in range(draws):
        last = sweep(
            model, run, disturbed, metric=metric,
            sources={"source": RunSource.same(run), "noise": NoiseSource(scale, options.seed + draw)},
            engine=options.engine, batch_size=options.batch_size, store=options.named(f"draw{draw:02d}").store,
            progress=options.progress, seed=options.seed,
        )  # fmt: skip
        total = total + last.scores / draws
        clean = last.baseline
    corrupt = total[:, 0]
    effect, degenerate = stats.normalise(total[:, 1:], clean, corrupt, min_gap=min_gap)
    if degenerate.all():
        raise UndefinedEffect(
            f"noise at '{where}' does not change {metric.name}", hint="name positions that matter, or raise noise_scale"
        )
    settings = {"noise_positions": where, "noise_scale": scale, "noise_draws": draws, "seed": options.seed}
    provenance = {
        **describe(model, pairs, metric, settings),
        **describe_sweep(last),
        "degenerate": int(degenerate.sum()),
    }
    return Effects(effect, clean, corrupt, degenerate, provenance)
