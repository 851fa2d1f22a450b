"""What a sweep will need, before it runs."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mech_align.memory import available_bytes
from mech_align.models import Model, Tokens
from mech_align.sites import PARTS
from mech_align.sweeps.sources import Run
from mech_align.sweeps.sweep import Cell, row_budget


@dataclass(frozen=True)
class Cost:
    """The price of a sweep.

    Attributes:
        scores: Prompts times cells.
        naive_passes: Forward passes of one prompt that a pass a cell would take.
        passes: The same work here, in forward passes of one prompt.
        peak_bytes: Memory on top of what is in use now.
        free_bytes: Memory that is free now.
        seconds: From timing two forward passes of one prompt; tens of per cent off.
    """

    scores: int
    naive_passes: float
    passes: float
    peak_bytes: int
    free_bytes: int
    seconds: float


def estimate(
    model: Model, run: Run, cells: Sequence[Cell], *, n_sources: int = 1, batch_size: int | None = None
) -> Cost:
    """How many passes, how much memory and how long would ``sweep`` take? Runs none of it."""
    from mech_align.sweeps.sweep import _batch_size  # pyright: ignore[reportPrivateUsage]

    shape, count = model.shape, len(run)
    longest = max(len(row) for row in run.tokens)
    fast = model.decoder is not None
    work = 0.0
    for cell in cells:
        first = min(cell, key=lambda i: (i.site.layer, PARTS.index(i.site.part)))
        late = first.site.layer == shape.n_layers - 1 and PARTS.index(first.site.part) >= PARTS.index("z")
        share = (shape.n_layers - first.site.layer) / shape.n_layers
        if late or all(i.positions == "last" for i in cell):
            share /= longest
        work += share if fast else 1.0
    passes = count * (1 + n_sources + work)
    batch = min(count, batch_size or _batch_size(run, model))
    item = model.dtype.itemsize
    width = 5 * shape.d_model + 2 * shape.n_kv_heads * shape.d_head + shape.n_heads * shape.d_head
    base = batch * longest * width * shape.n_layers * item
    per_row = 4 * shape.d_model + 3 * max(shape.d_mlp, shape.d_model) + shape.n_heads * longest
    travel = row_budget(model) * per_row * item
    readout = 0 if fast else batch * shape.d_vocab * 4 * 2
    source = n_sources * batch * longest * shape.n_layers * shape.d_model * item
    return Cost(
        scores=count * len(cells),
        naive_passes=float(count * (1 + n_sources + len(cells))),
        passes=passes,
        peak_bytes=int(base + travel + readout + source),
        free_bytes=available_bytes(model.device),
        seconds=passes * _seconds(model, run),
    )


def _seconds(model: Model, run: Run) -> float:
    """One prompt through the model: the second of two timed passes of the longest one."""
    tokens = Tokens.from_lists([max(run.tokens, key=len)], model.device)
    took = math.inf
    for _ in range(2):
        start = time.perf_counter()
        model.run(tokens)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took = time.perf_counter() - start
    return took
