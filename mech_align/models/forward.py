"""One forward pass through the wrapped model, with functions on any of its sites; right-padded on both backends."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge

from mech_align.errors import PatchDidNotFire
from mech_align.models.names import attached
from mech_align.models.tokens import Tokens

Inner = HookedTransformer | TransformerBridge


@dataclass
class Hook:
    """A function on one part of a layer: sees the value, returns a new one or ``None``. Counts how often it ran."""

    layer: int
    part: str
    apply: Callable[[Tensor], Tensor | None]
    fired: int = 0

    def __call__(self, value: Tensor) -> Tensor | None:
        self.fired += 1
        return self.apply(value)


class hooks_on:
    """Context in which every forward pass runs with the hooks; only these are removed again, also after an error.

    Raises:
        PatchDidNotFire: On leaving without another error, when a hook was never reached.
    """

    def __init__(self, inner: Inner, hooks: Iterable[Hook]) -> None:
        self.hooks = list(hooks)
        self._context = attached(inner, [(hook.layer, hook.part, hook) for hook in self.hooks])

    def __enter__(self) -> list[Hook]:
        self._context.__enter__()
        return self.hooks

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._context.__exit__(kind, error, trace)
        silent = [f"{hook.part} of layer {hook.layer}" for hook in self.hooks if hook.fired == 0]
        if kind is None and silent:
            raise PatchDidNotFire(
                f"the edit of {', '.join(silent[:3])} never ran",
                why="no forward pass inside the context went through that part",
                hint="run the model inside the context; this is a bug of mech_align if you did",
            )


def forward(
    inner: Inner, tokens: Tokens, want: Literal["last", "all", "none"] = "last", n_layers: int | None = None
) -> Float[Tensor, "..."] | None:
    """fp32 logits at the last token of each prompt ``[b, vocab]``, at all positions, or none at all.

    ``n_layers`` stops above that many layers where nothing above is wanted (HookedTransformer only: the bridge always
    runs all of them).
    """
    ids = tokens.ids
    # An explicit mask of ones keeps HookedTransformer from guessing a left-pad mask: pads are on the right, unseen.
    ones = torch.ones_like(ids)
    if isinstance(inner, HookedTransformer):
        total = inner.cfg.n_layers
        if want == "all":
            return inner(ids, attention_mask=ones, return_type="logits").float()
        depth = total if want == "last" or n_layers is None else n_layers
        resid = inner(ids, attention_mask=ones, stop_at_layer=depth)
        if want == "none":
            return None
        rows = torch.arange(len(tokens), device=resid.device)
        return _unembed(inner, resid[rows, tokens.last.to(resid.device)][:, None])[:, 0]
    extra: dict[str, Any] = {}
    positions, at = tokens.last.unique(return_inverse=True)
    if want != "all" and _keeps_logits(inner):
        extra["logits_to_keep"] = positions if want == "last" else positions[:1]
        logits = inner(ids, attention_mask=ones, return_type="logits", **extra)
        return None if want == "none" else logits[torch.arange(len(tokens), device=logits.device), at].float()
    logits = inner(ids, attention_mask=ones, return_type="logits").float()
    if want == "none":
        return None
    return logits if want == "all" else logits[torch.arange(len(tokens), device=logits.device), tokens.last]


def _unembed(inner: HookedTransformer, resid: Float[Tensor, "b t d"]) -> Float[Tensor, "b t vocab"]:
    if inner.cfg.normalization_type is not None:
        resid = inner.ln_final(resid)
    # TransformerLens' unembed copies the whole matrix at each call, which for a few rows is most of the time.
    weight, bias = inner.unembed.W_U, inner.unembed.b_U
    logits = (resid.to(weight.device) @ weight + bias).float() if weight.is_floating_point() else inner.unembed(resid)
    cap = inner.cfg.output_logits_soft_cap
    return cap * torch.tanh(logits / cap) if cap > 0 else logits


def _keeps_logits(inner: TransformerBridge) -> bool:
    if getattr(inner, "compatibility_mode", False):
        return False
    return "logits_to_keep" in inspect.signature(type(inner.original_model).forward).parameters
