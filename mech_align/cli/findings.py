"""From results to claims: each with its number, interval, controls and a verdict that says no more than they allow."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mech_align import stats
from mech_align.errors import MechAlignError
from mech_align.results import Result, site_label

SUPPORTED, NOT_SUPPORTED, UNDECIDED = "supported", "not supported", "undecided"
ALPHA = 0.05
NUMBERS = ("effect", "ci_low", "ci_high", "p", "q", "p_maxt", "n")
_MISSES = 0.2
_MOST = 5
"""Claims about single cells in one run."""


def strongest(mean: Result, k: int) -> list[dict[str, Any]]:
    """The ``k`` strongest cells of an averaged result as plain rows."""
    return _rows(mean, mean.top(k))


def listed(mean: Result, k: int) -> list[dict[str, Any]]:
    """What a table shows: the strongest cells; for curves every layer; for ablations no single control."""
    table: Any = mean.frame()
    dims = {str(dim) for dim in mean.data.dims}
    if "kind" in table and "cell" in table:
        chosen = table[~table["kind"].astype(str).str.startswith("control")]
        return _rows(mean, chosen.head(3 * k))
    if dims <= {"layer", "intervention"} and len(table) <= 200:
        return _rows(mean, table)
    return strongest(mean, k)


def control_line(mean: Result) -> str:
    """What ablating random sets does, in one line."""
    table: Any = mean.frame()
    if "kind" not in table or "cell" not in table:
        return ""
    words: list[str] = []
    for kind, name in (("control", "random sets"), ("control single", "other single heads")):
        effect = table["effect"][table["kind"].astype(str) == kind]
        if len(effect):
            ends = f"[{show_number(effect.min())}, {show_number(effect.max())}]"
            words.append(f"{len(effect)} {name}: mean {show_number(effect.mean())}, range {ends}")
    return " · ".join(words)


def _rows(mean: Result, table: pd.DataFrame) -> list[dict[str, Any]]:
    known = {"layer", "head", "neuron", "part", "component", "cell", "position"}
    others = [str(dim) for dim in mean.data.dims if str(dim) not in known]
    extra = {"exact": mean.values["exact"].values.ravel()} if _has_exact(mean) else {}
    dims = [str(dim) for dim in mean.data.dims]
    order = {tuple(row): i for i, row in enumerate(mean.frame()[dims].itertuples(index=False))} if extra else {}
    rows: list[dict[str, Any]] = []
    for row in table.to_dict("records"):
        site = " · ".join([site_label({str(k): v for k, v in row.items()}), *(str(row[dim]) for dim in others)])
        if row.get("layer") == -1 and "component" not in row:
            site = site.replace("L-1", "embedding")
        plain = {"site": site, **{key: _plain(row.get(key)) for key in NUMBERS}}
        rows.append(
            plain | {key: _plain(value[order[tuple(row[dim] for dim in dims)]]) for key, value in extra.items()}
        )
    return rows


def _has_exact(mean: Result) -> bool:
    return "exact" in mean.values and mean.values["exact"].dims == mean.data.dims


def gap_finding(result: Result, *, unit: str, metric: str) -> dict[str, Any]:
    """Is there anything to explain: does the metric tell the two runs apart?"""
    clean, corrupt = (result.values[name].values.astype(float) for name in ("clean", "corrupt"))
    groups = result.values["group"].values.astype(str)
    summary = stats.summarize((clean - corrupt)[:, None], groups)
    low, high = float(summary.ci_low[0]), float(summary.ci_high[0])
    verdict = UNDECIDED if math.isnan(low) else SUPPORTED if low > 0 else NOT_SUPPORTED
    controls: dict[str, Any] = {"clean mean": float(np.nanmean(clean)), "corrupt mean": float(np.nanmean(corrupt))}
    if metric in ("logit_difference", "log_odds"):
        controls["pairs whose clean run prefers the right answer"] = f"{int((clean > 0).sum())} of {len(clean)}"
        controls["pairs whose corrupt run prefers it"] = f"{int((corrupt > 0).sum())} of {len(clean)}"
    return finding(
        "The metric tells the clean run from the corrupt run",
        summary.mean[0],
        unit,
        (low, high),
        len(clean),
        controls,
        verdict,
    )


def patching_findings(result: Result, mean: Result, *, what: str, seed: int = 0) -> list[dict[str, Any]]:
    """Which cells survive: corrected for the whole map, and on prompts that did not choose them.

    Args:
        what: In words, one cell: ``"head"``.
    """
    n_groups = int((mean.provenance.get("statistics") or {}).get("n_groups", 0))
    floor = 2.0 ** (1 - n_groups)
    held_out = _held_out(result, seed)
    table: Any = mean.frame()
    order = np.argsort(-np.abs(table["effect"].fillna(0).to_numpy()), kind="stable")[:50]
    survivors = [int(i) for i in order if table["p_maxt"].iloc[i] <= ALPHA][:_MOST]
    noise = np.nanmedian(np.abs(table["effect"]))
    if survivors or floor > ALPHA:
        # where no test can reject, the strongest few are reported with what is known of them
        chosen = survivors or [int(i) for i in order[:3] if np.isfinite(table["effect"].iloc[i])]
        return [_cell(row_of(table, i), held_out.get(i), mean, what, float(noise), n_groups, floor) for i in chosen]
    top = row_of(table, int(order[0]))
    controls = {"strongest": site_label(top), "p_maxt": _plain(top["p_maxt"]), "groups": n_groups, "cells": len(table)}
    claim = f"Some single {what} on its own has an effect that survives correction for all {len(table):,} of them"
    ends = (top["ci_low"], top["ci_high"])
    return [finding(claim, top["effect"], mean.unit, ends, top["n"], controls, NOT_SUPPORTED)]


def _held_out(result: Result, seed: int) -> dict[int, stats.HalfConfirmation]:
    """For cells that one half of the groups selects, what the other half says; nothing with fewer than four groups."""
    groups = result.values["group"].values.astype(str).tolist()
    try:
        records = stats.split_half(result.data.values.astype(float), groups, 2 * _MOST, seed=seed, reverse=True)
    except MechAlignError:
        return {}
    found: dict[int, stats.HalfConfirmation] = {}
    for record in records:
        found.setdefault(record.cell, record)
    return found


def _cell(
    row: Mapping[str, Any], half: stats.HalfConfirmation | None, mean: Result, what: str, noise: int | float,
    n_groups: int, floor: int | float,
) -> dict[str, Any]:  # fmt: skip
    effect, low, high = float(row["effect"]), float(row["ci_low"]), float(row["ci_high"])
    controls: dict[str, Any] = {
        "p_maxt": _plain(row["p_maxt"]),
        "q": _plain(row["q"]),
        f"median size of all {what}s": noise,
    }
    if half is None:
        controls["held out"] = "not selected on half of the groups" if n_groups >= 4 else "needs 4 groups"
        confirmed = False
    else:
        controls["held out"] = {
            "effect": half.mean,
            "interval": [_plain(half.ci_low), _plain(half.ci_high)],
            "groups": half.n_groups,
        }
        confirmed = half.mean * effect > 0 and abs(half.mean) >= abs(effect) / 2
    excludes_zero = low > 0 or high < 0
    if floor > ALPHA:
        controls["groups"] = f"{n_groups}: no test can reach p = {ALPHA:g} with fewer than 6"
        verdict = UNDECIDED
    else:
        verdict = SUPPORTED if row["p_maxt"] <= ALPHA and excludes_zero and confirmed else UNDECIDED
    settings = mean.provenance.get("settings") or {}
    return finding(
        _claim(site_label(row), what, effect, settings), effect, mean.unit, (low, high), row["n"], controls, verdict
    )


def _claim(site: str, what: str, effect: float, settings: Mapping[str, Any]) -> str:
    name = f"{what[:1].upper()}{what[1:]} {site}"
    if settings.get("direction") == "noise":
        does = (
            "is needed for part of the clean behaviour"
            if effect < 0
            else "holds the clean behaviour back in the clean run"
        )
    elif settings.get("source_model"):
        does = (
            "with the other model's value brings back part of its behaviour"
            if effect > 0
            else "with the other model's value moves away from its behaviour"
        )
    else:
        does = (
            "on its own brings back part of the clean behaviour"
            if effect > 0
            else "on its own works against the clean behaviour"
        )
    return f"{name} {does}"


def ablation_findings(result: Result, mean: Result) -> list[dict[str, Any]]:
    """Do the named sites change the behaviour, and more than random ones of the same layers?"""
    table: Any = mean.frame()
    table["kind"] = table["kind"].astype(str)
    ranks: Mapping[str, Any] = result.provenance.get("controls") or {}
    wanted = (
        table[table["kind"].isin(["joint"])] if (table["kind"] == "joint").any() else table[table["kind"] == "found"]
    )
    out = [_ablated(row, ranks.get(str(row["cell"])), mean) for row in wanted.to_dict("records")[:_MOST]]
    steps = table[table["kind"] == "greedy"]
    if len(steps):
        last = steps.iloc[-1]
        claim = f"A greedy search takes out, in this order, {str(last['cell']).split(': ', 1)[-1].replace('+', ', ')}"
        controls = {str(row["cell"]).split(":")[0]: row["effect"] for row in steps.to_dict("records")}
        out.append(finding(claim, last["effect"], mean.unit, (last["ci_low"], last["ci_high"]), last["n"],
                            {**controls, "note": "the search chose these on the same prompts"}, UNDECIDED))  # fmt: skip
    return out


def _ablated(row: Mapping[str, Any], rank: Mapping[str, Any] | None, mean: Result) -> dict[str, Any]:
    low, high = float(row["ci_low"]), float(row["ci_high"])
    excludes_zero = low > 0 or high < 0
    settings = mean.provenance.get("settings") or {}
    names = str(row["cell"]).replace("+", ", ")
    mode = settings.get("mode", "mean")
    claim = f"Taking out {names} ({mode}) changes the metric more than random sets of the same layers"
    if rank is None:
        return finding(claim, row["effect"], mean.unit, (low, high), row["n"], "no random controls", UNDECIDED)
    controls = {"random sets": rank["n_controls"], "p against them": rank["p"], "their mean": rank["control_mean"],
                "their range": [rank["control_low"], rank["control_high"]]}  # fmt: skip
    if not excludes_zero:
        verdict = UNDECIDED if math.isnan(low) else NOT_SUPPORTED
    elif rank["p"] <= ALPHA:
        verdict = SUPPORTED
    else:
        verdict = UNDECIDED if rank["p"] <= 1 / (1 + rank["n_controls"]) + 1e-9 else NOT_SUPPORTED
    return finding(claim, row["effect"], mean.unit, (low, high), row["n"], controls, verdict)


def screen_findings(result: Result, mean: Result) -> list[dict[str, Any]]:
    """What exact patches say about the top of the gradient screen, and how many strong cells it missed."""
    told: Mapping[str, Any] = result.provenance.get("screen") or {}
    out = _confirmed(result, mean)
    interval, number = told.get("miss_rate_interval"), told.get("miss_rate")
    verdict = UNDECIDED
    if number is not None and interval is not None and None not in interval:
        verdict = SUPPORTED if interval[1] <= _MISSES else NOT_SUPPORTED if interval[0] > _MISSES else UNDECIDED
    numbers = {k.replace("_", " "): v for k, v in told.items() if isinstance(v, int | float | str) and k != "miss_rate"}
    claim = f"The screen misses no more than {_MISSES:.0%} of the large effects (estimated miss rate)"
    return [
        *out,
        finding(claim, number, "share of the large effects", interval, told.get("sampled"), numbers, verdict),
    ]


def _confirmed(result: Result, mean: Result) -> list[dict[str, Any]]:
    """The strongest of the cells that were patched exactly because of their score."""
    if "exact_by_prompt" not in result.values or not _has_exact(mean):
        return []
    exact = result.values["exact_by_prompt"]
    cells = [str(cell) for cell in exact["cell"].values] if "cell" in exact.coords else []
    groups = result.values["group"].values.astype(str)
    summary = stats.summarize(exact.values.astype(float), groups)
    order = np.argsort(-np.abs(np.nan_to_num(summary.mean)), kind="stable")
    chosen = [i for i in order if summary.p_maxt[i] <= ALPHA][:3] if cells else []
    return [
        finding(
            f"{cells[i]} carries part of the clean behaviour when patched exactly", summary.mean[i],
            "fraction of the clean-corrupt gap", (summary.ci_low[i], summary.ci_high[i]), summary.n[i],
            {"p_maxt over the confirmed": summary.p_maxt[i], "confirmed cells": len(cells)},
            SUPPORTED if summary.ci_low[i] > 0 or summary.ci_high[i] < 0 else UNDECIDED,
        )
        for i in order[: len(chosen)] if i in chosen
    ]  # fmt: skip


def attribution_findings(result: Result, mean: Result) -> list[dict[str, Any]]:
    """Do the parts add up, and which head writes most?"""
    left = np.abs(result.values["residual"].values.astype(float)) if "residual" in result.values else np.array([np.nan])
    name = "clean" if "clean" in result.values else "corrupt"
    total = result.values[name].values.astype(float)
    small = bool(np.nanmax(left) <= 1e-3 * max(1.0, float(np.nanmax(np.abs(total)))))
    claim = f"What all parts write sums to the metric of the {name} run (largest leftover of a prompt)"
    verdict = SUPPORTED if small else NOT_SUPPORTED
    controls: dict[str, Any] = {"mean of the metric": float(np.nanmean(total))}
    out = [finding(claim, float(np.nanmax(left)), mean.unit, None, len(total), controls, verdict)]
    table: Any = mean.frame()
    heads = table[(table["kind"].astype(str) == "head") & (table["p_maxt"] <= ALPHA)]
    for row in (
        heads.reindex(heads["effect"].abs().sort_values(ascending=False, kind="stable").index)
        .head(3)
        .to_dict("records")
    ):
        side = "towards" if row["effect"] > 0 else "against"
        controls = {
            "p_maxt": _plain(row["p_maxt"]),
            "q": _plain(row["q"]),
            "direct effect only": "what later layers make of it is not counted",
        }
        claim = f"Head {row['component']} writes directly {side} the clean answer in the {name} run"
        out.append(finding(claim, row["effect"], mean.unit,
                            (row["ci_low"], row["ci_high"]), row["n"], controls, SUPPORTED))  # fmt: skip
    return out


def lens_findings(result: Result, mean: Result) -> list[dict[str, Any]]:
    """From which layer on does the lens prefer the answer?"""
    whole = mean if "intervention" not in mean.data.dims else mean.select(intervention="none")
    table = whole.frame()
    low = table["ci_low"].to_numpy()
    above = low > 0
    layers = table["layer"].to_numpy()
    since = len(above) - int(np.argmin(above[::-1])) if not above.all() else 0
    if since == len(above):
        row = row_of(table, len(table) - 1)
        verdict = NOT_SUPPORTED if row["ci_high"] < 0 else UNDECIDED
        ends = (row["ci_low"], row["ci_high"])
        return [
            finding(
                "After the last layer the answer is preferred", row["effect"], mean.unit, ends, row["n"], None, verdict
            )
        ]
    row = row_of(table, since)
    controls = {
        "layer before": _plain(table["effect"].iloc[since - 1]) if since else None,
        "caution": "an early layer that reads as nothing may still hold the answer in another basis",
    }
    claim = f"From layer {layers[since]} on, the model's own unembedding reads the answer from the residual stream"
    ends = (row["ci_low"], row["ci_high"])
    return [finding(claim, row["effect"], mean.unit, ends, row["n"], controls, SUPPORTED)]


def show_number(value: Any) -> str:
    """Three significant digits with a sign; a dash for what is not known."""
    if value is None or isinstance(value, float) and math.isnan(value):
        return "–"
    if isinstance(value, str):
        return value
    size = abs(value)
    return (
        f"{value:+.1e}"
        if 0 < size < 5e-4
        else f"{value:+.3f}"
        if size < 1
        else f"{value:+.2f}"
        if size < 100
        else f"{value:+,.0f}"
    )


def row_of(table: pd.DataFrame, index: int) -> dict[str, Any]:
    """One row with every number in its own type."""
    return {str(key): value for key, value in table.iloc[[index]].to_dict("records")[0].items()}


def finding(
    claim: str, number: Any, unit: str, interval: Sequence[Any] | None, n: Any, controls: Any, verdict: str
) -> dict[str, Any]:  # fmt: skip
    """One claim as plain JSON; what is not finite is unknown."""
    ends = None if interval is None else [_plain(end) for end in interval]
    count = None if n is None else int(n)
    return {"claim": claim, "number": _plain(number), "unit": unit, "interval": ends, "n": count,
            "controls": _all_plain(controls), "verdict": verdict}  # fmt: skip


def _all_plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _all_plain(one) for key, one in value.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return [_all_plain(one) for one in value] if isinstance(value, list | tuple) else _plain(value)  # pyright: ignore[reportUnknownVariableType]


def _plain(value: Any) -> Any:
    """Strict JSON: what is not finite is unknown."""
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
