"""Answers of a Hugging Face Llama while some heads say something else; plain hooks, a check on faster engines.

A head's output is its slice of the input of `o_proj` (TransformerLens: `hook_z`). It is replaced at every position, in
the prompt and in the answer, by a constant (zero, a mean) or by what the same head says in another model on
the same tokens.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

Head = tuple[int, int]
Values = Mapping[int, Tensor] | LlamaForCausalLM


def output_projections(model: LlamaForCausalLM) -> list[nn.Linear]:
    """The output projection of every attention block, first layer first."""
    blocks = cast(list[LlamaDecoderLayer], list(model.model.layers))
    return [block.self_attn.o_proj for block in blocks]


@contextmanager
def captured(model: LlamaForCausalLM, kept: dict[int, Float[Tensor, "row token model"]]) -> Generator[None]:
    """Inside, every forward leaves the head outputs of each layer in `kept`."""

    def keep(layer: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept[layer] = args[0].detach()

    modules = output_projections(model)
    handles = [module.register_forward_pre_hook(partial(keep, layer)) for layer, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced(
    model: LlamaForCausalLM, heads: Sequence[Head], values: Mapping[int, Float[Tensor, "*row_token model"]]
) -> Generator[None]:
    """Inside, the outputs of `heads` are those in `values` (by layer, heads side by side), read afresh each forward."""
    width = model.config.hidden_size // model.config.num_attention_heads

    def swap(layer: int, head: int):
        def edit(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0].clone()
            span = slice(head * width, (head + 1) * width)
            z[..., span] = values[layer][..., span]
            return (z, *args[1:])

        return edit

    handles = [output_projections(model)[layer].register_forward_pre_hook(swap(layer, head)) for layer, head in heads]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def last_positions(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids, row numbers and last positions: under causal attention no prompt sees its padding."""
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    return ids, torch.arange(len(prompts)), torch.tensor([len(prompt) - 1 for prompt in prompts])


@torch.inference_mode()
def mean_outputs(model: LlamaForCausalLM, prompts: Sequence[Sequence[int]]) -> dict[int, Float[Tensor, " model"]]:
    """Mean head outputs where the prompts end, by layer."""
    ids, rows, last = last_positions(prompts)
    kept: dict[int, Tensor] = {}
    with captured(model, kept):
        model(input_ids=ids)
    return {layer: z[rows, last].mean(0) for layer, z in kept.items()}


@torch.inference_mode()
def next_logits(
    model: LlamaForCausalLM, prompts: Sequence[Sequence[int]], heads: Sequence[Head] = (), values: Values | None = None
) -> Float[Tensor, "prompt word"]:
    """Logits of the first answer token while `heads` say what `values` has: a table by layer, or another model."""
    ids, rows, last = last_positions(prompts)
    table: dict[int, Tensor] = {}
    if isinstance(values, LlamaForCausalLM):
        with captured(values, table):
            values(input_ids=ids)
    elif values is not None:
        table.update(values)
    with replaced(model, heads, table):
        return model(input_ids=ids).logits[rows, last]


@torch.inference_mode()
def greedy(
    model: LlamaForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    heads: Sequence[Head] = (),
    values: Values | None = None,
) -> Int[Tensor, "prompt new"]:
    """Most likely answers, left-padded behind a mask and with a KV cache, while `heads` say what `values` has."""
    width = max(map(len, prompts))
    step = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    position = (mask.cumsum(1) - 1).clamp(min=0)
    donor = values if isinstance(values, LlamaForCausalLM) else None
    table: dict[int, Tensor] = {} if values is None or isinstance(values, LlamaForCausalLM) else dict(values)
    caches = DynamicCache(), DynamicCache()
    answer: list[Tensor] = []
    for _ in range(new_tokens):
        inputs = {"input_ids": step, "attention_mask": mask, "position_ids": position}
        if donor is not None:
            with captured(donor, table):
                donor(**inputs, past_key_values=caches[1])
        with replaced(model, heads, table):
            logits = model(**inputs, past_key_values=caches[0], logits_to_keep=1).logits
        step = logits[:, -1].argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(step)], 1)
        position = position[:, -1:] + 1
        answer.append(step)
    return torch.cat(answer, 1)


@torch.inference_mode()
def direct_effects(
    model: LlamaForCausalLM, prompts: Sequence[Sequence[int]], up: int, down: int
) -> Float[Tensor, "layer head"]:
    r"""Mean direct effect of every head on logit(up) - logit(down): $z_h W_O^h$ through the final norm's own scale."""
    ids, rows, last = last_positions(prompts)
    kept: dict[int, Tensor] = {}
    residual: list[Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: residual.append(args[0][rows, last]))
    try:
        with captured(model, kept):
            model(input_ids=ids)
    finally:
        handle.remove()
    scale = residual[0].square().mean(-1, keepdim=True).add(model.config.rms_norm_eps).rsqrt()
    read = model.model.norm.weight * (model.lm_head.weight[up] - model.lm_head.weight[down])
    n_heads = model.config.num_attention_heads
    effects = [
        ((kept[layer][rows, last] * scale).mean(0) * (read @ module.weight)).unflatten(-1, (n_heads, -1)).sum(-1)
        for layer, module in enumerate(output_projections(model))
    ]
    return torch.stack(effects)
