"""Activation patching against TransformerLens' own functions, in one process, as ratios.

    python benchmarks/patching.py [--quick] [--backend hooked|bridge] [--seed 0]

A GPT-2-small-shaped model with random weights (12 layers, 12 heads, d_model 768, vocabulary 50,257), fp32. Both sides
get the same tokens and the same metric and run all they need from scratch: their undisturbed runs are part of each
time. The repetitions alternate between the two sides; the ratio is that of the medians. Absolute times mean little on
shared machines.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformer_lens.patching as tl
from transformers import GPT2Config, GPT2LMHeadModel

import mech_align as ma
from mech_align.models import Model
from mech_align.prompts import Pairs
from mech_align.sweeps import SweepOptions

LAYERS, HEADS, VOCAB = 12, 12, 50257


def build(backend: str, seed: int) -> Model:
    """The random model on the backend."""
    import tempfile

    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        GPT2LMHeadModel(GPT2Config(n_ctx=1024)).save_pretrained(folder)
        return ma.load_model(folder, backend=backend)


def prompts(batch: int, length: int, seed: int, shared: int = 0) -> Pairs:
    """Random token pairs of one length, equal in their first ``shared`` tokens."""
    rng = np.random.default_rng(seed)
    clean = rng.integers(0, VOCAB, (batch, length))
    corrupt = rng.integers(0, VOCAB, (batch, length))
    corrupt[:, :shared] = clean[:, :shared]
    answers = rng.choice(VOCAB, (batch, 2), replace=False)
    return Pairs.from_tokens(clean.tolist(), corrupt.tolist(), answers[:, :1].tolist(), answers[:, 1:].tolist())


def peer_inputs(model: Model, pairs: Pairs) -> tuple[Any, Any, Callable[[torch.Tensor], torch.Tensor]]:
    """What TransformerLens' functions take: clean and corrupt tokens, and a metric of the logits."""
    tokens = pairs.encode(None)
    answer = torch.tensor([a[0] for a in tokens.answer])
    wrong = torch.tensor([w[0] for w in tokens.wrong])
    rows = torch.arange(len(tokens))

    def metric(logits: torch.Tensor) -> torch.Tensor:
        last = logits[:, -1]
        return (last[rows, answer] - last[rows, wrong]).mean()

    return torch.tensor(tokens.clean), torch.tensor(tokens.corrupt), metric


def peer_by_position(model: Model, pairs: Pairs, positions: list[int]) -> np.ndarray:
    """TransformerLens' map over heads at some positions: ``[layer, head, position]``."""
    clean, corrupt, metric = peer_inputs(model, pairs)
    with torch.no_grad():
        _, cache = model.inner.run_with_cache(clean)
        grid = pd.MultiIndex.from_product([range(LAYERS), positions, range(HEADS)], names=["layer", "pos", "head"])
        flat = tl.generic_activation_patch(
            model.inner, corrupt, cache, metric, tl.layer_pos_head_vector_patch_setter, "z",
            index_df=grid.to_frame(index=False),
        )  # fmt: skip
    return flat.numpy().reshape(LAYERS, len(positions), HEADS).transpose(0, 2, 1)


def peer(model: Model, pairs: Pairs, function: Any, layers: list[int] | None, index: tuple[str, ...]) -> np.ndarray:
    """The map by TransformerLens: the cached clean run, then its sweep over the wanted cells."""
    clean, corrupt, metric = peer_inputs(model, pairs)
    with torch.no_grad():
        _, cache = model.inner.run_with_cache(clean)
        if layers is None:
            return function(model.inner, corrupt, cache, metric).numpy()
        length = clean.shape[1]
        sizes = {"layer": layers, "pos": range(length), "head": range(HEADS)}
        grid = pd.MultiIndex.from_product([sizes[name] for name in index], names=list(index)).to_frame(index=False)
        flat = tl.generic_activation_patch(
            model.inner, corrupt, cache, metric, tl.layer_head_vector_patch_setter, "z", index_df=grid
        )
        return flat.numpy().reshape([len(sizes[name]) for name in index])


def ours(model: Model, pairs: Pairs, layers: list[int] | None, positions: str) -> np.ndarray:
    """The same map by mech_align, as mean metric over the prompts."""
    quiet = SweepOptions(progress=lambda done, total: None)
    found = ma.head_patching(model, pairs, layers=layers, positions=positions, options=quiet)
    v = found.values
    gap = (v.clean - v.corrupt).values.astype(np.float64)
    scores = found.data.values * gap.reshape(-1, *[1] * (found.data.ndim - 1)) + v.corrupt.values.reshape(
        -1, *[1] * (found.data.ndim - 1)
    )
    return scores.mean(0)


def race(
    name: str, left: Callable[[], np.ndarray], right: Callable[[], np.ndarray], repeats: int, peers: int,
    *, share: float = 1.0, pick: Any = ...,
) -> None:  # fmt: skip
    """Alternate the two sides; print the ratio of medians and the largest difference.

    With ``share`` below 1 the peer runs only that share of its cells, which all cost it the same forward pass, and its
    time is scaled up; ``pick`` takes the same cells out of our map.
    """
    mine: list[float] = []
    theirs: list[float] = []
    a = b = np.zeros(0)
    right()  # first-use costs (lazy buffers, pages) are nobody's
    for number in range(repeats):
        if number < peers:
            start = time.perf_counter()
            a = left()
            theirs.append(time.perf_counter() - start)
        start = time.perf_counter()
        b = right()
        mine.append(time.perf_counter() - start)
    b = b[pick]
    theirs = [seconds / share for seconds in theirs]
    ratio = statistics.median(theirs) / statistics.median(mine)
    print(
        f"{name:<44} TransformerLens {statistics.median(theirs):8.2f} s   "
        f"mech_align {statistics.median(mine):7.2f} s   {ratio:6.1f} x   max|d| {np.abs(a - b).max():.1e}",
        flush=True,
    )


def main() -> None:
    """Print one line a benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="hooked")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="leave out heads x positions, which takes minutes"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    import tqdm.auto

    tl.tqdm = partial(tqdm.auto.tqdm, disable=True)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = build(options.backend, options.seed)
    print(f"GPT-2-small shape, {options.backend}, fp32, {torch.get_num_threads()} threads, torch {torch.__version__}")
    all_pos = tl.get_act_patch_attn_head_out_all_pos
    batch = prompts(8, 32, options.seed)
    race("all heads, 8 x 32 tokens, 144 cells",
         lambda: peer(model, batch, all_pos, None, ()), lambda: ours(model, batch, None, "all"), 3, 2)  # fmt: skip
    top = [LAYERS - 2, LAYERS - 1]
    race("heads of the last two layers, 24 cells", lambda: peer(model, batch, all_pos, top, ("layer", "head")),
         lambda: ours(model, batch, top, "all"), 5, 3)  # fmt: skip
    shared = prompts(8, 32, options.seed, shared=24)
    race("all heads, first 24 of 32 tokens shared",
         lambda: peer(model, shared, all_pos, None, ()), lambda: ours(model, shared, None, "all"), 3, 1)  # fmt: skip
    if not options.quick:
        small = prompts(2, 32, options.seed)
        some = list(range(0, 32, 8))
        race("heads x positions, 2 x 32, 4,608 cells (peer: 576)", lambda: peer_by_position(model, small, some),
             lambda: ours(model, small, None, "each"), 1, 1, share=len(some) / 32, pick=(..., some))  # fmt: skip


if __name__ == "__main__":
    main()
