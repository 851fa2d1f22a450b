import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from mech_align.errors import BadRun, MechAlignError
from mech_align.results import Result, load_result


def made(n: int = 12) -> Result:
    rng = np.random.default_rng(0)
    effect = rng.normal(0, 0.1, (n, 2, 3)).astype(np.float32)
    effect[:, 1, 2] += 2
    effect[:, 0, 1] -= 3
    effect[0] = np.nan
    values = xr.Dataset(
        {
            "effect": (("prompt", "layer", "head"), effect), "clean": ("prompt", np.arange(n, dtype=float)),
            "degenerate": ("prompt", np.arange(n) == 0),
        },
        coords={
            "prompt": np.arange(n), "id": ("prompt", [f"p{i}" for i in range(n)]),
            "group": ("prompt", [f"g{i // 2}" for i in range(n)]), "layer": [4, 5], "head": [0, 1, 2],
        },
    )  # fmt: skip
    return Result(values, "head_patching", "fraction", "positive = clean", {"n": 1, "warnings": ["first"]})


def test_the_effect_and_the_prompt_axis_are_checked() -> None:
    with pytest.raises(ValueError, match="effect"):
        Result(xr.Dataset({"other": ("prompt", [1.0])}), "x", "y")
    with pytest.raises(ValueError, match="first"):
        Result(xr.Dataset({"effect": (("layer", "prompt"), np.zeros((1, 2)))}), "x", "y")


def test_frame_has_a_row_a_cell() -> None:
    table = made().frame()
    assert len(table) == 12 * 2 * 3 and int(table["effect"].isna().sum()) == 6
    assert {"prompt", "layer", "head", "id", "group", "effect"} <= set(table.columns)
    row = table[(table["prompt"] == 3) & (table["layer"] == 5) & (table["head"] == 2)]
    assert float(row["effect"].iloc[0]) == float(made().data.values[3, 1, 2])


def test_mean_over_prompts_leaves_out_what_is_unmeasured() -> None:
    found = made().mean("prompt")
    assert found.has_statistics and not made().has_statistics
    assert np.allclose(found.data.values, np.nanmean(made().data.values, 0), atol=1e-6)
    assert int(found.values["n"].values.min()) == 11
    inside = (found.values["ci_low"] <= found.data) & (found.data <= found.values["ci_high"])
    assert bool(inside.all())
    assert found.provenance["statistics"]["n_groups"] == 6 and found.warnings[0] == "first"
    assert made().warnings == ["first"], "the original is left alone"


def test_mean_over_another_axis_is_plain() -> None:
    found = made().mean("head")
    assert found.data.dims == ("prompt", "layer") and not found.has_statistics
    assert np.allclose(found.data.values[1:], made().data.values[1:].mean(-1))
    assert "clean" in found.values
    with pytest.raises(MechAlignError, match="position"):
        made().mean("position")


def test_top_is_ranked_and_labelled() -> None:
    assert made().top(2)["site"].tolist() == ["L4H1", "L5H2"]
    assert made().top(1, by="positive")["site"].tolist() == ["L5H2"]
    assert made().top(1, by="negative")["site"].tolist() == ["L4H1"]
    assert len(made().mean("prompt").top(100)) == 6


@pytest.mark.parametrize(
    ("dims", "label"),
    [
        ({"part": ["mlp_out"], "layer": [3], "position": ["-1 x"]}, "L3.mlp_out@-1 x"),
        ({"layer": [3], "neuron": [17]}, "L3N17"),
        ({"component": ["embed"]}, "embed"),
        ({"cell": ["L1H2+L2H0"]}, "L1H2+L2H0"),
    ],
)
def test_labels_of_other_axes(dims: dict[str, list[object]], label: str) -> None:
    values = xr.Dataset({"effect": (tuple(dims), np.ones([1] * len(dims)))}, coords=dims)
    assert Result(values, "x", "y").top()["site"].tolist() == [label]


def test_select() -> None:
    found = made().select(layer=[5], head=2)
    assert found.data.dims == ("prompt", "layer")
    assert np.array_equal(found.data.values[:, 0], made().data.values[:, 1, 2], equal_nan=True)
    assert found.top(1)["site"].tolist() == ["L5H2"]
    with pytest.raises(MechAlignError, match="no head 9"):
        made().select(head=9)
    with pytest.raises(MechAlignError, match="no axis 'neuron'"):
        made().select(neuron=1)


@pytest.mark.parametrize("averaged", [False, True])
def test_saved_and_loaded_is_the_same(tmp_path: Path, averaged: bool) -> None:
    first = made().mean("prompt") if averaged else made()
    first = first.map(lambda values: values.assign_coords(head=np.array(["a", "Ġb", "<c>"])))
    again = load_result(first.save(tmp_path / "one"))
    xr.testing.assert_identical(first.values.drop_attrs(), again.values.drop_attrs())
    assert (again.name, again.unit, again.sign) == (first.name, first.unit, first.sign)
    assert again.provenance == json.loads(json.dumps(first.provenance))
    for name in first.values.variables:
        assert again.values[name].dtype.kind == first.values[name].dtype.kind
    assert load_result(first.save(tmp_path / "one")).data.equals(first.data), "saving over it works"


def test_a_saved_result_opens_without_torch_and_holds_no_pickle(tmp_path: Path) -> None:
    folder = made().save(tmp_path / "kept")
    with np.load(folder / "values.npz", allow_pickle=False) as file:
        assert set(file.files) == set(map(str, made().values.variables))
    code = (
        "import sys; from mech_align.results import load_result; r = load_result(sys.argv[1]);"
        "assert r.mean('prompt').top(1)['site'][0] == 'L4H1'; assert 'torch' not in sys.modules, 'torch came in'"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)


def test_damaged_folders_are_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(BadRun, match="no readable result"):
        load_result(tmp_path)
    folder = made().save(tmp_path / "kept")
    (folder / "values.npz").write_bytes(b"PK nothing")
    with pytest.raises((BadRun, Exception)) as caught:
        load_result(folder)
    assert isinstance(caught.value, BadRun)
    folder = made().save(tmp_path / "more")
    (folder / "result.json").write_text("{", encoding="utf-8")
    with pytest.raises(BadRun):
        load_result(folder)
