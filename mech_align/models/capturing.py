"""Activations out of a model: one batch in memory, many prompts as a stream, or with their gradients."""

import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mech_align.activations import Activations, ActivationWriter
from mech_align.errors import BadPrompts, UnknownSite
from mech_align.memory import available_bytes, halving
from mech_align.models.forward import Hook
from mech_align.models.tokens import Tokens
from mech_align.sites import PARTS, Site, part_name

if TYPE_CHECKING:
    from mech_align.models.model import Model

Key = tuple[int, str]
BATCH_TOKENS = 4096


def capture(model: "Model", tokens: Tokens, wanted: Collection[Key]) -> dict[Key, Tensor]:
    """Whole activations of one batch; see ``Model.capture``."""
    kept: dict[Key, Tensor] = {}

    def keep(key: Key) -> Hook:
        return Hook(*key, lambda value: kept.__setitem__(key, value.detach()))

    depth = 1 + max((layer for layer, _ in wanted), default=0)
    model.run(tokens, [keep(key) for key in wanted], want="none", n_layers=depth)
    return kept


def gradients(
    model: "Model",
    tokens: Tokens,
    wanted: Collection[Key],
    objective: Callable[[Float[Tensor, "b vocab"]], Float[Tensor, " b"]],
    hooks: Sequence[Hook],
) -> tuple[Mapping[Key, Tensor], Mapping[Key, Tensor], Float[Tensor, " b"]]:
    """Values, gradients and scores; see ``Model.gradients``."""
    values: dict[Key, Tensor] = {}

    def watch(key: Key) -> Hook:
        def see(value: Tensor) -> Tensor:
            # Frozen weights leave no graph: the lowest site starts it.
            value = value if value.requires_grad else value.detach().requires_grad_()
            values[key] = value
            return value

        return Hook(*key, see)

    logits = model.run(tokens, [*hooks, *(watch(key) for key in wanted)], grad=True)
    assert logits is not None
    with torch.enable_grad():
        scores = objective(logits)
        found = torch.autograd.grad(scores.sum(), list(values.values()), materialize_grads=True)
    grads = dict(zip(values, found, strict=True))
    return {key: value.detach() for key, value in values.items()}, grads, scores.detach()


def stream(
    model: "Model",
    tokens: Tokens,
    sites: Iterable[Site | str],
    *,
    positions: str | int | Sequence[int],
    batch_size: int | None,
    store: str | Path | None,
    progress: Callable[[int, int], None] | None,
) -> Activations:
    """Activations of many prompts; see ``Model.activations``."""
    wanted = _sites(sites, model)
    for site in wanted:
        if site.part == "pattern" and positions in ("mean", "all"):
            raise UnknownSite("attention patterns have another width for every prompt", hint="use model.capture")
    order, counts = _rows(tokens, positions)
    prompt = np.repeat(np.arange(len(tokens)), counts)
    position = np.concatenate(order) if len(order) else np.zeros(0, int)
    dtype = str(model.dtype).removeprefix("torch.")
    shapes = {site: _shape(site, model, tokens.ids.shape[1]) for site in wanted}
    size = sum(int(np.prod(shape)) for shape in shapes.values()) * len(prompt) * model.dtype.itemsize
    folder = Path(store) if store is not None else None
    if folder is None and size > 0.5 * available_bytes():
        folder = Path(tempfile.mkdtemp(prefix="mech_align_activations_"))
    key: dict[str, Any] = {
        "sites": [str(site) for site in wanted],
        "positions": positions if isinstance(positions, str | int) else [int(p) for p in positions],
        "model": model.provenance.get("fingerprint"),
        "backend": model.backend,
        "weights": model.provenance.get("weights"),
        "prompts": _fingerprint(tokens),
    }
    writer = ActivationWriter(shapes, len(prompt), dtype, folder, key)
    ends = np.concatenate([[0], np.cumsum(counts)])
    # Rows are counted, prompts are run: a resumed stream starts with the first prompt that is not complete.
    first = int(np.searchsorted(ends, writer.done, side="right")) - 1 if writer.done < len(prompt) else len(tokens)
    writer.done = int(ends[first])
    keys = {(site.layer, site.part) for site in wanted}
    step = batch_size or max(1, BATCH_TOKENS // tokens.ids.shape[1])

    def run(start: int, stop: int) -> None:
        lengths = tokens.lengths[start:stop]
        batch = Tokens(tokens.ids[start:stop, : int(lengths.max())], lengths)
        kept = capture(model, batch, keys)
        writer.write({site: _select(kept[site.layer, site.part], site, batch, order[start:stop], shapes[site])
                      for site in wanted})  # fmt: skip

    for start, stop in halving(first, len(tokens), step, run):
        if progress is not None:
            progress(stop, len(tokens))
        del start
    if folder is not None:
        np.save(folder / "rows.npy", np.stack([prompt, position]), allow_pickle=False)
    return Activations(writer.arrays, dtype, prompt, position, key)


def _sites(sites: Iterable[Site | str], model: "Model") -> list[Site]:
    out: list[Site] = []
    for item in [sites] if isinstance(sites, str | Site) else sites:
        if isinstance(item, str) and not item.upper().startswith("L"):
            part = part_name(item)
            out.extend(Site(layer, part) for layer in range(model.shape.n_layers))
        else:
            out.append((Site.parse(item) if isinstance(item, str) else item).check(model.shape))
    if not out:
        raise UnknownSite("no site asked for", hint=f"for instance resid_post; parts: {', '.join(PARTS)}")
    return list(dict.fromkeys(out))


def _rows(
    tokens: Tokens, positions: str | int | Sequence[int]
) -> tuple[list[Int[np.ndarray, " _"]], Int[np.ndarray, " prompt"]]:
    """Positions to keep of each prompt (-1: their mean), and how many."""
    lengths = tokens.lengths.tolist()
    if positions == "last":
        order = [np.array([length - 1]) for length in lengths]
    elif positions == "mean":
        order = [np.array([-1]) for _ in lengths]
    elif positions == "all":
        order = [np.arange(length) for length in lengths]
    elif isinstance(positions, str):
        raise BadPrompts(f"no position '{positions}'", hint="last, mean, all, a number, or one number a prompt")
    else:
        each = [positions] * len(lengths) if isinstance(positions, int) else list(positions)
        if len(each) != len(lengths):
            raise BadPrompts(f"{len(each)} positions for {len(lengths)} prompts", hint="give one for each prompt")
        order = [np.array([p + length if p < 0 else p]) for p, length in zip(each, lengths, strict=True)]
        for number, (where, length) in enumerate(zip(order, lengths, strict=True)):
            if not 0 <= where[0] < length:
                raise BadPrompts(f"prompt {number} has no position {each[number]}", why=f"it has {length} tokens")
    return order, np.array([len(where) for where in order])


def _shape(site: Site, model: "Model", width: int) -> tuple[int, ...]:
    s = model.shape
    heads = s.n_kv_heads if site.part in ("k", "v") else s.n_heads
    if site.part == "pattern":
        return (width,) if site.head is not None else (heads, width)
    if site.part in ("q", "k", "v", "z"):
        return (s.d_head,) if site.head is not None else (heads, s.d_head)
    if site.part == "mlp_post":
        return () if site.neuron is not None else (s.d_mlp,)
    return (s.d_model,)


def _select(
    value: Tensor, site: Site, tokens: Tokens, order: Sequence[Int[np.ndarray, " _"]], shape: Sequence[int]
) -> Tensor:
    if site.part == "pattern":
        at = torch.tensor([int(where[0]) for where in order], device=value.device)
        value = value[torch.arange(len(value), device=value.device), :, at]
        value = torch.nn.functional.pad(value, (0, shape[-1] - value.shape[-1]), value=torch.nan)
        behind = torch.arange(shape[-1], device=value.device) >= tokens.lengths[:, None].to(value.device)
        value = value.masked_fill(behind[:, None], torch.nan)  # whatever stood beside the prompt in its batch
        return value if site.head is None else value[:, site.head]
    if site.head is not None:
        value = value[:, :, site.head]
    if site.neuron is not None:
        value = value[:, :, site.neuron]
    if len(order) and order[0][0] == -1:
        mask = tokens.mask.to(value.device).reshape(*tokens.mask.shape, *[1] * (value.ndim - 2))
        return ((value.float() * mask).sum(1) / mask.sum(1)).to(value.dtype)
    rows = torch.tensor(np.repeat(np.arange(len(order)), [len(w) for w in order]), device=value.device)
    return value[rows, torch.tensor(np.concatenate(order), device=value.device)]


def _fingerprint(tokens: Tokens) -> str:
    import hashlib

    digest = hashlib.sha256(tokens.lengths.cpu().numpy().tobytes())
    for row, length in zip(tokens.ids.cpu(), tokens.lengths.tolist(), strict=True):
        digest.update(row[:length].numpy().tobytes())
    return digest.hexdigest()[:16]
