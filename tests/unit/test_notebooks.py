"""Notebook and script of a jupytext pair say the same. `make notebooks` runs them."""

from pathlib import Path

import jupytext
import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
PAIRS = sorted({path.stem for path in FOLDER.glob("*.ipynb")} | {path.stem for path in FOLDER.glob("*.py")})


@pytest.mark.parametrize("name", PAIRS)
def test_pair_is_in_step(name: str):
    notebook, script = (jupytext.read(FOLDER / f"{name}{ending}") for ending in (".ipynb", ".py"))
    cells = [[(cell.cell_type, cell.source.strip()) for cell in side.cells] for side in (notebook, script)]
    assert cells[0] == cells[1], f"jupytext --sync notebooks/{name}.py"


@pytest.mark.parametrize("name", PAIRS)
def test_no_notebook_carries_more_than_a_megabyte(name: str):
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 2**20
