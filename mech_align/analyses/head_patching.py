"""Which attention heads carry a behaviour?"""

from collections.abc import Iterable

import numpy as np

from mech_align.interventions import Intervention, patch
from mech_align.metrics import Metric, logit_difference
from mech_align.models import Model
from mech_align.prompts import Pairs, TokenPairs
from mech_align.results import Result
from mech_align.sites import Site, parse_layers
from mech_align.sweeps import SweepOptions, encode, patch_effects
from mech_align.sweeps.effects import FRACTION, SIGN, Direction
from mech_align.sweeps.positions import position_axis


def head_patching(
    model: Model,
    pairs: Pairs | TokenPairs,
    *,
    metric: Metric | None = None,
    part: str = "z",
    layers: str | Iterable[int] | None = None,
    positions: str = "all",
    direction: Direction = "denoise",
    source_model: Model | None = None,
    min_gap: float | None = None,
    options: SweepOptions = SweepOptions(),
) -> Result:
    r"""Effect of moving one head's output from the clean run into the corrupt run.

    $$e_{i,l,h} = \frac{m_i(\mathrm{corrupt} \mid z_{l,h} \leftarrow z^{\mathrm{clean}}_{l,h}) - m_i(\mathrm{corrupt})}
                       {m_i(\mathrm{clean}) - m_i(\mathrm{corrupt})}$$

    0 is no effect; 1 is the clean behaviour wholly restored.

    Args:
        metric: What the patch is hoped to restore, one number per prompt; the logit difference when left out.
        part: ``"z"`` (what a head hands to the output projection), or its ``"q"``, ``"k"``, ``"v"`` or ``"pattern"``.
        layers: Which layers, e.g. ``"62,63"``; all when left out. Others are NaN-free because they are not in the
            result.
        positions: ``"all"`` together, ``"last"``, a named position, or ``"each"`` for a map by position.
        direction: ``"noise"`` moves corrupt values into the clean run instead; then -1 is the behaviour wholly
            destroyed.
        source_model: Take the values from this model (say the base of a fine-tune) on the same corrupt prompts; 1 then
            is the other model's behaviour wholly restored.
        min_gap: Pairs with a smaller clean-corrupt gap are degenerate: counted, and NaN.

    Returns:
        Result with dims ``(prompt, layer, head)``, with ``"each"`` ``(prompt, layer, head, position)``; unit: fraction
        of the clean-corrupt gap.

    Raises:
        UndefinedEffect: The metric does not tell any pair apart.
        UnknownSite: A layer or part that the model does not have.

    Reference:
        Wang et al. 2022, arXiv:2211.00593, section 3.1; Heimersheim & Nanda 2024, arXiv:2404.15255.
    """
    metric = metric or logit_difference()
    tokens = encode(model, pairs)
    rows = parse_layers(layers, model.shape.n_layers)
    n_heads = model.shape.n_kv_heads if part in ("k", "v") else model.shape.n_heads
    axis = position_axis(model, tokens, positions, direction)
    cells = [
        [Intervention(Site(layer, part, head=head), patch(), where)]
        for layer in rows for head in range(n_heads) for where in axis.names
    ]  # fmt: skip
    found = patch_effects(
        model, axis.pairs, cells, metric=metric, direction=direction, source_model=source_model, min_gap=min_gap,
        options=options,
    )  # fmt: skip
    effect = axis.shape(found.effect.reshape(len(tokens), len(rows), n_heads, -1))
    dims = {"layer": np.array(rows), "head": np.arange(n_heads), **axis.coords}
    settings = {**found.provenance["settings"], "part": part, "positions": positions}
    return Result(
        found.dataset(tokens, effect, dims), "head_patching", FRACTION, SIGN, {**found.provenance, "settings": settings}
    )
