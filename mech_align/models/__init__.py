"""Models: load or wrap one, read its activations, change them. The only room that imports transformer_lens."""

from pathlib import Path
from typing import Any

import torch

from mech_align.models.forward import Hook
from mech_align.models.loading import Loaded, load_backend, wrap_backend
from mech_align.models.model import Model
from mech_align.models.pads import check_pad_invariance
from mech_align.models.tokens import Tokens

__all__ = ["Hook", "Loaded", "Model", "Tokens", "check_pad_invariance", "load_model", "wrap_model"]


def load_model(
    source: str | Path,
    *,
    adapter: str | Path | None = None,
    backend: str = "auto",
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: Any = None,
    weights: str = "raw",
    trust_remote_code: bool = False,
) -> Model:
    """Load a language model.

    Args:
        source: A hub name, a local Hugging Face folder, or ``organism:NAME[/VARIANT]``.
        adapter: A PEFT adapter, applied, merged, and proved to have changed the weights.
        backend: ``"hooked"`` (HookedTransformer), ``"bridge"`` (TransformerBridge), or ``"auto"``: hooked where it
            covers the architecture.
        weights: ``"raw"``, or ``"folded"`` for TransformerLens' folding and centring. Recorded in every result.
        device_map: Spread one model over devices, as accelerate does (bridge only).

    Raises:
        ModelNotFound: No such model, or no access to it; says what to do.
        AdapterUnchanged: The adapter changed no weight.
        UnsupportedModel: The backend does not cover the architecture.
    """
    return Model(
        load_backend(
            source,
            adapter=adapter,
            backend=backend,
            dtype=dtype,
            device=device,
            device_map=device_map,
            weights=weights,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    )


def wrap_model(inner: Any, tokenizer: Any = None, name: str | None = None) -> Model:
    """Wrap a HookedTransformer or TransformerBridge that the user already has, with or without a tokenizer."""
    return Model(wrap_backend(inner, tokenizer=tokenizer, name=name))
