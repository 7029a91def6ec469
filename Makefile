# Each target makes its own virtual environment under build/ and installs what it needs.
PYTHON ?= python3
VENV := build/venv
BIN := $(VENV)/bin
TESTS ?= not slow

.PHONY: quickstart test test-fast check check-all bench docs lint format types clean

quickstart: $(VENV)/installed  ## a small encoder from text to an exported model, on the CPU
	$(BIN)/enc launch pretrain quickstart trainer.overwrite_output_dir=true
	rm -rf runs/quickstart/hf
	$(BIN)/enc ckpt export runs/quickstart
	$(BIN)/enc fill-mask runs/quickstart
	$(BIN)/enc report runs/quickstart

test: $(VENV)/installed-test  ## all tests that run in a few minutes
	$(BIN)/python -m pytest -m "$(TESTS)" -n auto --dist loadgroup --no-loadscope-reorder --durations=25

test-fast: $(VENV)/installed-test  ## the tests that start no process, in a minute or so
	$(BIN)/python -m pytest -m "not slow and not processes" -n auto -q

check: lint types test  ## what CI runs

check-all: lint types  ## the slow tests too
	$(MAKE) test TESTS="slow or not slow"

lint: $(VENV)/installed-dev  ## style and common mistakes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed-dev  ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/installed  ## the pages that are made from the code
	$(BIN)/enc config schema --markdown > docs/configuration.md
	$(BIN)/typer enc.launcher.cli.app utils docs --name enc --title "Commands" > docs/commands.md

types: $(VENV)/installed-dev  ## mypy cannot follow the package mapping by itself, so it gets a link
	mkdir -p build/typing && ln -sfn "$(CURDIR)" build/typing/enc
	MYPYPATH=build/typing $(BIN)/mypy --namespace-packages --explicit-package-bases \
	  $$($(BIN)/python -c 'import enc; print(*(f"-p enc.{room}" for room in enc.ROOMS))')

bench: $(VENV)/installed-dev  ## throughput against other tools, on this machine
	$(BIN)/python -m enc.tools.bench.preprocess
	$(BIN)/enc bench step
	$(BIN)/enc bench kernels
	$(BIN)/python -m enc.tools.bench.two_streams
	$(BIN)/python -m enc.tools.bench.save
	$(BIN)/python -m enc.tools.bench.consolidate

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@ $(VENV)/installed

$(VENV)/installed-dev: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@ $(VENV)/installed $(VENV)/installed-test

clean:
	rm -rf build *.egg-info
