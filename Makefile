# `make demo` goes from drawings to mAP on this machine, `make test` runs the checks and the whole suite,
# `make chaos` strikes runs by faults, `make bench` races against peers, and `make gpu` tries what is claimed on a
# machine with GPUs. Each makes .venv first if it is not there or its list of packages changed.
# PYTHON=... picks another Python (3.10 or later), RUNS=... another folder for the demo.
PYTHON ?= python3
BIN := .venv/bin
RUNS ?= runs/demo
# mypy takes a package with those inside it, so it is given the outer ones of the one list in pyproject.toml.
PACKAGES = $(shell PYTHONPATH=. $(BIN)/python -c \
	'from cluster import snapshot; print(*(name for name in snapshot.packages() if "." not in name))')

.PHONY: install demo check test chaos gpu bench clean

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
	$(BIN)/mypy $(PACKAGES:%=--package %)
	$(BIN)/mypy evaluate/*.py
	$(BIN)/mypy slurm/*.py

# This needs a real two-node Slurm on this machine (slurm-wlm, munge, root) and takes hours.
chaos: install
	$(BIN)/python tests/faults/chaos.py
	$(BIN)/python tests/faults/chaos.py --parts runs --ranks 3 4 --workers 2 --faults 8

# The peers come from the extra `bench`. It takes about an hour and writes docs/benchmarks.md.
bench: install
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,bench]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps solo-learn  # of which one file is read
	$(BIN)/python benchmarks/bench.py

# One line a claim: PASS, FAIL or FIGURE.
gpu: install
	$(BIN)/python benchmarks/gpu_acceptance.py

test: check
# Each process begins with half of the tests, so that most files are in one, which sets up once what they share.
	$(BIN)/python -m pytest -n 2 --dist worksteal tests

clean:
	rm -rf .venv *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
