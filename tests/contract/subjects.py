"""Models, prompts and cells of the contract suite, made once a process."""

import atexit
import itertools
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import VOCAB, save_tiny
from torch import Tensor

from mech_align.interventions import Edit, Intervention, add, patch, project_out, zero
from mech_align.metrics import Metric
from mech_align.models import Hook, Model, Tokens, load_model, wrap_model
from mech_align.models.names import parts_of
from mech_align.prompts import Pairs, TokenPairs
from mech_align.sites import HEAD_PARTS, Site
from mech_align.sweeps import MeanSource, Run, RunSource, Source

COVERED = (
    "gpt2",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gpt_neox",
    "gpt_neox_sequential",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
)
"""Families that the decoder covers on both backends."""
UNCOVERED = "olmo2"
"""A family that it covers on neither, so that every cell is a whole forward pass."""
BACKENDS = ("hooked", "bridge")
SUBJECTS = [(family, backend) for family in COVERED for backend in BACKENDS]
EVERYONE = [*SUBJECTS, *((UNCOVERED, backend) for backend in BACKENDS), ("attn_only", "hooked")]


@cache
def folder(family: str, seed: int = 0) -> Path:
    path = Path(tempfile.mkdtemp(prefix=f"contract_{family}_"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return save_tiny(family, path, seed=seed)


@cache
def subject(family: str, backend: str, seed: int = 0, dtype: str = "float32", weights: str = "raw") -> Model:
    """One model; nobody may change it."""
    if family == "attn_only":
        return wrap_model(hooked(attn_only=True, seed=seed))
    return load_model(folder(family, seed), backend=backend, dtype=dtype, weights=weights)


def fresh(family: str, backend: str, **how: Any) -> Model:
    """A model that a test may break."""
    return load_model(folder(family), backend=backend, **how)


def hooked(seed: int = 0, **changes: Any) -> Any:
    """A HookedTransformer as a user would make one, without a Hugging Face model behind it."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes: dict[str, Any] = {"n_layers": 3, "n_heads": 4, "d_model": 24, "d_head": 6, "d_mlp": 40, "n_ctx": 32}
    plan: dict[str, Any] = {**sizes, "d_vocab": VOCAB, "act_fn": "gelu", "seed": seed, "device": "cpu", **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")
            model = HookedTransformer(HookedTransformerConfig(**plan))
        for name, weight in model.named_parameters():
            size = 1.0 if "embed.W" in name else 0.3
            weight.data = torch.randn_like(weight) * size + (1.0 if name.endswith(".w") else 0.0)
    return model.requires_grad_(False).eval()


# ---------------------------------------------------------------- prompts


@cache
def pairs(*, ragged: bool = True, count: int = 4, seed: int = 0) -> TokenPairs:
    """Token pairs that share a beginning of some length; ragged: no two prompts of the same length."""
    rng = np.random.default_rng(seed)
    clean: list[list[int]] = []
    corrupt: list[list[int]] = []
    for number in range(count):
        length = 6 + (number * 2 if ragged else 2)
        row = rng.integers(3, VOCAB, length).tolist()
        other = list(row)
        for at in range(number % 3, length):
            if rng.random() < 0.6:
                other[at] = int(rng.integers(3, VOCAB))
        other[2 + number % 3] = (row[2 + number % 3] + 1) % VOCAB
        if ragged and number % 2:
            other.insert(3, int(rng.integers(3, VOCAB)))
        clean.append(row)
        corrupt.append(other)
    answers = [rng.choice(VOCAB, 4, replace=False).tolist() for _ in range(count)]
    made = Pairs.from_tokens(
        clean,
        corrupt,
        [a[:1] if i % 2 else a[:2] for i, a in enumerate(answers)],
        [a[2:] for a in answers],
        group=[f"g{i // 2}" for i in range(count)],
        positions=[{"spot": 2}, {"spot": [1, 3]}, *[{"spot": -2}] * (count - 2)],
    )
    return made.encode(None)


# ---------------------------------------------------------------- cells


PLACES = ("all", "last", "spot", 1, -2)


def sources(model: Model, run: Run, source: RunSource, other: Model | None) -> dict[str, Source]:
    """One of each kind: another run, the mean of reference prompts, random other prompts, another model."""
    kept = model.activations([list(row) for row in run.tokens], _all_sites(model, skip=("pattern",)), positions="all")
    means = {(site.layer, site.part): kept[site].mean(0) for site in kept.sites}
    out: dict[str, Source] = {
        "source": source, "mean": MeanSource(means), "resample": RunSource.resampled(run, run.tokens, seed=3),
    }  # fmt: skip
    return out if other is None else {**out, "other": RunSource.same(run, other)}


def _all_sites(model: Model, skip: Sequence[str] = ()) -> list[Site]:
    return [
        Site(layer, part) for layer in range(model.shape.n_layers) for part in parts_of(model.inner) if part not in skip
    ]


def cells(model: Model, kinds: Sequence[str], seed: int = 0) -> list[list[Intervention]]:
    """Every part x every kind of edit and source, in turn at every kind of position; then joint ones."""
    generator = torch.Generator().manual_seed(seed)
    place = itertools.cycle(PLACES)
    made: list[list[Intervention]] = []
    for site in _all_sites(model):
        for named in [site, *_inside(site, model)]:
            for kind in kinds if named == site else kinds[:1]:
                if named.part == "pattern" and kind == "mean":
                    continue
                made.append([Intervention(named, patch(), next(place), source=kind)])
            width = _width(named, model)
            if width is not None and named.part != "pattern":
                vector = torch.randn(width, generator=generator)
                edits = [zero(), add(vector, 0.7), project_out(vector)]
                made += [[Intervention(named, edit, next(place))] for edit in edits[: 1 if named != site else 3]]
    made += [[Intervention(i.site, zero(), i.positions)] for i in (made[0][0], made[-1][0])]
    return [*made, *_joint(model, generator, kinds)]


def _inside(site: Site, model: Model) -> list[Site]:
    shape = model.shape
    if site.part in HEAD_PARTS:
        heads = shape.n_kv_heads if site.part in ("k", "v") else shape.n_heads
        return [Site(site.layer, site.part, head=head) for head in range(0, heads, 1 if site.part == "z" else 3)]
    return [Site(site.layer, "mlp_post", neuron=n) for n in (0, 5, shape.d_mlp - 1)] if site.part == "mlp_post" else []


def _width(site: Site, model: Model) -> int | None:
    shape = model.shape
    if site.part in HEAD_PARTS:
        return shape.d_head
    if site.part == "mlp_post":
        return shape.d_mlp if site.neuron is None else None
    return shape.d_model


def _joint(model: Model, generator: torch.Generator, kinds: Sequence[str]) -> list[list[Intervention]]:
    """Cells of two to four edits over several layers, of different kinds, at different positions."""
    have, top, s = parts_of(model.inner), model.shape.n_layers - 1, kinds[0]
    kv = model.shape.n_kv_heads - 1

    def at(layer: int, part: str, where: str | int = "all", head: int | None = None, edit: Edit | None = None,
           source: str = s, neurons: tuple[int, ...] = ()) -> Intervention:  # fmt: skip
        return Intervention(Site(layer, part, head=head), edit or patch(), where, neurons, source)

    vector = torch.randn(model.shape.d_model, generator=generator)
    wanted = [
        [at(0, "z", "all", 1), at(top, "z", "all", 3)],
        [at(0, "z", "last", 1), at(0, "z", "all", 2)],
        [at(top, "z", "last", 0), at(top, "z", 1, 2, zero())],
        [at(top, "z", "last", 0), at(top, "resid_post", "last", edit=add(vector))],
        [at(0, "mlp_out", "spot"), at(1, "q", "all", 0), at(top, "mlp_post", "last", neurons=(1, 7))],
        [at(1, "attn_out", "last"), at(1, "mlp_post", "all", neurons=(0, 2, 3))],
        [at(0, "resid_post", 1), at(top, "pattern", "all", 2)],
        [at(1, "pattern", "all"), at(1, "k", "spot", kv), at(top, "v", "all", 0)],
        [
            at(0, "resid_pre", "all", edit=add(vector, 0.3)),
            at(1, "z", "last", 2),
            at(top, "attn_out", "all", edit=zero()),
        ],
        [at(0, "z", "all", 1), at(1, "resid_mid", -2), at(top, "mlp_out", "last", source=kinds[-1])],
        [at(1, "mlp_post", "all", neurons=(4, 5)), at(1, "mlp_out", 1, edit=zero()), at(1, "resid_post", "last")],
        [at(1, "mlp_post", "all", neurons=(4, 5)), at(1, "mlp_post", "last", neurons=(5, 6), edit=zero())],
        # Another edit disturbs the run before it first differs from its source, so that a patch there matters.
        [at(0, "resid_pre", "all", edit=add(vector)), at(1, "attn_out", "all")],
    ]
    return [cell for cell in wanted if all(edit.site.part in have for edit in cell)]


# ---------------------------------------------------------------- the plain way


def by_hand(
    model: Model, run: Run, row: int, cell: Sequence[Intervention], given: Mapping[str, Source], metric: Metric
) -> float:
    """One prompt under one cell, alone, through hooks: shares nothing with a sweep but ``model.run``."""
    tokens = Tokens.from_lists([run.tokens[row]])
    hooks = [_hook(model, run, row, edit, given) for edit in cell]
    with torch.no_grad():
        logits = model.run(tokens, hooks, want="all")
    assert logits is not None
    return measure(logits[0, -1], run, row, metric)


def measure(logits: Tensor, run: Run, row: int, metric: Metric) -> float:
    """The metric of one prompt from its last logits."""
    answer, wrong = torch.zeros(2, 1, len(logits), dtype=torch.bool)
    answer[0, list(run.answer[row])] = True
    wrong[0, list(run.wrong[row])] = True
    return float(metric.measure(logits[None], answer, wrong)[0])


def _hook(model: Model, run: Run, row: int, edit: Intervention, given: Mapping[str, Source]) -> Hook:
    site, length = edit.site, len(run.tokens[row])
    where = _where(run, row, edit.positions, length)
    origin = given.get(edit.source) if edit.edit.needs_source else None
    found: Tensor | None = None
    partner = np.arange(length)
    if isinstance(origin, RunSource):
        partner = origin.position[row]
        found = (origin.model or model).capture(Tokens.from_lists([origin.tokens[row]]), {(site.layer, site.part)})[
            site.layer, site.part
        ]
    elif isinstance(origin, MeanSource):
        found = origin.values[site.layer, site.part].expand(1, length, *origin.values[site.layer, site.part].shape)
    pick: Any = slice(None) if edit.index is None else list(edit.index)

    def apply(value: Tensor) -> Tensor:
        value = value.clone()
        for at in where:
            if origin is not None and partner[at] < 0:
                continue
            if site.part == "pattern":
                new = torch.zeros_like(value[:, pick, at])
                assert found is not None
                for key in range(at + 1):
                    if partner[key] >= 0:
                        new[..., key] = found[:, pick, partner[at], partner[key]]
                value[:, pick, at] = new
            else:
                take = None if found is None else found[:, partner[at]][:, pick]
                value[:, at, pick] = edit.edit.apply(value[:, at, pick].clone(), take)
        return value

    return Hook(site.layer, site.part, apply)


def _where(run: Run, row: int, positions: str | int, length: int) -> list[int]:
    if positions == "all":
        return list(range(length))
    if positions == "last":
        return [length - 1]
    if isinstance(positions, int):
        return [positions % length]
    return list(run.named[row][positions])


def worst(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Differences of scores, relative where a score is large."""
    return np.abs(found - wanted) / np.maximum(1.0, np.abs(wanted))
