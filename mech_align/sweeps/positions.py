"""The position axis of a map: one named position for all prompts, or a slot for each token counted from the end."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from mech_align.models import Model
from mech_align.prompts import TokenPairs


@dataclass(frozen=True)
class PositionAxis:
    """Positions of a map.

    Attributes:
        pairs: The pairs, with a named position for each slot.
        names: What an intervention is told, one for each slot.
        coords: Of the axis ``position``; empty when there is only one.
        missing: Which prompts have no such slot.
    """

    pairs: TokenPairs
    names: Sequence[str]
    coords: dict[str, Any]
    missing: np.ndarray[Any, Any] | None = None

    def shape(self, effect: Float[np.ndarray, "prompt *cell position"]) -> Float[np.ndarray, "prompt *kept"]:
        """Drop the axis when it has one slot; make slots that a prompt does not have unmeasured."""
        if self.missing is None:
            return effect[..., 0]
        hole = self.missing.reshape(len(self.missing), *[1] * (effect.ndim - 2), -1)
        return np.where(hole, np.nan, effect)


def position_axis(model: Model, pairs: TokenPairs, positions: str, direction: str = "denoise") -> PositionAxis:
    """``"each"``: slots counted from the end, so that the metric position of ragged prompts coincides.

    Coordinates are labels such as ``"-3 Ġpark"`` (the token of the first prompt that has the slot, with ``~`` where
    prompts differ there).
    """
    if positions != "each":
        return PositionAxis(pairs, [positions], {})
    rows = pairs.corrupt if direction == "denoise" else pairs.clean
    longest = max(map(len, rows))
    slots = [f"slot {back}" for back in range(longest, 0, -1)]
    named: list[dict[str, list[int]]] = []
    missing = np.zeros((len(rows), longest), bool)
    for i, row in enumerate(rows):
        entry = {slot: [len(row) - longest + at] for at, slot in enumerate(slots)}
        missing[i] = [entry[slot][0] < 0 for slot in slots]
        named.append({slot: [at for at in where if at >= 0] for slot, where in entry.items()})
    labels: list[str] = []
    for at in range(longest):
        seen = {rows[i][len(rows[i]) - longest + at] for i in range(len(rows)) if not missing[i, at]}
        first = next(rows[i][len(rows[i]) - longest + at] for i in range(len(rows)) if not missing[i, at])
        labels.append(f"{at - longest} {model.token_strings([first])[0]}{'~' if len(seen) > 1 else ''}")
    key = "named" if direction == "denoise" else "named_clean"
    merged = [{**old, **new} for old, new in zip(getattr(pairs, key), named, strict=True)]
    return PositionAxis(replace(pairs, **{key: merged}), slots, {"position": np.array(labels)}, missing)
