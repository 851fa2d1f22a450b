"""Score every prompt under every cell: batch, place, run, check, keep."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from tqdm.auto import tqdm

from mech_align.errors import BadPrompts, OutOfMemory, SelfCheckFailed
from mech_align.interventions import Intervention
from mech_align.memory import is_out_of_memory
from mech_align.metrics import Metric
from mech_align.models import Model
from mech_align.models.names import check_writable, hook_point, hooks_in_place
from mech_align.sites import Site
from mech_align.sweeps.batch import Batch
from mech_align.sweeps.sources import NoiseSource, Run, RunSource, Source
from mech_align.sweeps.store import ScoreStore

Cell = Sequence[Intervention]
Progress = Callable[[int, int], None]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Sweep:
    """What a sweep measured.

    Attributes:
        scores: The metric of each prompt under each cell.
        baseline: The metric of each undisturbed prompt.
        source_scores: For each source that is a run: the metric of that run.
        checks: Sizes of the errors that the self-checks found, in the unit of the metric.
        engine: ``"suffix"`` (only what an edit can change is computed) or ``"full"`` (a forward pass a cell).
        warnings: What a reader should know.
    """

    scores: Float[np.ndarray, "prompt cell"]
    baseline: Float[np.ndarray, " prompt"]
    source_scores: Mapping[str, Float[np.ndarray, " prompt"]]
    checks: Mapping[str, float]
    engine: str
    warnings: tuple[str, ...] = ()


def sweep(
    model: Model,
    run: Run,
    cells: Sequence[Cell],
    *,
    metric: Metric,
    sources: Mapping[str, Source] | None = None,
    engine: Literal["auto", "suffix", "full"] = "auto",
    batch_size: int | None = None,
    store: str | Path | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> Sweep:
    """What is the metric of each prompt under each cell of interventions?

    Equal to a full forward pass for each prompt and cell; only the layers and positions that a cell can change are
    computed. Every sweep checks itself: putting a run's own values in changes nothing, putting the whole residual
    stream of the source in gives the source's score, one random cell equals a full forward pass, every edit fired, no
    hook stays behind.

    Args:
        run: The prompts that are disturbed.
        cells: Each one a set of interventions that act together.
        sources: Where edits take their values from, by the name that ``Intervention.source`` gives.
        engine: ``"auto"``: the suffix engine wherever it covers the architecture and passes its check, else full
            passes.
        batch_size: Prompts at a time; chosen by prompt length when left out. Halved when memory runs out.
        store: A folder for unfinished work: the same call goes on there after an interruption.
        progress: Called with (scores done, scores in all); a progress bar when left out.

    Raises:
        UnknownSite: A cell names something that the model does not have.
        SelfCheckFailed: The engine does not reproduce the model.
        OutOfMemory: Not even one prompt fits.
    """
    given = dict(sources or {})
    _check_cells(model, run, cells, given)
    work = _Work(model, run, list(cells), metric, given, engine, seed)
    folder = None if store is None else Path(store)
    keeper = ScoreStore((len(run), len(cells)), folder, work.key())
    before = hooks_in_place(model.inner)
    hidden = True if progress is not None else None  # None: a bar on terminals only
    bar = tqdm(total=len(run) * len(cells), desc="sweep", unit="score", delay=2.0, disable=hidden, leave=False)
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        bar.update(count)
        if progress is not None:
            progress(done, len(run) * len(cells))

    with bar, torch.inference_mode():
        for rows in _batches(run, batch_size or _batch_size(run, model)):
            work.do(rows, keeper, tick)
    left = hooks_in_place(model.inner) - before
    if left:
        raise SelfCheckFailed(f"{left} hooks were left behind in the model", hint="this is a bug of mech_align")
    return Sweep(
        np.array(keeper.scores), work.baseline, work.source_scores, {**work.checks, "hooks left behind": float(left)},
        work.engine, tuple(work.warnings),
    )  # fmt: skip


def score(model: Model, run: Run, metric: Metric, *, batch_size: int | None = None) -> Float[np.ndarray, " prompt"]:
    """The metric of each undisturbed prompt."""
    return sweep(model, run, [], metric=metric, batch_size=batch_size).baseline


class _Work:
    """One sweep under way: the engine in use, what was measured besides the cells, and the checks."""

    def __init__(
        self,
        model: Model,
        run: Run,
        cells: list[Cell],
        metric: Metric,
        sources: Mapping[str, Source],
        engine: str,
        seed: int,
    ) -> None:
        self.model, self.run, self.cells, self.metric, self.sources = model, run, cells, metric, sources
        self.wanted_engine = engine
        covered = model.decoder is not None and all(
            s.model is None or s.model.decoder is not None for s in sources.values() if isinstance(s, RunSource)
        )
        if engine == "suffix" and not covered:
            raise SelfCheckFailed("the suffix engine does not cover this architecture", hint="engine='full'")
        self.engine = "suffix" if covered and engine != "full" else "full"
        self.rng = np.random.default_rng(seed)
        self.baseline = np.full(len(run), np.nan, np.float32)
        self.source_scores = {
            name: np.full(len(run), np.nan, np.float32) for name, s in sources.items() if isinstance(s, RunSource)
        }
        self.checks: dict[str, float] = {}
        self.checked = False
        self.warnings: list[str] = []
        self.row_budget = row_budget(model)

    def key(self) -> dict[str, Any]:
        """What the scores depend on."""
        digest = hashlib.sha256()
        for part in (self.run, [[_identity(i) for i in cell] for cell in self.cells], sorted(self.sources)):
            digest.update(repr(part).encode())
        for source in self.sources.values():
            if isinstance(source, RunSource):
                digest.update(repr((source.tokens, [p.tolist() for p in source.position])).encode())
                if source.model is not None:
                    digest.update(repr(_weights(source.model)).encode())
            elif isinstance(source, NoiseSource):
                digest.update(repr(source).encode())
            else:
                for site, value in sorted(source.values.items()):
                    digest.update(repr(site).encode() + value.float().cpu().numpy().tobytes())
        return {
            "model": _weights(self.model), "metric": self.metric.name, "work": digest.hexdigest(),
            "engine": self.wanted_engine,
        }  # fmt: skip

    def do(self, rows: list[int], keeper: ScoreStore, tick: Callable[[int], None]) -> None:
        """One batch of prompts under all cells; smaller pieces when memory runs out."""
        ticked = 0
        while True:
            passed = 0
            try:
                batch = self._prepare(rows)
                for members in batch.chunks(self.row_budget):
                    if not keeper.has(rows, members):
                        found = batch.run(members).float().cpu().numpy()
                        _refuse_nan(found, [self.cells[i] for i in members], self.model)
                        keeper.write(rows, members, found)
                    passed += len(rows) * len(members)
                    if passed > ticked:  # not again what was told before memory ran out
                        tick(passed - ticked)
                        ticked = passed
                return
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._shrink(rows, error)
                if len(rows) > 1 and self.row_budget < max(len(self.run.tokens[r]) for r in rows):
                    half = len(rows) // 2
                    self.do(rows[:half], keeper, lambda _: None)
                    self.do(rows[half:], keeper, lambda _: None)
                    tick(len(rows) * len(self.cells) - ticked)
                    return

    def _shrink(self, rows: list[int], error: BaseException) -> None:
        if self.row_budget <= 1 and len(rows) == 1:
            raise OutOfMemory(
                "not even one prompt under one intervention fits into memory",
                why=str(error).splitlines()[0] if str(error) else type(error).__name__,
                hint=["use shorter prompts or dtype bfloat16", "use a machine with more memory"],
            ) from error
        self.row_budget = max(1, self.row_budget // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        note = "memory ran out; the batch was halved"
        self.warnings = list(dict.fromkeys([*self.warnings, note]))

    def _prepare(self, rows: list[int]) -> Batch:
        batch = Batch(self.model, self.run, rows, self.cells, self.metric, self.sources, self.engine)
        if not self.checked:
            problem = self._check(batch, rows)
            if problem and self.engine == "suffix" and self.wanted_engine == "auto":
                self.warnings.append(f"suffix engine refused for this model ({problem}); full forward passes were used")
                self.engine, self.checks = "full", {}
                return self._prepare(rows)
            if problem:
                raise SelfCheckFailed(
                    f"the {self.engine} engine does not reproduce the model: {problem}",
                    hint="engine='full' runs whole forward passes; please report the architecture",
                )
            self.checked = True
        self.baseline[rows] = batch.baseline().float().cpu().numpy()
        for name, found in batch.source_scores().items():
            self.source_scores[name][rows] = found.float().cpu().numpy()
        return batch

    def _check(self, batch: Batch, rows: list[int]) -> str:
        """Run the self-checks on a first batch; says what is wrong, or nothing."""
        allowed = TOLERANCE.get(self.model.dtype, 1e-4) * max(1.0, float(batch.score_size()))
        # A score is a difference of logits that may be far larger, and that are fp32 at best.
        rounding = max(torch.finfo(self.model.dtype).eps, torch.finfo(torch.float32).eps)
        allowed += 4 * rounding * float(batch.logit_size())
        if not self.cells:
            return self._note("undisturbed = full forward", batch.full_error(None, rows[0]), allowed)
        pick = int(self.rng.integers(len(self.cells)))
        problem = self._note("own values change", batch.own_value_error(pick), allowed)
        for name, source in self.sources.items():
            if isinstance(source, RunSource) and source.model is None:
                lowest = min(i.site.layer for cell in self.cells for i in cell)
                problem = problem or self._note("whole residual - source", batch.whole_error(name, lowest), allowed)
        if self.engine == "suffix":
            row = rows[int(self.rng.integers(len(rows)))]
            problem = problem or self._note("random cell - full forward", batch.full_error(pick, row), allowed)
        return problem

    def _note(self, name: str, error: float | None, allowed: float) -> str:
        if error is None:
            return ""
        self.checks[name] = error
        return "" if error <= allowed else f"{name}: {error:.3g} where {allowed:.3g} is allowed"


def row_budget(model: Model) -> int:
    """Rows of the residual stream that travel at once: on a CPU as many as stay in its cache (1,024 of width 768)."""
    if model.device.type == "cuda":
        return 65536
    return min(16384, max(1024, 1024 * 768 // model.shape.d_model))


def _check_cells(model: Model, run: Run, cells: Sequence[Cell], sources: Mapping[str, Source]) -> None:
    seen: set[tuple[int, str]] = set()
    names: set[str] = set()
    numbers: set[int] = set()
    for cell in cells:
        for intervention in cell:
            site: Site = intervention.site
            if (site.layer, site.part) not in seen:
                hook_point(model.inner, Site(site.layer, site.part).check(model.shape).layer, site.part)
                seen.add((site.layer, site.part))
            for index in intervention.index or ():
                kind = {"neuron": index} if site.part == "mlp_post" else {"head": index}
                Site(site.layer, site.part, **kind).check(model.shape)
            if intervention.edit.needs_source and intervention.source not in sources:
                raise ValueError(f"no source named '{intervention.source}'; there are {sorted(sources)}")
            if isinstance(intervention.positions, int):
                numbers.add(intervention.positions)
            elif intervention.positions not in ("all", "last"):
                names.add(intervention.positions)
    if model.decoder is None:
        for part in {part for _, part in seen}:
            check_writable(model.inner, part)
    for name in names:
        without = [run.id[i] for i, named in enumerate(run.named) if name not in named]
        if without:
            known = sorted({"all", "last", *(key for named in run.named for key in named)})
            raise BadPrompts(
                f"{len(without)} of {len(run)} prompts have no position named '{name}' ({', '.join(without[:3])})",
                hint=f"positions here: {', '.join(known)}; others come from the field 'positions' of the pairs",
            )
    for number in numbers:
        short = [run.id[i] for i, row in enumerate(run.tokens) if not -len(row) <= number < len(row)]
        if short:
            raise BadPrompts(
                f"{len(short)} of {len(run)} prompts have no position {number} ({', '.join(short[:3])})",
                hint="count from the end (-1 is the last token), or name positions in the pairs",
            )


def _identity(intervention: Intervention) -> tuple[Any, ...]:
    edit = intervention.edit
    source = intervention.source if edit.needs_source else None
    return str(intervention.site), intervention.index, edit.name, edit.detail, intervention.positions, source


def _weights(model: Model) -> list[str]:
    # The fingerprint is that of the weights before any folding.
    return [
        str(model.provenance.get("fingerprint")),
        str(model.provenance.get("weights")),
        model.backend,
        str(model.dtype),
    ]


def _batches(run: Run, size: int) -> Iterator[list[int]]:
    """Prompts of similar length together, in an order that depends on nothing but the prompts."""
    order = sorted(range(len(run)), key=lambda i: (len(run.tokens[i]), i))
    for first in range(0, len(order), size):
        yield order[first : first + size]


def _batch_size(run: Run, model: Model) -> int:
    """Prompts at a time: about 512 tokens on a CPU (so that a chunk stays in cache), more on a GPU."""
    tokens = 16384 if model.device.type == "cuda" else 512
    return max(1, min(256, tokens // max(len(row) for row in run.tokens)))


def _refuse_nan(found: Float[np.ndarray, "row cell"], cells: Sequence[Cell], model: Model) -> None:
    bad = ~np.isfinite(found)
    if bad.any():
        where = "; ".join(str(i) for i in cells[int(np.argwhere(bad)[0, 1])])
        raise SelfCheckFailed(
            f"a score is not a finite number under {where}",
            why="activations overflowed" if model.dtype == torch.float16 else "",
            hint="use dtype float32",
        )
