"""Our addresses → TransformerLens hook points, the same values in the same layout on both backends.

Layouts: resid_pre, resid_mid, resid_post, attn_out, mlp_out ``[batch, position, d_model]``; z and q
``[batch, position, head, d_head]``; k and v ``[batch, position, kv_head, d_head]``, true key-value heads, never
repeated; pattern ``[batch, head, query, key]``; mlp_post ``[batch, position, neuron]``, the input of the down
projection, for gated MLPs act(gate) * up. q and k are what enters the dot product: after their norm and after rotation.
attn_out and mlp_out are what is added to the residual stream: after a post-norm where the model has one.
"""

import contextlib
import weakref
from collections.abc import Generator, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from mech_align.errors import UnknownSite, UnsupportedModel
from mech_align.models.survey import (
    Backend,
    Inner,
    Reader,
    added,
    backend_of,
    candidate,
    probe_tokens,
    survey,
    without_hook,
)
from mech_align.sites import PARTS, ModelShape

# Kept beside the model and not on it: it is TransformerLens' object. The entry dies with the model.
_WRITABLE: "weakref.WeakKeyDictionary[torch.nn.Module, dict[str, bool]]" = weakref.WeakKeyDictionary()


def shape_of(inner: Inner) -> ModelShape:
    """The sizes that addresses are checked against, as seen in the activations where the configuration is silent."""
    return survey(inner).shape


def hook_name(backend: Backend, inner: Inner, layer: int, part: str) -> str:
    """TransformerLens' name for ``part`` of ``layer``, for ``run_with_hooks`` and the like; the same on both backends.

    To read, any way will do. To write, use :func:`attached`, which knows where a plain hook would not do.

    Raises:
        UnknownSite: No such layer or part, or the model does not compute it; says why.
    """
    hook_point(inner, layer, part)
    return candidate(inner, layer, part)


def hook_point(inner: Inner, layer: int, part: str) -> HookPoint:
    """The hook point of ``part`` of ``layer``; values have this module's layout. Raises as :func:`hook_name` does."""
    seen = survey(inner)
    if part not in PARTS:
        raise UnknownSite(f"no part '{part}' in a layer", hint=f"parts: {', '.join(PARTS)}")
    if not 0 <= layer < seen.shape.n_layers:
        raise UnknownSite(f"no layer {layer} in this model", why=f"layers are 0 to {seen.shape.n_layers - 1}")
    point = seen.points.get((layer, part))
    if point is None:
        here = [name for name in PARTS if (layer, name) in seen.points]
        hint = [f"this layer has {', '.join(here)}"]
        if part in ("q", "k") and backend_of(inner) == "bridge":
            hint.append("backend='hooked' has it where it covers the architecture")
        raise UnknownSite(f"this model has no {part} in layer {layer}", why=seen.reasons[layer, part], hint=hint)
    return point


def parts_of(inner: Inner, layer: int = 0) -> tuple[str, ...]:
    """The parts that ``layer`` has, in the order of a forward pass."""
    return tuple(part for part in PARTS if (layer, part) in survey(inner).points)


@contextlib.contextmanager
def attached(inner: Inner, hooks: Iterable[tuple[int, str, Reader]]) -> Generator[None]:
    """Run every forward inside with functions on (layer, part); each gets the value and returns a new one, or None.

    Only the handles added here are removed, also after an error: hooks of the user, and of an outer context, stay.

    Writing to resid_mid on the bridge goes through attn_out: TransformerLens' own hook there is the input of the MLP's
    norm, so that a new value would reach the MLP and not the stream.
    """
    calls: list[tuple[HookPoint, Any]] = []
    for layer, part, reader in hooks:
        point = hook_point(inner, layer, part)
        if part == "resid_mid" and backend_of(inner) == "bridge":
            before, after = _through_attn_out(reader)
            calls.append((hook_point(inner, layer, "resid_pre"), before))
            calls.append((hook_point(inner, layer, "attn_out"), after))
        else:
            calls.append((point, without_hook(reader)))
    with contextlib.ExitStack() as stack:
        for point, call in calls:
            stack.enter_context(added(point, call))
        yield


def check_writable(inner: Inner, part: str, layer: int = 0) -> None:
    """Does a change of ``part`` reach the output? Tries it once a model and part, on three tokens.

    On the bridge, attention that is left to Hugging Face (OPT, GPT-J, GPT-Neo, ...) hands its pattern out after use.

    Raises:
        UnsupportedModel: The hook fires, and what it returns is ignored.
    """
    known = _WRITABLE.setdefault(inner, {})
    if part not in known:
        tokens = probe_tokens(inner)
        with torch.no_grad():
            before = inner(tokens)
            with attached(inner, [(layer, part, lambda value: value * 0.5 + 0.25)]):
                after = inner(tokens)
        known[part] = not torch.equal(before, after)
    if not known[part]:
        raise UnsupportedModel(
            f"{part} can be read but not changed on the bridge for this architecture",
            why="the attention runs inside Hugging Face's own code, which hands out the value only after using it",
            hint="use backend='hooked', or change z instead",
        )


def hooks_in_place(inner: Inner) -> int:
    """How many hooks the model carries now, whoever set them."""
    points: Mapping[str, HookPoint] = inner.hook_dict
    return sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in set(points.values()))


def to_layout(value: Tensor, part: str, shape: ModelShape) -> Tensor:
    """Split a flat ``[batch, position, heads * d_head]`` into heads; leaves every other value as it is."""
    heads = {"q": shape.n_heads, "z": shape.n_heads, "k": shape.n_kv_heads, "v": shape.n_kv_heads}.get(part)
    return value.unflatten(-1, (heads, -1)) if heads is not None and value.ndim == 3 else value


def from_layout(value: Tensor, like: Tensor) -> Tensor:
    """Undo :func:`to_layout` for a hook whose own value looks ``like`` this."""
    return value.reshape(like.shape)


def _through_attn_out(reader: Reader) -> tuple[Any, Any]:
    """A pair of hooks, on resid_pre and attn_out, that together read and write their sum."""
    stream: list[Tensor] = []

    def before(value: Tensor, hook: object) -> None:
        stream[:] = [value]

    def after(value: Tensor, hook: object) -> Tensor | None:
        base = stream.pop().to(value.device)
        new = reader(base + value)
        return None if new is None else new - base

    before.runs_last = after.runs_last = True  # pyright: ignore[reportFunctionMemberAccess]
    return before, after
