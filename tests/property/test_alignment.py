"""Laws of the map from corrupt to clean positions, for any two token sequences."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mech_align.prompts.alignment import align, differing, first_difference, partner_named, standard_positions

few_tokens = st.lists(st.integers(0, 3), min_size=1, max_size=12)  # few kinds, so that beginnings and ends often agree


@given(few_tokens, few_tokens)
def test_partners_are_valid_ordered_and_single(clean: list[int], corrupt: list[int]) -> None:
    source = align(clean, corrupt)
    assert len(source) == len(corrupt)
    partners = source[source >= 0]
    assert (partners < len(clean)).all()
    assert (np.diff(partners) > 0).all()


@given(few_tokens, few_tokens)
def test_the_last_positions_are_always_partners(clean: list[int], corrupt: list[int]) -> None:
    assert align(clean, corrupt)[-1] == len(clean) - 1


@given(few_tokens, few_tokens)
def test_unequal_lengths_pair_only_equal_tokens_before_the_last(clean: list[int], corrupt: list[int]) -> None:
    if len(clean) == len(corrupt):
        assert align(clean, corrupt).tolist() == list(range(len(corrupt)))
        return
    for position, source in enumerate(align(clean, corrupt)[:-1].tolist()):
        assert source < 0 or clean[source] == corrupt[position]


@given(few_tokens, few_tokens)
def test_the_map_back_is_the_inverse(clean: list[int], corrupt: list[int]) -> None:
    there, back = align(clean, corrupt), align(corrupt, clean)
    assert {(c, k) for k, c in enumerate(there.tolist()) if c >= 0} == {
        (c, k) for c, k in enumerate(back.tolist()) if k >= 0
    }


@given(few_tokens, few_tokens, st.lists(st.integers(4, 7), min_size=1, max_size=4), st.integers(4, 9))
def test_an_inserted_middle_alone_has_no_partner(
    start: list[int], end: list[int], middle: list[int], other: int
) -> None:
    clean, corrupt = [*start, 99, *end], [*start, *middle, other, *end]  # 2 to 5 tokens in place of one
    source = align(clean, corrupt)
    assert np.flatnonzero(source < 0).tolist() == list(range(len(start), len(start) + len(middle) + 1))
    assert differing(clean, corrupt, source) == np.flatnonzero(source < 0).tolist()


@given(few_tokens, few_tokens)
def test_first_difference_is_where_the_beginnings_part(clean: list[int], corrupt: list[int]) -> None:
    first = first_difference(clean, corrupt)
    if clean == corrupt:
        assert first == []
        return
    (position,) = first
    assert corrupt[:position] == clean[:position]
    assert corrupt[: position + 1] != clean[: position + 1] or position == len(corrupt) - 1


@pytest.mark.parametrize(
    ("clean", "corrupt", "expected"),
    [
        ([1, 2, 3, 4], [1, 9, 4], [0, -1, 3]),
        ([1, 9, 4], [1, 2, 3, 4], [0, -1, -1, 2]),
        ([1, 2, 3], [1, 2], [0, 2]),  # the corrupt prompt breaks off: its last position still reads the answer
        ([1, 1], [1, 1, 1], [0, -1, 1]),  # repeated tokens are never used twice
        ([5], [7, 8, 5], [-1, -1, 0]),
    ],
)
def test_cases(clean: list[int], corrupt: list[int], expected: list[int]) -> None:
    assert align(clean, corrupt).tolist() == expected


def test_a_deletion_has_a_first_difference_but_no_differing_token() -> None:
    names = standard_positions([1, 2, 3, 4], [1, 4], align([1, 2, 3, 4], [1, 4]))
    assert names == {"last": [1], "all": [0, 1], "differs": [], "first_difference": [1]}


def test_named_spans_become_partners_one_by_one_and_uneven_ones_do_not() -> None:
    source = align([1, 5, 6, 2, 3], [1, 7, 7, 7, 8, 9, 3])
    assert source.tolist() == [0, -1, -1, -1, -1, -1, 4]
    assert partner_named(source, [1, 2], [4, 5]).tolist() == [0, -1, -1, -1, 1, 2, 4]
    assert partner_named(source, [1, 2], [4]).tolist() == source.tolist()
    assert source.tolist() == [0, -1, -1, -1, -1, -1, 4]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="without tokens"):
        align([], [1])
