import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mech_align.activations import Activations, ActivationWriter, load_activations
from mech_align.errors import BadRun, UnknownSite
from mech_align.sites import Site

Z, N = Site(1, "z"), Site(0, "mlp_post", neuron=3)
KEY = {"sites": ["L1.z", "L0N3"], "positions": "last"}
SHAPES = {Z: (2, 4), N: ()}


def rows(count: int, dtype: torch.dtype = torch.float32) -> dict[Site, torch.Tensor]:
    return {Z: torch.randn(count, 2, 4).to(dtype), N: torch.randn(count).to(dtype)}


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_written_is_read(dtype: str, on_disk: bool, tmp_path: Path) -> None:
    writer = ActivationWriter(SHAPES, 5, dtype, tmp_path if on_disk else None, KEY)
    first, second = rows(3, getattr(torch, dtype)), rows(2, getattr(torch, dtype))
    writer.write(first)
    writer.write(second)
    kept = Activations(writer.arrays, dtype, np.arange(5), np.zeros(5, int), KEY)
    if on_disk:
        np.save(tmp_path / "rows.npy", np.stack([np.arange(5), np.zeros(5, int)]))
        kept = load_activations(tmp_path)
    for site in (Z, N):
        assert kept[site].dtype == getattr(torch, dtype)
        assert torch.equal(kept[site], torch.cat((first[site], second[site])))
        assert kept.numpy(site).dtype == np.float32
    assert torch.equal(kept["L1H1"], kept[Z][:, 1]) and len(kept) == 5 and kept.sites == [Z, N]
    with pytest.raises(UnknownSite, match="L1.z"):
        kept["L2.z"]


def test_an_unfinished_folder_is_taken_up_and_refused_to_others(tmp_path: Path) -> None:
    writer = ActivationWriter(SHAPES, 5, "float32", tmp_path, KEY)
    first = rows(3)
    writer.write(first)
    del writer
    more = ActivationWriter(SHAPES, 5, "float32", tmp_path, KEY)
    assert more.done == 3 and np.array_equal(more.arrays[Z][:3], first[Z].numpy())
    for shape, key in ((6, KEY), (5, {**KEY, "positions": "mean"})):
        with pytest.raises(BadRun, match="another"):
            ActivationWriter(SHAPES, shape, "float32", tmp_path, key)
    with pytest.raises(BadRun, match="no finished"):
        load_activations(tmp_path)
    with pytest.raises(BadRun):
        load_activations(tmp_path / "nothing")
    assert json.loads((tmp_path / "activations.json").read_text())["done"] == 3
