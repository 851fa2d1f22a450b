"""Which of very many parts would have a large patching effect, for the price of a few passes?"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import spearmanr
from torch import Tensor

from mech_align import stats
from mech_align.errors import MechAlignError
from mech_align.interventions import Intervention, patch
from mech_align.memory import available_bytes
from mech_align.metrics import Metric, logit_difference
from mech_align.models import Hook, Model, Tokens
from mech_align.prompts import Pairs, TokenPairs
from mech_align.results import Result
from mech_align.sites import Site, parse_layers
from mech_align.sweeps import Effects, Run, RunSource, SweepOptions, encode, patch_effects
from mech_align.sweeps.batch import Readout
from mech_align.sweeps.effects import FRACTION, SIGN, Direction
from mech_align.sweeps.reading import Key, each_batch
from mech_align.sweeps.sources import align

PARTS: Mapping[str, str] = {"heads": "z", "attn": "attn_out", "mlp": "mlp_out", "neurons": "mlp_post"}
_AXIS = {"z": "head", "mlp_post": "neuron"}
_INPUT: Key = (0, "resid_pre")


def attribution_patching(
    model: Model,
    pairs: Pairs | TokenPairs,
    *,
    metric: Metric | None = None,
    part: str = "heads",
    steps: int = 1,
    path: str = "layer",
    layers: str | Iterable[int] | None = None,
    positions: str = "all",
    direction: Direction = "denoise",
    confirm: int = 20,
    sample: int = 30,
    threshold: float | None = None,
    min_gap: float | None = None,
    options: SweepOptions = SweepOptions(),
) -> Result:
    r"""Which of very many parts would have a large patching effect, for the price of a few passes?

    To first order, the clean value $a^c$ put into the corrupt run $x$ changes the metric by

    $$\hat e_{i,a} = \frac{1}{m_i(c) - m_i(x)} \sum_t \bigl(a^c_{i,t} - a^x_{i,t}\bigr)^{\top}
      \frac1n \sum_{k=1}^{n} \frac{\partial m_i}{\partial a_t}\Big|_{x_k}$$

    With one step the gradient is that of the corrupt run, $x_1 = x$: one backward pass for all parts. With $n$ steps
    it is averaged at $\alpha_k = (k - \tfrac12)/n$ along a straight line from corrupt to clean. With ``path="layer"``
    the line is that of the layer's own activations, in the corrupt run: a layer's scores then sum to the effect of
    patching it whole, for as many passes a step as there are layers. With ``path="inputs"`` it is that of the input
    embeddings: one pass a step, and a gradient of runs that are half clean everywhere, which no single patch makes;
    it often ranks worse than one step.

    **A score is a screen and no effect.** The strongest ``confirm`` parts are patched exactly, and so is a random
    sample of the rest, which tells how many strong ones the screen missed.

    Args:
        metric: One number per prompt; the logit difference when left out.
        part: ``"heads"`` (query heads, ``z``), ``"attn"`` or ``"mlp"`` (whole blocks), or ``"neurons"`` of the MLPs.
        steps: Gradients to average.
        path: What moves from corrupt to clean over the steps, ``"layer"`` or ``"inputs"``.
        layers: Which layers, e.g. ``"62,63"``; all when left out.
        positions: ``"all"`` together, ``"last"``, or a named position. Those without a partner in the other run count
            nothing.
        direction: ``"denoise"`` puts clean values into the corrupt run, ``"noise"`` the other way round.
        confirm: How many of the strongest mean scores to patch exactly.
        sample: How many of the others, drawn at random.
        threshold: What counts as a large effect for the miss rate; a tenth of the largest exact effect when left out.
        min_gap: Pairs with a smaller clean-corrupt gap are degenerate: counted, and NaN.

    Returns:
        Result with dims ``(prompt, layer, head)``, ``(prompt, layer)`` or ``(prompt, layer, neuron)``; unit:
        first-order score in fractions of the clean-corrupt gap. Beside it ``exact``, the mean exact effect (NaN where
        not measured), ``confirmed`` (``top``, ``sample`` or ``no``), and ``exact_by_prompt`` with dims
        ``(prompt, cell)``. The estimated miss rate is in ``provenance["screen"]``.

    Raises:
        UndefinedEffect: The metric does not tell any pair apart.
        UnknownSite: A layer or part that the model does not have.

    Reference:
        Nanda 2023, Attribution Patching; Syed et al. 2023, arXiv:2310.10348; Kramar et al. 2024, arXiv:2403.00745 (how
        the screen fails); Sundararajan et al. 2017, arXiv:1703.01365 (integrated gradients); Hanna et al. 2024,
        arXiv:2403.17806 (along the inputs).
    """
    metric = metric or logit_difference()
    _check(part, steps, path, confirm, sample)
    tokens = encode(model, pairs)
    numbers = parse_layers(layers, model.shape.n_layers)
    if positions not in ("all", "last"):
        tokens.positions(positions, side="corrupt" if direction == "denoise" else "clean")
    keys = [(layer, PARTS[part]) for layer in numbers]
    screen = _Screen(model, tokens, metric, keys, positions, direction, steps, path)
    each_batch(screen.run, screen.score, batch_size=options.batch_size, batch_tokens=screen.batch_tokens)
    effect, _ = stats.normalise(screen.scores, screen.gap, np.zeros_like(screen.gap), min_gap=min_gap)
    axis = _AXIS.get(PARTS[part])
    dims: dict[str, Any] = {"layer": np.array(numbers), **({axis: np.arange(effect.shape[2])} if axis else {})}
    flat = effect.reshape(len(tokens), -1)
    top, drawn = _choose(flat, confirm, sample, options.seed)
    sites = [_site(int(cell), effect.shape[1:], numbers, part) for cell in (*top, *drawn)]
    cells = [[Intervention(site, patch(), positions)] for site in sites]
    exact = patch_effects(
        model, tokens, cells, metric=metric, direction=direction, min_gap=min_gap, options=options.named("exact")
    )
    if not axis:
        effect = effect.reshape(len(tokens), -1)
    values = exact.dataset(tokens, effect, dims)
    mean, kind = np.full(flat.shape[1], np.nan), np.full(flat.shape[1], "no", dtype="<U6")
    mean[[*top, *drawn]] = np.nanmean(exact.effect, axis=0)
    kind[top], kind[drawn] = "top", "sample"
    values = values.assign(
        exact=(tuple(dims), mean.reshape(effect.shape[1:]).astype(np.float32)),
        confirmed=(tuple(dims), kind.reshape(effect.shape[1:])),
        exact_by_prompt=(("prompt", "cell"), exact.effect.astype(np.float32)),
    ).assign_coords(cell=np.array([str(site) for site in sites], dtype=str))
    settings = {
        **exact.provenance["settings"], "part": part, "steps": steps, "path": path, "layers": numbers,
        "positions": positions, "confirm": confirm, "sample": sample,
    }  # fmt: skip
    report = _report(flat, mean, top, drawn, threshold)
    provenance = {**exact.provenance, "settings": settings, "screen": report}
    provenance["warnings"] = [*provenance["warnings"], *screen.warnings(exact), *_small_sample(report)]
    unit = f"screen score (first-order), {FRACTION}"
    return Result(values, "attribution_patching", unit, SIGN, provenance)


class _Screen:
    """Gradient scores over batches of prompts, in the metric's own unit."""

    def __init__(
        self, model: Model, pairs: TokenPairs, metric: Metric, keys: Sequence[Key], positions: str, direction: str,
        steps: int, path: str,
    ) -> None:  # fmt: skip
        self.model, self.metric, self.keys, self.positions = model, metric, list(keys), positions
        self.steps, self.path = steps, path
        self.denoise = direction == "denoise"
        self.run = Run.corrupt(pairs) if self.denoise else Run.clean(pairs)
        self.source = RunSource.clean(pairs) if self.denoise else RunSource.corrupt(pairs)
        shape = model.shape
        units = {"z": shape.n_heads, "mlp_post": shape.d_mlp}.get(keys[0][1], 1)
        self.scores = np.full((len(pairs), len(keys), units), np.nan, np.float32)
        self.own, self.other = np.full(len(pairs), np.nan, np.float32), np.full(len(pairs), np.nan, np.float32)
        self.unreached = set(keys)

    @property
    def gap(self) -> Float[np.ndarray, " prompt"]:
        """Clean less corrupt, whichever was disturbed."""
        return self.other - self.own if self.denoise else self.own - self.other

    @property
    def batch_tokens(self) -> int:
        """Tokens whose graph, values and gradients should fit into a third of the free memory."""
        shape, longest = self.model.shape, max(map(len, self.run.tokens))
        layer = 16 * shape.d_model + 6 * shape.d_mlp + 3 * shape.n_heads * longest
        values = 4 * self.scores.shape[2] * (shape.d_head if self.keys[0][1] == "z" else 1)
        readout = 3 * shape.d_vocab // longest
        each = self.model.dtype.itemsize * shape.n_layers * (layer + values) + 4 * readout
        most = 16384 if self.model.device.type == "cuda" else 2048
        return int(min(most, available_bytes(self.model.device) // 3 // each))

    def score(self, rows: list[int]) -> None:
        """One batch of prompts."""
        # Gradients are needed here even when the caller switched them off.
        with torch.inference_mode(False):
            self._score(rows)

    def _score(self, rows: list[int]) -> None:
        model, device = self.model, self.model.device
        tokens = Tokens.from_lists([self.run.tokens[row] for row in rows], device)
        others = Tokens.from_lists([self.source.tokens[row] for row in rows], device)
        readout = Readout(model, self.run, rows, self.metric)
        width = tokens.ids.shape[1]
        partners = self.source.partners(rows, width)
        paired = partners >= 0
        mask = self.run.mask(rows, self.positions, width) & paired
        joint = self.steps > 1 and self.path == "inputs"
        wanted = [*self.keys, *([_INPUT] if joint else [])]
        found, other = self._read(others, wanted, readout)
        target = {key: align(value, partners, key[1]) for key, value in found.items()}
        if self.steps == 1:
            start, slopes, own = model.gradients(tokens, self.keys, readout.from_logits)
            total = self._sum(self.keys, start, target, slopes, mask)
        else:
            start, own = self._read(tokens, wanted, readout)
            total = torch.zeros(len(rows), len(self.keys), self.scores.shape[2])
            # All sites share the line of the inputs; each has its own line through its own layer.
            lines = [(_INPUT, self.keys, paired)] if joint else [(key, [key], mask) for key in self.keys]
            for moved, keys, where in lines:
                at = [self.keys.index(key) for key in keys]
                for step in range(self.steps):
                    hook = _between(moved, start, target, where, (step + 0.5) / self.steps)
                    _, slopes, _ = model.gradients(tokens, keys, readout.from_logits, hooks=[hook])
                    total[:, at] += self._sum(keys, start, target, slopes, mask) / self.steps
        self.scores[rows] = total.numpy()
        self.own[rows], self.other[rows] = own.float().cpu().numpy(), other.float().cpu().numpy()

    def _read(
        self, tokens: Tokens, wanted: Collection[Key], readout: Readout
    ) -> tuple[dict[Key, Tensor], Float[Tensor, " b"]]:
        """Activations of a run and its score, in one pass."""
        kept: dict[Key, Tensor] = {}

        def keep(key: Key) -> Hook:
            return Hook(*key, lambda value: kept.__setitem__(key, value.detach()))

        logits = self.model.run(tokens, [keep(key) for key in wanted])
        assert logits is not None
        return kept, readout.from_logits(logits)

    def _sum(
        self, keys: Sequence[Key], start: Mapping[Key, Tensor], target: Mapping[Key, Tensor],
        gradients: Mapping[Key, Tensor], mask: Bool[Tensor, "b t"],
    ) -> Float[Tensor, "b layer unit"]:  # fmt: skip
        """Change times gradient, summed over positions and over what belongs to one unit."""
        columns: list[Tensor] = []
        for key in keys:
            slope = gradients[key]
            if key in self.unreached and bool(slope.any()):
                self.unreached.discard(key)
            product = (target[key].to(slope.device) - start[key].to(slope.device)).float() * slope.float()
            here = mask.to(product.device).reshape(*mask.shape, *[1] * (product.ndim - 2))
            # masked_fill and not a product: behind a prompt's end anything may stand, NaN too.
            product = product.masked_fill(~here, 0.0).sum(1)
            if key[1] != "mlp_post":
                product = product.sum(-1)
            columns.append(product.reshape(len(product), -1).cpu())
        return torch.stack(columns, dim=1)

    def warnings(self, exact: Effects) -> list[str]:
        """Layers that no gradient reached, and runs that the sweep scored otherwise."""
        out: list[str] = []
        if self.unreached:
            layers = ", ".join(str(layer) for layer, _ in sorted(self.unreached)[:5])
            out.append(f"no gradient reached {self.keys[0][1]} of layer {layers}: scores are zero there")
        seen = exact.clean - exact.corrupt
        worst = float(np.max(np.abs(seen - self.gap)))
        if not worst <= 1e-2 * max(1.0, float(np.abs(seen).max())):
            out.append(f"the clean-corrupt gap differs by up to {worst:.2g} between the screen and the exact patches")
        return out


def _between(
    key: Key, start: Mapping[Key, Tensor], end: Mapping[Key, Tensor], where: Bool[Tensor, "b t"], share: float
) -> Hook:
    """An activation on the straight line between two runs; other positions stay as they are."""
    here = where.to(start[key].device).reshape(*where.shape, *[1] * (start[key].ndim - 2))
    between = torch.where(here, torch.lerp(start[key], end[key].to(start[key]), share), start[key])
    return Hook(*key, lambda value: between.to(value))


def _check(part: str, steps: int, path: str, confirm: int, sample: int) -> None:
    if part not in PARTS:
        raise MechAlignError(f"no part '{part}' to screen", hint=f"parts: {', '.join(PARTS)}")
    if path not in ("layer", "inputs"):
        raise MechAlignError(f"no path '{path}' from corrupt to clean", hint="layer or inputs")
    if steps < 1 or confirm < 0 or sample < 0:
        raise MechAlignError(
            f"impossible settings: steps={steps}, confirm={confirm}, sample={sample}",
            hint="at least one step; confirm and sample are numbers of parts, 0 for none",
        )


def _choose(
    scores: Float[np.ndarray, "prompt cell"], confirm: int, sample: int, seed: int
) -> tuple[Int[np.ndarray, " top"], Int[np.ndarray, " drawn"]]:
    """The strongest mean scores, and a simple random sample of all others."""
    measured = np.isfinite(scores)
    mean = np.where(measured, scores, 0).sum(0) / np.maximum(measured.sum(0), 1)
    order = np.argsort(-np.abs(mean), kind="stable")
    top, rest = order[:confirm], np.sort(order[confirm:])
    drawn = np.random.default_rng(seed).choice(rest, min(sample, len(rest)), replace=False)
    return top, drawn


def _site(cell: int, shape: tuple[int, ...], layers: Sequence[int], part: str) -> Site:
    row, unit = divmod(cell, shape[1])
    index = {"heads": {"head": unit}, "neurons": {"neuron": unit}}.get(part, {})
    return Site(layers[row], PARTS[part], **index)


def _report(
    scores: Float[np.ndarray, "prompt cell"], exact: Float[np.ndarray, " cell"], top: Int[np.ndarray, " top"],
    drawn: Int[np.ndarray, " drawn"], threshold: float | None,
) -> dict[str, Any]:  # fmt: skip
    """What the exact patches say about the screen."""
    found, sampled = exact[top], exact[drawn]
    both = np.concatenate([found, sampled])
    largest = float(np.nanmax(np.abs(both))) if np.isfinite(both).any() else 0.0
    size = threshold if threshold is not None else 0.1 * largest
    report: dict[str, Any] = {
        "confirmed": len(top), "sampled": len(drawn), "cells": len(exact), "threshold": size,
        "threshold_from": "given" if threshold is not None else "a tenth of the largest exact effect",
    }  # fmt: skip
    mean = scores[np.isfinite(scores).any(1)].mean(0)
    for name, cells in (("top", top), ("sample", drawn), ("both", np.concatenate([top, drawn]))):
        report[f"spearman_{name}"] = _spearman(mean[cells], exact[cells])
    if size > 0 and len(top) == len(exact):
        nothing = {"missed": 0.0, "miss_rate": 0.0, "miss_rate_interval": [0.0, 0.0]}
        report |= {"found": int((np.abs(found) >= size).sum()), **nothing}
    elif size > 0 and len(both):
        missed = stats.miss_rate(found, sampled, len(exact) - len(top), threshold=size)
        report |= {
            "found": missed.found, "sample_large": missed.sample_large,
            "missed": _number(missed.missed.estimate),
            "missed_interval": [_number(missed.missed.low), _number(missed.missed.high)],
            "miss_rate": _number(missed.rate.estimate),
            "miss_rate_interval": [_number(missed.rate.low), _number(missed.rate.high)],
        }  # fmt: skip
    return report


def _spearman(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float | None:
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    found: Any = spearmanr(a, b)
    return _number(float(found[0]))


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _small_sample(report: Mapping[str, Any]) -> list[str]:
    rest = report["cells"] - report["confirmed"]
    if rest > 0 and report["sampled"] == 0:
        return ["nothing outside the top was measured, so that the screen's miss rate is unknown (sample=0)"]
    return []
