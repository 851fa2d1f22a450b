"""Hugging Face model → HookedTransformer, from its configuration object and its weights, never from a name or path.

TransformerLens' own loader finds an architecture by looking for words in the name, asks the hub, and knows some
checkpoints' constants by heart. Here the configuration is written out of the Hugging Face one, the activation function
is recognised by its values, and TransformerLens' weight converters do the rest; ``loading`` compares the logits.
"""

import contextlib
import copy
import importlib
import io
import warnings
from collections.abc import Generator
from typing import Any

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.utilities.activation_functions import SUPPORTED_ACTIVATIONS
from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from mech_align.errors import UnsupportedModel
from mech_align.models.families import FAMILIES, Settings, refuse


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
    if architecture not in FAMILIES:
        raise UnsupportedModel(
            f"HookedTransformer has no conversion for {architecture}",
            hint=["use backend='bridge'", f"covered: {', '.join(sorted(FAMILIES))}"],
        )
    module, settings_of = FAMILIES[architecture]
    try:
        settings: Settings = {
            **settings_of(hf_config),
            "act_fn": activation_name(hf_model),
            "model_name": name,
            "original_architecture": architecture,
            "dtype": dtype or next(hf_model.parameters()).dtype,
            "device": str(device),
            "init_weights": False,
            "default_prepend_bos": prepends_bos(tokenizer),
            "tokenizer_prepends_bos": prepends_bos(tokenizer),
        }
        cfg = HookedTransformerConfig(**settings)
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
        inner.load_and_process_state_dict(state, **processing(weights, cfg))
        if cfg.dtype != final:
            inner.to(final)
    inner.tokenizer = tokenizer_copy(tokenizer)
    return inner.requires_grad_(False).eval()


@contextlib.contextmanager
def quiet_construction() -> Generator[None]:
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
    pad and BOS tokens on the user's object. The copy pads on the right: with left padding HookedTransformer guesses a
    mask from the pad id, and where pad is EOS is BOS it masks real tokens.
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
    refuse(unset, f"{architecture} whose weights lack {', '.join(unset[:3])}")


def processing(weights: str, cfg: HookedTransformerConfig) -> dict[str, bool]:
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
