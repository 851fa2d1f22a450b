# Every door of the project. `make demo` and `make test` work alone in a fresh clone.
#
#   PYTHON     the interpreter that makes .venv (default: the first of python3, python3.13 ... that is 3.11 or newer)
#   PIP_FLAGS  more options for pip, for example, on a machine without CUDA that fetches torch from PyPI:
#              make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

SHELL     := /bin/bash
PYTHON    ?=
PIP_FLAGS ?=
OUT       ?= runs/demo
WORKERS   ?= 2
BIN       := .venv/bin
STAMP     := .venv/.installed

# Two test processes with one thread each beat one with two; torch's own threads would fight over the cores.
THREADS   := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: install demo test check lint format types layers notebooks docs bench constraints clean

install: $(STAMP)

.venv/bin/python:
	@python="$(PYTHON)"; \
	if [ -z "$$python" ]; then \
	  for candidate in python3 python3.13 python3.12 python3.11; do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python="$$candidate"; break; fi; \
	  done; \
	fi; \
	if ! "$${python:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  echo "mech_align needs Python 3.11 or newer; found: $$("$${python:-python3}" --version 2>&1 || true)." >&2; \
	  echo "Install one and say which: make install PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi; \
	echo "making .venv with $$("$$python" --version)"; \
	"$$python" -m venv .venv || { rm -rf .venv; echo "python -m venv failed; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }

$(STAMP): pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev,docs,export,widget]'
	@touch $@

demo: $(STAMP)
	$(BIN)/mech-align demo --out $(OUT)
	@echo "The report: file://$(abspath $(OUT))/report.html"

test: $(STAMP)
	$(THREADS) $(BIN)/python -m pytest -q -n $(WORKERS)

check: lint types layers test

lint: $(STAMP)
	$(BIN)/ruff check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)
	$(BIN)/pyright

layers: $(STAMP)
	$(BIN)/lint-imports

notebooks: $(STAMP)
	$(THREADS) $(BIN)/python -m pytest -q -o addopts= --nbmake --nbmake-timeout=600 -n $(WORKERS) notebooks

docs: $(STAMP)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "The pages: file://$(abspath docs/_build/html)/index.html"

bench: $(STAMP)
	$(BIN)/python benchmarks/patching.py

# Writes constraints.txt anew from what is installed, restricted to what the extras in it need.
constraints: $(STAMP)
	$(BIN)/python scripts/pin.py dev docs export widget > constraints.new && mv constraints.new constraints.txt

clean:
	rm -rf build dist docs/_build .pytest_cache .ruff_cache .hypothesis .import_linter_cache
