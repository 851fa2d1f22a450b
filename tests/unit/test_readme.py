"""The README's example does what the README says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_example_runs_and_finds_the_planted_heads(tmp_path: Path):
    example, pairs = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", example + pairs], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ranked = re.findall(r"^\d +(L\d+H\d+) ", done.stdout, re.MULTILINE)
    assert set(ranked[:2]) == {"L4H1", "L4H5"}
    assert (tmp_path / "heads.html").exists() and (tmp_path / "heads" / "values.npz").exists()


def test_files_that_the_readme_links_to_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        if target != "docs/images/heatmap.png":  # drawn from a finished demo
            assert (ROOT / target).exists(), target
