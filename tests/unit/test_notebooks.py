"""Notebooks as they are committed: twins in step, nothing stored in them, no logic, a kernelspec that every tool reads.

That they run is seen by `make notebooks`.
"""

import ast
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LOGIC = (
    ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.For, ast.While, ast.If, ast.With, ast.Try,
)  # fmt: skip

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def cells(notebook: Any) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def code(notebook: Any) -> list[ast.Module]:
    return [ast.parse(source) for kind, source in cells(notebook) if kind == "code"]


def test_every_notebook_has_its_twin():
    assert [path.stem for path in NOTEBOOKS] == sorted(path.stem for path in FOLDER.glob("*.py"))
    assert {"01_quickstart", "02_tracing_and_attribution", "03_dla_and_logit_lens"} <= {path.stem for path in NOTEBOOKS}


@each_notebook
def test_twins_say_the_same(path: Path):
    script = jupytext.read(path.with_suffix(".py"))
    assert cells(script) == cells(read(path)), f"jupytext --sync {path.with_suffix('.py')}"


@each_notebook
def test_the_pairing_and_the_kernel_stand_in_both(path: Path):
    script = jupytext.read(path.with_suffix(".py"))
    for metadata in (read(path).metadata, script.metadata):
        assert metadata["jupytext"]["formats"] == "ipynb,py:percent"
        # papermill refuses a kernelspec without a language
        assert metadata["kernelspec"] == {"display_name": "Python 3", "language": "python", "name": "python3"}


@each_notebook
def test_nothing_that_a_run_leaves_is_stored(path: Path):
    # Outputs hold prompts, paths of somebody's machine and megabytes of figures.
    for cell in read(path).cells:
        assert not cell.get("outputs") and not cell.get("attachments")
        assert cell.get("execution_count") is None
        assert not cell.metadata


@each_notebook
def test_it_is_a_valid_notebook(path: Path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


@each_notebook
def test_there_is_no_logic_in_it(path: Path):
    for tree in code(read(path)):
        assert not [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, LOGIC)]


@each_notebook
def test_only_public_names_are_used(path: Path):
    for tree in code(read(path)):
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert not node.attr.startswith("_")
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] == "mech_align"
                assert not any(alias.name.startswith("_") for alias in node.names)
            if isinstance(node, ast.Import):
                assert {alias.name for alias in node.names} <= {"mech_align", "pandas"}


@each_notebook
def test_it_works_in_a_fresh_clone_without_a_network(path: Path):
    """Models and pairs come with the package: no hub name, no path."""
    loaders = {"load_model": "organism:", "load_pairs": None, "load_prompts": None}
    seen: list[str] = []
    for tree in code(read(path)):
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
            if name not in loaders:
                continue
            seen.append(name)
            source = call.args[0]
            if loaders[name]:
                assert isinstance(source, ast.Constant) and str(source.value).startswith("organism:")
            else:
                assert isinstance(source, ast.Call) and ast.unparse(source.func).startswith("organism_")
    assert {"load_model", "load_pairs"} <= set(seen)
