"""Where the values come from that an edit puts in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mech_align.prompts import TokenPairs

TokenRows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Run:
    """Prompts as token ids, with what the metric and the edits need to know of them.

    Attributes:
        tokens: One row a prompt, ragged.
        answer: Right next tokens of each prompt.
        wrong: Wrong next tokens of each prompt.
        named: For each prompt, positions by name; ``"all"`` and ``"last"`` need no entry.
        group: The unit of resampling.
        id: One name a prompt.
    """

    tokens: TokenRows
    answer: TokenRows
    wrong: TokenRows
    named: tuple[Mapping[str, Sequence[int]], ...]
    group: tuple[str, ...]
    id: tuple[str, ...]

    @classmethod
    def corrupt(cls, pairs: TokenPairs) -> "Run":
        """The corrupt side of the pairs; right answers stay those of the clean side."""
        return cls(
            _rows(pairs.corrupt), _rows(pairs.answer), _rows(pairs.wrong), tuple(pairs.named), tuple(pairs.group),
            tuple(pairs.id),
        )  # fmt: skip

    @classmethod
    def clean(cls, pairs: TokenPairs) -> "Run":
        """The clean side of the pairs."""
        return cls(_rows(pairs.clean), _rows(pairs.answer), _rows(pairs.wrong), tuple(pairs.named_clean),
                   tuple(pairs.group), tuple(pairs.id))  # fmt: skip

    def __len__(self) -> int:
        return len(self.tokens)

    def mask(self, rows: Sequence[int], positions: str | int, width: int) -> Bool[Tensor, "b t"]:
        """Where a named position lies in each of the given prompts.

        Raises:
            KeyError: A prompt has no position of that name.
        """
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            length = len(self.tokens[row])
            if positions == "all":
                mask[i, :length] = True
            elif positions == "last":
                mask[i, length - 1] = True
            elif isinstance(positions, int):
                where = positions if positions >= 0 else length + positions
                if 0 <= where < length:
                    mask[i, where] = True
            else:
                mask[i, list(self.named[row][positions])] = True
        return mask


@dataclass(frozen=True)
class RunSource:
    """Activations of another run: other tokens, another model, or both.

    Attributes:
        tokens: One row for each prompt of the disturbed run.
        position: For each position of the disturbed run the position in this one, -1 where it has no partner (it is
            then left as it is).
        model: The model that makes the values; the disturbed one when ``None``.
    """

    tokens: TokenRows
    position: tuple[Int[np.ndarray, " _"], ...]
    model: Any = None

    @classmethod
    def clean(cls, pairs: TokenPairs, model: Any = None) -> "RunSource":
        """The clean run, to be put into the corrupt one."""
        return cls(_rows(pairs.clean), tuple(np.asarray(p) for p in pairs.source_position), model)

    @classmethod
    def corrupt(cls, pairs: TokenPairs, model: Any = None) -> "RunSource":
        """The corrupt run, to be put into the clean one (noising)."""
        backwards: list[np.ndarray[Any, Any]] = []
        for clean, where in zip(pairs.clean, pairs.source_position, strict=True):
            position = np.full(len(clean), -1)
            for corrupt_position, clean_position in enumerate(where):
                if clean_position >= 0:
                    position[clean_position] = corrupt_position
            backwards.append(position)
        return cls(_rows(pairs.corrupt), tuple(backwards), model)

    @classmethod
    def same(cls, run: Run, model: Any = None) -> "RunSource":
        """The same prompts, usually in another model (base into tuned)."""
        return cls(run.tokens, tuple(np.arange(len(row)) for row in run.tokens), model)

    @classmethod
    def resampled(cls, run: Run, reference: Sequence[Sequence[int]], seed: int) -> "RunSource":
        """For each prompt a random other one, aligned at the end; positions before its start have no partner."""
        rng = np.random.default_rng(seed)
        tokens: list[tuple[int, ...]] = []
        position: list[np.ndarray[Any, Any]] = []
        for row in run.tokens:
            others = [r for r in reference if tuple(r) != tuple(row)] or list(reference)
            other = tuple(others[int(rng.integers(len(others)))])
            where = np.arange(len(row)) + len(other) - len(row)
            tokens.append(other)
            position.append(np.where(where < 0, -1, where))
        return cls(tuple(tokens), tuple(position))

    def first_difference(self, run: Run, rows: Sequence[int]) -> list[int]:
        """Up to which position each prompt and its source are the same, so that a patch there does nothing."""
        if self.model is not None:
            return [0] * len(rows)
        first: list[int] = []
        for row in rows:
            mine, other, where = run.tokens[row], self.tokens[row], self.position[row]
            same = 0
            while same < min(len(mine), len(other)) and where[same] == same and mine[same] == other[same]:
                same += 1
            first.append(same)
        return first

    def partners(self, rows: Sequence[int], width: int) -> Int[Tensor, "b t"]:
        """Source position for each position, -1 where there is none."""
        out = torch.full((len(rows), width), -1)
        for i, row in enumerate(rows):
            out[i, : len(self.position[row])] = torch.as_tensor(self.position[row])
        return out


@dataclass(frozen=True)
class MeanSource:
    """One fixed value per site, for instance the mean over a named reference set.

    Attributes:
        values: By layer and part, shaped like the activation at one position, in the order of ``sites.PARTS``.
        name: What was averaged, for provenance.
    """

    values: Mapping[tuple[int, str], Float[Tensor, "..."]]
    name: str = "mean"


@dataclass(frozen=True)
class NoiseSource:
    """Gaussian noise of the size of the embeddings, the same for the same prompt and seed.

    Attributes:
        scale: Standard deviation, in those of the token embeddings (3 in Meng et al. 2022, arXiv:2202.05262, section
            2).
        seed: A draw of its own for each prompt.
    """

    scale: float
    seed: int

    def values(self, row: int, width: int, size: int, deviation: float) -> Float[Tensor, "t d"]:
        """Noise for one prompt; longer batches do not change it."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + row) % 2**63)
        return torch.stack([torch.randn(size, generator=generator) for _ in range(width)]) * self.scale * deviation


Source = RunSource | MeanSource | NoiseSource


def align(value: Float[Tensor, "b s ..."], partners: Int[Tensor, "b t"], part: str) -> Float[Tensor, "b _ ..."]:
    """Source values at the positions of the disturbed run; arbitrary where there is no partner.

    An attention pattern ``[b, head, q, k]`` is moved along both of its axes.
    """
    partners = partners.to(value.device)
    if part == "pattern":
        rows = torch.arange(len(value), device=value.device)[:, None, None, None]
        heads = torch.arange(value.shape[1], device=value.device)[None, :, None, None]
        index = partners.clamp_min(0)
        moved = value[rows, heads, index[:, None, :, None], index[:, None, None, :]]
        # Named positions may cross the order of the tokens; no query looks ahead all the same.
        return (moved * (partners >= 0)[:, None, None, :]).tril()
    identity = partners.shape[1] == value.shape[1] and bool(
        (partners == torch.arange(partners.shape[1], device=partners.device)).logical_or(partners < 0).all()
    )
    if identity:
        return value
    return value[torch.arange(len(value), device=value.device)[:, None], partners.clamp_min(0)]


def _rows(rows: Sequence[Sequence[int]]) -> TokenRows:
    return tuple(tuple(int(token) for token in row) for row in rows)
