"""Our addresses → TransformerLens hook points, the same values in the same layout on both backends.

Layouts: resid_pre, resid_mid, resid_post, attn_out, mlp_out ``[batch, position, d_model]``; z and q
``[batch, position, head, d_head]``; k and v ``[batch, position, kv_head, d_head]``, true key-value heads, never
repeated; pattern ``[batch, head, query, key]``; mlp_post ``[batch, position, neuron]``, the input of the down
projection, for gated MLPs act(gate) * up. q and k are what enters the dot product: after their norm and after rotation.
attn_out and mlp_out are what is added to the residual stream: after a post-norm where the model has one.

Names alone prove little: some hooks of the bridge exist and never fire, some fire without effect. So the first question
about a model runs three tokens through it and keeps, per layer, the hooks that fire exactly once, have the right shape
and obey resid_pre + attn_out = resid_mid and resid_mid + mlp_out = resid_post.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from mech_align.errors import UnknownSite, UnsupportedModel
from mech_align.sites import PARTS, ModelShape

Backend = Literal["hooked", "bridge"]
Inner = HookedTransformer | TransformerBridge
Reader = Callable[[Tensor], Tensor | None]

_NAMES: Mapping[str, str] = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "mlp_post": "mlp.hook_post",
    "z": "attn.hook_z",
    "v": "attn.hook_v",
    "pattern": "attn.hook_pattern",
}


@dataclass(frozen=True)
class Survey:
    """What three tokens through a model showed.

    Attributes:
        points: (layer, part) → hook point that can be read.
        reasons: (layer, part) → why it cannot be.
        residual_error: Largest violation of the residual sums above, relative to the stream.
    """

    shape: ModelShape
    points: Mapping[tuple[int, str], HookPoint]
    reasons: Mapping[tuple[int, str], str]
    residual_error: float


# Kept beside the model and not on it: it is TransformerLens' object. The entry dies with the model.
_SURVEYS: "weakref.WeakKeyDictionary[torch.nn.Module, Survey]" = weakref.WeakKeyDictionary()
_WRITABLE: "weakref.WeakKeyDictionary[torch.nn.Module, dict[str, bool]]" = weakref.WeakKeyDictionary()


def backend_of(inner: object) -> Backend:
    """Which of the two kinds of TransformerLens model is this?

    Raises:
        UnsupportedModel: Neither.
    """
    if isinstance(inner, HookedTransformer):
        return "hooked"
    if isinstance(inner, TransformerBridge):
        return "bridge"
    raise UnsupportedModel(
        f"a {type(inner).__name__} is neither a HookedTransformer nor a TransformerBridge",
        hint="give load_model the name or folder of a Hugging Face model instead",
    )


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
    return _candidate(inner, layer, part)


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
def attached(inner: Inner, hooks: Iterable[tuple[int, str, Reader]]) -> Iterator[None]:
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
            calls.append((point, _without_hook(reader)))
    with contextlib.ExitStack() as stack:
        for point, call in calls:
            stack.enter_context(_added(point, call))
        yield


def check_writable(inner: Inner, part: str, layer: int = 0) -> None:
    """Does a change of ``part`` reach the output? Tries it once a model and part, on three tokens.

    On the bridge, attention that is left to Hugging Face (OPT, GPT-J, GPT-Neo, ...) hands its pattern out after use.

    Raises:
        UnsupportedModel: The hook fires, and what it returns is ignored.
    """
    known = _WRITABLE.setdefault(inner, {})
    if part not in known:
        tokens = _probe_tokens(inner)
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


def survey(inner: Inner) -> Survey:
    """Run three tokens and see which hooks this model really has; remembered as long as the model lives."""
    found = _SURVEYS.get(inner)
    if found is None:
        backend_of(inner)
        found = _SURVEYS[inner] = _run_survey(inner)
    return found


# ---------------------------------------------------------------- the survey


def _candidate(inner: Inner, layer: int, part: str) -> str:
    name = _NAMES.get(part) or f"attn.hook_{'rot_' if _rotates(inner) else ''}{part}"
    return f"blocks.{layer}.{name}"


def _rotates(inner: Inner) -> bool:
    return getattr(inner.cfg, "positional_embedding_type", None) == "rotary"


def _without_hook(reader: Reader) -> Any:
    def call(value: Tensor, hook: object) -> Tensor | None:
        return reader(value)

    return call


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


@contextlib.contextmanager
def _added(point: HookPoint, call: Any) -> Iterator[None]:
    point.add_hook(call)
    handle = point.fwd_hooks[-1]
    for other in point.fwd_hooks:
        # A write to the sum must see every edit of its terms, whichever was attached first.
        if getattr(other.user_hook, "runs_last", False):
            point._forward_hooks.move_to_end(other.hook.id)
    try:
        yield
    finally:
        handle.hook.remove()
        # Compared by identity: handles are dataclasses, equal whenever their fields are.
        point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]


def _probe_tokens(inner: Inner) -> Tensor:
    count = max(2, int(inner.cfg.d_vocab))
    ids = [[(7 * index + 1) % count for index in range(min(3, int(inner.cfg.n_ctx)))]]
    return torch.tensor(ids, device=str(inner.cfg.device or "cpu"))


def _run_survey(inner: Inner) -> Survey:
    cfg: Any = inner.cfg
    known: Mapping[str, HookPoint] = inner.hook_dict
    values: dict[tuple[int, str], list[Tensor]] = {}
    points: dict[tuple[int, str], HookPoint] = {}
    reasons: dict[tuple[int, str], str] = {}
    for layer in range(cfg.n_layers):
        for part in PARTS:
            point = known.get(_candidate(inner, layer, part))
            if point is None:
                reasons[layer, part] = _why_missing(cfg, part)
            else:
                points[layer, part] = point
    tokens = _probe_tokens(inner)
    with contextlib.ExitStack() as stack, torch.no_grad():
        for key, point in points.items():
            stack.enter_context(_added(point, _recorder(values.setdefault(key, []))))
        inner(tokens)
    shape = _shape(cfg, {part: found[0] for (_, part), found in values.items() if found})
    for key, found in values.items():
        reason = _unusable(found, key[1], shape, tokens.shape[1])
        if reason:
            reasons[key] = reason
    usable = {key: found[0] for key, found in values.items() if key not in reasons}
    error = _check_sums(usable, reasons, shape.n_layers)
    return Survey(shape, {key: point for key, point in points.items() if key not in reasons}, reasons, error)


def _recorder(into: list[Tensor]) -> Any:
    return _without_hook(lambda value: into.append(value.detach().clone()))


def _why_missing(cfg: Any, part: str) -> str:
    if getattr(cfg, "attn_only", False) and part in ("resid_mid", "mlp_post", "mlp_out"):
        return "the model has attention only, no MLPs"
    if getattr(cfg, "parallel_attn_mlp", False) and part == "resid_mid":
        return "attention and MLP run in parallel on resid_pre, so that there is no stream between them"
    if part == "mlp_post" and getattr(cfg, "num_experts", None):
        return "the MLP is a mixture of experts, without one row of neurons"
    return "TransformerLens has no hook there for this architecture"


def _shape(cfg: Any, seen: Mapping[str, Tensor]) -> ModelShape:
    def size(part: str, axis: int, default: int) -> int:
        return int(seen[part].shape[axis]) if part in seen and seen[part].ndim > max(axis, 1) else default

    heads = int(cfg.n_heads)
    grouped = getattr(cfg, "n_key_value_heads", None)
    if getattr(cfg, "ungroup_grouped_query_attention", False):
        grouped = None
    return ModelShape(
        n_layers=int(cfg.n_layers),
        n_heads=heads,
        n_kv_heads=int(grouped or heads),
        d_model=int(cfg.d_model),
        d_head=int(cfg.d_head),
        d_mlp=0 if getattr(cfg, "attn_only", False) else size("mlp_post", 2, int(getattr(cfg, "d_mlp", None) or 0)),
        d_vocab=int(cfg.d_vocab_out if getattr(cfg, "d_vocab_out", -1) > 0 else cfg.d_vocab),
        n_ctx=int(cfg.n_ctx),
    )


def _unusable(found: list[Tensor], part: str, shape: ModelShape, length: int) -> str:
    if not found:
        return "the hook exists and never fires"
    if len(found) > 1:
        return f"the hook fires {len(found)} times in a forward pass"
    kv, query = [1, length, shape.n_kv_heads, shape.d_head], [1, length, shape.n_heads, shape.d_head]
    wanted = {
        "q": query,
        "z": query,
        "k": kv,
        "v": kv,
        "pattern": [1, shape.n_heads, length, length],
        "mlp_post": [1, length, shape.d_mlp],
    }.get(part, [1, length, shape.d_model])
    got = list(found[0].shape)
    return "" if got == wanted else f"the hook gives {got} where {wanted} is wanted"


def _check_sums(values: Mapping[tuple[int, str], Tensor], reasons: dict[tuple[int, str], str], n_layers: int) -> float:
    """Drop the parts of layers whose residual sums do not hold; return the largest error of those that do."""
    worst = 0.0
    for layer in range(n_layers):
        get = {part: values[layer, part].double() for part in PARTS if (layer, part) in values}
        attn_only = reasons.get((layer, "mlp_out"), "").endswith("no MLPs")
        sums: list[tuple[tuple[str, ...], str]] = [
            (("resid_pre", "attn_out"), "resid_post" if attn_only else "resid_mid")
        ]
        sums.append((("resid_mid", "mlp_out"), "resid_post"))
        if "resid_mid" not in get and not attn_only:
            sums = [(("resid_pre", "attn_out", "mlp_out"), "resid_post")]
        for terms, total in sums:
            if total not in get or any(term not in get for term in terms):
                continue
            tolerance = 1e-4 if values[layer, total].dtype in (torch.float32, torch.float64) else 3e-2
            size = max(float(get[part].abs().max()) for part in (*terms, total))
            error = float((sum(get[term] for term in terms) - get[total]).abs().max()) / max(size, 1e-30)
            if error <= tolerance:
                worst = max(worst, error)
                continue
            for part in (terms[-1], *(("resid_mid",) if "resid_mid" in (*terms, total) else ())):
                reasons[layer, part] = (
                    f"the hook does not give what the stream receives ({' + '.join(terms)} is not {total})"
                )
    return worst
