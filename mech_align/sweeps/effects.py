"""From pairs to normalised effects: what every patching analysis shares."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float

from mech_align import stats
from mech_align.errors import BadAnswer, BadPrompts, UndefinedEffect
from mech_align.metrics import Metric
from mech_align.models import Model
from mech_align.prompts import Pairs, TokenPairs
from mech_align.prompts.answers import AnswerPolicy, leading_space_alternative
from mech_align.prompts.encoding import RaggedPolicy
from mech_align.sweeps.sources import Run, RunSource, Source
from mech_align.sweeps.sweep import Cell, Sweep, sweep

Direction = Literal["denoise", "noise"]
FRACTION = "fraction of the clean-corrupt gap"
SIGN = "positive = more clean behaviour"


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep runs, as opposed to what it measures.

    Attributes:
        engine: ``"auto"``, ``"suffix"`` or ``"full"``.
        batch_size: Prompts at a time; automatic when ``None``.
        store: A folder for unfinished work, taken up again by the same call.
        progress: Called with (scores done, scores in all); a progress bar when ``None``.
        seed: Of whatever is drawn at random.
    """

    engine: Literal["auto", "suffix", "full"] = "auto"
    batch_size: int | None = None
    store: Any = None
    progress: Any = None
    seed: int = 0

    def named(self, name: str) -> "SweepOptions":
        """The same, with a store of its own below ``store``."""
        if self.store is None:
            return self
        return replace(self, store=Path(self.store) / name)


@dataclass(frozen=True)
class Effects:
    """Effects of cells on pairs.

    Attributes:
        effect: ``(score - undisturbed) / gap``; NaN for pairs without a gap.
        clean: The metric where the behaviour is meant to be present: the clean run, or the source model.
        corrupt: The metric of the run that is restored (denoise) or the run without the behaviour.
        degenerate: Pairs whose two runs the metric does not tell apart.
    """

    effect: Float[np.ndarray, "prompt cell"]
    clean: Float[np.ndarray, " prompt"]
    corrupt: Float[np.ndarray, " prompt"]
    degenerate: Bool[np.ndarray, " prompt"]
    provenance: dict[str, Any] = field(default_factory=lambda: {})

    def dataset(
        self, pairs: TokenPairs, effect: Float[np.ndarray, "prompt *cell"], dims: Mapping[str, Any]
    ) -> xr.Dataset:
        """Labelled values: the effect over ``prompt`` and the given dims, and the scores of each prompt beside."""
        return xr.Dataset(
            {
                "effect": (("prompt", *dims), effect.astype(np.float32)),
                "clean": ("prompt", self.clean),
                "corrupt": ("prompt", self.corrupt),
                "degenerate": ("prompt", self.degenerate),
            },
            coords={"prompt": np.arange(len(pairs)), **prompt_coords(pairs), **dims},
        )


def prompt_coords(pairs: TokenPairs | Run) -> dict[str, Any]:
    """``id`` and ``group`` along the prompt axis."""
    return {"id": ("prompt", np.array(pairs.id, dtype=str)), "group": ("prompt", np.array(pairs.group, dtype=str))}


def encode(
    model: Model, pairs: Pairs | TokenPairs, *, ragged: RaggedPolicy = "align", answers: AnswerPolicy = "single"
) -> TokenPairs:
    """Pairs as tokens of this model, checked: fits the context, answers as the model writes them.

    Args:
        ragged, answers: As for ``Pairs.encode``.

    Raises:
        BadPrompts, BadAnswer: See ``Pairs.encode``; also when the model would write an answer with another leading
            space.
    """
    if isinstance(pairs, TokenPairs):
        _check_vocabulary(model, pairs)
        return pairs
    tokens = pairs.encode(model.tokenizer, n_ctx=model.shape.n_ctx, ragged=ragged, answers=answers)
    _check_vocabulary(model, tokens)
    if model.tokenizer is not None and pairs.clean is not None:
        _check_leading_space(model, tokens)
    return tokens


def patch_effects(
    model: Model,
    pairs: TokenPairs,
    cells: Sequence[Cell],
    *,
    metric: Metric,
    direction: Direction = "denoise",
    source_model: Model | None = None,
    sources: Mapping[str, Source] | None = None,
    min_gap: float | None = None,
    options: SweepOptions = SweepOptions(),
) -> Effects:
    """Effects of cells as fractions of the clean-corrupt gap.

    Args:
        cells: Their interventions take values from the source ``"source"``: the clean run (denoise) or the corrupt one
            (noise); with ``source_model``, that model on the very prompts that are disturbed.
        direction: ``"denoise"`` puts clean values into the corrupt run: 1 restores the clean behaviour. ``"noise"``
            puts corrupt values into the clean run: -1 destroys it.
        min_gap: Smallest gap of a pair that counts; see ``stats.normalise``.

    Raises:
        UndefinedEffect: No pair has a gap.
    """
    denoise = direction == "denoise"
    run = Run.corrupt(pairs) if denoise else Run.clean(pairs)
    if source_model is not None:
        source = RunSource.same(run, source_model)
    else:
        source = RunSource.clean(pairs) if denoise else RunSource.corrupt(pairs)
    found = sweep(
        model, run, cells, metric=metric, sources={"source": source, **(sources or {})}, engine=options.engine,
        batch_size=options.batch_size, store=options.store, progress=options.progress, seed=options.seed,
    )  # fmt: skip
    other = np.asarray(found.source_scores["source"])
    # The source model stands for the behaviour that is put back, whichever run it is put into.
    forward = denoise or source_model is not None
    clean, corrupt = (other, found.baseline) if forward else (found.baseline, other)
    base = corrupt if forward else clean
    shifted = found.scores - base[:, None]
    effect, degenerate = stats.normalise(shifted, clean - corrupt, np.zeros_like(clean), min_gap=min_gap)
    if degenerate.all():
        raise _flat(pairs, clean, corrupt, metric)
    warnings = [*pairs.notes, *found.warnings, *_gap_warnings(pairs, clean, corrupt, degenerate, source_model)]
    settings: dict[str, Any] = {"direction": direction, "min_gap": min_gap, "seed": options.seed}
    if source_model is not None:
        settings["source_model"] = source_model.provenance
    provenance = {**describe(model, pairs, metric, settings), **describe_sweep(found), "warnings": warnings,
                  "degenerate": int(degenerate.sum())}  # fmt: skip
    return Effects(effect, clean, corrupt, degenerate, provenance)


def describe(model: Model, pairs: TokenPairs, metric: Metric, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Where a number comes from: model, data, metric, settings, versions."""
    data = json.dumps([pairs.clean, pairs.corrupt, pairs.answer, pairs.wrong, list(pairs.group)])
    return {
        "model": model.provenance, "backend": model.backend, "dtype": str(model.dtype).removeprefix("torch."),
        "data": {"n": len(pairs), "groups": len(set(pairs.group)), "encoding": pairs.settings,
                 "sha256": hashlib.sha256(data.encode()).hexdigest()[:16]},
        "metric": {"name": metric.name, "unit": metric.unit}, "settings": dict(settings),
        "versions": {name: version(name) for name in ("mech-align", "torch", "transformer-lens", "transformers")},
        "warnings": list(pairs.notes),
    }  # fmt: skip


def describe_sweep(found: Sweep) -> dict[str, Any]:
    """How a sweep went."""
    return {"engine": found.engine, "checks": {name: float(size) for name, size in found.checks.items()}}


def _gap_warnings(
    pairs: TokenPairs, clean: Float[np.ndarray, " p"], corrupt: Float[np.ndarray, " p"],
    degenerate: Bool[np.ndarray, " p"], source_model: Model | None,
) -> list[str]:  # fmt: skip
    out: list[str] = []
    if degenerate.any():
        names = ", ".join(pairs.id[i] for i in np.flatnonzero(degenerate)[:5])
        out.append(
            f"{int(degenerate.sum())} of {len(pairs)} pairs have no gap to speak of and count as unmeasured ({names})"
        )
    backward = int((clean < corrupt).sum())
    if backward > len(pairs) / 2:
        who = "the source model" if source_model is not None else "the clean run"
        out.append(
            f"in {backward} of {len(pairs)} pairs {who} scores lower than the corrupt run: are 'answer' and 'wrong', "
            "or 'clean' and 'corrupt', swapped?"
        )
    return out


def _flat(
    pairs: TokenPairs, clean: Float[np.ndarray, " p"], corrupt: Float[np.ndarray, " p"], metric: Metric
) -> UndefinedEffect:
    gap = np.abs(clean - corrupt)
    names = ", ".join(pairs.id[:5]) + ("..." if len(pairs) > 5 else "")
    return UndefinedEffect(
        f"{metric.name} does not tell clean from corrupt in any of the {len(pairs)} pairs ({names})",
        why=f"the largest gap is {np.nanmax(gap):.2g} {metric.unit}: there is nothing to explain",
        hint=[
            "check that the model knows the answer: compare the two prompts by hand",
            "check 'answer' and 'wrong'; for a metric in small units set min_gap",
        ],
    )


def _check_vocabulary(model: Model, pairs: TokenPairs) -> None:
    """Refuse token ids that the model does not have, before they become an index error deep inside."""
    size = model.shape.d_vocab
    for what in ("clean", "corrupt", "answer", "wrong"):
        for pair, row in zip(pairs.id, getattr(pairs, what), strict=True):
            outside = [token for token in row if not 0 <= token < size]
            if outside:
                raise (BadAnswer if what in ("answer", "wrong") else BadPrompts)(
                    f"{what} of pair {pair} has the token id {outside[0]}",
                    why=f"{model.name} has {size} tokens, from 0",
                    hint="the ids must come from this model's own tokenizer",
                )  # fmt: skip


def _check_leading_space(model: Model, pairs: TokenPairs, n: int = 8) -> None:
    """Refuse answers with another leading space than the model writes: effects would be of a token it never says."""
    rows = list(range(min(n, len(pairs))))
    probabilities = model.logits([pairs.clean[i] for i in rows]).softmax(-1)
    given = np.zeros(len(rows))
    other = np.zeros(len(rows))
    example: tuple[int, int] | None = None
    for at, row in enumerate(rows):
        for token in pairs.answer[row]:
            twin = leading_space_alternative(model.tokenizer, token)
            given[at] += float(probabilities[at, token])
            if twin is not None and twin not in pairs.answer[row]:
                other[at] += float(probabilities[at, twin])
                example = example or (token, twin)
    if example is None or not np.mean((given < 1e-2) & (other > 30 * given) & (other > 1e-2)) > 0.5:
        return
    written, meant = (model.tokenizer.convert_ids_to_tokens(t) for t in (example[1], example[0]))
    raise BadAnswer(
        f"after the clean prompts the model writes {written!r} (probability {other.mean():.2g}), never {meant!r} "
        f"({given.mean():.2g})",
        why="the two differ only in their leading space",
        hint=f"change the answers to {model.tokenizer.decode([example[1]])!r}, or end the prompts with a space",
    )
