"""What README and docs show can be typed."""

import re
import shlex
from pathlib import Path

import pytest
import tyro

from mech_align.cli.commands import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINES = sorted({line for page in PAGES for line in re.findall(r"^mech-align .+$", page.read_text(), re.MULTILINE)})


def parse(line: str) -> object:
    words = shlex.split(line)[1:]
    name = next(name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS)
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
    return tyro.cli(COMMANDS[name].load_options(), args=words[len(name.split()) :], config=config)


@pytest.mark.parametrize("line", LINES)
def test_shown_commands_have_these_options(line: str):
    assert parse(line)


def test_an_option_that_is_not_there_would_be_seen():
    with pytest.raises(SystemExit):
        parse("mech-align patch --model gpt2 --pairs p.jsonl --component heads")


def test_every_command_is_shown():
    page = (ROOT / "docs" / "command_line.md").read_text()
    for name in COMMANDS:
        first, *rest = name.split()
        assert f"`mech-align {first}" in page and all(f"{word}`" in page for word in rest), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_are_python(page: Path):
    for example in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        assert compile(example, str(page), "exec").co_names, "an example that does nothing"
