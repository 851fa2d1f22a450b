"""Which hooks does a TransformerLens model really have? Found by running three tokens through it.

Names alone prove little: some hooks of the bridge exist and never fire, some fire without effect. A part of a layer
counts when its hook fires exactly once in a forward pass, has the right shape, and obeys resid_pre + attn_out =
resid_mid and resid_mid + mlp_out = resid_post.
"""

import contextlib
import weakref
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from mech_align.errors import UnsupportedModel
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


def survey(inner: Inner) -> Survey:
    """Run three tokens and see which hooks this model really has; remembered as long as the model lives."""
    found = _SURVEYS.get(inner)
    if found is None:
        backend_of(inner)
        found = _SURVEYS[inner] = _run_survey(inner)
    return found


def candidate(inner: Inner, layer: int, part: str) -> str:
    """TransformerLens' name for a part, if the model has it."""
    name = _NAMES.get(part) or f"attn.hook_{'rot_' if _rotates(inner) else ''}{part}"
    return f"blocks.{layer}.{name}"


def _rotates(inner: Inner) -> bool:
    return getattr(inner.cfg, "positional_embedding_type", None) == "rotary"


def without_hook(reader: Reader) -> Any:
    """A reader as TransformerLens calls hooks."""

    def call(value: Tensor, hook: object) -> Tensor | None:
        return reader(value)

    return call


@contextlib.contextmanager
def added(point: HookPoint, call: Any) -> Generator[None]:
    """Keep one hook on a point for as long as the context lasts; touch no other."""
    point.add_hook(call)
    handle = point.fwd_hooks[-1]
    for other in point.fwd_hooks:
        # A write to the sum must see every edit of its terms, whichever was attached first.
        if getattr(other.user_hook, "runs_last", False):
            order: Any = point._forward_hooks  # pyright: ignore[reportPrivateUsage]
            order.move_to_end(other.hook.id)
    try:
        yield
    finally:
        handle.hook.remove()
        # Compared by identity: handles are dataclasses, equal whenever their fields are.
        point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]


def probe_tokens(inner: Inner) -> Tensor:
    """A few valid token ids where the model wants them."""
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
            point = known.get(candidate(inner, layer, part))
            reason = _why_absent(cfg, part)
            if point is None or reason:
                reasons[layer, part] = reason or "TransformerLens has no hook there for this architecture"
            else:
                points[layer, part] = point
    tokens = probe_tokens(inner)
    with contextlib.ExitStack() as stack, torch.no_grad():
        for key, point in points.items():
            stack.enter_context(added(point, _recorder(values.setdefault(key, []))))
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
    return without_hook(lambda value: into.append(value.detach().clone()))


def _why_absent(cfg: Any, part: str) -> str:
    """Why a model of this plan has no such part, or nothing; TransformerLens declares some hooks all the same."""
    if getattr(cfg, "attn_only", False) and part in ("resid_mid", "mlp_post", "mlp_out"):
        return "the model has attention only, no MLPs"
    if getattr(cfg, "parallel_attn_mlp", False) and part == "resid_mid":
        return "attention and MLP run in parallel on resid_pre, so that there is no stream between them"
    if part == "mlp_post" and getattr(cfg, "num_experts", None):
        return "the MLP is a mixture of experts, without one row of neurons"
    return ""


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
