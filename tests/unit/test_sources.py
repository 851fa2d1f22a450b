import numpy as np
import pytest
import torch
from contract.subjects import pairs

from mech_align.prompts import Pairs
from mech_align.sweeps import NoiseSource, Run, RunSource
from mech_align.sweeps.sources import align

PAIRS = pairs()


def test_masks_of_positions() -> None:
    run = Run.corrupt(PAIRS)
    width = max(map(len, run.tokens))
    lengths = torch.tensor([len(row) for row in run.tokens])
    rows = list(range(len(run)))
    assert torch.equal(run.mask(rows, "all", width).sum(1), lengths)
    assert torch.equal(run.mask(rows, "last", width).int().argmax(1), lengths - 1)
    assert torch.equal(run.mask(rows, -2, width).int().argmax(1), lengths - 2)
    assert run.mask([2, 0], 1, width)[:, 1].all() and int(run.mask([2, 0], 1, width).sum()) == 2
    assert run.mask([1], "spot", width)[0].nonzero().flatten().tolist() == PAIRS.named[1]["spot"]
    with pytest.raises(KeyError):
        run.mask([0], "nowhere", width)


def test_the_two_directions_are_inverse() -> None:
    plain = Pairs.from_tokens([[5, 6, 7, 8]], [[5, 6, 9, 7, 8]], [[1]], [[2]]).encode(None)
    into_corrupt, into_clean = RunSource.clean(plain), RunSource.corrupt(plain)
    assert into_corrupt.position[0].tolist() == [0, 1, -1, 2, 3]
    assert into_clean.position[0].tolist() == [0, 1, 3, 4]
    assert into_corrupt.first_difference(Run.corrupt(plain), [0]) == [2]
    same = RunSource.same(Run.clean(plain))
    assert same.position[0].tolist() == [0, 1, 2, 3] and same.first_difference(Run.clean(plain), [0]) == [4]
    assert RunSource(same.tokens, same.position, model=object()).first_difference(Run.clean(plain), [0]) == [0]


def test_values_move_to_their_partners() -> None:
    value = torch.arange(8.0).reshape(2, 4, 1)
    partners = torch.tensor([[3, -1, 0, 1], [0, 1, 2, -1]])
    moved = align(value, partners, "z")
    for row in range(2):
        for at in range(4):
            if partners[row, at] >= 0:
                assert moved[row, at] == value[row, partners[row, at]]
    pattern = torch.rand(2, 3, 4, 4).tril()
    turned = align(pattern, torch.tensor([[0, -1, 1, 2], [0, 1, 2, 3]]), "pattern")
    assert torch.equal(turned[1], pattern[1])
    assert torch.equal(turned[0, :, 2, [0, 2]], pattern[0, :, 1, [0, 1]]) and bool((turned[0, :, :, 1] == 0).all())
    crossed = align(pattern, torch.tensor([[0, 3, 1, 2], [0, 1, 2, 3]]), "pattern")
    assert torch.equal(crossed, crossed.tril()), "no query looks ahead"


def test_resampling_takes_other_prompts_aligned_at_the_end() -> None:
    run = Run.corrupt(PAIRS)
    source = RunSource.resampled(run, run.tokens, seed=0)
    assert RunSource.resampled(run, run.tokens, seed=0).tokens == source.tokens
    assert any(RunSource.resampled(run, run.tokens, seed=s).tokens != source.tokens for s in range(1, 6))
    for mine, other, where in zip(run.tokens, source.tokens, source.position, strict=True):
        assert other != mine and other in run.tokens
        assert where[-1] == len(other) - 1 and (where < 0).sum() == max(0, len(mine) - len(other))
        assert (np.diff(where[where >= 0]) == 1).all()


def test_noise_belongs_to_the_prompt_and_the_seed() -> None:
    noise = NoiseSource(3.0, 5)
    assert torch.equal(noise.values(2, 9, 64, 0.5)[:4], noise.values(2, 4, 64, 0.5)), "longer batches do not change it"
    assert not torch.equal(noise.values(2, 4, 64, 0.5), noise.values(3, 4, 64, 0.5))
    assert not torch.equal(noise.values(2, 4, 64, 0.5), NoiseSource(3.0, 6).values(2, 4, 64, 0.5))
    assert abs(float(noise.values(0, 100, 64, 0.5).std()) - 1.5) < 0.1
