"""Pairs as tokens: encoded once, aligned once, every choice recorded."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from jaxtyping import Int
from numpy import ndarray

from mech_align.errors import BadPrompts
from mech_align.prompts.alignment import RESERVED_NAMES, align, partner_named, standard_positions
from mech_align.prompts.problems import say_some


@dataclass(frozen=True, eq=False)
class TokenPairs:
    """Clean and corrupt prompts as tokens, with the map between them.

    Args:
        clean: Token ids of each clean prompt, special tokens included.
        corrupt: Token ids of each corrupt prompt.
        answer: The set of tokens that are right after ``clean``.
        wrong: The set of tokens that are right after ``corrupt``.
        group: The unit of resampling of each pair.
        id: The name of each pair.
        source_position: For each corrupt position its clean partner, or -1.
        named: Corrupt positions by name; every pair has "last", "all", "differs" and "first_difference".
        named_clean: The same names on the clean side.
        notes: What a reader of the result should know.
        settings: How the tokens were made, as plain data.
    """

    clean: list[list[int]]
    corrupt: list[list[int]]
    answer: list[tuple[int, ...]]
    wrong: list[tuple[int, ...]]
    group: tuple[str, ...]
    id: tuple[str, ...]
    source_position: list[Int[ndarray, " _"]]  # one length a pair
    named: list[dict[str, list[int]]]
    named_clean: list[dict[str, list[int]]]
    notes: list[str] = field(default_factory=list[str])
    settings: dict[str, Any] = field(default_factory=dict[str, Any])

    def __len__(self) -> int:
        return len(self.clean)

    def __repr__(self) -> str:
        lengths = [len(ids) for ids in (*self.clean, *self.corrupt)]
        span = f"{min(lengths)}-{max(lengths)}" if lengths else "0"
        return f"TokenPairs(n={len(self)}, groups={len(set(self.group))}, {span} tokens, notes={len(self.notes)})"

    def positions(self, name: str, *, side: str = "corrupt") -> list[list[int]]:
        """Where is the named position in each prompt?

        Raises:
            BadPrompts: Some pair has no position of this name.
        """
        held = self.named if side == "corrupt" else self.named_clean
        without = [pair for pair, names in zip(self.id, held, strict=True) if name not in names]
        if without:
            known = sorted({known for names in held for known in names})
            near = get_close_matches(name, known, n=1)
            hints = [f"Did you mean {near[0]!r}?"] if near and near[0] != name else []
            hints.append(f"Names here: {', '.join(known)}. Others come from the field `positions` of the pairs.")
            raise BadPrompts(
                f"{len(without)} of {len(self)} pairs have no position named {name!r}: {say_some(without)}.", hint=hints
            )
        return [list(names[name]) for names in held]

    def take(self, indices: Iterable[int]) -> "TokenPairs":
        """The same, for these pairs only, in this order."""
        chosen = [range(len(self))[index] for index in indices]
        return replace(
            self,
            clean=[self.clean[i] for i in chosen],
            corrupt=[self.corrupt[i] for i in chosen],
            answer=[self.answer[i] for i in chosen],
            wrong=[self.wrong[i] for i in chosen],
            group=tuple(self.group[i] for i in chosen),
            id=tuple(self.id[i] for i in chosen),
            source_position=[self.source_position[i] for i in chosen],
            named=[self.named[i] for i in chosen],
            named_clean=[self.named_clean[i] for i in chosen],
        )

    def swapped(self) -> "TokenPairs":
        """Clean and corrupt, answer and wrong change places; the alignment is done again the other way round."""
        custom = [
            {name: (corrupt[name], clean[name]) for name in clean if name not in RESERVED_NAMES}
            for clean, corrupt in zip(self.named_clean, self.named, strict=True)
        ]
        aligned = [
            aligned_pair(clean, corrupt, names)
            for clean, corrupt, names in zip(self.corrupt, self.clean, custom, strict=True)
        ]
        return replace(
            self,
            clean=self.corrupt,
            corrupt=self.clean,
            answer=self.wrong,
            wrong=self.answer,
            source_position=[one.source_position for one in aligned],
            named=[one.named for one in aligned],
            named_clean=[one.named_clean for one in aligned],
        )


@dataclass(frozen=True, eq=False)
class Aligned:
    """The map of one pair, and its named positions on either side."""

    source_position: Int[ndarray, " corrupt_position"]
    named: dict[str, list[int]]
    named_clean: dict[str, list[int]]


def aligned_pair(clean: list[int], corrupt: list[int], custom: Mapping[str, tuple[list[int], list[int]]]) -> Aligned:
    """The map of one pair and its named positions, those of the user (clean, corrupt) included."""
    source = align(clean, corrupt)
    for on_clean, on_corrupt in custom.values():
        source = partner_named(source, on_clean, on_corrupt)
    back = align(corrupt, clean)
    for on_clean, on_corrupt in custom.values():
        back = partner_named(back, on_corrupt, on_clean)
    named = standard_positions(clean, corrupt, source) | {name: both[1] for name, both in custom.items()}
    named_clean = standard_positions(corrupt, clean, back) | {name: both[0] for name, both in custom.items()}
    return Aligned(source, named, named_clean)
