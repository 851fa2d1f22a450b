"""What an analysis returns: labelled values, their unit, and where they come from. Opens without torch."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
import xarray as xr

from mech_align import stats
from mech_align.errors import BadRun, MechAlignError

PROMPT = "prompt"
STATISTICS = ("ci_low", "ci_high", "p", "p_maxt", "q", "n")
FORMAT = 1


@dataclass(frozen=True)
class Result:
    """Labelled effects with their unit and provenance.

    Attributes:
        values: Variable ``effect``, with the dim ``prompt`` first as long as it was not averaged (coordinates ``id``
            and ``group``, the unit of resampling). After ``mean("prompt")`` also ``ci_low``, ``ci_high``, ``p``
            (sign-flip), ``p_maxt`` (corrected over the whole map), ``q`` (Benjamini-Hochberg) and ``n``. Further
            variables hold what belongs to the same run, such as the score of the clean and the corrupt run of each
            prompt.
        name: The analysis, e.g. ``"head_patching"``.
        unit: Of an effect.
        sign: What a positive effect means.
        provenance: Model, data, settings, versions, checks and warnings; plain JSON.

    Unmeasured cells are NaN.
    """

    values: xr.Dataset
    name: str
    unit: str
    sign: str = ""
    provenance: dict[str, Any] = field(default_factory=lambda: {})

    def __post_init__(self) -> None:
        if "effect" not in self.values:
            raise ValueError("a Result needs the variable 'effect'")
        if PROMPT in self.data.dims and self.data.dims[0] != PROMPT:
            raise ValueError("the prompt axis comes first")

    def __repr__(self) -> str:
        sizes = ", ".join(f"{dim} {size}" for dim, size in self.data.sizes.items())
        warned = f", {len(self.warnings)} warnings" if self.warnings else ""
        return f"Result({self.name}: {sizes}; {self.unit}{warned})"

    @property
    def data(self) -> xr.DataArray:
        """The effects, labelled."""
        return self.values["effect"]

    @property
    def warnings(self) -> list[str]:
        """What a reader should know before trusting the numbers."""
        return list(self.provenance.get("warnings", []))

    @property
    def has_statistics(self) -> bool:
        """Whether the prompts were averaged, with intervals and tests beside."""
        return "ci_low" in self.values

    def frame(self) -> pd.DataFrame:
        """A long table, one row a cell, unmeasured cells included."""
        names = ["effect", *(name for name in STATISTICS if name in self.values)]
        table = self.values[names].to_dataframe(dim_order=[str(dim) for dim in self.data.dims])
        return table.reset_index()

    def top(self, k: int = 10, *, by: Literal["abs", "positive", "negative"] = "abs") -> pd.DataFrame:
        """The ``k`` strongest cells, strongest first, averaged over prompts where they were not yet.

        Args:
            by: By size whatever the sign, or the most positive, or the most negative ones.
        """
        table = self.mean(PROMPT).frame() if PROMPT in self.data.dims else self.frame()
        table = table[table["effect"].notna()]
        effect = np.asarray(table["effect"], dtype=float)
        key = {"abs": -np.abs(effect), "positive": -effect, "negative": effect}[by]
        table = table.iloc[np.argsort(key, kind="stable")[:k]].reset_index(drop=True)
        table.insert(0, "site", [site_label(row) for row in table.to_dict("records")])
        return table

    def mean(
        self,
        dim: str = PROMPT,
        *,
        confidence: float = 0.95,
        n_resamples: int = 2000,
        n_flips: int = 9999,
        seed: int = 0,
    ) -> "Result":
        """Average over prompts, with an interval and tests that resample by group; or plainly over another axis.

        Returns:
            Over ``prompt``: effects with ``ci_low``, ``ci_high``, ``p``, ``p_maxt``, ``q``, ``n``. Warnings of the
            statistics (too few groups for the correction, for instance) are added to ``provenance["warnings"]``.
        """
        if dim not in self.data.dims:
            raise MechAlignError(
                f"no axis '{dim}' to average over", hint=f"axes: {', '.join(map(str, self.data.dims))}"
            )
        if dim != PROMPT:
            kept = self.values[["effect"]].mean(dim, skipna=True)
            others = {name: value for name, value in self.values.items() if name != "effect" and dim not in value.dims}
            return replace(self, values=kept.assign(others))
        groups = self.values["group"].values if "group" in self.values.coords else None
        summary = stats.summarize(
            self.data.values.astype(float), groups, confidence=confidence, n_resamples=n_resamples, n_flips=n_flips,
            seed=seed,
        )  # fmt: skip
        dims = self.data.dims[1:]
        coords = {name: c for name, c in self.data.coords.items() if PROMPT not in c.dims}
        numbers = {
            "effect": summary.mean, "ci_low": summary.ci_low, "ci_high": summary.ci_high, "p": summary.p,
            "p_maxt": summary.p_maxt, "q": summary.q, "n": summary.n,
        }  # fmt: skip
        values = xr.Dataset({name: (dims, np.asarray(value)) for name, value in numbers.items()}, coords=coords)
        kept = [name for name, value in self.values.items() if PROMPT not in value.dims and name not in numbers]
        values = values.assign({name: self.values[name].drop_vars("prompt", errors="ignore") for name in kept})
        statistics = {
            "confidence": confidence, "n_resamples": n_resamples, "n_flips": n_flips, "seed": seed,
            "n_prompts": int(self.data.sizes[PROMPT]), "n_groups": int(summary.n_groups),
            "p_floor": float(summary.p_floor),
        }  # fmt: skip
        provenance = {
            **self.provenance,
            "statistics": statistics,
            "warnings": list(dict.fromkeys([*self.warnings, *summary.warnings])),
        }
        return replace(self, values=values, provenance=provenance)

    def select(self, **coords: Any) -> "Result":
        """The part of the result at these coordinates, e.g. ``select(layer=[4, 5], head=1)``."""
        for name, wanted in coords.items():
            if name not in self.values.dims:
                raise MechAlignError(f"no axis '{name}'", hint=f"axes: {', '.join(map(str, self.data.dims))}")
            have = list(self.values[name].values)
            missing = [value for value in np.atleast_1d(wanted) if value not in have]
            if missing:
                raise MechAlignError(f"no {name} {missing[0]}", hint=f"there are: {_shorten(have)}")
        return replace(self, values=self.values.sel(coords))

    def map(self, function: Callable[[xr.Dataset], xr.Dataset]) -> "Result":
        """The same result with its values changed by a pure function."""
        return replace(self, values=function(self.values))

    def save(self, path: str | Path) -> Path:
        """Write ``values.npz`` and ``result.json`` into a folder. No pickle."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {str(name): _plain(value) for name, value in self.values.variables.items()}
        with (folder / "values.npz.part").open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **cast(Any, arrays))
        (folder / "values.npz.part").replace(folder / "values.npz")
        head = {
            "format": FORMAT, "name": self.name, "unit": self.unit, "sign": self.sign,
            "dims": {str(name): list(map(str, value.dims)) for name, value in self.values.variables.items()},
            "coords": [str(name) for name in self.values.coords],
            "provenance": self.provenance,
        }  # fmt: skip
        (folder / "result.json").write_text(json.dumps(head, indent=1, default=_jsonable), encoding="utf-8")
        return folder


def load_result(path: str | Path) -> Result:
    """Read a result that ``Result.save`` wrote.

    Raises:
        BadRun: The folder holds no result, or a damaged one.
    """
    folder = Path(path)
    try:
        head = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        with np.load(folder / "values.npz", allow_pickle=False) as file:
            variables = {name: (tuple(head["dims"][name]), file[name]) for name in file.files}
    except (OSError, KeyError, ValueError) as problem:
        raise BadRun(
            f"no readable result in {folder}", why=str(problem), hint="give a folder such as DIR/results/head_patching"
        ) from problem
    coords = {name: variables.pop(name) for name in head["coords"]}
    values = xr.Dataset(cast(Mapping[str, Any], variables), coords=cast(Mapping[str, Any], coords))
    return Result(values, head["name"], head["unit"], head["sign"], head["provenance"])


def site_label(row: Mapping[str, Any]) -> str:
    """A short name for one cell of a table: ``L10H7``, ``L3.mlp``, ``L3N17``, with the position where there is one."""
    label = f"L{row['layer']}" if "layer" in row else ""
    part, head = row.get("part"), row.get("head")
    if head is not None:
        label += f"H{head}"
    elif row.get("neuron") is not None:
        label += f"N{row['neuron']}"
    elif part is not None:
        label = f"{label}.{part}" if label else str(part)
    elif row.get("component") is not None:
        label = str(row["component"])
    elif row.get("cell") is not None:
        label = str(row["cell"])
    if row.get("position") is not None:
        label += f"@{row['position']}"
    return label


def _plain(value: xr.Variable) -> np.ndarray[Any, Any]:
    array = np.asarray(value.values)
    return array.astype(str) if array.dtype.kind == "O" else array


def _jsonable(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Path | set | tuple):
        return str(value) if isinstance(value, Path) else list(cast(Any, value))
    raise TypeError(f"{type(value).__name__} does not belong into provenance")


def _shorten(values: list[Any], limit: int = 12) -> str:
    words = [str(value) for value in values]
    return ", ".join(words if len(words) <= limit else [*words[: limit - 2], "...", words[-1]])
