"""The reference: one whole forward pass a cell, through TransformerLens' own hooks. Works on every architecture."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mech_align.models import Hook, Model, Tokens
from mech_align.sweeps.suffix import Placed, PlacedCell, Values


class FullEngine:
    """Scores of a batch of prompts under cells of interventions, by full forward passes.

    Args:
        score: ``logits [b, vocab] -> [b]``.
    """

    def __init__(
        self,
        model: Model,
        tokens: Tokens,
        sources: Mapping[str, Values],
        score: Callable[[Float[Tensor, "b vocab"]], Float[Tensor, " b"]],
    ) -> None:
        self.model, self.tokens, self.sources, self.score = model, tokens, sources, score

    def baseline(self) -> Float[Tensor, " b"]:
        """The score of the undisturbed run."""
        return self._scored([])

    def run(self, cells: Sequence[PlacedCell]) -> Float[Tensor, "b cell"]:
        """Scores under each cell, in the order of the cells."""
        return torch.stack([self._scored([self._hook(edit) for edit in cell]) for cell in cells], dim=1)

    def chunks(self, cells: Sequence[PlacedCell]) -> Iterator[list[int]]:
        """One cell at a time."""
        yield from ([number] for number in range(len(cells)))

    def hooks(self, cell: PlacedCell) -> list[Hook]:
        """The functions on the model that carry out one cell."""
        return [self._hook(edit) for edit in cell]

    def _scored(self, hooks: Sequence[Hook]) -> Float[Tensor, " b"]:
        logits = self.model.run(self.tokens, hooks)
        assert logits is not None
        return self.score(logits)

    def _hook(self, placed: Placed) -> Hook:
        intervention = placed.intervention
        index = None if intervention.index is None else list(intervention.index)
        axis = 1 if placed.part == "pattern" else 2  # where heads and neurons lie
        source = (
            self.sources[intervention.source][placed.layer, placed.part] if intervention.edit.needs_source else None
        )
        if source is not None and index is not None:
            source = source.index_select(axis, torch.tensor(index, device=source.device))

        def apply(value: Tensor) -> Tensor:
            where = slice(None) if index is None else index
            picked = (slice(None), where) if axis == 1 else (slice(None), slice(None), where)
            old = value[picked] if index is not None else value
            new = intervention.edit.apply(old, None if source is None else source.to(old.device))
            mask = placed.mask.to(old.device)
            mask = mask[:, None, :, None] if axis == 1 else mask.reshape(*mask.shape, *[1] * (old.ndim - 2))
            new = torch.where(mask, new, old)
            if index is None:
                return new
            value = value.clone()
            value[picked] = new
            return value

        return Hook(placed.layer, placed.part, apply)
