"""The package's front door: cheap to open, every name behind it there, a wrong name answered helpfully."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mech_align

SOURCE = Path(mech_align.__file__)
HEAVY = ("torch", "transformers", "transformer_lens", "sae_lens", "numpy", "pandas", "plotly")


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_loads_nothing_heavy():
    loaded = run_python(f"import sys, mech_align; dir(mech_align); print([m for m in {HEAVY} if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_the_check_above_would_see_a_heavy_import():
    loaded = run_python(f"import sys, numpy, mech_align; print([m for m in {HEAVY} if m in sys.modules])")
    assert loaded.strip() == "['numpy']"


def test_saved_results_open_without_torch():
    code = "import sys, mech_align as ma; ma.load_result, ma.Result, ma.heatmap, ma.ranked; import mech_align.runs"
    loaded = run_python(f"{code}; print([m for m in {HEAVY[:4]} if m in sys.modules])")
    assert loaded.strip() == "[]"


@pytest.mark.parametrize("name", sorted(mech_align.__all__))
def test_every_public_name_is_there(name: str):
    assert getattr(mech_align, name) is not None
    assert name in dir(mech_align)


def test_type_checkers_and_users_see_the_same_names():
    tree = ast.parse(SOURCE.read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    typed = {alias.asname: str(node.module).removeprefix("mech_align.") for node in imports for alias in node.names}
    assert typed == mech_align._HOMES | dict.fromkeys(mech_align._ROOMS, "mech_align")


@pytest.mark.parametrize(("wrong", "right"), [("load_modle", "load_model"), ("head_patch", "head_patching")])
def test_a_wrong_name_is_answered_with_near_ones(wrong: str, right: str):
    with pytest.raises(AttributeError, match=rf"no attribute '{wrong}'; did you mean .*{right}"):
        getattr(mech_align, wrong)


def test_a_name_near_nothing_lists_all():
    with pytest.raises(AttributeError, match="it offers .*head_patching.*load_model"):
        mech_align.zzzzzz
