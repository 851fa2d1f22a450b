"""Plain reading for analyses that change nothing: batches of prompts, and activations at the metric position only."""

from collections.abc import Callable, Collection, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mech_align.memory import halving
from mech_align.models import Hook, Model, Tokens
from mech_align.sweeps.sources import Run

Key = tuple[int, str]
BATCH_TOKENS = 2048


def each_batch(
    run: Run,
    do: Callable[[list[int]], None],
    *,
    batch_size: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Call ``do`` with the row numbers of prompts of similar length; with fewer at a time when memory runs out.

    Args:
        batch_tokens: How many tokens, pads included, go together where ``batch_size`` is left out.

    Raises:
        OutOfMemory: Not even one prompt fits.
    """
    order = sorted(range(len(run)), key=lambda row: (len(run.tokens[row]), row))
    step = batch_size or max(1, batch_tokens // max(map(len, run.tokens)))
    for _, done in halving(0, len(order), step, lambda first, last: do(order[first:last])):
        if progress is not None:
            progress(done, len(order))


def read_last(
    model: Model, tokens: Tokens, wanted: Collection[Key], hooks: Sequence[Hook] = ()
) -> tuple[dict[Key, Float[Tensor, "b ..."]], Float[Tensor, "b vocab"]]:
    """Activations of one batch at each prompt's last token, and its logits: one forward pass under ``hooks``.

    Nothing but these rows is kept, so that all layers of a deep model fit.
    """
    kept: dict[Key, Tensor] = {}

    def watch(key: Key) -> Hook:
        def see(value: Tensor) -> None:
            kept[key] = value.detach()[torch.arange(len(value), device=value.device), tokens.last.to(value.device)]

        return Hook(*key, see)

    logits = model.run(tokens, [*hooks, *(watch(key) for key in dict.fromkeys(wanted))])
    assert logits is not None
    return kept, logits
