"""Run folders: what is in them, when they are opened again, and the report."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from mech_align.errors import BadRun
from mech_align.results import Result
from mech_align.runs import Run, load_run
from mech_align.runs.files import summary_table
from mech_align.runs.report import show_interval, show_number, show_p

COMMAND = ["mech-align", "patch", "--model", "toy", "--out", "my run"]
PLAN = {"layers": (4, 5), "seed": 3, "metric": "logit_difference"}
SECRET = "Explain how to pick a lock"


def result(name: str = "head_patching", **provenance: Any) -> Result:
    rng = np.random.default_rng(0)
    values = rng.normal(0, 0.01, (12, 3, 4))
    values[:, 2, 1] += rng.normal(0.5, 0.05, 12)
    values[:, 0, 0] = np.nan
    data = xr.Dataset(
        {"effect": (("prompt", "layer", "head"), values)},
        coords={
            "id": ("prompt", [f"{SECRET} {i}" for i in range(12)]),
            "group": ("prompt", [f"g{i % 6}" for i in range(12)]),
            "layer": range(3), "head": range(4),
        },
    )  # fmt: skip
    return Result(
        data,
        name,
        "fraction of the clean-corrupt gap",
        "positive = more clean behaviour",
        {"warnings": ["2 pairs left out"], **provenance},
    )


def opened(path: Path, **changes: Any) -> Run:
    return Run.create(path, **{"command": COMMAND, "plan": PLAN, "model": {"name": "toy", "sha": "1f"}, **changes})


def finished(path: Path, **provenance: Any) -> Run:
    run = opened(path)
    with run.step("patch"):
        run.add_result("head_patching", result(**provenance))
    run.add_findings([{
        "claim": "L2H1 <b>restores</b> & more", "number": 0.5, "unit": "of the gap", "interval": (0.46, 0.53), "n": 12,
        "controls": [{"name": "20 random heads", "number": 0.001, "interval": [-0.02, 0.02]}], "verdict": "supported",
    }])  # fmt: skip
    return run


def test_folder_holds_what_the_contract_says(tmp_path: Path) -> None:
    run = finished(tmp_path / "new" / "run")
    run.write_report()
    have = {str(p.relative_to(run.path)) for p in run.path.rglob("*") if p.is_file()}
    assert have == {
        "manifest.json", "results/head_patching/values.npz", "results/head_patching/result.json",
        "tables/head_patching.parquet", "figures/head_patching.json", "findings.json", "report.html",
    }  # fmt: skip
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert manifest["command"] == "mech-align patch --model toy --out 'my run'"
    assert manifest["plan"] == {"layers": [4, 5], "seed": 3, "metric": "logit_difference"} and manifest["seed"] == 3
    assert manifest["model"] == {"name": "toy", "sha": "1f"} and "numpy" in manifest["versions"]
    assert manifest["steps"]["patch"]["status"] == "done" and manifest["steps"]["patch"]["seconds"] >= 0
    table = pd.read_parquet(run.path / "tables" / "head_patching.parquet")
    assert list(table.columns) == ["layer", "head", "effect", "ci_low", "ci_high", "p", "q", "n", "p_maxt"]
    assert len(table) == 12 and table["effect"].isna().sum() == 1
    (finding,) = json.loads((run.path / "findings.json").read_text())
    assert list(finding) == ["claim", "number", "unit", "interval", "n", "controls", "verdict"]


def test_results_come_back_with_their_prompts(tmp_path: Path) -> None:
    finished(tmp_path / "run")
    again = load_run(tmp_path / "run")
    assert again.names == ["head_patching"] and again.is_done("patch") and not again.is_done("other")
    np.testing.assert_array_equal(again.result("head_patching").data.values, result().data.values)
    assert again.table("head_patching")["effect"].max() == pytest.approx(float(result().data.mean("prompt").max()))
    assert again.findings[0]["interval"] == [0.46, 0.53]


def test_same_plan_goes_on_another_is_refused(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    before = (tmp_path / "run" / "findings.json").read_text()
    assert opened(tmp_path / "run").is_done("patch")
    assert len(run.manifest["sessions"]) == 2
    assert run.matches({**PLAN, "layers": [4, 5]}) and not run.matches({**PLAN, "seed": 4})
    for changes, word in (
        ({"plan": {**PLAN, "seed": 4}}, "seed"), ({"model": {"name": "toy", "sha": "2e"}}, "model"),
        ({"command": "mech-align ablate --model toy"}, "verb"),
    ):  # fmt: skip
        with pytest.raises(BadRun, match=word) as caught:
            opened(tmp_path / "run", **changes)
        assert "--out" in str(caught.value)
    assert (tmp_path / "run" / "findings.json").read_text() == before
    assert len(run.manifest["sessions"]) == 2
    opened(tmp_path / "run", command="/usr/bin/mech-align patch --model toy --batch-size 8")


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("words")
    with pytest.raises(BadRun, match="holds no run"):
        opened(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(BadRun, match="is a file"):
        opened(tmp_path / "thesis.tex")
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(BadRun):
        opened(other)
    assert (other / "manifest.json").read_text() == '{"name": "a web app"}'
    with pytest.raises(BadRun, match="no run"):
        load_run(tmp_path / "nowhere")
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "manifest.json.part").write_text('{"too')
    assert opened(killed).names == []


def test_steps_tell_what_became_of_them(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt), run.step("patch"):
        (run.partial_dir("patch") / "cells.npy").write_bytes(b"1")
        assert run.manifest["steps"]["patch"]["status"] == "running"
        raise KeyboardInterrupt
    assert run.manifest["steps"]["patch"]["status"] == "interrupted" and not run.is_done("patch")
    assert (run.path / "partial" / "patch" / "cells.npy").exists(), "what was computed stays"
    with pytest.raises(ZeroDivisionError), run.step("lens"):
        raise ZeroDivisionError(SECRET)
    assert run.manifest["steps"]["lens"]["error"] == "ZeroDivisionError"
    assert SECRET not in (run.path / "manifest.json").read_text()
    with run.step("patch"):
        pass
    assert run.is_done("patch") and not (run.path / "partial").exists()


def test_a_killed_step_is_seen_as_interrupted(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    step = run.step("patch")
    step.__enter__()  # and nobody ever leaves it
    assert run.manifest["steps"]["patch"]["status"] == "running"
    assert opened(tmp_path / "run").manifest["steps"]["patch"]["status"] == "interrupted"


def test_a_resumed_run_warns_when_versions_changed(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    file = run.path / "manifest.json"
    file.write_text(file.read_text().replace(f'"numpy": "{np.__version__}"', '"numpy": "1.0"'))
    assert "numpy 1.0 →" in opened(run.path).manifest["warnings"][0]


def test_names_cannot_leave_the_folder(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    for name in ("../x", "a/b", "", ".hidden"):
        with pytest.raises(ValueError):
            run.add_result(name, result())
        with pytest.raises(ValueError):
            run.partial_dir(name)


def test_findings_with_the_same_claim_are_replaced(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    run.add_findings([{"claim": "another"}, {"claim": "L2H1 <b>restores</b> & more", "number": np.float32(0.25)}])
    assert [(f["claim"], f["number"]) for f in run.findings] == [
        ("another", None),
        ("L2H1 <b>restores</b> & more", 0.25),
    ]


def test_table_of_a_result_without_statistics() -> None:
    plain = result().map(lambda data: data.mean("prompt"))
    table = summary_table(plain)
    assert list(table.columns)[2:] == ["effect", "ci_low", "ci_high", "p", "q", "n", "p_maxt"]
    assert table["ci_low"].isna().all() and table["effect"].notna().sum() == 11


class Page(HTMLParser):
    """Elements and the text of script and style elements, as a browser cuts them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, dict[str, str | None], str]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.raw.append((tag, dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style") and self.raw:
            tag, attrs, text = self.raw[-1]
            self.raw[-1] = (tag, attrs, text + data)
        else:
            self.words.append(data)

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}", {}))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    run = finished(
        tmp_path_factory.mktemp("runs") / "run", examples=[SECRET], model={"name": "</script><script>alert(1)</script>"}
    )
    text = run.write_report().read_text(encoding="utf-8")
    return text, Page(text)


def test_report_makes_no_request_and_runs_only_its_own_code(page: tuple[str, Page]) -> None:
    text, parsed = page
    assert len(text.encode()) < 6_000_000
    outside = {"src", "href", "action", "data", "poster", "srcset"}
    for tag, attrs in parsed.tags:
        assert not [v for k, v in attrs.items() if k in outside and v and not v.startswith(("#", "data:"))], (
            tag,
            attrs,
        )
        assert not [k for k in attrs if k.startswith("on") or k == "style"], (tag, attrs)
    policy = next(
        attrs["content"] for tag, attrs in parsed.tags if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None and policy.startswith("default-src 'none'")
    scripts = re.search(r"script-src ([^;]*)", policy)
    styles = re.search(r"style-src ([^;]*)", policy)
    assert scripts and styles and "unsafe" not in scripts[1] and "unsafe" not in styles[1]
    code = [text for tag, attrs, text in parsed.raw if tag == "script" and attrs.get("type") != "application/json"]
    assert len(code) == 2
    for allowed, texts in ((scripts[1], code), (styles[1], [text for tag, _, text in parsed.raw if tag == "style"])):
        for inline in texts:
            digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in allowed
    assert sum("plotly.js v" in inline for inline in code) == 1, "plotly.js is there once"


def test_report_escapes_what_it_shows(page: tuple[str, Page]) -> None:
    text, parsed = page
    assert "L2H1 &lt;b&gt;restores&lt;/b&gt; &amp; more" in text
    assert "L2H1 <b>restores</b> & more" in " ".join(parsed.words)
    assert "<script>alert(1)" not in text
    for name in ("settings", "figure-head_patching"):
        data = next(text for tag, attrs, text in parsed.raw if attrs.get("id") == name)
        assert json.loads(data)
    assert {"light", "dark"} == set(
        json.loads(next(t for _, a, t in parsed.raw if a.get("id") == "settings"))["templates"]
    )


def test_report_says_findings_warnings_and_facts(page: tuple[str, Page]) -> None:
    words = re.sub(r"\s+", " ", " ".join(page[1].words))
    for text in (
        "supported", "+0.500 of the gap", "[+0.460, +0.530]", "20 random heads: +0.001 [−0.020, +0.020]",
        "2 pairs left out",
        "fraction of the clean-corrupt gap", "positive = more clean behaviour", "12 prompts in 6 groups", "L2H1",
        "mech-align patch --model toy --out 'my run'", "1 of 12 cells", "sha: 1f",
    ):  # fmt: skip
        assert text in words, text
    assert words.index("restores") < words.index("Head patching".lower()) or words.index("restores") < words.index(
        "Which attention heads"
    )


def test_report_is_accessible(page: tuple[str, Page]) -> None:
    tags = page[1].tags
    assert next(attrs["lang"] for tag, attrs in tags if tag == "html") == "en"
    plots = [attrs for _, attrs in tags if "data-figure" in attrs]
    assert plots and all(attrs["role"] == "img" and "Strongest: L2H1" in str(attrs["aria-label"]) for attrs in plots)
    assert all("scope" in attrs for tag, attrs in tags if tag == "th")
    assert any(tag == "button" for tag, _ in tags) and any(attrs.get("class") == "skip" for _, attrs in tags)
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = {str(attrs["href"])[1:] for tag, attrs in tags if tag == "a"}
    assert links <= set(ids)


def test_prompts_only_when_asked(tmp_path: Path, page: tuple[str, Page]) -> None:
    assert SECRET not in page[0]
    run = finished(tmp_path / "run", examples=[SECRET])
    text = run.write_report(prompts=[{"clean": SECRET, "corrupt": "<i>x</i>"}]).read_text(encoding="utf-8")
    assert SECRET in text and "<i>x</i>" not in text


def test_tokens_of_prompts_only_when_asked(tmp_path: Path) -> None:
    base = result("causal_tracing").values.rename(head="position")
    named = base.assign_coords(position=["-4 Explain", "-3 Ġhow2~", "-2 Ġpadlock2", "last"])
    traced = Result(named, "causal_tracing", "logits", "", {})
    run = opened(tmp_path / "run")
    run.add_result("causal_tracing", traced)
    text = run.write_report().read_text(encoding="utf-8")
    assert "padlock2" not in text and "how2~" not in text and "@-3" in text and "@last" in text
    assert "how2~" in str(run.table("causal_tracing")["position"].tolist()), "the table is data and keeps them"
    run.add_result("causal_tracing", traced, tokens=True)
    assert "how2~" in run.write_report().read_text(encoding="utf-8")


def test_random_controls_do_not_fill_the_table(tmp_path: Path) -> None:
    values = np.full((12, 22), 0.9)
    values[:, 0] = 0.3
    kinds = ["found", *["control"] * 21]
    coords = {"cell": ["L2H1", *(f"control {i:02d}" for i in range(21))], "kind": ("cell", kinds)}
    data = xr.Dataset({"effect": (("prompt", "cell"), values)}, coords=coords)
    run = opened(tmp_path / "run")
    run.add_result("mean_ablation", Result(data, "mean_ablation", "logits", "", {}))
    text = run.write_report().read_text(encoding="utf-8")
    assert '<th scope="row">L2H1</th>' in text and '<th scope="row">control' not in text


def test_report_without_results_and_with_unfinished_steps(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt), run.step("patch"):
        raise KeyboardInterrupt
    text = run.write_report().read_text(encoding="utf-8")
    assert "makes no claim" in text and "step patch is interrupted" in text
    assert len(text) < 100_000, "no plotly.js without figures"


def test_own_figures_are_kept_under_their_names(tmp_path: Path) -> None:
    from mech_align import plots

    run = opened(tmp_path / "run")
    mean = run.add_result(
        "heads", result(), figures={"heads_map": plots.heatmap(result()), "heads_list": plots.ranked(result())}
    )
    assert mean.has_statistics
    assert sorted(p.name for p in (run.path / "figures").iterdir()) == ["heads_list.json", "heads_map.json"]
    run.add_result("second", result())
    assert (run.path / "figures" / "second.json").exists(), "pictures are named after the entry, not after the analysis"
    assert 'data-figure="figure-heads_list"' in run.write_report().read_text(encoding="utf-8")


def test_a_figure_file_cannot_leave_its_data_block(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    file = run.path / "figures" / "head_patching.json"
    figure = {**json.loads(file.read_text(encoding="utf-8")), "note": "</script><script>alert(2)</script><!--"}
    file.write_text(json.dumps(figure), encoding="utf-8")
    text = run.write_report().read_text(encoding="utf-8")
    assert "<script>alert(2)" not in text
    data = next(text for _, attrs, text in Page(text).raw if attrs.get("id") == "figure-head_patching")
    assert json.loads(data) == figure


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "+0.500"), (-0.0123, "−0.012"), (123.4, "+123"), (5.27, "+5.27"), (None, "–"), (float("nan"), "–"), (12,
        "12"),
        ("2 of 2", "2 of 2"),
    ],
)  # fmt: skip
def test_numbers(value: Any, text: str) -> None:
    assert show_number(value) == text


def test_p_values_and_intervals() -> None:
    assert [show_p(p) for p in (0.0, 0.0312, 0.4, float("nan"))] == ["< 0.001", "0.031", "0.40", "–"]
    assert show_interval((0.1, -0.2)) == "[+0.100, −0.200]" and show_interval(None) == "–"
    assert show_interval([float("nan")] * 2) == "–"
