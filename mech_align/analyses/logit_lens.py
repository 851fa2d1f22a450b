"""Which answer could be read from the residual stream after each layer?"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mech_align.errors import MechAlignError, SelfCheckFailed
from mech_align.interventions import Intervention
from mech_align.metrics import Metric, log_odds
from mech_align.models import Hook, Model
from mech_align.models.names import check_writable
from mech_align.prompts import Pairs, TokenPairs
from mech_align.results import Result
from mech_align.sweeps import Run, RunSource, Source, encode
from mech_align.sweeps.batch import Batch, Readout
from mech_align.sweeps.effects import describe, prompt_coords
from mech_align.sweeps.full import FullEngine
from mech_align.sweeps.reading import Key, each_batch, read_last
from mech_align.sweeps.sweep import TOLERANCE

NONE = "none"
_STREAMS = ("resid_pre", "resid_mid", "resid_post")
_LOGITS = 2**26
"""How many logits may be in memory at once."""


def logit_lens(
    model: Model,
    pairs: Pairs | TokenPairs,
    *,
    metric: Metric | None = None,
    part: str = "resid_post",
    run: Literal["clean", "corrupt"] = "clean",
    interventions: Mapping[str, Sequence[Intervention]] | None = None,
    sources: Mapping[str, Source] | None = None,
    batch_size: int | None = None,
) -> Result:
    r"""If the model stopped after a layer, which answer could be read from its residual stream?

    $$\ell_l = W_U\,\mathrm{norm}_{\mathrm{final}}(r_l) + b_U$$

    at the last token, and the metric of these logits. After the last layer this is the model itself, which is checked.

    Args:
        metric: The log-odds of the answer sets when left out.
        part: ``"resid_post"`` (from the embeddings up), ``"resid_pre"`` or ``"resid_mid"``.
        run: Which prompts are read; right answers are those of the clean side in either case.
        interventions: By name, edits that act together; the lens is read again under each.
        sources: Where edits take values from, by ``Intervention.source``. Left out, ``"source"`` is the other run.
        batch_size: Prompts at a time; automatic when left out.

    Returns:
        Result with dims ``(prompt, layer)``, with interventions ``(prompt, intervention, layer)``, the undisturbed run
        first, as ``"none"``. Layer -1 is the embedding. Unit of the metric. Beside it ``rank`` (1 is best) and
        ``probability`` of the best answer token, and ``output``, the metric of the model's own logits.

    Raises:
        UnknownSite: A part or an edited site that the model does not have.
        SelfCheckFailed: The last layer does not give the model's logits.

    Reference:
        nostalgebraist 2020, interpreting GPT: the logit lens; Belrose et al. 2023, arXiv:2303.08112.
    """
    metric = metric or log_odds()
    if run not in ("clean", "corrupt"):
        raise MechAlignError(f"no run '{run}'", hint="clean or corrupt")
    tokens = encode(model, pairs)
    rows = Run.clean(tokens) if run == "clean" else Run.corrupt(tokens)
    cells = _cells(model, tokens, run, interventions or {})
    given = _sources(tokens, run, cells, sources)
    places = _places(model, part)
    lens = _Lens(model, rows, metric, places, list(cells.values()), given)
    each_batch(rows, lens.read, batch_size=batch_size)
    values = {"effect": lens.effect, "rank": lens.rank, "probability": lens.probability}
    names = [NONE, *cells]
    dims = ("prompt", "intervention", "layer") if interventions else ("prompt", "layer")
    shaped = {name: value if interventions else value[:, 0] for name, value in values.items()}
    output = lens.output if interventions else lens.output[:, 0]
    layers = np.array([layer for layer, _ in places])
    data = xr.Dataset(
        {**{name: (dims, value) for name, value in shaped.items()}, "output": (dims[:-1], output)},
        coords={
            "prompt": np.arange(len(rows)), **prompt_coords(tokens), "layer": layers,
            "label": ("layer", np.array(["embed" if layer < 0 else str(layer) for layer in layers])),
            **({"intervention": np.array(names)} if interventions else {}),
        },
    )  # fmt: skip
    settings = {
        "part": part, "run": run, "interventions": {name: [str(i) for i in cell] for name, cell in cells.items()},
    }  # fmt: skip
    provenance = {**describe(model, tokens, metric, settings), "engine": lens.engine, "checks": lens.checks}
    provenance["warnings"] = [*provenance["warnings"], *lens.warnings]
    return Result(data, "logit_lens", metric.unit, "positive = towards the clean answer", provenance)


class _Lens:
    """The lens over batches of prompts: the readout in use, and what was read so far."""

    def __init__(
        self, model: Model, run: Run, metric: Metric, places: Sequence[tuple[int, Key]],
        cells: Sequence[Sequence[Intervention]], sources: Mapping[str, Source],
    ) -> None:  # fmt: skip
        self.model, self.run, self.metric, self.cells, self.sources = model, run, metric, cells, sources
        self.places = places
        self.engine = "decoder" if model.decoder is not None else "hooks"
        shape = (len(run), 1 + len(cells), len(places))
        self.effect, self.rank, self.probability = (np.full(shape, np.nan, np.float32) for _ in range(3))
        self.output = np.full(shape[:2], np.nan, np.float32)
        self.checks: dict[str, float] = {}
        self.warnings: list[str] = []

    def read(self, rows: list[int]) -> None:
        """One batch under no intervention and under each."""
        batch = Batch(self.model, self.run, rows, self.cells, self.metric, self.sources, "full")
        assert isinstance(batch.engine, FullEngine)
        for number, hooks in enumerate([[], *(batch.engine.hooks(cell) for cell in batch.placed)]):
            kept, logits = read_last(self.model, batch.tokens, [key for _, key in self.places], hooks)
            home = logits.device
            resid = torch.stack([kept[key].to(home) for _, key in self.places], dim=1)
            output = batch.readout.from_logits(logits)
            found = self._measured(batch, resid)
            if self.places[-1][1] == (self.model.shape.n_layers - 1, "resid_post"):
                problem = self._compare(found[0][:, -1], output)
                if problem and self.engine == "decoder":
                    self.warnings.append(f"the unembedding was read through the model itself, because {problem}")
                    self.engine, self.checks = "hooks", {}
                    return self.read(rows)
                if problem:
                    raise SelfCheckFailed(f"the top of the lens is not the model: {problem}", hint="please report it")
            for into, value in zip((self.effect, self.rank, self.probability), found, strict=True):
                into[rows, number] = value.float().cpu().numpy()
            self.output[rows, number] = output.float().cpu().numpy()
        return None

    def _measured(self, batch: Batch, resid: Float[Tensor, "b layer d"]) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            pieces = [_measure(batch.readout, logits) for logits in self._logits(batch, resid)]
        effect, rank, probability = (torch.cat(piece, dim=1) for piece in zip(*pieces, strict=True))
        return effect, rank, probability

    def _logits(self, batch: Batch, resid: Float[Tensor, "b layer d"]) -> Iterator[Float[Tensor, "b some vocab"]]:
        """fp32 logits of all layers, a few at a time."""
        decoder = self.model.decoder
        if self.engine == "decoder" and decoder is not None:
            for some in resid.split(max(1, _LOGITS // (len(resid) * self.model.shape.d_vocab)), dim=1):
                yield decoder.readout(some)
            return
        # Where the weights cannot be read: put each layer's stream in at the top, and let the model finish.
        top = self.model.shape.n_layers - 1
        check_writable(self.model.inner, "resid_post", top)
        last = batch.tokens.last
        for one in resid.unbind(1):

            def put(value: Tensor, one: Tensor = one) -> Tensor:
                value = value.clone()
                value[torch.arange(len(value), device=value.device), last.to(value.device)] = one.to(value)
                return value

            logits = self.model.run(batch.tokens, [Hook(top, "resid_post", put)])
            assert logits is not None
            yield logits[:, None]

    def _compare(self, lens: Float[Tensor, " b"], output: Float[Tensor, " b"]) -> str:
        """Is the top of the lens the model's own answer? Says what is wrong, or nothing."""
        error = float((lens.to(output.device) - output).abs().max())
        allowed = TOLERANCE.get(self.model.dtype, 1e-4) * max(1.0, float(output.abs().max()))
        self.checks["last layer - model"] = max(error, self.checks.get("last layer - model", 0.0))
        return "" if error <= allowed else f"the last layer is {error:.3g} off where {allowed:.3g} is allowed"


def _measure(readout: Readout, logits: Float[Tensor, "b layer vocab"]) -> tuple[Tensor, Tensor, Tensor]:
    """Metric, and rank and probability of the best answer token."""
    b, n, _ = logits.shape
    picked = logits if readout.tokens is None else logits[..., readout.tokens.to(logits.device)]
    answer, wrong = (m.to(logits.device)[:, None].expand(b, n, -1) for m in (readout.answer, readout.wrong))
    flat = (value.flatten(0, 1) for value in (picked, answer, wrong))
    effect = readout.metric.measure(*flat).unflatten(0, (b, n))
    best = picked.masked_fill(~answer, -torch.inf).amax(-1)
    rank = 1 + (logits > best[..., None]).sum(-1)
    return effect, rank, (best - logits.logsumexp(-1)).exp()


def _places(model: Model, part: str) -> list[tuple[int, Key]]:
    """Layer numbers as shown, and where their stream is read."""
    if part not in _STREAMS:
        raise MechAlignError(
            f"the lens does not read {part}", why="only the residual stream is what the unembedding reads",
            hint=f"part: {', '.join(_STREAMS)}; logit_attribution shows what single heads and MLPs write",
        )  # fmt: skip
    places: list[tuple[int, Key]] = [(layer, (layer, part)) for layer in range(model.shape.n_layers)]
    return [(-1, (0, "resid_pre")), *places] if part == "resid_post" else places


def _cells(
    model: Model, pairs: TokenPairs, run: str, interventions: Mapping[str, Sequence[Intervention]]
) -> dict[str, list[Intervention]]:
    cells = {name: list(cell) for name, cell in interventions.items()}
    if NONE in cells:
        raise MechAlignError(f"'{NONE}' is the name of the undisturbed run", hint="give the intervention another name")
    for name, cell in cells.items():
        if not cell:
            raise MechAlignError(f"the intervention '{name}' changes nothing", hint="give at least one Intervention")
        for edit in cell:
            for index in edit.index or (None,):
                axis = "neuron" if edit.site.part == "mlp_post" else "head"
                type(edit.site)(edit.site.layer, edit.site.part, **{axis: index}).check(model.shape)
            check_writable(model.inner, edit.site.part, edit.site.layer)
            if isinstance(edit.positions, str):
                pairs.positions(edit.positions, side=run)
    return cells


def _sources(
    pairs: TokenPairs, run: str, cells: Mapping[str, Sequence[Intervention]], sources: Mapping[str, Source] | None
) -> dict[str, Source]:
    """The sources that edits name; without any given, the other run of each pair."""
    wanted = {i.source for cell in cells.values() for i in cell if i.edit.needs_source}
    given = dict(sources or {})
    if not given and wanted == {"source"}:
        given["source"] = RunSource.clean(pairs) if run == "corrupt" else RunSource.corrupt(pairs)
    missing = sorted(wanted - given.keys())
    if missing:
        known = ", ".join(given) or "none given"
        raise MechAlignError(f"no source named '{missing[0]}' for an edit", hint=f"sources: {known}")
    return {name: given[name] for name in sorted(wanted)}
