"""Reads a wrapped TransformerLens model as a ``Decoder``; architectures that it does not cover give ``None``."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge

from mech_align.models.decoder import Decoder, DecoderLayer, Linear, Mlp, Norm, Rotary

BRIDGE_ARCHITECTURES = frozenset(
    f"{name}ForCausalLM"
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "GPTNeoX", "Gemma", "Gemma2", "Gemma3", "Phi3")
) | {"GPT2LMHeadModel"}

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
}
_NORMS = {"LN": "layer", "LNPre": "layer", "RMS": "rms", "RMSPre": "rms", None: "none"}


def read_decoder(inner: HookedTransformer | TransformerBridge) -> Decoder | None:
    """The model as plain functions, or ``None`` where it has something that ``Decoder`` does not know.

    A reading is never trusted on its own: each sweep compares it with a forward pass of the model.
    """
    with torch.no_grad():
        return _read_hooked(inner) if isinstance(inner, HookedTransformer) else _read_bridge(inner)


def _read_hooked(model: HookedTransformer) -> Decoder | None:
    cfg = model.cfg
    unknown = (
        cfg.num_experts is not None
        or cfg.normalization_type not in _NORMS
        or cfg.positional_embedding_type not in ("standard", "rotary")
        or cfg.attention_dir != "causal"
        or cfg.use_hook_tokens
        or cfg.post_embedding_ln
        or getattr(cfg, "use_logn_attn", False)
        or getattr(cfg, "use_dynamic_ntk", False)
        or cfg.original_architecture in ("Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoForCausalLM", "BertForMaskedLM")
        or (not cfg.attn_only and cfg.act_fn not in _ACTIVATIONS)
    )
    if unknown:
        return None
    final = _hooked_norm(getattr(model, "ln_final", None), cfg)
    return Decoder(
        embedding=model.embed.W_E.detach(),
        layers=tuple(_hooked_layer(block, cfg) for block in model.blocks),
        final_norm=final,
        unembedding=model.unembed.W_U.detach().T,
        unembedding_bias=model.unembed.b_U.detach(),
        position_embedding=model.pos_embed.W_pos.detach() if cfg.positional_embedding_type == "standard" else None,
        softcap=cfg.output_logits_soft_cap if cfg.output_logits_soft_cap > 0 else None,
    )


def _hooked_norm(module: Any, cfg: Any) -> Norm:
    if module is None or isinstance(module, torch.nn.Identity):
        return Norm("none")
    weight, bias = getattr(module, "w", None), getattr(module, "b", None)
    kind = "rms" if "RMS" in type(module).__name__ else "layer"
    return Norm(kind, _detach(weight), _detach(bias), float(module.eps))


def _hooked_layer(block: Any, cfg: Any) -> DecoderLayer:
    attn = block.attn
    # Grouped-query attention keeps its true keys and values under these names; W_K repeats them for each query head.
    grouped = hasattr(attn, "_W_K") and not getattr(cfg, "ungroup_grouped_query_attention", False)
    kv = (cfg.n_key_value_heads or cfg.n_heads) if grouped else cfg.n_heads
    prefix = "_" if grouped else ""
    k_weight, v_weight, k_bias, v_bias = (getattr(attn, prefix + name) for name in ("W_K", "W_V", "b_K", "b_V"))

    def project(weight: Tensor, bias: Tensor) -> Linear:
        # [head, d, d_head] cannot be viewed as [head * d_head, d]: the one copy that this room makes.
        return Linear(weight.detach().permute(0, 2, 1).flatten(0, 1).contiguous(), bias.detach().flatten())

    scale = float(attn.attn_scale)
    rotary = None
    if cfg.positional_embedding_type == "rotary":
        rotary = Rotary(*_hooked_tables(attn, cfg), adjacent=bool(cfg.rotary_adjacent_pairs))
    mlp = None
    if not cfg.attn_only:
        inner = block.mlp
        gate = Linear(inner.W_gate.detach().T) if cfg.gated_mlp else None
        # A gated TransformerLens MLP adds b_in after the gate: act(x W_gate) * (x W_in) + b_in.
        up = Linear(inner.W_in.detach().T, None if gate else inner.b_in.detach())
        down = Linear(inner.W_out.detach().T, inner.b_out.detach())
        mlp = Mlp(up, down, _ACTIVATIONS[cfg.act_fn], gate, inner.b_in.detach() if gate else None)
    both = cfg.use_normalization_before_and_after
    return DecoderLayer(
        norm1=_hooked_norm(block.ln1, cfg),
        query=project(attn.W_Q, attn.b_Q),
        key=project(k_weight, k_bias),
        value=project(v_weight, v_bias),
        output=Linear(attn.W_O.detach().flatten(0, 1).T, attn.b_O.detach()),
        n_heads=cfg.n_heads,
        n_kv_heads=kv,
        scale=1.0 / scale,
        norm2=Norm("none") if cfg.attn_only else _hooked_norm(block.ln2, cfg),
        mlp=mlp,
        rotary=rotary,
        query_norm=_hooked_norm(attn.q_norm, cfg) if attn.q_norm is not None else None,
        key_norm=_hooked_norm(attn.k_norm, cfg) if attn.k_norm is not None else None,
        post_attn=_hooked_norm(block.ln1_post, cfg) if both else None,
        post_mlp=_hooked_norm(block.ln2_post, cfg) if both else None,
        softcap=cfg.attn_scores_soft_cap if cfg.attn_scores_soft_cap > 0 else None,
        window=cfg.window_size if attn.attn_type == "local" else None,
        parallel=bool(cfg.parallel_attn_mlp),
    )


def _hooked_tables(attn: Any, cfg: Any) -> tuple[Tensor, Tensor]:
    cos, sin = attn.rotary_cos, attn.rotary_sin
    if cos.shape[0] < cfg.n_ctx:  # the tables grow on demand; ask for all of them
        sin, cos = attn.calculate_sin_cos_rotary(cfg.rotary_dim, cfg.n_ctx, base=attn._rotary_base(), dtype=cfg.dtype)
    return cos.to(attn.W_Q.device), sin.to(attn.W_Q.device)


def _read_bridge(bridge: TransformerBridge) -> Decoder | None:
    config: Any = bridge.original_model.config
    architecture = (config.architectures or [type(bridge.original_model).__name__])[0]
    if architecture not in BRIDGE_ARCHITECTURES or getattr(bridge, "compatibility_mode", False):
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    rotary = _bridge_rotary(bridge, text)
    layers = tuple(_bridge_layer(block, index, text, architecture, rotary) for index, block in enumerate(bridge.blocks))
    head = _component(bridge.unembed)
    position = getattr(bridge, "pos_embed", None)
    return Decoder(
        embedding=_component(bridge.embed).weight.detach(),
        layers=layers,
        final_norm=_bridge_norm(bridge.ln_final),
        unembedding=head.weight.detach(),
        unembedding_bias=_detach(head.bias),
        position_embedding=_component(position).weight.detach() if architecture == "GPT2LMHeadModel" else None,
        embedding_scale=math.sqrt(text.hidden_size) if architecture.startswith("Gemma") else 1.0,
        softcap=getattr(text, "final_logit_softcapping", None),
    )


def _bridge_layer(block: Any, index: int, cfg: Any, architecture: str, rotary: Any) -> DecoderLayer:
    attn, heads = block.attn, cfg.num_attention_heads
    output = _linear(attn.o)
    size = output.weight.shape[1] // heads
    key = _linear(attn.k)
    types = getattr(cfg, "layer_types", None)
    window = getattr(cfg, "sliding_window", None)
    sliding = types[index] == "sliding_attention" if types else window is not None
    sliding = sliding and getattr(cfg, "use_sliding_window", True)
    scalar = getattr(cfg, "query_pre_attn_scalar", None) or size
    post = architecture in ("Gemma2ForCausalLM", "Gemma3ForCausalLM")
    norm_q, norm_k = getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)
    gate = getattr(block.mlp, "gate", None)
    name = getattr(cfg, "hidden_activation", None) or getattr(cfg, "hidden_act", None) or cfg.activation_function
    return DecoderLayer(
        norm1=_bridge_norm(block.ln1),
        query=_linear(attn.q),
        key=key,
        value=_linear(attn.v),
        output=output,
        n_heads=heads,
        n_kv_heads=key.weight.shape[0] // size,
        scale=_gpt2_scale(cfg, index, size) if architecture == "GPT2LMHeadModel" else scalar**-0.5,
        norm2=_bridge_norm(block.ln2),
        mlp=Mlp(
            up=_linear(getattr(block.mlp, "in")),
            down=_linear(block.mlp.out),
            act=_ACTIVATIONS[name],
            gate=None if gate is None else _linear(gate),
        ),
        rotary=None if rotary is None else rotary[types[index] if types else None],
        query_norm=None if norm_q is None else _bridge_norm(norm_q),
        key_norm=None if norm_k is None else _bridge_norm(norm_k),
        post_attn=_bridge_norm(block.ln1_post) if post else None,
        post_mlp=_bridge_norm(block.ln2_post) if post else None,
        softcap=getattr(cfg, "attn_logit_softcapping", None),
        window=window if sliding else None,
        parallel=architecture == "GPTNeoXForCausalLM" and cfg.use_parallel_residual,
    )


def _gpt2_scale(cfg: Any, index: int, size: int) -> float:
    scale = size**-0.5 if cfg.scale_attn_weights else 1.0
    return scale / (index + 1) if cfg.scale_attn_by_inverse_layer_idx else scale


def _bridge_rotary(bridge: Any, cfg: Any) -> dict[str | None, Rotary] | None:
    module = _component(getattr(bridge, "rotary_emb", None))
    if module is None:
        return None
    device = _component(bridge.embed).weight.device
    positions = torch.arange(cfg.max_position_embeddings, device=device)[None]
    dummy = torch.zeros(1, dtype=torch.float32, device=device)
    types: list[str | None] = list(dict.fromkeys(getattr(cfg, "layer_types", None) or [None]))
    tables: dict[str | None, Rotary] = {}
    for kind in types:
        by_type = kind is not None and hasattr(module, f"{kind}_inv_freq")
        cos, sin = module(dummy, positions, kind) if by_type else module(dummy, positions)
        tables[kind] = Rotary(cos[0], sin[0])
    return tables


def _component(module: Any) -> Any:
    """The Hugging Face module below however many bridge wrappers."""
    while hasattr(module, "original_component") and module.original_component is not None:
        module = module.original_component
    return module


def _linear(module: Any) -> Linear:
    inner = _component(module)
    weight = inner.weight.detach()
    weight = weight.T if type(inner).__name__ == "Conv1D" else weight
    return Linear(weight, _detach(inner.bias))


def _bridge_norm(module: Any) -> Norm:
    inner = _component(module)
    name = type(inner).__name__
    if "RMS" in name:
        eps = getattr(inner, "variance_epsilon", None) or inner.eps
        return Norm("rms", inner.weight.detach(), None, float(eps), 1.0 if name.startswith("Gemma") else 0.0)
    return Norm("layer", inner.weight.detach(), _detach(inner.bias), float(inner.eps))


def _detach(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
