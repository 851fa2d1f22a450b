"""The project files agree with each other."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
EXTRAS = PROJECT["optional-dependencies"]
PINNED_EXTRAS = ("dev", "docs", "export", "widget")


@pytest.mark.parametrize(
    "wanted", [*PROJECT["dependencies"], *(text for extra in PINNED_EXTRAS for text in EXTRAS[extra])]
)
def test_every_requirement_is_pinned_inside_its_range(wanted: str):
    requirement = Requirement(wanted)
    pin = PINS[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pin, prereleases=True), f"{wanted} is pinned to {pin}"


def test_no_pin_names_a_cuda_package_or_a_local_build():
    assert not [name for name in PINS if name.startswith(("nvidia", "triton"))]
    assert not [pin for pin in PINS.values() if "+" in pin]


def test_ci_calls_targets_that_the_makefile_has():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = re.search(r"for target in (.+); do", (ROOT / ".ci" / "run").read_text())
    assert called and {"test", "lint", "types", "layers", "notebooks", "docs"} <= set(called[1].split()) <= targets
    assert {"install", "demo", "check", "bench"} <= targets


def test_every_analysis_has_a_page():
    analyses = {path.stem for path in (ROOT / "mech_align" / "analyses").glob("[a-z]*.py")}
    pages = {path.stem for path in (ROOT / "docs" / "methods").glob("*.md")}
    assert analyses <= pages, f"no docs/methods page for {sorted(analyses - pages)}"
