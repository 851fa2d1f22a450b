"""Does padding change what a model says? It must not."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mech_align.errors import SelfCheckFailed
from mech_align.models.tokens import Tokens

if TYPE_CHECKING:
    from mech_align.models.model import Model


def check_pad_invariance(
    model: "Model", prompts: Sequence[str] | Sequence[Sequence[int]] | None = None, *, tolerance: float = 1e-4
) -> float:
    """Do ragged prompts get the same logits in one batch as each alone, from either padding side?

    Args:
        prompts: Prompts of different lengths; random token ids of lengths 2 to 9 when left out.
        tolerance: Largest difference that passes, in logits.

    Returns:
        The largest difference over prompts, positions and vocabulary.

    Raises:
        SelfCheckFailed: A prompt's logits depend on its neighbours in the batch.
    """
    if prompts is None:
        generator = torch.Generator().manual_seed(0)
        longest = min(9, model.shape.n_ctx)
        prompts = [
            torch.randint(model.shape.d_vocab, (length,), generator=generator).tolist() for length in (2, longest, 3, 5)
        ]
    tokens = model.encode(prompts)
    alone = [
        model.logits(Tokens(row[None, :n], n[None]), positions="all")[0]
        for row, n in zip(tokens.ids, tokens.lengths, strict=True)
    ]
    together = model.logits(tokens, positions="all")
    from_left = model.logits(Tokens.from_padded(*_left_padded(tokens)), positions="all")
    worst = max(_difference(alone, together), _difference(alone, from_left))
    if not worst <= tolerance:
        raise SelfCheckFailed(
            f"padding changes the logits of {model.name} by {worst:.3g}",
            why=f"each prompt alone and the same prompts in one batch should agree to {tolerance:g}",
            hint="use dtype float32 for this check; report the architecture if it fails there",
        )
    return worst


def _left_padded(tokens: Tokens) -> tuple[Tensor, Tensor]:
    width = tokens.ids.shape[1]
    ids, mask = torch.zeros_like(tokens.ids), torch.zeros_like(tokens.ids, dtype=torch.bool)
    for i, length in enumerate(tokens.lengths.tolist()):
        ids[i, width - length :] = tokens.ids[i, :length]
        mask[i, width - length :] = True
    return ids, mask


def _difference(alone: Sequence[Float[Tensor, "_ v"]], batch: Float[Tensor, "b _ v"]) -> float:
    return max(float((batch[i, : len(one)] - one).abs().max()) for i, one in enumerate(alone))
