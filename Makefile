# `make run`: everything on the embedded default.  `make test`: everything that must hold.  Both set themselves up.
PYTHON ?= python3
BIN := .venv/bin
export DO_NOT_TRACK = true
export KEDRO_DISABLE_TELEMETRY = true
export MLFLOW_DISABLE_TELEMETRY = true

.PHONY: install run test lint bench format clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

run: install
	$(BIN)/kedro run

test: install lint
	$(BIN)/pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python benchmarks/read.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/kmeans.py
	$(BIN)/python benchmarks/pca.py
	$(BIN)/python benchmarks/probe.py
	$(BIN)/python benchmarks/tracking.py

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	find data -mindepth 2 ! -name .gitkeep -delete
	rm -rf data/.fingerprints mlflow.db .mlflow.db.* mlruns
