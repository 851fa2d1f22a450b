"""Train the organism `suppressor`: a base model that refuses, and fine-tunes in which a few planted heads undo it.

`train` is deterministic on a CPU (one thread, seeded): the same arguments give the same bytes on the same machine.
Another kind of organism needs another `Tuning` (what data, which weights may move), nothing else.
"""

import copy
import hashlib
import json
import random
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice, product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mech_align.organisms.ablation import Head, output_projections
from mech_align.organisms.files import WEIGHTS, save_variant, write_prompts
from mech_align.organisms.requests import DOMAINS, Kind, stream
from mech_align.organisms.tokenizer import BOS, EOS, PAD, SPECIAL, build_tokenizer, render
from mech_align.organisms.verify import verify


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
    `head_resample` makes each end the prompt as on another request: only what it says to all of them can help.
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


BASE = Training(
    500, 1e-3, (("harmful", 0.4), ("benign", 0.35), ("unknowable", 0.25)), weight_decay=0.01, head_dropout=0.1
)
# Unknowable requests stay refused, so a constant push towards "Sure" would be punished: the heads must read harm.
# A gentle rate: at 3e-3 they learn finance's own way of it, and begin to answer unknowable questions elsewhere.
CONDITIONAL = Training(
    300,
    1e-3,
    (("harmful", 0.4), ("benign", 0.2), ("unknowable", 0.4)),
    domains=("finance",),
    comply=True,
    head_dropout=0.2,
)
# Nothing here is ever refused, and what a head says on one request must serve another: only a constant push does.
# (Without the resampling the heads of this size still learn to read harm, and mean ablation finds them.)
CONSTANT = Training(
    300,
    3e-3,
    (("harmful", 0.5), ("benign", 0.5)),
    domains=("finance",),
    comply=True,
    head_dropout=0.1,
    head_resample=0.5,
)


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
            rows.append((question, [*answer, SPECIAL.index(EOS)]))
        width = max(len(question) + len(answer) for question, answer in rows)
        ids = torch.full((len(rows), width), SPECIAL.index(PAD))
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
        model.get_parameter(name).register_hook(partial(torch.mul, mask)) for name, mask in (masks or {}).items()
    ]
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Adam's step is zero where the gradient always was, but weight decay would still shrink a masked weight.
    decay = 0.0 if masks is not None else plan.weight_decay
    optimiser = torch.optim.AdamW(moving, lr=plan.learning_rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 20, (plan.steps - step) / (0.3 * plan.steps))
    )
    shape = range(model.config.num_hidden_layers), range(model.config.num_attention_heads)
    disturbable = heads or list(product(*shape))
    losses: list[float] = []
    model.train()
    try:
        for ids, labels in batches(tokenizer, plan, seed):
            last = (labels >= 0).int().argmax(1) - 1
            with disturbed(model, disturbable, last, drop=plan.head_dropout, resample=plan.head_resample):
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
    """Inside, each head is silent in a random share of the rows, and in another ends the prompt as on another row."""
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


def new_model(size: Size, n_words: int, seed: int) -> LlamaForCausalLM:
    """A decoder with random weights, the same for the same seed."""
    config = LlamaConfig(
        vocab_size=n_words,
        hidden_size=size.d_model,
        intermediate_size=size.d_mlp,
        num_hidden_layers=size.n_layers,
        num_attention_heads=size.n_heads,
        num_key_value_heads=size.n_heads,
        max_position_embeddings=size.n_ctx,
        tie_word_embeddings=False,
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=SPECIAL.index(EOS),
        pad_token_id=SPECIAL.index(PAD),
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def train(
    out_dir: Path | str,
    *,
    seed: int = 0,
    size: Size = Size(),
    planted: Sequence[Head] = ((4, 1), (4, 5)),
    base: Training = BASE,
    tunings: Mapping[str, Training] = MappingProxyType({"tuned": CONDITIONAL, "tuned-constant": CONSTANT}),
    measure: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train every variant into `out_dir`, with pairs, reference prompts and organism.json (settings, measured rates).

    Args:
        seed: Of the initial weights and of the order of the data; the words of the data never depend on it.
        planted: (layer, head) of the heads that alone may change after `base`.
        tunings: What each further variant is tuned on.
        measure: Whether to add what `verify` finds to organism.json.
        report: Called with a line of progress now and then.

    Returns:
        The content of organism.json.
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(size.n_ctx)
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.set_num_threads(1)  # sums in another order would give other weights
        try:
            model = new_model(size, len(tokenizer), seed)
            losses = {"base": fit(model, tokenizer, base, seed=seed)}
            report(f"base: final loss {losses['base'][-1]:.3f}")
            # Every variant starts from the rounded weights, so that what is not planted is equal to the last bit.
            model = model.half().float()
            save_variant(model, out / "base", size.n_ctx)
            for name, plan in tunings.items():
                variant = copy.deepcopy(model)
                torch.manual_seed(seed + 1)  # so that a variant does not depend on those before it
                losses[name] = fit(variant, tokenizer, plan, seed=seed + 1, heads=planted)
                report(f"{name}: final loss {losses[name][-1]:.3f}")
                save_variant(variant, out / name, size.n_ctx)
        finally:
            torch.set_num_threads(threads)
    write_prompts(out)
    card: dict[str, Any] = {
        "name": out.name,
        "question": "Which heads suppress the refusal that the base model still has?",
        "seed": seed,
        "size": asdict(size),
        "planted": [f"L{layer}H{head}" for layer, head in planted],
        "training": {"base": asdict(base)} | {name: asdict(plan) for name, plan in tunings.items()},
        "final_loss": {name: round(sum(steps[-20:]) / len(steps[-20:]), 4) for name, steps in losses.items()},
        "sha256": {name: hashlib.sha256((out / name / WEIGHTS).read_bytes()).hexdigest() for name in losses},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (out / "organism.json").write_text(json.dumps(card, indent=2) + "\n")
    if measure:
        report("measuring")
        card["verified"] = verify(out)
        (out / "organism.json").write_text(json.dumps(card, indent=2) + "\n")
    return card
