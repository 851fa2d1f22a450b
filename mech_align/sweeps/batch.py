"""One batch of prompts with its cells placed, its sources run, and its engine ready."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from mech_align.interventions import Intervention, patch
from mech_align.metrics import Metric
from mech_align.models import Model, Tokens
from mech_align.models.names import parts_of
from mech_align.sites import Site
from mech_align.sweeps.full import FullEngine
from mech_align.sweeps.sources import MeanSource, NoiseSource, Run, RunSource, Source, align
from mech_align.sweeps.suffix import Placed, SuffixEngine, Values, undisturbed

OWN = "the run itself"


class Readout:
    """The metric of a batch, from logits or straight from the final residual stream."""

    def __init__(self, model: Model, run: Run, rows: Sequence[int], metric: Metric) -> None:
        self.model, self.metric = model, metric
        sets = [(run.answer[row], run.wrong[row]) for row in rows]
        used = sorted({token for pair in sets for tokens in pair for token in tokens})
        width = model.shape.d_vocab if metric.reads == "logits" else len(used)
        self.tokens = None if metric.reads == "logits" else torch.tensor(used, device=model.device)
        at = {token: token if self.tokens is None else place for place, token in enumerate(used)}
        self.answer = torch.zeros(len(rows), width, dtype=torch.bool, device=model.device)
        self.wrong = torch.zeros_like(self.answer)
        for i, (answer, wrong) in enumerate(sets):
            self.answer[i, [at[token] for token in answer]] = True
            self.wrong[i, [at[token] for token in wrong]] = True

    def from_logits(self, logits: Float[Tensor, "b vocab"]) -> Float[Tensor, " b"]:
        picked = logits if self.tokens is None else logits[:, self.tokens.to(logits.device)]
        return self.metric.measure(picked, self.answer.to(picked.device), self.wrong.to(picked.device))

    def from_resid(self, resid: Float[Tensor, "b c d"]) -> Float[Tensor, "b c"]:
        decoder = self.model.decoder
        assert decoder is not None
        logits = decoder.readout(resid, self.tokens)
        b, c, _ = logits.shape
        answer, wrong = (m.to(logits.device)[:, None].expand(b, c, -1).flatten(0, 1) for m in (self.answer, self.wrong))
        return self.metric.measure(logits.flatten(0, 1), answer, wrong).unflatten(0, (b, c))


class Batch:
    """Cells over a batch of prompts, ready to run."""

    def __init__(
        self,
        model: Model,
        run: Run,
        rows: Sequence[int],
        cells: Sequence[Sequence[Intervention]],
        metric: Metric,
        sources: Mapping[str, Source],
        engine: str,
    ) -> None:
        self.model, self.runs, self.rows, self.cells, self.metric = model, run, list(rows), cells, metric
        self.sources, self.kind = sources, engine
        self.tokens = Tokens.from_lists([run.tokens[row] for row in rows], model.device)
        self.readout = Readout(model, run, rows, metric)
        self.masks: dict[tuple[str | int, str | None, bool], Tensor] = {}
        self._source_scores: dict[str, Tensor] = {}
        self.values = {name: self._values(name, source) for name, source in sources.items()}
        self.placed = [self._place(cell) for cell in cells]
        self.engine = self._engine()

    def chunks(self, row_budget: int) -> Iterator[list[int]]:
        """Which cells run together."""
        if isinstance(self.engine, SuffixEngine):
            self.engine.row_budget = row_budget
        return self.engine.chunks(self.placed)

    def run(self, members: Sequence[int]) -> Float[Tensor, "b cell"]:
        """Scores under some of the cells."""
        return self.engine.run([self.placed[i] for i in members])

    def baseline(self) -> Float[Tensor, " b"]:
        """Scores of the undisturbed prompts."""
        return self._baseline

    def source_scores(self) -> Mapping[str, Float[Tensor, " b"]]:
        """Scores of the runs that values were taken from."""
        return self._source_scores

    @cached_property
    def _baseline(self) -> Float[Tensor, " b"]:
        return self.engine.baseline()

    def score_size(self) -> Float[Tensor, ""]:
        """The largest score of the undisturbed prompts, for tolerances."""
        return self._baseline.abs().max()

    def logit_size(self) -> Float[Tensor, ""]:
        """The largest logit that the metric reads in one of the prompts, for tolerances."""
        if isinstance(self.engine, SuffixEngine):
            return self.engine.decoder.readout(self.engine.final()[:1], self.readout.tokens).abs().max()
        logits = self.model.run(Tokens.from_lists([self.runs.tokens[self.rows[0]]], self.model.device))
        assert logits is not None
        picked = logits if self.readout.tokens is None else logits[:, self.readout.tokens.to(logits.device)]
        return picked.abs().max()

    # ------------------------------------------------------------ self-checks

    def own_value_error(self, cell: int) -> float:
        """How much the scores change when a site is given the values that it has anyway."""
        site = self.cells[cell][0].site
        key = (site.layer, site.part)
        known = self.engine.base if isinstance(self.engine, SuffixEngine) else {}
        own = {key: known[key]} if key in known else self._run_values(self.model, self.tokens, {key})
        placed = Placed(Intervention(site, patch(), source=OWN), self._mask("all", None))
        engine = self._engine({**self.values, OWN: own})
        return float((engine.run([[placed]])[:, 0] - self._baseline).abs().max())

    def whole_error(self, name: str, layer: int) -> float | None:
        """Distance to the source's scores when its whole stream is put in; None where no prompt aligns."""
        source = cast(RunSource, self.sources[name])
        aligned = [
            i for i, row in enumerate(self.rows)
            if len(source.tokens[row]) == len(self.runs.tokens[row])
            and bool((torch.as_tensor(source.position[row]) == torch.arange(len(self.runs.tokens[row]))).all())
        ]  # fmt: skip
        if not aligned or (layer, "resid_pre") not in self.values[name]:
            return None
        site = Intervention(Site(layer, "resid_pre"), patch(), source=name)
        score = self.engine.run([[Placed(site, self._mask("all", None))]])[:, 0]
        gap = (score - self._source_scores[name].to(score.device)).abs()
        return float(gap[aligned].max())

    def full_error(self, cell: int | None, row: int) -> float:
        """Distance to a whole forward pass of one prompt under one cell (or none)."""
        at = self.rows.index(row)
        width = len(self.runs.tokens[row])
        values = {
            name: {key: _one(value, at, width, key[1]) for key, value in found.items()}
            for name, found in self.values.items()
        }
        readout = Readout(self.model, self.runs, [row], self.metric)
        tokens = Tokens.from_lists([self.runs.tokens[row]], self.model.device)
        full = FullEngine(self.model, tokens, values, readout.from_logits)
        if cell is None:
            return float((full.baseline()[0] - self._baseline[at]).abs())
        mine = self.engine.run([self.placed[cell]])[at, 0]
        placed = [Placed(p.intervention, p.mask[at : at + 1, :width]) for p in self.placed[cell]]
        return float((full.run([placed])[0, 0] - mine).abs())

    # ------------------------------------------------------------ preparation

    def _engine(self, values: Mapping[str, Values] | None = None) -> "SuffixEngine | FullEngine":
        values = self.values if values is None else values
        if self.kind == "full":
            return FullEngine(self.model, self.tokens, values, self.readout.from_logits)
        assert self.model.decoder is not None
        lowest = min((i.site.layer for cell in self.cells for i in cell), default=self.model.shape.n_layers)
        shared = getattr(self, "engine", None)
        return SuffixEngine(
            self.model.decoder, self.tokens.ids, self.tokens.last, values, self.readout.from_resid, lowest=lowest,
            base=shared.base if isinstance(shared, SuffixEngine) else None,
        )  # fmt: skip

    def _place(self, cell: Sequence[Intervention]) -> list[Placed]:
        # Before their first difference a run and its source agree, unless another edit of the cell disturbs the run.
        alone = len({i.source for i in cell}) == 1 and all(i.edit.name == "patch" for i in cell)
        return [Placed(i, self._mask(i.positions, i.source if i.edit.needs_source else None, trim=alone)) for i in cell]

    def _mask(self, positions: str | int, source: str | None, *, trim: bool = False) -> Tensor:
        """Where an edit acts: at its positions, less those without a partner in the source, or equal to it anyway."""
        if (positions, source, trim) not in self.masks:
            width = self.tokens.ids.shape[1]
            mask = self.runs.mask(self.rows, positions, width).to(self.model.device)
            origin = self.sources.get(source) if source is not None else None
            if isinstance(origin, RunSource):
                mask = mask & (origin.partners(self.rows, width).to(mask.device) >= 0)
                if trim:
                    first = torch.tensor(origin.first_difference(self.runs, self.rows), device=mask.device)
                    mask = mask & (torch.arange(width, device=mask.device)[None] >= first[:, None])
            self.masks[positions, source, trim] = mask
        return self.masks[positions, source, trim]

    def _values(self, name: str, source: Source) -> Values:
        wanted = {
            (i.site.layer, i.site.part) for cell in self.cells for i in cell if i.source == name and i.edit.needs_source
        }
        b, t = self.tokens.ids.shape
        if isinstance(source, NoiseSource):
            size = self.model.shape.d_model
            noise = torch.stack([source.values(row, t, size, self.model.embedding_deviation) for row in self.rows])
            return {key: noise.to(self.model.device, self.model.dtype) for key in wanted}
        if isinstance(source, MeanSource):
            missing = sorted(wanted - source.values.keys())
            if missing:
                raise ValueError(f"the mean source has no value for {missing}")
            means = {key: source.values[key].to(self.model.device) for key in wanted}
            return {key: mean.expand(b, t, *mean.shape) for key, mean in means.items()}
        if source.model is None and wanted and "resid_pre" in parts_of(self.model.inner):
            wanted = {*wanted, (min(layer for layer, _ in wanted), "resid_pre")}  # for the whole-residual check
        model = source.model or self.model
        tokens = Tokens.from_lists([source.tokens[row] for row in self.rows], model.device)
        found = self._run_values(model, tokens, wanted, name)
        partners = source.partners(self.rows, self.tokens.ids.shape[1])
        return {key: align(value, partners, key[1]).to(self.model.device) for key, value in found.items()}

    def _run_values(
        self, model: Model, tokens: Tokens, wanted: set[tuple[int, str]], name: str | None = None
    ) -> dict[tuple[int, str], Tensor]:
        readout = self.readout if model is self.model else Readout(model, self.runs, self.rows, self.metric)
        if self.kind == "full":
            found = model.capture(tokens, wanted)
            if name is not None:
                logits = model.run(tokens)
                assert logits is not None
                self._source_scores[name] = readout.from_logits(logits)
            return found
        assert model.decoder is not None
        top = (model.shape.n_layers - 1, "resid_post")
        depth = None if name is not None else 1 + max(layer for layer, _ in wanted)
        found = undisturbed(
            model.decoder, tokens.ids, keep=lambda layer, part: (layer, part) in wanted or (layer, part) == top,
            n_layers=depth,
        )  # fmt: skip
        if name is not None:
            final = found[top]
            last = final[torch.arange(len(tokens), device=final.device), tokens.last.to(final.device)]
            self._source_scores[name] = readout.from_resid(last[:, None])[:, 0]
            if top not in wanted:
                del found[top]
        return found


def _one(value: Tensor, at: int, width: int, part: str) -> Tensor:
    return value[at : at + 1, :, :width, :width] if part == "pattern" else value[at : at + 1, :width]
