"""Every family on both backends reads the same activations, whatever stands beside a prompt in its batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from contract.subjects import COVERED, EVERYONE, UNCOVERED, pairs, subject

from mech_align.activations import load_activations
from mech_align.errors import BadPrompts, BadRun
from mech_align.models import Tokens, check_pad_invariance
from mech_align.models.names import parts_of
from mech_align.sites import HEAD_PARTS, Site

ROWS = [row for row in (*pairs().clean, *pairs().corrupt)]


@pytest.mark.parametrize(("family", "backend"), EVERYONE)
def test_padding_changes_nothing(family: str, backend: str) -> None:
    model = subject(family, backend)
    assert check_pad_invariance(model) <= 1e-4
    assert check_pad_invariance(model, ROWS) <= 1e-4


def test_left_and_right_padded_batches_are_the_same_prompts() -> None:
    ids = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7]])
    left = Tokens.from_padded(ids, torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]))
    right = Tokens.from_padded(ids.roll(-2, 1)[:1], torch.tensor([[1, 1, 1, 0, 0]]))
    assert left.ids[0, :3].tolist() == right.ids[0, :3].tolist() == [5, 6, 7]
    assert left.lengths.tolist() == [3, 5] and right.lengths.tolist() == [3]
    with pytest.raises(BadPrompts, match="between"):
        Tokens.from_padded(ids, torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 1]]))


@pytest.mark.parametrize("family", [*COVERED, UNCOVERED])
def test_both_backends_capture_the_same(family: str) -> None:
    models = [subject(family, backend) for backend in ("hooked", "bridge")]
    parts = parts_of(models[0].inner)
    assert parts == parts_of(models[1].inner)
    keys = [(layer, part) for layer in range(models[0].shape.n_layers) for part in parts]
    tokens = models[0].encode(ROWS)
    one, two = (model.capture(tokens, keys) for model in models)
    for key in keys:
        for row, length in enumerate(tokens.lengths.tolist()):
            a, b = (
                found[key][row, :, :length, :length] if key[1] == "pattern" else found[key][row, :length]
                for found in (one, two)
            )
            assert a.shape == b.shape
            size = max(1.0, float(a.abs().max()))
            assert float((a - b).abs().max()) <= 1e-5 * size, key


@pytest.mark.parametrize(("family", "backend"), [("gpt2", "hooked"), ("qwen3", "bridge"), ("gemma2", "hooked")])
@pytest.mark.parametrize("positions", ["last", "mean", "all", 1, -2, "each"])
def test_streamed_activations_are_those_of_each_prompt_alone(
    family: str, backend: str, positions: str | int, tmp_path: Path
) -> None:
    model = subject(family, backend)
    where = [len(row) - 1 - i % 3 for i, row in enumerate(ROWS)] if positions == "each" else positions
    parts = [part for part in parts_of(model.inner) if part != "pattern" or positions not in ("mean", "all")]
    sites = [Site(1, part) for part in parts] + [Site(2, "z", head=1), Site(0, "mlp_post", neuron=7)]
    kept = model.activations(ROWS, sites, positions=where, batch_size=3)
    disk = model.activations(ROWS, sites, positions=where, batch_size=2, store=tmp_path / "kept")
    again = load_activations(tmp_path / "kept")
    row = 0
    for number, prompt in enumerate(ROWS):
        alone = model.capture(model.encode([prompt]), {(site.layer, site.part) for site in sites})
        places = {"last": [-1], "mean": [None], "all": list(range(len(prompt)))}.get(str(positions))
        places = places or [where[number] if isinstance(where, list) else where]  # type: ignore[list-item]
        for place in places:
            for site in sites:
                value = alone[site.layer, site.part][0]
                value = value[:, place] if site.part == "pattern" else value
                value = value if site.head is None else value[:, site.head]
                value = value if site.neuron is None else value[:, site.neuron]
                if site.part != "pattern":
                    value = value.mean(0) if place is None else value[place]
                got = kept[site][row]
                if site.part == "pattern":
                    assert bool(got[..., len(prompt) :].isnan().all())
                    got = got[..., : len(prompt)]
                assert torch.allclose(got, value, atol=1e-5 * max(1.0, float(value.abs().max()))), site
                for stored in (disk, again):
                    assert torch.allclose(stored[site][row], kept[site][row], atol=2e-5, equal_nan=True), site
            assert kept.prompt[row] == number
            assert kept.position[row] == (-1 if place is None else place % len(prompt))
            row += 1
    assert row == len(kept) == len(again)


def test_an_interrupted_stream_goes_on(tmp_path: Path) -> None:
    model = subject("llama", "hooked")
    whole = model.activations(ROWS, ["resid_post", "L1.k"], positions="all", batch_size=2)

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done >= 4:
            raise Stop

    with pytest.raises(Stop):
        model.activations(ROWS, ["resid_post", "L1.k"], positions="all", batch_size=2, store=tmp_path, progress=stop)
    with pytest.raises(BadRun):
        load_activations(tmp_path)
    seen: list[int] = []
    more = model.activations(
        ROWS, ["resid_post", "L1.k"], positions="all", batch_size=2, store=tmp_path,
        progress=lambda done, total: seen.append(done),
    )  # fmt: skip
    assert seen == [6, 8], "the first two batches are not run again"
    for site in whole.sites:
        assert torch.equal(whole[site], more[site])
        assert torch.equal(whole[site], load_activations(tmp_path)[site])
    for other in (["resid_post"], ["resid_post", "L1.v"]):
        with pytest.raises(BadRun):
            model.activations(ROWS, other, positions="all", store=tmp_path)
    with pytest.raises(BadRun):
        model.activations(ROWS[:-1], ["resid_post", "L1.k"], positions="all", store=tmp_path)
    with pytest.raises(BadRun):
        subject("llama", "bridge").activations(ROWS, ["resid_post", "L1.k"], positions="all", store=tmp_path)


def test_a_head_of_a_kept_part_can_be_read() -> None:
    model = subject("gpt2", "hooked")
    kept = model.activations(ROWS, ["z", "mlp_post"], positions="last")
    assert torch.equal(kept["L1H2"], kept["L1.z"][:, 2])
    assert torch.equal(kept["L0N5"], kept["L0.mlp_post"][:, 5])
    assert kept.numpy("L1.z").dtype == np.float32
    assert set(HEAD_PARTS) <= set(parts_of(model.inner))
