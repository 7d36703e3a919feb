# Each target sets up what it needs, on a machine with Python 3.11 or newer and nothing else.
PYTHON ?= python3
BIN := .venv/bin
SMOKE := .venv-smoke/bin
PEERS := .venv-peers/bin
PURE := autotune/plan.py,autotune/evidence.py,autotune/search.py,autotune/account.py,autotune/alternatives.py,autotune/estimate.py,autotune/levers.py,autotune/inputs.py,autotune/batching.py,autotune/layout.py,autotune/forecast.py,autotune/shapes.py,autotune/speed.py,autotune/remaining.py,autotune/bottleneck.py,autotune/errands.py,trainer/microbatch.py,trainer/progress.py

.PHONY: help demo test check slow faults faults-full smoke bench clean
help:
	@echo "make demo    train a tiny model on real Chinese dialogues, in minutes, on a processor"
	@echo "make test    run the tests"
	@echo "make check   formatting, lint, types, import contracts, tests, coverage of the pure files"
	@echo "make slow    the tests that take minutes each, before a release"
	@echo "make faults  break the promises of docs/reliability.md on purpose; five minutes, Linux, better as root"
	@echo "make faults-full   the same as often as it says; an hour"
	@echo "make smoke   build the wheel, install it apart, plan and train with it"
	@echo "make bench   how true plans are, how fast training is, and beside what people use otherwise; 3 hours, Linux and root"

# A run of tests starts a hundred workers: what they import is compiled once, whatever the machine's habit.
unexport PYTHONDONTWRITEBYTECODE

# torch comes first and by its tested version: an open range would take the newest, with gigabytes of CUDA packages.
# Nothing is compiled by pip, which would be all 11,000 files: Python compiles the third that is imported.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile -c constraints.txt torch
	$(BIN)/pip install --quiet --no-compile -c constraints.txt -e '.[demo,dev]'
	touch $@

demo: .venv/ready
	$(BIN)/chatlm train --auto --profile tiny

test: .venv/ready
	$(BIN)/pytest

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest --cov --cov-report=
	$(BIN)/coverage report --include=$(PURE) --fail-under=100 --show-missing

# Whole plans and launches, of minutes each.
slow: .venv/ready
	$(BIN)/pytest -m slow

faults: .venv/ready
	$(BIN)/pytest tests/faults -rP --numprocesses=2

# An hour on two cores.
faults-full: .venv/ready
	CHATLM_FAULTS=full $(BIN)/pytest tests/faults -rP --numprocesses=2

smoke: .venv/ready
	rm -rf dist .venv-smoke
	$(BIN)/python -m build --wheel --no-isolation
	$(PYTHON) -m venv .venv-smoke
	$(SMOKE)/pip install --quiet --no-compile -c constraints.txt torch
	$(SMOKE)/pip install --quiet --no-compile -c constraints.txt "$$(ls dist/*.whl)[demo]"
	PATH="$(CURDIR)/$(SMOKE):$$PATH" tests/smoke.sh

# The peers live apart: lightning, trl and datasets are no dependencies of ours.
.venv-peers/ready: constraints.txt
	$(PYTHON) -m venv .venv-peers
	$(PEERS)/pip install --quiet --no-compile -c constraints.txt torch
	$(PEERS)/pip install --quiet --no-compile -c constraints.txt lightning accelerate transformers trl duckdb
	touch $@

bench: .venv/ready .venv-peers/ready
	$(BIN)/python benchmarks/plan.py
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python benchmarks/train.py
	$(if $(CHATLM_REAL_DATA),$(BIN)/python benchmarks/epochs.py)
	$(if $(CHATLM_REAL_DATA),$(BIN)/python benchmarks/data.py)
	$(BIN)/python benchmarks/sample.py
	$(BIN)/python benchmarks/monitor.py
	$(BIN)/python benchmarks/report.py

clean:
	rm -rf .venv .venv-peers .venv-smoke build dist
