# make demo: everything from drawings to mAP on this machine.  make test: checks and the whole suite.
# Both make .venv first if it is not there. PYTHON=... picks another Python (3.10 or later).
PYTHON ?= python3
BIN := .venv/bin
RUNS ?= runs/demo

.PHONY: install demo check test chaos clean

install: .venv/installed

.venv/installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" bash demo.sh $(RUNS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy schematics cluster pretraining simclr vicreg detection
	$(BIN)/mypy evaluate/*.py
	$(BIN)/mypy slurm/*.py

# Strikes runs by faults on a real two-node Slurm on this machine (slurm-wlm, munge, root); half an hour or more.
chaos: install
	$(BIN)/python tests/faults/chaos.py

test: check
	$(BIN)/python -m pytest tests

clean:
	rm -rf .venv *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
