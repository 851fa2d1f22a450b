"""Hugging Face model → HookedTransformer, from its configuration object and its weights, never from a name or path.

TransformerLens' own loader finds an architecture by looking for words in the name, asks the hub, and knows some
checkpoints' constants by heart. Here the configuration is written out of the Hugging Face one, the activation function
is recognised by its values, and TransformerLens' weight converters do the rest; ``loading`` compares the logits.
"""

import contextlib
import copy
import importlib
import io
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.utilities.activation_functions import SUPPORTED_ACTIVATIONS
from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from mech_align.errors import UnsupportedModel

Settings = dict[str, Any]


def to_hooked(
    hf_model: PreTrainedModel,
    hf_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    weights: str = "raw",
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    name: str = "custom",
) -> HookedTransformer:
    """Which HookedTransformer computes what this Hugging Face model computes?

    Args:
        hf_model: Read, never changed; may sit on another device.
        weights: ``"raw"`` as trained, or ``"folded"`` (norm weights and value biases folded in, writing weights and
            unembedding centred where the architecture allows it: then log-probabilities agree, not logits).

    Returns:
        A frozen HookedTransformer in eval mode. It owns copies of the weights, and a copy of the tokenizer.

    Raises:
        UnsupportedModel: The architecture, or a feature that the configuration switches on, has no counterpart.
    """
    architecture = type(hf_model).__name__
    if architecture not in _FAMILIES:
        raise UnsupportedModel(
            f"HookedTransformer has no conversion for {architecture}",
            hint=["use backend='bridge'", f"covered: {', '.join(sorted(_FAMILIES))}"],
        )
    module, settings_of = _FAMILIES[architecture]
    try:
        settings = {**settings_of(hf_config), "act_fn": activation_name(hf_model)}
        cfg = HookedTransformerConfig(
            **settings,
            model_name=name,
            original_architecture=architecture,
            dtype=dtype or next(hf_model.parameters()).dtype,
            device=str(device),
            init_weights=False,
            default_prepend_bos=prepends_bos(tokenizer),
            tokenizer_prepends_bos=prepends_bos(tokenizer),
        )
        convert = importlib.import_module(f"transformer_lens.pretrained.weight_conversions.{module}")
        state: dict[str, torch.Tensor] = getattr(convert, f"convert_{module}_weights")(hf_model, cfg)
        _add_attention_biases(state, hf_model, cfg)
    except (AttributeError, KeyError, RuntimeError, AssertionError) as error:
        raise UnsupportedModel(
            f"this variant of {architecture} does not convert to HookedTransformer",
            why=f"{type(error).__name__}: {error}",
            hint="use backend='bridge'",
        ) from error
    final, folded = cfg.dtype, weights == "folded"
    if folded and final != torch.float64:
        cfg.dtype = torch.float32  # products of weights, rounded once at the end
    with quiet_construction():
        inner = HookedTransformer(cfg)
        _check_complete(inner, state, architecture)
        inner.load_and_process_state_dict(state, **_processing(weights, cfg))
        if cfg.dtype != final:
            inner.to(final)
    inner.tokenizer = tokenizer_copy(tokenizer)
    return inner.requires_grad_(False).eval()


@contextlib.contextmanager
def quiet_construction() -> Iterator[None]:
    """Hide TransformerLens' print on construction and the one warning that every HookedTransformer gives."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.filterwarnings("ignore", message="HookedTransformer is deprecated", category=DeprecationWarning)
        yield


def prepends_bos(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Does the tokenizer by itself put its beginning-of-sequence token in front of a text?"""
    if tokenizer is None or tokenizer.bos_token_id is None:
        return False
    ids = tokenizer("a")["input_ids"]
    return isinstance(ids, list) and len(ids) > 1 and ids[0] == tokenizer.bos_token_id


def tokenizer_copy(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase | None:
    """A tokenizer for ``inner.to_tokens`` that leaves the user's own as it is.

    ``HookedTransformer.set_tokenizer`` would reload the tokenizer with a forced BOS, from the hub if need be, and set
    pad and BOS tokens on the user's object. The copy pads on the right: with left padding HookedTransformer guesses a mask
    from the pad id, and where pad is EOS is BOS it masks real tokens.
    """
    if tokenizer is None:
        return None
    copied = copy.deepcopy(tokenizer)
    copied.padding_side = "right"
    if copied.pad_token is None and copied.eos_token is not None:
        copied.pad_token = copied.eos_token
    return copied


def activation_name(hf_model: PreTrainedModel) -> str:
    """TransformerLens' name of the MLP activation, found by comparing values: names in old configurations mislead."""
    act = next(
        (
            getattr(module, attribute)
            for module in hf_model.modules()
            for attribute in ("act_fn", "act", "activation_fn")
            if callable(getattr(module, attribute, None))
        ),
        None,
    )
    if act is None:
        raise UnsupportedModel("no activation function found in the MLP", hint="use backend='bridge'")
    grid = torch.linspace(-6, 6, 241)
    # gelu_pytorch_tanh before gelu_new: the same function, which TransformerLens writes out by hand, 5 x slower.
    for name in ("silu", "relu", "gelu", "gelu_pytorch_tanh", "relu2", "gelu_fast", "gelu_new"):
        if torch.allclose(act(grid), SUPPORTED_ACTIVATIONS[name](grid), rtol=1e-6, atol=1e-6):
            return name
    raise UnsupportedModel(
        f"activation function {type(act).__name__} is none of TransformerLens'", hint="use backend='bridge'"
    )


# ---------------------------------------------------------------- settings, family by family


def _refuse(condition: object, feature: str) -> None:
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
        _refuse(rope.get("mscale") or rope.get("mscale_all_dim"), "yarn position scaling with mscale")
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
        _refuse(kind != "default", f"{kind} position scaling")
    return found


def _windows(config: Any, n_layers: int) -> Settings:
    """Which layers see only the last ``sliding_window`` tokens."""
    window = getattr(config, "sliding_window", None)
    kinds: list[str] = list(getattr(config, "layer_types", None) or ["sliding_attention"] * n_layers)
    _refuse(set(kinds) - {"sliding_attention", "full_attention"}, f"attention layers of type {sorted(set(kinds))}")
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
    _refuse(getattr(config, "mlp_bias", False), "biases inside a gated MLP")
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
    _refuse(settings["n_key_value_heads"] not in (None, settings["n_heads"]), f"grouped key-value heads in {family}")
    return {**settings, "n_key_value_heads": None}


def _gemma(config: Any) -> Settings:
    return _gated(config)


def _gemma2(config: Any) -> Settings:
    _refuse(getattr(config, "use_bidirectional_attention", None), "bidirectional attention")
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
    _refuse((near.get("rope_type") or "default") != "default", "scaled positions in sliding layers")
    return {**_gemma2(plain), "use_qk_norm": True, "rotary_base_local": near["rope_theta"]}


def _gpt2(config: Any) -> Settings:
    _refuse(config.add_cross_attention, "cross-attention")
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
    _refuse(config.qk_layernorm, "normalised queries and keys in Phi")
    _refuse(config.num_key_value_heads not in (None, config.num_attention_heads), "grouped key-value heads in Phi")
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
    _refuse(not config.do_layer_norm_before or config._remove_final_layer_norm, "OPT with norms after the blocks")
    _refuse(config.word_embed_proj_dim != config.hidden_size, "OPT with projected embeddings")
    _refuse(not config.enable_bias or not config.layer_norm_elementwise_affine, "OPT without biases")
    return {**_sizes(config), "d_mlp": config.ffn_dim, "eps": 1e-5, "normalization_type": "LN"}


def _olmo(config: Any) -> Settings:
    settings = _full_heads(_gated(config), "OLMo")
    return {**settings, "normalization_type": "LN", "final_rms": False, "eps": 1e-5, "clip_qkv": config.clip_qkv}


_FAMILIES: dict[str, tuple[str, Callable[[Any], Settings]]] = {
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


# ---------------------------------------------------------------- weights


def _add_attention_biases(state: dict[str, torch.Tensor], hf_model: Any, cfg: HookedTransformerConfig) -> None:
    """Add the biases that Llama-like configurations may switch on and TransformerLens' converters leave out."""
    layers = getattr(getattr(hf_model, "model", None), "layers", None)
    if layers is None:
        return
    for index, layer in enumerate(layers):
        attention = layer.self_attn
        for letter, projection in (("Q", "q_proj"), ("K", "k_proj"), ("V", "v_proj")):
            bias = getattr(getattr(attention, projection, None), "bias", None)
            for key in (f"blocks.{index}.attn.b_{letter}", f"blocks.{index}.attn._b_{letter}"):
                if bias is not None and key in state:
                    state[key] = bias.reshape(-1, cfg.d_head)
        out = getattr(getattr(attention, "o_proj", None), "bias", None)
        if out is not None:
            state[f"blocks.{index}.attn.b_O"] = out


def _check_complete(inner: HookedTransformer, state: dict[str, torch.Tensor], architecture: str) -> None:
    """Construction leaves matrices unset, so each must come from the converter; absent biases start at zero."""
    unset = [key for key, _ in inner.named_parameters() if key not in state and ".b_" not in key and "._b_" not in key]
    _refuse(unset, f"{architecture} whose weights lack {', '.join(unset[:3])}")


def _processing(weights: str, cfg: HookedTransformerConfig) -> dict[str, bool]:
    """TransformerLens' processing switches, minus those that would change what this architecture computes."""
    folded = weights == "folded"
    post_norm = cfg.original_architecture in POST_NORM_ARCHITECTURES
    return {
        "fold_ln": folded and not post_norm,
        # Centring is invisible to a norm that subtracts the mean; an RMS norm sees it.
        "center_writing_weights": folded and str(cfg.normalization_type).startswith("LN"),
        "center_unembed": folded and cfg.output_logits_soft_cap <= 0,
        "fold_value_biases": folded,
    }
