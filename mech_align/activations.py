"""Activations of many prompts by site: in memory, or one file a site on disk, read back a layer at a time."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mech_align.errors import BadRun, UnknownSite
from mech_align.sites import Site

_HEAD = "activations.json"


@dataclass(frozen=True)
class Activations:
    """Values of sites over prompts.

    Attributes:
        arrays: By site, ``[row, ...]``; memory-mapped when they live on disk. bfloat16 is kept as its bits.
        dtype: Of the values, as torch names it (``"float32"``, ``"bfloat16"``).
        prompt: Which prompt a row belongs to. One row a prompt, unless all positions were kept.
        position: The token position of a row; -1 for a mean over positions.
        provenance: Model, sites, positions.
    """

    arrays: Mapping[Site, np.ndarray[Any, Any]]
    dtype: str
    prompt: Int[np.ndarray, " row"]
    position: Int[np.ndarray, " row"]
    provenance: Mapping[str, Any]

    def __repr__(self) -> str:
        shown = ", ".join(map(str, self.sites[:3])) + (", ..." if len(self.arrays) > 3 else "")
        return f"Activations({len(self)} rows of {len(self.arrays)} sites: {shown}; {self.dtype})"

    @property
    def sites(self) -> list[Site]:
        """What was kept."""
        return list(self.arrays)

    def __len__(self) -> int:
        return len(self.prompt)

    def __getitem__(self, site: Site | str) -> Tensor:
        """Values of one site, ``[row, ...]``; a head or neuron is cut out of its part.

        Raises:
            UnknownSite: The site was not kept; names those that were.
        """
        wanted = Site.parse(site) if isinstance(site, str) else site
        whole = wanted if wanted in self.arrays else Site(wanted.layer, wanted.part)
        if whole not in self.arrays:
            kept = ", ".join(map(str, self.sites[:12]))
            raise UnknownSite(f"{wanted} was not kept", hint=f"kept: {kept}")
        value = torch.from_numpy(np.ascontiguousarray(self.arrays[whole]))
        value = value.view(torch.bfloat16) if self.dtype == "bfloat16" else value
        if whole == wanted:
            return value
        return value[:, wanted.head if wanted.head is not None else wanted.neuron]

    def numpy(self, site: Site | str) -> np.ndarray[Any, Any]:
        """Values of one site as fp32."""
        return self[site].float().numpy()


class ActivationWriter:
    """Takes batches of rows and keeps them, in memory or in a folder; a folder is resumed where it stopped.

    One ``.npy`` a site, allotted in full at the start: analyses read by layer, and a file a batch would be read five to
    seven times slower.
    """

    def __init__(
        self, shapes: Mapping[Site, Sequence[int]], n_rows: int, dtype: str, folder: Path | None, key: Mapping[str, Any]
    ) -> None:
        self.dtype, self.folder, self.key, self.n_rows = dtype, folder, dict(key), n_rows
        kind = {"bfloat16": np.uint16, "float16": np.float16, "float64": np.float64}.get(dtype, np.float32)
        self.done = 0
        self.arrays: dict[Site, np.ndarray[Any, Any]] = {}
        resumes = folder is not None and (folder / _HEAD).exists()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if resumes:
                self.done = self._check(folder)
        for site, shape in shapes.items():
            full = (n_rows, *shape)
            if folder is None:
                self.arrays[site] = np.empty(full, kind)
            else:
                self.arrays[site] = np.lib.format.open_memmap(  # pyright: ignore[reportUnknownMemberType]
                    folder / f"{site}.npy", mode="r+" if resumes else "w+", dtype=kind, shape=None if resumes else full
                )
        if folder is not None and not resumes:
            self._note()

    def write(self, rows: Mapping[Site, Tensor]) -> None:
        """Append a batch; the counter moves only after the values are on disk."""
        count = 0
        for site, value in rows.items():
            count = len(value)
            value = value.detach().cpu().contiguous()
            value = value.view(torch.uint16) if self.dtype == "bfloat16" else value
            self.arrays[site][self.done : self.done + count] = value.numpy()
        self.done += count
        if self.folder is not None:
            for array in self.arrays.values():
                if isinstance(array, np.memmap):
                    array.flush()
            self._note()

    def _check(self, folder: Path) -> int:
        head = json.loads((folder / _HEAD).read_text(encoding="utf-8"))
        if head["key"] != json.loads(json.dumps(self.key)) or head["n_rows"] != self.n_rows:
            raise BadRun(
                f"{folder} holds activations of another model, other prompts or other sites",
                hint="give another folder, or delete this one",
            )
        return int(head["done"])

    def _note(self) -> None:
        assert self.folder is not None
        head = {"key": self.key, "n_rows": self.n_rows, "done": self.done, "dtype": self.dtype}
        part = self.folder / f"{_HEAD}.part"
        part.write_text(json.dumps(head), encoding="utf-8")
        part.replace(self.folder / _HEAD)


def load_activations(folder: str | Path) -> Activations:
    """Open activations that ``Model.activations(..., store=folder)`` wrote, without reading them into memory.

    Raises:
        BadRun: No activations there, or not finished.
    """
    path = Path(folder)
    try:
        head = json.loads((path / _HEAD).read_text(encoding="utf-8"))
        rows = np.load(path / "rows.npy", allow_pickle=False)
    except (OSError, ValueError) as problem:
        raise BadRun(f"no finished activations in {path}", why=str(problem), hint="run the capture again") from problem
    arrays = {site: np.load(path / f"{site}.npy", mmap_mode="c", allow_pickle=False) for site in _sites(head)}
    return Activations(arrays, head["dtype"], rows[0], rows[1], head["key"])


def _sites(head: Mapping[str, Any]) -> Iterator[Site]:
    for name in head["key"]["sites"]:
        yield Site.parse(name)
