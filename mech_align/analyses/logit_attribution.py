"""Which parts of the network write the answer straight into the logits?"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mech_align.errors import MechAlignError, SelfCheckFailed, UnsupportedModel
from mech_align.metrics import Metric, logit_difference
from mech_align.models import Model, Tokens
from mech_align.models.decoder import Decoder, Norm
from mech_align.prompts import Pairs, TokenPairs
from mech_align.results import Result
from mech_align.sweeps import Run, encode
from mech_align.sweeps.batch import Readout
from mech_align.sweeps.effects import describe, prompt_coords
from mech_align.sweeps.reading import Key, each_batch, read_last

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Allowed leftover, as a share of the sum of the absolute parts."""


def logit_attribution(
    model: Model,
    pairs: Pairs | TokenPairs,
    *,
    metric: Metric | None = None,
    run: Literal["clean", "corrupt"] = "clean",
    split_mlp_bias: bool = False,
    batch_size: int | None = None,
) -> Result:
    r"""Which heads, MLPs, embeddings and biases write the answer straight into the logits?

    The last residual stream is a sum of parts, $r = \sum_j w_j$. With the final norm's scale held at its value in the
    run the metric is linear in them:

    $$m = b + \sum_j \frac{\gamma \odot (w_j - \bar w_j)}{\sigma(r)} \cdot u, \qquad
      u = \frac1{|A|}\sum_{a \in A} W_U[:,a] - \frac1{|W|}\sum_{v \in W} W_U[:,v]$$

    ($\bar w_j$ for LayerNorm only). Norms between a block and the stream (Gemma 2, 3) are held at their scale likewise.
    Weights may be folded or raw. With squashed logits (Gemma 2) the parts sum to the value before the squashing.

    Args:
        metric: Linear in the logits; the logit difference when left out.
        run: Which prompts are split; right answers are those of the clean side in either case.
        split_mlp_bias: Show the bias of each MLP's output projection as a part of its own.

    Returns:
        Result with dims ``(prompt, component)``, coordinates ``layer`` (-1 for embeddings, the number of layers for
        what comes last) and ``kind`` (head, mlp, bias, embed); unit of the metric. Beside it, for each prompt, the
        metric itself (``clean`` or ``corrupt``) and ``residual``, what the parts leave over.

    Raises:
        MechAlignError: The metric is not linear in the logits.
        UnsupportedModel: An architecture whose weights cannot be read as a plain decoder.
        SelfCheckFailed: The parts do not sum to the metric.

    Reference:
        Elhage et al. 2021, A Mathematical Framework for Transformer Circuits; Wang et al. 2022,
        arXiv:2211.00593, section 3.
    """
    metric = metric or logit_difference()
    if not metric.linear:
        raise MechAlignError(
            f"{metric.name} does not split over the parts of a network", why="it is not linear in the logits",
            hint="use logit_difference",
        )  # fmt: skip
    if run not in ("clean", "corrupt"):
        raise MechAlignError(f"no run '{run}'", hint="clean or corrupt")
    decoder = _decoder_of(model)
    tokens = encode(model, pairs)
    rows = Run.clean(tokens) if run == "clean" else Run.corrupt(tokens)
    parts = _parts(decoder, split_mlp_bias)
    effect = np.full((len(rows), len(parts)), np.nan)
    total, size, squashed = (np.full(len(rows), np.nan) for _ in range(3))

    def do(numbers: list[int]) -> None:
        found = _attribute(model, decoder, rows, numbers, metric, [part.label for part in parts])
        effect[numbers], total[numbers] = found.parts, found.total
        size[numbers], squashed[numbers] = found.size, found.squashing_error

    each_batch(rows, do, batch_size=batch_size)
    residual = total - effect.sum(1)
    warnings, checks = _check(model, residual, squashed, np.maximum(size, np.abs(effect).sum(1)))
    settings = {"run": run, "split_mlp_bias": split_mlp_bias}
    provenance = {**describe(model, tokens, metric, settings), "checks": checks}
    provenance["warnings"] = [*provenance["warnings"], *warnings]
    if decoder.softcap is not None:
        provenance["attributed"] = f"the metric before logits are squashed to +-{decoder.softcap:g}"
    values = xr.Dataset(
        {"effect": (("prompt", "component"), effect.astype(np.float32)), run: ("prompt", total.astype(np.float32)),
         "residual": ("prompt", residual.astype(np.float32))},
        coords={
            "prompt": np.arange(len(rows)), **prompt_coords(tokens),
            "component": np.array([part.label for part in parts]),
            "layer": ("component", np.array([part.layer for part in parts])),
            "kind": ("component", np.array([part.kind for part in parts])),
        },
    )  # fmt: skip
    return Result(values, "logit_attribution", metric.unit, "positive = towards the clean answer", provenance)


@dataclass(frozen=True)
class _Part:
    label: str
    layer: int
    kind: str


@dataclass(frozen=True)
class _Found:
    """Of one batch: the parts, their sum as it should be, the scale of rounding, the error of squashed logits."""

    parts: Float[np.ndarray, "b component"]
    total: Float[np.ndarray, " b"]
    size: Float[np.ndarray, " b"]
    squashing_error: Float[np.ndarray, " b"]


def _decoder_of(model: Model) -> Decoder:
    if model.decoder is None:
        raise UnsupportedModel(
            f"logit attribution does not know how to take {model.name} apart on this backend",
            why="its architecture is not read as a plain decoder, so that what each head writes is unknown",
            hint="try the other backend; head_patching and logit_lens work on every architecture",
        )
    return model.decoder


def _parts(decoder: Decoder, split_mlp_bias: bool) -> list[_Part]:
    """The parts in the order of a forward pass. A bias that is zero everywhere is none."""
    parts = [_Part("embed", -1, "embed")]
    if decoder.position_embedding is not None:
        parts.append(_Part("pos_embed", -1, "embed"))
    for index, layer in enumerate(decoder.layers):
        parts += [_Part(f"L{index}H{head}", index, "head") for head in range(layer.n_heads)]
        if _nonzero(layer.output.bias) or (layer.post_attn is not None and _nonzero(layer.post_attn.bias)):
            parts.append(_Part(f"L{index}.attn bias", index, "bias"))
        if layer.mlp is not None:
            parts.append(_Part(f"L{index}.mlp", index, "mlp"))
            if split_mlp_bias and layer.post_mlp is None and _nonzero(layer.mlp.down.bias):
                parts.append(_Part(f"L{index}.mlp bias", index, "bias"))
    if _nonzero(decoder.final_norm.bias) or _nonzero(decoder.unembedding_bias):
        parts.append(_Part("unembed bias", len(decoder.layers), "bias"))
    return parts


def _attribute(model: Model, decoder: Decoder, run: Run, rows: list[int], metric: Metric, labels: list[str]) -> _Found:
    """What each part of one batch writes along the metric's direction."""
    tokens = Tokens.from_lists([run.tokens[row] for row in rows], model.device)
    top = (len(decoder.layers) - 1, "resid_post")
    wanted: list[Key] = [top]
    for index, layer in enumerate(decoder.layers):
        wanted += [(index, "z")] + ([(index, "mlp_out")] if layer.mlp is not None else [])
    kept, logits = read_last(model, tokens, wanted)
    readout = Readout(model, run, rows, metric)
    wide = torch.float64 if model.dtype == torch.float64 else torch.float32
    weights = _weights(metric, readout, wide).to(decoder.unembedding.device)
    chosen = slice(None) if readout.tokens is None else readout.tokens.to(weights.device)
    final = kept[top].to(weights.device)
    target = weights @ decoder.unembedding[chosen].to(wide)
    direction, constant = _through(decoder.final_norm, final, target)
    if decoder.unembedding_bias is not None:
        constant = constant + weights @ decoder.unembedding_bias[chosen].to(wide)
    written = _embeddings(decoder, tokens, direction)
    for index in range(len(decoder.layers)):
        written |= _layer(decoder, index, kept, direction, split=f"L{index}.mlp bias" in labels)
    written["unembed bias"] = constant
    plain = decoder if decoder.softcap is None else replace(decoder, softcap=None)
    shown = readout.from_logits(logits).to(weights.device)
    total, error = shown, torch.zeros_like(shown)
    if decoder.softcap is not None:
        # The squashing cannot be undone exactly, so the value before it is read off, and its squashed twin is compared.
        total = _measure(readout, plain.readout(final, readout.tokens))
        error = _measure(readout, decoder.readout(final, readout.tokens)) - shown
    used = logits.to(weights.device)[:, chosen]
    size = (used * (weights != 0)).abs().amax(-1)
    columns = [written[label].double().cpu() for label in labels]
    return _Found(torch.stack(columns, 1).numpy(), *(x.double().cpu().numpy() for x in (total, size, error)))


def _measure(readout: Readout, logits: Float[Tensor, "b token"]) -> Float[Tensor, " b"]:
    return readout.metric.measure(logits, readout.answer.to(logits.device), readout.wrong.to(logits.device))


def _weights(metric: Metric, readout: Readout, dtype: torch.dtype) -> Float[Tensor, "b token"]:
    """The weight of each token's logit in the metric: its gradient, the same everywhere for a linear metric."""
    with torch.inference_mode(False), torch.enable_grad():
        logits = torch.zeros(readout.answer.shape, dtype=dtype, device=readout.answer.device, requires_grad=True)
        score = metric.measure(logits, readout.answer.clone(), readout.wrong.clone())
        return torch.autograd.grad(score.sum(), logits)[0]


def _through(
    norm: Norm, x: Float[Tensor, "b d"], direction: Float[Tensor, "b d"]
) -> tuple[Float[Tensor, "b d"], Float[Tensor, " b"]]:
    """A direction after a norm as one before it, the scale held at what ``x`` gives; and what the norm's bias adds."""
    bias = torch.zeros(()).to(direction) if norm.bias is None else norm.bias.to(direction)
    constant = (direction * bias).sum(-1)
    if norm.kind == "none":
        return direction, constant
    weight = 1.0 if norm.weight is None else norm.weight.to(direction) + norm.offset
    before = direction * weight / norm.scale(x).to(direction)
    if norm.kind == "layer":
        before = before - before.mean(-1, keepdim=True)  # the transpose of taking the mean out of the input
    return before, constant


def _embeddings(decoder: Decoder, tokens: Tokens, direction: Float[Tensor, "b d"]) -> dict[str, Tensor]:
    rows = torch.arange(len(tokens), device=tokens.ids.device)
    ids = tokens.ids[rows, tokens.last].to(decoder.embedding.device)
    token = F.embedding(ids, decoder.embedding)
    if decoder.embedding_scale != 1.0:
        token = token * torch.tensor(decoder.embedding_scale, dtype=token.dtype)
    written = {"embed": (token.to(direction) * direction).sum(-1)}
    if decoder.position_embedding is not None:
        place = decoder.position_embedding[tokens.last.to(decoder.position_embedding.device)]
        written["pos_embed"] = (place.to(direction) * direction).sum(-1)
    return written


def _layer(
    decoder: Decoder, index: int, kept: dict[Key, Tensor], direction: Float[Tensor, "b d"], *, split: bool
) -> dict[str, Tensor]:
    """Heads, attention bias and MLP of one layer; the MLP's bias apart when ``split``."""
    layer = decoder.layers[index]
    here = direction.to(layer.device)
    z = kept[index, "z"].to(layer.device)
    along, bias = here, torch.zeros_like(here[:, 0])
    if layer.post_attn is not None:
        along, bias = _through(layer.post_attn, layer.output(z.flatten(-2)), here)
    # The direction is pulled back through W_O instead of every head being pushed through it.
    heads = ((along @ layer.output.weight.to(along)).unflatten(-1, z.shape[1:]) * z.to(along)).sum(-1)
    if layer.output.bias is not None:
        bias = bias + along @ layer.output.bias.to(along)
    written = {f"L{index}H{head}": heads[:, head] for head in range(heads.shape[1])} | {f"L{index}.attn bias": bias}
    if layer.mlp is not None:
        out = kept[index, "mlp_out"].to(layer.device)
        written[f"L{index}.mlp"] = (out.to(here) * here).sum(-1)
        if split:
            assert layer.mlp.down.bias is not None
            written[f"L{index}.mlp bias"] = here @ layer.mlp.down.bias.to(here)
            written[f"L{index}.mlp"] -= written[f"L{index}.mlp bias"]
    return written


def _nonzero(bias: Tensor | None) -> bool:
    return bias is not None and bool(bias.any())


def _check(
    model: Model, residual: Float[np.ndarray, " prompt"], squashed: Float[np.ndarray, " prompt"],
    size: Float[np.ndarray, " prompt"],
) -> tuple[list[str], dict[str, float]]:  # fmt: skip
    """Do the parts add up? Rounding in half precision is a warning, anything else that does not fit an error."""
    allowed = _TOLERANCE.get(model.dtype, 1e-4)
    scale = np.maximum(1.0, size)
    share = float(max(np.max(np.abs(residual) / scale), np.max(np.abs(squashed) / scale)))
    checks = {"largest residual": float(np.abs(residual).max()), "largest residual, share of all parts": share}
    if np.abs(squashed).max() > 0:
        checks["squashed readout - logits"] = float(np.abs(squashed).max())
    half = model.dtype in (torch.float16, torch.bfloat16)
    if not share <= (10 * allowed if half else allowed):
        raise SelfCheckFailed(
            f"the parts do not sum to the metric: up to {np.abs(residual).max():.3g} is left over",
            why=f"that is {share:.2g} of the sum of all parts, where {allowed:.0e} would be rounding",
            hint=["use dtype float32", "please report the architecture"],
        )
    if share > allowed:
        name = str(model.dtype).removeprefix("torch.")
        return [f"rounding in {name} leaves {share:.2g} of the parts unexplained"], checks
    return [], checks
