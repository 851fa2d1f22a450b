"""Claims about a model whose answer is known: was what was planted found, and nothing else?"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mech_align.cli.findings import (
    ALPHA,
    NOT_SUPPORTED,
    SUPPORTED,
    UNDECIDED,
    ablation_findings,
    finding,
    row_of,
    show_number,
)  # fmt: skip
from mech_align.results import Result


def known_answer_findings(
    results: Mapping[str, Result], means: Mapping[str, Result], *, planted: Sequence[str], found: Sequence[str]
) -> list[dict[str, Any]]:
    """Does the search find the heads that were planted, and nothing else?"""
    places = "first and second" if len(planted) == 2 else f"first to {len(planted)}th"
    names = f"{' and '.join(planted)}, the planted heads,"
    out = [
        _ranked(means["head_patching"], planted, f"{names} rank {places} by patching"),
        _ranked(
            means["base_patching"],
            planted,
            f"{names} rank {places} by patching in the values of the model before fine-tuning",
        ),
        _ranked(means["head_ablation"], planted, f"{names} rank {places} by mean ablation"),
    ]
    joint, mean = results["mean_ablation"], means["mean_ablation"]
    out += [one for one in ablation_findings(joint, mean) if not one["claim"].startswith("A greedy")]
    return [*out, _random_heads(mean), _greedy_order(mean, planted), _signs(means["logit_attribution"], planted)]


def _ranked(mean: Result, planted: Sequence[str], claim: str) -> dict[str, Any]:
    top = mean.top(len(planted) + 1).to_dict("records")
    weakest, after = top[len(planted) - 1], top[len(planted)]
    found = [str(row["site"]) for row in top[: len(planted)]]
    tested = all(row["p_maxt"] <= ALPHA for row in top[: len(planted)])
    verdict = NOT_SUPPORTED if set(found) != set(planted) else SUPPORTED if tested else UNDECIDED
    controls = {
        "effects": {str(row["site"]): row["effect"] for row in top[: len(planted)]},
        "strongest other head": f"{after['site']} {show_number(after['effect'])}", "p_maxt": weakest["p_maxt"],
        "heads": int(mean.data.size),
    }  # fmt: skip
    ends = (weakest["ci_low"], weakest["ci_high"])
    return finding(claim, weakest["effect"], f"{mean.unit} (the weaker one)", ends, weakest["n"], controls, verdict)


def _random_heads(mean: Result) -> dict[str, Any]:
    table: Any = mean.frame()
    kind = table["kind"].astype(str)
    random, joint = table["effect"][kind == "control"], float(table["effect"][kind == "joint"].iloc[0])
    share = float(np.abs(random).max() / abs(joint))
    controls = {"random sets": len(random), "largest, as a share of the found ones": share, "found ones": joint}
    claim = "Random heads of the same layers stay near zero by comparison (their mean, and their range)"
    n = table["n"][kind == "control"].max()
    return finding(
        claim,
        random.mean(),
        mean.unit,
        (random.min(), random.max()),
        n,
        controls,
        SUPPORTED if share <= 0.1 else NOT_SUPPORTED,
    )


def _greedy_order(mean: Result, planted: Sequence[str]) -> dict[str, Any]:
    table: Any = mean.frame()
    last = row_of(table, int(np.flatnonzero(table["kind"].astype(str) == "greedy")[-1]))
    order = str(last["cell"]).split(": ", 1)[-1].split("+")
    controls = {"order": ", ".join(order)}
    claim = "A greedy search over all heads, one after the other, takes out the planted ones and no other"
    verdict = SUPPORTED if set(order) == set(planted) else NOT_SUPPORTED
    return finding(claim, last["effect"], mean.unit, (last["ci_low"], last["ci_high"]), last["n"], controls, verdict)


def _signs(mean: Result, planted: Sequence[str]) -> dict[str, Any]:
    table: Any = mean.frame().set_index("component")
    rows = [table.loc[name].to_dict() for name in planted]
    worst = max(rows, key=lambda row: row["ci_high"])
    others = table[(table["kind"].astype(str) == "head") & ~table.index.isin(list(planted))]["effect"]
    controls = {
        "direct effects": {name: row["effect"] for name, row in zip(planted, rows, strict=True)},
        "other heads, range": [others.min(), others.max()],
    }  # fmt: skip
    right = all(row["ci_high"] < 0 for row in rows)
    claim = (
        f"The planted heads write directly against refusal ({', '.join(planted)}: negative, the sign of a suppressor)"
    )
    ends, unit = (worst["ci_low"], worst["ci_high"]), f"{mean.unit} (the weaker one)"
    return finding(claim, worst["effect"], unit, ends, worst["n"], controls, SUPPORTED if right else NOT_SUPPORTED)
