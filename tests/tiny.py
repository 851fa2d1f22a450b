"""Tiny random Hugging Face models, a word-level tokenizer and LoRA folders, all made on the spot: no network, no files.

Every family of :data:`FAMILIES` is 2 or 3 layers wide enough to tell heads apart. Weights are drawn well away from the
library's defaults (which give nearly flat logits), biases are not zero and norm weights are not one, so that a wrong
conversion shows.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.gemma import GemmaConfig
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.gpt2 import GPT2Config
from transformers.models.gpt_neo import GPTNeoConfig
from transformers.models.gpt_neox import GPTNeoXConfig
from transformers.models.gptj import GPTJConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.olmo import OlmoConfig
from transformers.models.olmo2 import Olmo2Config
from transformers.models.opt import OPTConfig
from transformers.models.phi import PhiConfig
from transformers.models.phi3 import Phi3Config
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

VOCAB = 97
N_CTX = 64

_ROPE = {"rope_type": "default", "rope_theta": 5000.0}
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": N_CTX,
}
_IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _sizes(*drop: str, **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**_SIZES, **_IDS, **changes}.items() if key not in drop}


def _gpt2(**changes: Any) -> GPT2Config:
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": N_CTX}
    return GPT2Config(**{**sizes, "bos_token_id": 1, "eos_token_id": 2, **changes})


def _gpt_neox(**changes: Any) -> GPTNeoXConfig:
    rope = {**_ROPE, "partial_rotary_factor": 0.5}
    base = _sizes("num_key_value_heads", rope_parameters=rope, hidden_act="gelu")
    return GPTNeoXConfig(**{**base, **changes})


def _gptj(**changes: Any) -> GPTJConfig:
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": N_CTX, "rotary_dim": 4}
    return GPTJConfig(**{**sizes, "bos_token_id": 1, "eos_token_id": 2, **changes})


def _gpt_neo(**changes: Any) -> GPTNeoConfig:
    base = {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48}
    window = {"attention_types": [[["global", "local"], 1]], "window_size": 4, "max_position_embeddings": N_CTX}
    return GPTNeoConfig(**{**base, **window, "bos_token_id": 1, "eos_token_id": 2, **changes})


def _opt(**changes: Any) -> OPTConfig:
    sizes = _sizes("num_key_value_heads", "intermediate_size", ffn_dim=48, word_embed_proj_dim=32)
    return OPTConfig(**{**sizes, **changes})


def _gemma2(**changes: Any) -> Gemma2Config:
    base = _sizes(
        head_dim=12,
        query_pre_attn_scalar=10,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=8.0,
        sliding_window=4,
        rope_parameters=_ROPE,
    )
    return Gemma2Config(**{**base, **changes})


def _gemma3(**changes: Any) -> Gemma3TextConfig:
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": 50000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
    }
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    base = _sizes(head_dim=12, query_pre_attn_scalar=10, sliding_window=4, layer_types=kinds, rope_parameters=rope)
    return Gemma3TextConfig(**{**base, **changes})


FAMILIES: Mapping[str, Callable[..., Any]] = {
    "gpt2": _gpt2,
    "llama": lambda **c: LlamaConfig(**{**_sizes(rope_parameters=_ROPE, rms_norm_eps=1e-5), **c}),
    "llama_headdim": lambda **c: LlamaConfig(
        **{**_sizes(rope_parameters=_ROPE, head_dim=12, tie_word_embeddings=True), **c}
    ),
    "mistral": lambda **c: MistralConfig(**{**_sizes(rope_parameters=_ROPE, sliding_window=4), **c}),
    "qwen2": lambda **c: Qwen2Config(**{**_sizes(rope_parameters=_ROPE), **c}),
    "qwen3": lambda **c: Qwen3Config(**{**_sizes(rope_parameters=_ROPE, head_dim=12), **c}),
    "gpt_neox": _gpt_neox,
    "gpt_neox_sequential": lambda **c: _gpt_neox(**{"use_parallel_residual": False, **c}),
    "gemma": lambda **c: GemmaConfig(**{**_sizes(head_dim=12, num_key_value_heads=1, rope_parameters=_ROPE), **c}),
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi": lambda **c: PhiConfig(
        **{**_sizes("num_key_value_heads", rope_parameters={**_ROPE, "partial_rotary_factor": 0.5}), **c}
    ),
    "phi3": lambda **c: Phi3Config(**{**_sizes(rope_parameters=_ROPE, sliding_window=4), **c}),
    "opt": _opt,
    "gptj": _gptj,
    "gpt_neo": _gpt_neo,
    "olmo": lambda **c: OlmoConfig(**{**_sizes(rope_parameters=_ROPE, num_key_value_heads=4), **c}),
    "olmo2": lambda **c: Olmo2Config(**{**_sizes(rope_parameters=_ROPE, num_key_value_heads=4), **c}),
}
"""Family name → function that builds its configuration; keyword arguments replace entries."""

MAIN_FAMILIES = ("gpt2", "llama", "qwen2", "qwen3", "gpt_neox", "gemma")
"""The families of the contract suite."""


def tiny_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of ``family`` in float32 and eval mode; equal arguments give equal weights."""
    config = FAMILIES[family](**changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim >= 2:
                    # Fan-in scaling keeps activations of order 1 at any width, embeddings included.
                    weight.copy_(torch.randn_like(weight) * (0.8 if "emb" in name or "wte" in name else 0.25))
                elif "norm" in name or "ln_" in name:
                    weight.add_(0.3 * torch.randn_like(weight))
                else:
                    weight.copy_(0.3 * torch.randn_like(weight))
    return model.requires_grad_(False)


def save_tiny(family: str, folder: Path, *, tokenizer: bool = True, seed: int = 0, **changes: Any) -> Path:
    """Write a tiny model (and the word-level tokenizer) as a Hugging Face folder and return the folder."""
    tiny_model(family, seed=seed, **changes).save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_words() -> list[str]:
    """The vocabulary of :func:`tiny_tokenizer`, by token id."""
    named = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        "the",
        "a",
        "She",
        "He",
        "Lily",
        "Tim",
        "Anna",
        "Ben",
        "went",
        "to",
        "park",
        ".",
    ]
    return [*named, *(f"w{index}" for index in range(VOCAB - len(named)))]


def tiny_tokenizer(*, bos: bool = True, padding_side: str = "right") -> PreTrainedTokenizerFast:
    """A word-level tokenizer with :data:`VOCAB` entries; puts ``<s>`` in front when ``bos``."""
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(tiny_words())}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    if bos:
        core.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side=padding_side, **special)


def write_adapter(
    folder: Path, family: str, *, zero: bool = False, rslora: bool = False, seed: int = 1, **changes: Any
) -> Path:
    """Write a rank-4 LoRA folder for a tiny model of ``family``: random B, or ``zero`` B, which changes nothing."""
    from peft import LoraConfig, get_peft_model

    base = tiny_model(family, **changes)
    linear = {"gpt2": ["c_attn", "c_proj"], "gpt_neox": ["query_key_value", "dense"], "phi3": ["qkv_proj", "o_proj"]}
    settings = LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=rslora,
        target_modules=linear.get(family, ["q_proj", "v_proj"]),
        fan_in_fan_out=family == "gpt2",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = get_peft_model(base, settings)
        with torch.no_grad():
            for name, weight in wrapped.named_parameters():
                if "lora_A" in name or ("lora_B" in name and not zero):
                    weight.copy_(0.2 * torch.randn_like(weight))
        wrapped.save_pretrained(str(folder))
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file in place."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
