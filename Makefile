# Two commands on a fresh machine: `make demo` and `make test`. Both build .venv from the pins on first use.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test lint types bench clean help

help:            ## list the targets
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */\1\t/'

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/cuda/*)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned environment into $(VENV) (about two minutes, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch torchvision
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(STAMP)   ## decompose the bundled model on scenes it draws; panels in out/demo
	@$(BIN)/clipfast demo --out out/demo

test: $(STAMP)   ## run the tests, a process per core, each with whole files
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile -p no:benchmark

lint: $(STAMP)   ## ruff: style and imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .

types: $(STAMP)  ## mypy --strict over the package
	@$(BIN)/mypy

bench: $(STAMP)  ## benchmarks on this machine; JSON in benchmarks/results
	@$(BIN)/python -m pytest benchmarks --benchmark-only

clean:           ## remove what the targets made
	rm -rf $(VENV) out build dist *.egg-info kernels/_native* kernels/_cuda*
