"""One page that says what was found: a single file that opens offline and makes no request."""

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, cast

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mech_align.plots import page_settings, plotly_js
from mech_align.results import Result, site_label

_TOP = 10
# plotly.js writes the style sheet of a map library that no figure here uses, unless an element with its id is there;
# the policy would refuse it and the browser complain
_UNUSED_STYLES = re.compile(r'getElementById\("([0-9a-f]{64})"\)')
_LARGEST_FIGURE = 3_000_000
"""Characters of JSON; a larger figure stays in its file, so that the page opens."""
_QUESTIONS = {
    "head_patching": "Which heads, moved from the clean run into the corrupt run, bring the clean behaviour back?",
    "neuron_patching": "Which neurons, moved from the clean run into the corrupt run, bring the clean behaviour back?",
    "causal_tracing": "Where does restoring the clean activation bring the clean behaviour back?",
    "attribution_patching": "Which parts does a gradient screen point to, and do exact patches agree?",
    "logit_attribution": "How much does each part write directly towards the answer?",
    "logit_lens": "At which layer does the answer become readable?",
    "mean_ablation": "Does switching these heads off change the behaviour more than switching off random ones?",
}
_PRIVATE = {"prompts", "prompt", "texts", "text", "examples", "clean", "corrupt", "answer", "wrong", "completions"}
_GOOD = ("support", "confirm", "yes", "pass", "hold", "true", "found")
_BAD = ("not ", "no", "fail", "refut", "unsupport", "contradict", "false")


@dataclass(frozen=True)
class Entry:
    """One result as the report shows it; ``figures`` are JSON by name."""

    name: str
    question: str
    result: Result
    table: pd.DataFrame
    figures: Mapping[str, str]
    statistics: Mapping[str, Any] = field(default_factory=lambda: {})
    warnings: Sequence[str] = ()
    tokens: bool = False


def render(
    manifest: Mapping[str, Any], findings: Sequence[Mapping[str, Any]], entries: Sequence[Entry],
    prompts: Sequence[Mapping[str, Any]] = (),
) -> str:  # fmt: skip
    """The page as HTML.

    Its content security policy forbids every request and every script and style sheet but the three whose hashes it
    names. Figures travel as JSON in data blocks. Everything else is escaped.
    """
    environment = Environment(
        loader=PackageLoader("mech_align", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(number=show_number, p=show_p, interval=show_interval, time=show_time)
    source = cast(Any, environment.loader).get_source(environment, "report.css")[0]
    style, script = _inline(source), _inline(cast(Any, environment.loader).get_source(environment, "report.js")[0])
    figures = {key: text for entry in entries for key, text in entry.figures.items() if len(text) <= _LARGEST_FIGURE}
    plotly = _inline(plotly_js()) if figures else ""
    return environment.get_template("report.html.j2").render(
        policy=_policy([script, *([plotly] if plotly else [])], [style]),
        style=Markup(style), script=Markup(script), plotly=Markup(plotly), unused_styles=_UNUSED_STYLES.findall(plotly),
        settings=_data(json.dumps(page_settings())),
        figures={key: _data(text) for key, text in figures.items()},
        manifest=manifest, findings=[_finding(finding) for finding in findings],
        entries=[_section(entry, bool(prompts)) for entry in entries],
        warnings=_warnings(manifest, entries), facts=_facts(manifest, entries), prompts=_prompt_table(prompts),
        plan=_pretty(_public(manifest.get("plan", {}), bool(prompts))),
        seconds=sum(float(step.get("seconds", 0)) for step in manifest["steps"].values()),
    )  # fmt: skip


def show_number(value: Any, signed: bool = True) -> str:
    """Three significant digits, a true minus sign; words stay words, nothing is a dash."""
    if value is None or isinstance(value, float) and math.isnan(value):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    places = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    text = f"{value:+,.{places}f}" if signed else f"{value:,.{places}f}"
    return text.replace("-", "−")


def show_p(value: Any) -> str:
    """A p value: never 0, never more digits than it has."""
    if value is None or math.isnan(float(value)):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def show_interval(value: Any) -> str:
    """Both ends, or a dash."""
    if value is None or not isinstance(value, Sequence) or isinstance(value, str):
        return "–" if value is None else str(value)
    ends = [show_number(end) for end in cast(Sequence[Any], value)]
    return "–" if all(end == "–" for end in ends) else f"[{', '.join(ends)}]"


def show_time(value: str) -> str:
    """A moment as people write it."""
    return datetime.fromisoformat(value).strftime("%-d %B %Y, %H:%M UTC")


def place(position: Any) -> Any:
    """A position without the token that stands there: ``"-2 park"`` becomes ``"-2"``, ``"last"`` stays."""
    number = re.match(r"-?\d+(?=\s)", str(position))
    return number[0] if number else position


def _inline(text: str) -> str:
    """Code for an inline element; a closing tag inside it would end it, and another line end would change its hash."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    assert "</script" not in text.lower() and "</style" not in text.lower() and "<!--" not in text
    return text


def _data(text: str) -> Markup:
    """JSON inside a data block: no ``<`` is left that could end the block or begin a comment."""
    for character, code in (
        ("<", "\\u003c"),
        (">", "\\u003e"),
        ("&", "\\u0026"),
        ("\u2028", "\\u2028"),
        ("\u2029", "\\u2029"),
    ):
        text = text.replace(character, code)
    return Markup(text)


def _policy(scripts: Sequence[str], styles: Sequence[str]) -> str:
    def hashes(texts: Sequence[str]) -> str:
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    # plotly.js makes an empty style element, hence the hash of "", and fills it through the object model;
    # it shows heat maps as data: images and saves pictures through blob: addresses
    return "; ".join((
        "default-src 'none'", f"script-src {hashes(scripts)}", f"style-src {hashes([*styles, ''])}",
        "style-src-attr 'unsafe-inline'", "img-src data: blob:", "font-src data:", "base-uri 'none'",
        "form-action 'none'",
    ))  # fmt: skip


def _finding(finding: Mapping[str, Any]) -> dict[str, Any]:
    verdict = str(finding.get("verdict") or "no verdict")
    low = verdict.lower()
    tone = (
        "open"
        if low == "no verdict"
        else "bad"
        if low.startswith(_BAD)
        else "good"
        if low.startswith(_GOOD)
        else "open"
    )
    return {**finding, "verdict": verdict, "tone": tone, "controls": _controls(finding.get("controls"))}


def _controls(controls: Any) -> list[str]:
    if controls is None:
        return []
    if isinstance(controls, Mapping):
        items = cast(Mapping[str, Any], controls)
        if "name" in items:
            return [_control(items)]
        return [f"{str(key).replace('_', ' ')}: {_named_value(str(key), value)}" for key, value in items.items()]
    if isinstance(controls, Sequence) and not isinstance(controls, str):
        return [_control(item) if isinstance(item, Mapping) else str(item) for item in cast(Sequence[Any], controls)]
    return [str(controls)]


def _control(control: Mapping[str, Any]) -> str:
    words = [str(control.get("name", "control")).replace("_", " ")]
    if control.get("number") is not None:
        words.append(f"{show_number(control['number'])} {show_interval(control.get('interval'))}".replace(" –", ""))
    known = {"name", "number", "interval"}
    words += [
        f"{str(key).replace('_', ' ')} {_named_value(str(key), value)}"
        for key, value in control.items()
        if key not in known
    ]
    return ": ".join([words[0], ", ".join(words[1:])]) if len(words) > 1 else words[0]


def _named_value(name: str, value: Any) -> str:
    is_p = name in ("p", "q", "p_maxt") or name.startswith(("p against", "p_against"))
    return show_p(value) if is_p and isinstance(value, int | float) else _value(value)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return show_interval(cast(Any, value))
    if isinstance(value, Mapping):
        return ", ".join(
            f"{str(k).replace('_', ' ')} {_named_value(str(k), v)}" for k, v in cast(Mapping[str, Any], value).items()
        )
    return show_number(value)


def _section(entry: Entry, with_prompts: bool) -> dict[str, Any]:
    table: Any = entry.table  # the types of pandas cannot tell a column from a table
    measured = table[table["effect"].notna()]
    listed = measured[~measured["kind"].str.startswith("control")] if "kind" in measured else measured
    order = listed["effect"].abs().sort_values(ascending=False, kind="stable").index
    exact, dims = _exact(entry.result), [str(dim) for dim in entry.result.data.dims if dim != "prompt"]
    rows: list[dict[str, Any]] = [
        {
            "exact": exact.get(tuple(row[dim] for dim in dims)),
            "site": _where(row, dims, entry.tokens),
            "kind": row.get("kind"),
            **{str(k): v for k, v in row.items()},
        }
        for row in listed.loc[order].head(_TOP).to_dict("records")
    ]
    n = int(measured["n"].max()) if measured["n"].notna().any() else entry.result.data.sizes.get("prompt")
    title = entry.name.replace("_", " ")
    strongest = ", ".join(f"{row['site']} {show_number(float(row['effect']))}" for row in rows[:3])
    return {
        "name": entry.name, "title": title[:1].upper() + title[1:],
        "question": entry.question or entry.result.provenance.get("question") or _QUESTIONS.get(entry.result.name, ""),
        "unit": entry.result.unit, "sign": entry.result.sign, "n": n, "statistics": dict(entry.statistics),
        "rows": rows, "n_cells": len(table), "n_missing": len(table) - len(measured),
        "n_controls": len(measured) - len(listed),
        "figures": list(entry.figures), "has_p": bool(measured["p"].notna().any()), "has_exact": bool(exact),
        "alt": f"{title}: {len(measured)} measured cells. Strongest: {strongest}. The table below holds the numbers.",
        "provenance": _pretty(_public(entry.result.provenance, with_prompts)),
    }  # fmt: skip


def _where(row: Mapping[str, Any], dims: Sequence[str], tokens: bool) -> str:
    """The name of a cell, with the values of axes that a site does not have."""
    if not tokens and "position" in row:
        row = {**row, "position": place(row["position"])}
    label = site_label(row)
    if "layer" in row and not str(row["layer"]).isdigit():  # the embedding, counted as -1 or named
        label = label.replace(f"L{row['layer']}", str(row.get("label", row["layer"])), 1)
    known = {"layer", "head", "neuron", "part", "component", "cell", "position"}
    return " · ".join([*([label] if label else []), *(str(row[dim]) for dim in dims if dim not in known)]) or "all"


def _exact(result: Result) -> dict[tuple[Any, ...], float]:
    """Exact effects beside the scores of a screen, by the coordinates of their cell."""
    if "exact" not in result.values or "prompt" in result.values["exact"].dims:
        return {}
    names = [str(dim) for dim in result.data.dims if dim != "prompt"]
    frame = result.values["exact"].rename("exact").to_dataframe(dim_order=names).reset_index()
    return {tuple(row[name] for name in names): row["exact"] for row in frame.to_dict("records")}


def _public(value: Any, with_prompts: bool, key: str = "") -> Any:
    """Provenance without prompts: a text, or a list of texts, under a name that prompts go by."""
    if isinstance(value, Mapping):
        return {str(k): _public(v, with_prompts, str(k)) for k, v in cast(Mapping[Any, Any], value).items()}
    if not with_prompts and key in _PRIVATE:
        if isinstance(value, str):
            return "(a prompt, not shown)"
        if isinstance(value, list | tuple) and any(not isinstance(item, int | float) for item in cast(Any, value)):
            return f"({len(cast(Any, value))} entries, not shown)"
    return [_public(item, with_prompts, key) for item in cast(Any, value)] if isinstance(value, list | tuple) else value


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, default=str)


def _warnings(manifest: Mapping[str, Any], entries: Sequence[Entry]) -> list[str]:
    """Every warning once, with the results that it belongs to."""
    where: dict[str, list[str]] = {str(text): [] for text in manifest.get("warnings", [])}
    for entry in entries:
        for text in [*entry.result.warnings, *entry.warnings]:
            where.setdefault(str(text), []).append(entry.name.replace("_", " "))
    for name, step in manifest["steps"].items():
        if step["status"] != "done":
            where[f"step {name} is {step['status']}: the report is not complete"] = []
    return [f"{text} ({', '.join(dict.fromkeys(names))})" if names else text for text, names in where.items()]


def _facts(manifest: Mapping[str, Any], entries: Sequence[Entry]) -> list[tuple[str, str]]:
    first = entries[0].result.provenance if entries else {}
    facts = [
        ("Command", manifest.get("command")), ("Model", manifest.get("model") or first.get("model")),
        ("Data", manifest.get("data") or first.get("data")), ("Seed", manifest.get("seed")),
        ("Begun", _moment(manifest.get("created"))), ("Last change", _moment(manifest.get("updated"))),
        ("Sessions", len(manifest.get("sessions", [])) or None),
        ("Versions", ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items())),
    ]  # fmt: skip
    return [(label, _fact(value)) for label, value in facts if value not in (None, "")]


def _moment(value: str | None) -> str | None:
    return show_time(value) if value else None


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        public = _public(cast(Any, value), False)
        return " · ".join(f"{key}: {_fact(item)}" for key, item in public.items() if item not in (None, "", {}))
    return str(value)


def _prompt_table(prompts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    columns = list(dict.fromkeys(str(key) for prompt in prompts for key in prompt))
    rows = [["" if prompt.get(column) is None else str(prompt[column]) for column in columns] for prompt in prompts]
    return {"columns": columns, "rows": rows}
