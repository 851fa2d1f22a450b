"""Hugging Face's logits as the reference for a converted model."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mech_align.errors import SelfCheckFailed
from mech_align.models.survey import Inner

_PROBE = (2, 12)


def probe(hf_model: PreTrainedModel) -> Tensor:
    """Random token ids, the same ones for every model of a size."""
    config: Any = hf_model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or _PROBE[1]
    size = (_PROBE[0], min(_PROBE[1], int(context)))
    return torch.randint(0, config.vocab_size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor) -> Tensor:
    """Float32 logits of either kind of model, on the CPU."""
    table: Any = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    out: Any = model(tokens.to(table.weight.device if table is not None else str(model.cfg.device)))
    return (out if isinstance(out, Tensor) else out.logits).float().cpu()


def compare(inner: Inner, tokens: Tensor, reference: Tensor, weights: str, backend: str) -> float:
    """The largest difference to ``reference``, of log-probabilities where weights are folded.

    Raises:
        SelfCheckFailed: It is more than rounding, or something is not finite.
    """
    got = logits_of(inner, tokens)
    if weights == "folded":  # centring the unembedding shifts all logits of a position alike
        got, reference = got.log_softmax(-1), reference.log_softmax(-1)
    gap = (got - reference).abs()
    if not torch.isfinite(reference).all() or not torch.isfinite(got).all():
        raise SelfCheckFailed(
            f"the model gives logits that are not finite ({backend})",
            hint="float16 overflows in many models: use bfloat16 or float32",
        )
    worst = float(gap.max())
    dtype = next(inner.parameters()).dtype
    if dtype in (torch.float32, torch.float64):
        limit = 1e-4 * max(1.0, float(reference.abs().max()) / 20)
        passed = worst <= limit
    else:
        # Half precision rounds each layer: compare the typical error with the spread of the logits.
        limit = {torch.bfloat16: 0.1, torch.float16: 0.03}.get(dtype, 0.1) * float(reference.std())
        passed = float(gap.square().mean().sqrt()) <= limit
    if not passed:
        raise SelfCheckFailed(
            f"{type(inner).__name__} does not give Hugging Face's logits for this model",
            why=f"on {tokens.shape[0]} x {tokens.shape[1]} random tokens they differ by up to {worst:.3g}, "
            f"where {limit:.1g} is allowed",
            hint="try backend='bridge'"
            if backend == "hooked"
            else "try backend='hooked' if it covers the architecture; the fault is in TransformerLens' adapter",
        )
    return worst
