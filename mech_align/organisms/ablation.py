"""Greedy answers of a Hugging Face Llama while some heads say something else; plain hooks, so that it checks the fast engine.

A head's output is its slice of the input of `o_proj` (TransformerLens: `hook_z`). It is replaced at every position, in the
prompt and in the answer, by a constant (zero, a mean) or by what the same head says in another model on the same tokens.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM

Head = tuple[int, int]


def output_projections(model: LlamaForCausalLM) -> list[nn.Module]:
    """The output projection of every attention block, first layer first."""
    return [block.self_attn.o_proj for block in model.model.layers]


@contextmanager
def captured(model: LlamaForCausalLM, kept: dict[int, Float[Tensor, "row token model"]]) -> Generator[None]:
    """Inside, every forward leaves the head outputs of each layer in `kept`."""

    def keep(layer: int):
        return lambda module, args: kept.__setitem__(layer, args[0].detach())

    handles = [module.register_forward_pre_hook(keep(layer)) for layer, module in enumerate(output_projections(model))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced(
    model: LlamaForCausalLM, heads: Sequence[Head], values: Mapping[int, Float[Tensor, "*row_token model"]]
) -> Generator[None]:
    """Inside, the outputs of `heads` are those in `values` (by layer, all heads side by side), read afresh each forward."""
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


@torch.inference_mode()
def greedy(
    model: LlamaForCausalLM,
    ids: Int[Tensor, "row token"],
    *,
    new_tokens: int,
    heads: Sequence[Head] = (),
    values: Mapping[int, Tensor] | LlamaForCausalLM | None = None,
) -> Int[Tensor, "row new"]:
    """Most likely answers, with a KV cache; `values` is a table of constants or the model that the heads' outputs come from."""
    donor = values if isinstance(values, LlamaForCausalLM) else None
    table: dict[int, Tensor] = {} if donor is not None or values is None else dict(values)  # type: ignore[arg-type]
    caches = (DynamicCache(), DynamicCache())
    step, answer = ids, []
    for _ in range(new_tokens):
        if donor is not None:
            with captured(donor, table):
                donor(input_ids=step, past_key_values=caches[1])
        with replaced(model, heads, table):
            logits = model(input_ids=step, past_key_values=caches[0], logits_to_keep=1).logits
        step = logits[:, -1].argmax(-1, keepdim=True)
        answer.append(step)
    return torch.cat(answer, 1)
