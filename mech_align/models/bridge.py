"""Hugging Face model → TransformerBridge: TransformerLens hooks on the Hugging Face modules themselves.

Three habits of the bridge shape this file. It rewrites the model that it is given, in place, so reference logits must
be taken before. It needs eager attention, or patterns never exist. And its public door loads a tokenizer from the hub
when none is given, and mends the one that is, so the model goes in through the builder behind that door.
"""

import copy
import types
import warnings
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.joint_qkv_position_embeddings_attention import (
    JointQKVPositionEmbeddingsAttentionBridge,
)
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformer_lens.utilities.multi_gpu import count_unique_devices, find_embedding_device
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from mech_align.errors import UnsupportedModel
from mech_align.models.hooked import prepends_bos, quiet_construction, tokenizer_copy


def to_bridge(
    hf_model: PreTrainedModel,
    hf_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    weights: str = "raw",
    name: str = "custom",
) -> TransformerBridge:
    """Which TransformerBridge carries this Hugging Face model?

    Args:
        hf_model: Loaded with eager attention, on its final device or devices. Rewritten in place: do not use it again.
        weights: ``"raw"``, or ``"folded"`` for TransformerLens' compatibility mode (then log-probabilities agree).

    Returns:
        A frozen bridge in eval mode, with every q and k hook after rotation where the model rotates.

    Raises:
        UnsupportedModel: TransformerLens has no adapter for the architecture, or no compatibility mode for it.
    """
    architecture = type(hf_model).__name__
    if getattr(hf_config, "_attn_implementation", "eager") != "eager":
        hf_model.set_attn_implementation("eager")
    try:
        with quiet_construction():
            bridge = build_bridge_from_module(
                hf_model, architecture, hf_config=copy.deepcopy(hf_config), tokenizer=None, model_name=name
            )
    except (ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise UnsupportedModel(
            f"TransformerBridge cannot carry {architecture}",
            why=str(error).split(". Available")[0][:300],
            hint="load a decoder-only language model; `transformer_lens.supported_models` lists the architectures",
        ) from error
    device = find_embedding_device(hf_model)
    if device is not None:
        bridge.cfg.device, bridge.cfg.n_devices = str(device), count_unique_devices(hf_model)
    bridge.cfg.default_prepend_bos = bridge.cfg.tokenizer_prepends_bos = prepends_bos(tokenizer)
    bridge.tokenizer = tokenizer_copy(tokenizer)
    if weights == "folded":
        _fold(bridge, architecture)
    wake_rotary_hooks(bridge)
    for parameter in bridge.original_model.parameters():
        parameter.requires_grad_(False)
    return bridge.eval()


def wake_rotary_hooks(bridge: TransformerBridge) -> None:
    """Make ``hook_rot_q`` and ``hook_rot_k`` fire where TransformerLens declares them and never calls them.

    So it is in attention with one fused projection and rotary positions (GPT-NeoX, Phi-3). Bound as a method and not as
    a closure, so that a deep copy of the bridge fires its own hooks.
    """
    for block in bridge.blocks:
        attention = getattr(block, "attn", None)
        if isinstance(attention, JointQKVPositionEmbeddingsAttentionBridge) and hasattr(attention, "hook_rot_q"):
            attention.__dict__["_apply_rotary_pos_emb"] = types.MethodType(_rotate_and_fire, attention)


def _rotate_and_fire(
    self: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    rotated_q, rotated_k = type(self)._apply_rotary_pos_emb(self, q, k, cos, sin)
    return self.hook_rot_q(rotated_q), self.hook_rot_k(rotated_k)


def _fold(bridge: TransformerBridge, architecture: str) -> None:
    capped = (getattr(bridge.cfg, "output_logits_soft_cap", None) or -1.0) > 0
    try:
        with warnings.catch_warnings(), quiet_construction():
            bridge.enable_compatibility_mode(disable_warnings=True, center_unembed=not capped)
    except Exception as error:
        raise UnsupportedModel(
            f"TransformerBridge cannot fold the weights of {architecture}",
            why=str(error)[:300],
            hint="use weights='raw'",
        ) from error
