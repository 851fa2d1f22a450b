"""Which clean token stands where a corrupt one does: the map that a patch from the clean run follows."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from numpy import ndarray

RESERVED_NAMES = ("last", "all", "differs", "first_difference")


def align(clean_ids: Sequence[int], corrupt_ids: Sequence[int]) -> Int[ndarray, " corrupt_position"]:
    """Which clean position is the partner of each corrupt position?

    Equal length: the same index. Otherwise the common beginning is paired from the left and the common end from the
    right, never overlapping, and the middle has no partner. The last positions are always partners, whatever tokens
    they
    hold: there the model says what comes next, and there the metric is read.

    Args:
        clean_ids: Tokens of the clean prompt, at least one.
        corrupt_ids: Tokens of the corrupt prompt, at least one.

    Returns:
        Clean position for each corrupt position, -1 where there is no partner. Partners keep their order.
    """
    n_clean, n_corrupt = len(clean_ids), len(corrupt_ids)
    if not n_clean or not n_corrupt:
        raise ValueError("a prompt without tokens cannot be aligned")
    if n_clean == n_corrupt:
        return np.arange(n_corrupt, dtype=np.int64)
    source = np.full(n_corrupt, -1, dtype=np.int64)
    # The last pair is set apart first, so that a prompt that continues the other does not lose it to the beginning.
    room = min(n_clean, n_corrupt) - 1
    start = 0
    while start < room and clean_ids[start] == corrupt_ids[start]:
        start += 1
    end = 1
    if clean_ids[-1] == corrupt_ids[-1]:
        while end < room - start + 1 and clean_ids[n_clean - 1 - end] == corrupt_ids[n_corrupt - 1 - end]:
            end += 1
    source[:start] = np.arange(start)
    source[n_corrupt - end :] = np.arange(n_clean - end, n_clean)
    return source


def differing(
    clean_ids: Sequence[int], corrupt_ids: Sequence[int], source_position: Int[ndarray, " corrupt_position"]
) -> list[int]:
    """At which corrupt positions is the token another than its partner's, or without a partner?"""
    return [
        position
        for position, source in enumerate(source_position.tolist())
        if source < 0 or clean_ids[source] != corrupt_ids[position]
    ]


def first_difference(clean_ids: Sequence[int], corrupt_ids: Sequence[int]) -> list[int]:
    """What is the first corrupt position where the two prompts are no longer the same?

    Where the corrupt prompt only lacks tokens, this is the position after the gap. Empty for identical prompts.
    """
    if list(clean_ids) == list(corrupt_ids):
        return []
    shared = 0
    for clean, corrupt in zip(clean_ids, corrupt_ids, strict=False):
        if clean != corrupt:
            break
        shared += 1
    return [min(shared, len(corrupt_ids) - 1)]


def standard_positions(
    clean_ids: Sequence[int], corrupt_ids: Sequence[int], source_position: Int[ndarray, " corrupt_position"]
) -> dict[str, list[int]]:
    """Which corrupt positions carry the names that every pair has?"""
    return {
        "last": [len(corrupt_ids) - 1],
        "all": list(range(len(corrupt_ids))),
        "differs": differing(clean_ids, corrupt_ids, source_position),
        "first_difference": first_difference(clean_ids, corrupt_ids),
    }


def partner_named(
    source_position: Int[ndarray, " corrupt_position"], clean: Sequence[int], corrupt: Sequence[int]
) -> Int[ndarray, " corrupt_position"]:
    """The map once the user has said that these clean and corrupt tokens are the same thing (" Lily" and " Tim").

    Spans of equal length become partners one by one, and every other position keeps its own. Spans of unequal length
    leave the map as it is.
    """
    if len(clean) != len(corrupt):
        return source_position
    changed = source_position.copy()
    for source, position in zip(clean, corrupt, strict=True):
        changed[position] = source
    return changed
