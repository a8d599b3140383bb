# `make run`: everything on the embedded default.  `make test`: everything that must hold.  Both set themselves up.
PYTHON ?= python3
BIN := .venv/bin
export DO_NOT_TRACK = true
export KEDRO_DISABLE_TELEMETRY = true
export MLFLOW_DISABLE_TELEMETRY = true
export NO_MKDOCS_2_WARNING = 1

.PHONY: install run test test-fast settings lint docs bench gpu-bundle format clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; now = sys.version_info[:2]; (3, 11) <= now < (3, 14) or sys.exit("$(PYTHON) is Python %d.%d; wanted 3.11 to 3.13: name one, as in make $(MAKECMDGOALS) PYTHON=python3.12" % now)'
	@echo "Installing what Assay needs into .venv, some gigabytes: this takes minutes."
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

run: install
	$(BIN)/kedro run

# A process takes a file, whose tests share what they have made. A thread that waits does not
# spin, and rewritten tests are kept: that takes half of the time of short tests.
PYTEST := OMP_NUM_THREADS=1 GOMP_SPINCOUNT=0 PYTHONDONTWRITEBYTECODE= $(BIN)/pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder

test: install lint
	$(PYTEST)

# Without whole runs, killed processes and drawn inputs: a minute and a half on two cores.
test-fast: install
	$(PYTEST) -m "not e2e and not crash and not property"

# The numerics' tests under whatever a process may set torch to.
settings: install
	for setting in float64 bfloat16 autocast inference deterministic medium 1-thread 4-threads; do \
		echo $$setting; TORCH_SETTING=$$setting $(BIN)/pytest -q tests/numerics || exit 1; done

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/typos

# The site, into build/site-docs; a warning is an error.
docs: install
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --strict

bench: run
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python benchmarks/read.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/kmeans.py
	$(BIN)/python benchmarks/pca.py
	$(BIN)/python benchmarks/stage_rates.py
	$(BIN)/python benchmarks/probe.py
	$(BIN)/python benchmarks/tracking.py

# What has to travel, with the repository, to a GPU machine without a network: docs/benchmarks.md says what to run there.
gpu-bundle: install
	$(BIN)/python benchmarks/gpu/bundle.py --to build/gpu

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	find data -mindepth 2 ! -name .gitkeep -delete
	rm -rf data/.fingerprints data/.locks mlflow.db .mlflow.db.* mlruns
