"""Which neurons carry a behaviour?"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from mech_align.errors import UnknownSite
from mech_align.interventions import Intervention, patch
from mech_align.metrics import Metric, logit_difference
from mech_align.models import Model
from mech_align.prompts import Pairs, TokenPairs
from mech_align.results import Result
from mech_align.sites import Site, parse_layers
from mech_align.sweeps import Cell, SweepOptions, encode, patch_effects
from mech_align.sweeps.effects import FRACTION, SIGN, Direction


def neuron_patching(
    model: Model,
    pairs: Pairs | TokenPairs,
    *,
    metric: Metric | None = None,
    layers: str | Iterable[int] | None = None,
    sets: Mapping[str, Sequence[Site]] | None = None,
    positions: str = "all",
    direction: Direction = "denoise",
    source_model: Model | None = None,
    min_gap: float | None = None,
    options: SweepOptions = SweepOptions(),
) -> Result:
    r"""Effect of moving one neuron, or a set of neurons, from the clean run into the corrupt run.

    $$e_{i,l,n} = \frac{m_i(\mathrm{corrupt} \mid a_{l,n} \leftarrow a^{\mathrm{clean}}_{l,n}) - m_i(\mathrm{corrupt})}
                       {m_i(\mathrm{clean}) - m_i(\mathrm{corrupt})}$$

    with $a$ the input of the MLP's down projection. 0 is no effect; 1 is the clean behaviour wholly restored.

    Args:
        layers: Which layers; every neuron of each is patched on its own.
        sets: Patch these named sets instead, each as one: ``{"top 2": [Site.parse("L3N17"), Site.parse("L3N4")]}``.
        positions, direction, source_model, min_gap: As in ``head_patching``.

    Returns:
        Result with dims ``(prompt, layer, neuron)``, or ``(prompt, cell)`` for sets; unit: fraction of the gap.

    Raises:
        UndefinedEffect: The metric does not tell any pair apart.
        UnknownSite: A layer or neuron that the model does not have.

    Reference:
        Vig et al. 2020, arXiv:2004.12265 (neuron interventions); Heimersheim & Nanda 2024, arXiv:2404.15255.
    """
    tokens = encode(model, pairs)
    rows = parse_layers(layers, model.shape.n_layers)
    if sets is None:
        cells: list[Cell] = [
            [Intervention(Site(layer, "mlp_post", neuron=neuron), patch(), positions)]
            for layer in rows for neuron in range(model.shape.d_mlp)
        ]  # fmt: skip
    else:
        cells = [_together(name, chosen, positions) for name, chosen in sets.items()]
    found = patch_effects(
        model, tokens, cells, metric=metric or logit_difference(), direction=direction, source_model=source_model,
        min_gap=min_gap, options=options,
    )  # fmt: skip
    if sets is None:
        effect = found.effect.reshape(len(tokens), len(rows), model.shape.d_mlp)
        values = found.dataset(tokens, effect, {"layer": np.array(rows), "neuron": np.arange(model.shape.d_mlp)})
    else:
        values = found.dataset(tokens, found.effect, {"cell": np.array(list(sets), dtype=str)})
    settings = {**found.provenance["settings"], "positions": positions}
    return Result(values, "neuron_patching", FRACTION, SIGN, {**found.provenance, "settings": settings})


def _together(name: str, chosen: Sequence[Site], positions: str) -> Cell:
    by_layer: dict[int, list[int]] = {}
    for site in chosen:
        if site.neuron is None:
            raise UnknownSite(f"{site} in the set '{name}' is no neuron", hint="neurons are written L3N17")
        by_layer.setdefault(site.layer, []).append(site.neuron)
    if not by_layer:
        raise UnknownSite(f"the neuron set '{name}' is empty")
    return [
        Intervention(Site(layer, "mlp_post"), patch(), positions, neurons=tuple(sorted(set(neurons))))
        for layer, neurons in sorted(by_layer.items())
    ]
