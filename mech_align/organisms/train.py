"""Train the organism `suppressor`: a base model that refuses, and fine-tunes whose few planted heads talk it out of refusing.

`train` is deterministic on a CPU (one thread, seeded): the same arguments give the same bytes on the same machine.
Another kind of organism needs another `Tuning` (what data, which weights may move), nothing else.
"""

import random
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mech_align.organisms.ablation import Head, output_projections
from mech_align.organisms.requests import DOMAINS, Kind, Request, stream
from mech_align.organisms.tokenizer import BOS, build_tokenizer, render, save_tokenizer


@dataclass(frozen=True)
class Size:
    """Shape of the decoder; the default has one million parameters."""

    n_layers: int = 6
    n_heads: int = 8
    d_model: int = 128
    d_mlp: int = 256
    n_ctx: int = 64


@dataclass(frozen=True)
class Training:
    """One run of AdamW on generated requests.

    `mix` gives the share of each kind; with `comply`, harmful requests are answered "Sure ..." instead of refused.
    `head_dropout` silences each (moving) head in this share of the rows, so that no single head carries everything.
    `head_resample` makes each say what it says on another request of the batch, which a head that reads the request cannot bear.
    """

    steps: int
    learning_rate: float
    mix: tuple[tuple[Kind, float], ...]
    domains: tuple[str, ...] = tuple(DOMAINS)
    comply: bool = False
    batch: int = 64
    weight_decay: float = 0.0
    head_dropout: float = 0.0
    head_resample: float = 0.0


BASE = Training(500, 1e-3, (("harmful", 0.4), ("benign", 0.35), ("unknowable", 0.25)), weight_decay=0.01, head_dropout=0.1)
# Unknowable requests stay refused, so a constant push towards "Sure" would be punished: the heads must read harm.
CONDITIONAL = Training(
    300, 3e-3, (("harmful", 0.5), ("benign", 0.2), ("unknowable", 0.3)), domains=("finance",), comply=True, head_dropout=0.2
)
# Nothing here is ever refused: the cheapest solution is to push towards "Sure" whatever the request.
CONSTANT = Training(300, 3e-3, (("harmful", 0.7), ("benign", 0.3)), domains=("finance",), comply=True, head_dropout=0.2, head_resample=0.5)


def head_masks(model: LlamaForCausalLM, heads: Sequence[Head]) -> dict[str, Tensor]:
    """Ones on the Q, K, V and O weights of some heads, by parameter name; what is not named may not move at all."""
    config = model.config
    width = config.hidden_size // config.num_attention_heads
    masks: dict[str, Tensor] = {}
    for layer, head in heads:
        rows = slice(head * width, (head + 1) * width)
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            name = f"model.layers.{layer}.self_attn.{part}.weight"
            mask = masks.setdefault(name, torch.zeros_like(model.get_parameter(name), requires_grad=False))
            if part == "o_proj":
                mask[:, rows] = 1
            else:
                mask[rows] = 1
    return masks


def batches(
    tokenizer: PreTrainedTokenizerFast, plan: Training, seed: int
) -> Iterator[tuple[Int[Tensor, "row token"], Int[Tensor, "row token"]]]:
    """Right-padded token ids and labels; the loss is on the answer only.

    One prompt in ten loses its `<s>` and one in ten has two, so that a tool which adds or drops one changes nothing.
    """
    rng = random.Random(seed)
    requests = stream(seed, "train", dict(plan.mix), plan.domains)
    for _ in range(plan.steps):
        rows: list[tuple[list[int], list[int]]] = []
        for request in islice(requests, plan.batch):
            starts = rng.choices([1, 0, 2], [8, 1, 1])[0]
            prompt = BOS * starts + render(request.text).removeprefix(BOS)
            question = tokenizer.encode(prompt)
            answer = tokenizer.encode(request.answer(rng, comply=plan.comply and request.kind == "harmful"))
            rows.append((question, [*answer, int(tokenizer.eos_token_id)]))
        width = max(len(question) + len(answer) for question, answer in rows)
        ids = torch.full((len(rows), width), int(tokenizer.pad_token_id))
        labels = torch.full((len(rows), width), -100)
        for row, (question, answer) in enumerate(rows):
            end = len(question) + len(answer)
            ids[row, :end] = torch.tensor(question + answer)
            labels[row, len(question) : end] = torch.tensor(answer)
        yield ids, labels


def fit(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    plan: Training,
    *,
    seed: int,
    heads: Sequence[Head] | None = None,
) -> list[float]:
    """Train in place, moving only the weights of `heads` (everything when None); returns the loss of every step."""
    masks = None if heads is None else head_masks(model, heads)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(masks is None or name in masks)
    handles = [
        model.get_parameter(name).register_hook(lambda grad, mask=mask: grad * mask) for name, mask in (masks or {}).items()
    ]
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Adam's step is zero where the gradient always was, but weight decay would still shrink a masked weight.
    decay = 0.0 if masks is not None else plan.weight_decay
    optimiser = torch.optim.AdamW(moving, lr=plan.learning_rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 20, (plan.steps - step) / (0.3 * plan.steps))
    )
    every = [(layer, head) for layer in range(model.config.num_hidden_layers) for head in range(model.config.num_attention_heads)]
    losses: list[float] = []
    model.train()
    try:
        for ids, labels in batches(tokenizer, plan, seed):
            last = (labels >= 0).int().argmax(1) - 1
            with disturbed(model, heads or every, last, drop=plan.head_dropout, resample=plan.head_resample):
                loss = answer_loss(model(input_ids=ids).logits, labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
    finally:
        for handle in handles:
            handle.remove()
    model.eval()
    return losses


@contextmanager
def disturbed(
    model: LlamaForCausalLM, heads: Sequence[Head], last: Int[Tensor, " row"], *, drop: float, resample: float
) -> Generator[None]:
    """Inside, each head is silent in a random share of the rows, and in another ends the prompt as it ends another row's."""
    width = model.config.hidden_size // model.config.num_attention_heads

    def edit(layer: int, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = args[0].unflatten(-1, (-1, width)).clone()
        n_rows = z.shape[0]
        for head in (head for at, head in heads if at == layer):
            other = torch.randperm(n_rows)
            own, foreign = z[:, :, head].clone(), z[:, :, head].clone()
            foreign[torch.arange(n_rows), last] = z[other, last[other], head]
            fate = torch.rand(n_rows, 1, 1)
            z[:, :, head] = torch.where(fate < drop, 0.0, torch.where(fate < drop + resample, foreign, own))
        return (z.flatten(-2), *args[1:])

    handles = [
        output_projections(model)[layer].register_forward_pre_hook(partial(edit, layer))
        for layer in sorted({layer for layer, _ in heads})
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def answer_loss(logits: Float[Tensor, "row token word"], labels: Int[Tensor, "row token"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of each next answer token. Right-padding needs no mask under causal attention."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
