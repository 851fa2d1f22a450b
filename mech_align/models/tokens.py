"""Ragged prompts as one right-padded array. Causal attention then never sees a pad, whatever its token is."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from mech_align.errors import BadPrompts


@dataclass(frozen=True)
class Tokens:
    """Token ids of prompts, padded on the right; position ids are 0, 1, 2, ... in every row.

    Attributes:
        ids: Padded with 0; the value of a pad never matters.
        lengths: How many tokens of a row are real.
    """

    ids: Int[Tensor, "prompt position"]
    lengths: Int[Tensor, " prompt"]

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> "Tokens":
        """Pad token lists of any lengths.

        Raises:
            BadPrompts: A row without tokens.
        """
        empty = [str(i) for i, row in enumerate(rows) if len(row) == 0]
        if empty or not rows:
            raise BadPrompts("a prompt without tokens" + (f" (number {', '.join(empty[:5])})" if empty else ""))
        lengths = [len(row) for row in rows]
        ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.as_tensor(list(row), dtype=torch.long)
        return cls(ids.to(device), torch.tensor(lengths, device=device))

    @classmethod
    def from_padded(cls, ids: Int[Tensor, "prompt position"], mask: Shaped[Tensor, "prompt position"]) -> "Tokens":
        """Take over a batch that was padded on either side; the mask says which tokens are real.

        Raises:
            BadPrompts: Real tokens with a gap between them.
        """
        mask = mask.bool()
        rows = [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)]
        for i, keep in enumerate(mask.cpu()):
            real = keep.nonzero().flatten()
            if len(real) and int(real[-1] - real[0]) + 1 != len(real):
                raise BadPrompts(f"row {i} has pads between its tokens", hint="pad on the left or on the right")
        return cls.from_lists(rows, ids.device)

    @property
    def mask(self) -> Bool[Tensor, "prompt position"]:
        """Which tokens are real."""
        return torch.arange(self.ids.shape[1], device=self.ids.device)[None] < self.lengths[:, None]

    @property
    def last(self) -> Int[Tensor, " prompt"]:
        """Position of the last real token of each prompt."""
        return self.lengths - 1

    def __len__(self) -> int:
        return len(self.ids)
