"""Scores of a sweep as they come in: in memory, or in a folder that the same sweep takes up again."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from mech_align.errors import BadRun


class ScoreStore:
    """Scores ``[prompt, cell]``, NaN until measured, with a mark for each one that is done.

    Args:
        folder: Where to keep them; ``None`` for memory. Scores are on disk before their marks are, so that a process
            that is killed loses at most the piece under way.
        key: What the sweep depends on. A folder with another key is refused.

    Raises:
        BadRun: The folder belongs to another sweep.
    """

    def __init__(self, shape: tuple[int, int], folder: Path | None, key: Mapping[str, Any]) -> None:
        self.shape = shape
        text = json.dumps({**key, "shape": list(shape)}, sort_keys=True, default=str)
        if folder is None:
            self.scores: Float[np.ndarray, "prompt cell"] = np.full(shape, np.nan, np.float32)
            self.done: Bool[np.ndarray, "prompt cell"] = np.zeros(shape, bool)
            return
        folder.mkdir(parents=True, exist_ok=True)
        mark = folder / "key.json"
        if mark.exists():
            if mark.read_text(encoding="utf-8") != text:
                raise BadRun(
                    f"{folder} holds half a sweep of another model, other prompts or other settings",
                    hint="give another folder, or delete this one",
                )
            self.scores, self.done = _open(folder / "scores.npy"), _open(folder / "done.npy")
            return
        self.scores = _create(folder / "scores.npy", shape, np.float32, np.nan)
        self.done = _create(folder / "done.npy", shape, np.bool_, False)
        part = folder / "key.json.part"
        part.write_text(text, encoding="utf-8")
        part.replace(mark)

    def has(self, rows: Sequence[int], cells: Sequence[int]) -> bool:
        """Whether all of a block is done."""
        return bool(self.done[np.ix_(rows, cells)].all())

    def write(self, rows: Sequence[int], cells: Sequence[int], scores: Float[np.ndarray, "row cell"]) -> None:
        """Keep a block."""
        block = np.ix_(rows, cells)
        self.scores[block] = scores
        _flush(self.scores)
        self.done[block] = True
        _flush(self.done)


def _create(path: Path, shape: tuple[int, int], dtype: Any, fill: Any) -> np.ndarray[Any, Any]:
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)  # pyright: ignore[reportUnknownMemberType]
    array[:] = fill
    array.flush()
    return array


def _open(path: Path) -> np.ndarray[Any, Any]:
    return np.load(path, mmap_mode="r+", allow_pickle=False)


def _flush(array: np.ndarray[Any, Any]) -> None:
    if isinstance(array, np.memmap):
        array.flush()
