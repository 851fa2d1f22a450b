"""How the configuration of each Hugging Face family reads as settings of a HookedTransformerConfig."""

import copy
import math
from collections.abc import Callable
from typing import Any

from mech_align.errors import UnsupportedModel

Settings = dict[str, Any]


def refuse(condition: object, feature: str) -> None:
    """Stop when a configuration switches on what HookedTransformer lacks."""
    if condition:
        raise UnsupportedModel(f"HookedTransformer does not cover {feature}", hint="use backend='bridge'")


def _rope(rope: Settings | None, d_head: int, n_ctx: int) -> Settings:
    """Rotary settings from the ``rope_parameters`` of transformers 5."""
    rope = rope or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    found: Settings = {
        "positional_embedding_type": "rotary",
        "rotary_base": rope.get("rope_theta", 10000.0),
        "rotary_dim": int(d_head * (rope.get("partial_rotary_factor") or 1.0)),
        "rotary_adjacent_pairs": False,
    }
    if kind == "linear":
        found["rotary_scaling_factor"] = float(rope["factor"])
    elif kind == "llama3":
        found |= {
            "use_NTK_by_parts_rope": True,
            "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
            "NTK_by_parts_factor": rope["factor"],
            "NTK_original_ctx_len": rope.get("original_max_position_embeddings", n_ctx),
        }
    elif kind == "yarn":
        refuse(rope.get("mscale") or rope.get("mscale_all_dim"), "yarn position scaling with mscale")
        factor = float(rope["factor"])
        found |= {
            "use_yarn_rope": True,
            "yarn_factor": factor,
            "yarn_attention_factor": rope.get("attention_factor")
            or (0.1 * math.log(factor) + 1 if factor > 1 else 1.0),
            "yarn_beta_fast": float(rope.get("beta_fast") or 32),
            "yarn_beta_slow": float(rope.get("beta_slow") or 1),
            "yarn_original_max_position_embeddings": rope.get("original_max_position_embeddings") or n_ctx,
            "yarn_truncate": rope.get("truncate", True),
        }
    else:
        refuse(kind != "default", f"{kind} position scaling")
    return found


def _windows(config: Any, n_layers: int) -> Settings:
    """Which layers see only the last ``sliding_window`` tokens."""
    window = getattr(config, "sliding_window", None)
    kinds: list[str] = list(getattr(config, "layer_types", None) or ["sliding_attention"] * n_layers)
    refuse(set(kinds) - {"sliding_attention", "full_attention"}, f"attention layers of type {sorted(set(kinds))}")
    if not window or "sliding_attention" not in kinds:
        return {}
    local = ["local" if kind == "sliding_attention" else "global" for kind in kinds]
    return {"use_local_attn": True, "window_size": int(window), "attn_types": local}


def _sizes(config: Any) -> Settings:
    """Sizes under the names that most configurations share."""
    heads: int = config.num_attention_heads
    return {
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "n_heads": heads,
        "d_head": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "n_ctx": config.max_position_embeddings,
        "d_vocab": config.vocab_size,
    }


def _gated(config: Any) -> Settings:
    """The Llama plan: RMS norms, rotary positions, gated MLP, grouped keys and values, perhaps sliding windows."""
    sizes = _sizes(config)
    refuse(getattr(config, "mlp_bias", False), "biases inside a gated MLP")
    rope = getattr(config, "rope_parameters", None)
    return {
        **sizes,
        "d_mlp": config.intermediate_size,
        "n_key_value_heads": config.num_key_value_heads,
        "eps": getattr(config, "rms_norm_eps", 1e-5),
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        **_windows(config, sizes["n_layers"]),
        **_rope(rope, sizes["d_head"], sizes["n_ctx"]),
    }


def _full_heads(settings: Settings, family: str) -> Settings:
    """For converters that know one key-value head per head only."""
    refuse(settings["n_key_value_heads"] not in (None, settings["n_heads"]), f"grouped key-value heads in {family}")
    return {**settings, "n_key_value_heads": None}


def _gemma(config: Any) -> Settings:
    return _gated(config)


def _gemma2(config: Any) -> Settings:
    refuse(getattr(config, "use_bidirectional_attention", None), "bidirectional attention")
    return {
        **_gated(config),
        "use_normalization_before_and_after": True,
        "attn_scale": math.sqrt(config.query_pre_attn_scalar),
        "attn_scores_soft_cap": config.attn_logit_softcapping or -1.0,
        "output_logits_soft_cap": config.final_logit_softcapping or -1.0,
    }


def _gemma3(config: Any) -> Settings:
    plain = copy.copy(config)
    plain.rope_parameters = dict(config.rope_parameters["full_attention"])
    near = config.rope_parameters["sliding_attention"]
    refuse((near.get("rope_type") or "default") != "default", "scaled positions in sliding layers")
    return {**_gemma2(plain), "use_qk_norm": True, "rotary_base_local": near["rope_theta"]}


def _gpt2(config: Any) -> Settings:
    refuse(config.add_cross_attention, "cross-attention")
    return {
        "n_layers": config.n_layer,
        "d_model": config.n_embd,
        "n_heads": config.n_head,
        "d_head": config.n_embd // config.n_head,
        "d_mlp": config.n_inner or 4 * config.n_embd,
        "n_ctx": config.n_positions,
        "d_vocab": config.vocab_size,
        "eps": config.layer_norm_epsilon,
        "use_attn_scale": config.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "normalization_type": "LN",
    }


def _gptj(config: Any) -> Settings:
    d_head = config.n_embd // config.n_head
    return {
        **{
            key: value
            for key, value in _gpt2(_WithDefaults(config)).items()
            if not key.startswith(("use_attn", "scale_"))
        },
        "parallel_attn_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": config.rotary_dim or d_head,
        "rotary_adjacent_pairs": True,
    }


class _WithDefaults:
    """A configuration read with GPT-2's defaults for what it lacks."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        gpt2 = {"add_cross_attention": False, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
        return getattr(self._config, name, gpt2[name]) if name in gpt2 else getattr(self._config, name)


def _gpt_neo(config: Any) -> Settings:
    return {
        "n_layers": config.num_layers,
        "d_model": config.hidden_size,
        "n_heads": config.num_heads,
        "d_head": config.hidden_size // config.num_heads,
        "d_mlp": config.intermediate_size or 4 * config.hidden_size,
        "n_ctx": config.max_position_embeddings,
        "d_vocab": config.vocab_size,
        "eps": config.layer_norm_epsilon,
        "use_attn_scale": False,
        "use_local_attn": True,
        "attn_types": list(config.attention_layers),
        "window_size": config.window_size,
        "normalization_type": "LN",
    }


def _gpt_neox(config: Any) -> Settings:
    sizes = _sizes(config)
    return {
        **sizes,
        "d_mlp": config.intermediate_size,
        "eps": config.layer_norm_eps,
        "parallel_attn_mlp": config.use_parallel_residual,
        "normalization_type": "LN",
        **_rope(config.rope_parameters, sizes["d_head"], sizes["n_ctx"]),
    }


def _phi(config: Any) -> Settings:
    refuse(config.qk_layernorm, "normalised queries and keys in Phi")
    refuse(config.num_key_value_heads not in (None, config.num_attention_heads), "grouped key-value heads in Phi")
    sizes = _sizes(config)
    return {
        **sizes,
        "d_mlp": config.intermediate_size,
        "eps": config.layer_norm_eps,
        "parallel_attn_mlp": True,
        "normalization_type": "LN",
        **_rope(config.rope_parameters, sizes["d_head"], sizes["n_ctx"]),
    }


def _opt(config: Any) -> Settings:
    refuse(not config.do_layer_norm_before or config._remove_final_layer_norm, "OPT with norms after the blocks")
    refuse(config.word_embed_proj_dim != config.hidden_size, "OPT with projected embeddings")
    refuse(not config.enable_bias or not config.layer_norm_elementwise_affine, "OPT without biases")
    return {**_sizes(config), "d_mlp": config.ffn_dim, "eps": 1e-5, "normalization_type": "LN"}


def _olmo(config: Any) -> Settings:
    settings = _full_heads(_gated(config), "OLMo")
    return {**settings, "normalization_type": "LN", "final_rms": False, "eps": 1e-5, "clip_qkv": config.clip_qkv}


FAMILIES: dict[str, tuple[str, Callable[[Any], Settings]]] = {
    "GPT2LMHeadModel": ("gpt2", _gpt2),
    "LlamaForCausalLM": ("llama", _gated),
    "MistralForCausalLM": ("mistral", _gated),
    "Qwen2ForCausalLM": ("qwen2", _gated),
    "Qwen3ForCausalLM": ("qwen3", lambda config: {**_gated(config), "use_qk_norm": True}),
    "GPTNeoXForCausalLM": ("neox", _gpt_neox),
    "GemmaForCausalLM": ("gemma", _gemma),
    "Gemma2ForCausalLM": ("gemma", _gemma2),
    "Gemma3ForCausalLM": ("gemma", _gemma3),
    "PhiForCausalLM": ("phi", _phi),
    "Phi3ForCausalLM": ("phi3", _gated),
    "OPTForCausalLM": ("opt", _opt),
    "GPTJForCausalLM": ("gptj", _gptj),
    "GPTNeoForCausalLM": ("neo", _gpt_neo),
    "OlmoForCausalLM": ("olmo", _olmo),
    "Olmo2ForCausalLM": ("olmo2", lambda config: _full_heads(_gated(config), "OLMo 2")),
}
"""Hugging Face class → (TransformerLens converter, how its configuration reads)."""
