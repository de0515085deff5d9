# `make demo` and `make test` are all that a fresh machine with Python 3.11 or newer needs.
BIN := .venv/bin
TEST := $(BIN)/python -m pytest

.PHONY: help setup demo up lint test test-all bench chaos constraints

help:
	@echo "make demo      a training is killed, goes on elsewhere, and is compared bit for bit (about 2 minutes)"
	@echo "make up        the whole service: database, API, worker"
	@echo "make test      lint and tests, at most 10 minutes"
	@echo "make test-all  everything, at most 60 minutes"
	@echo "make chaos     real kills, then a check of the whole history; SEED=… and FAULTS=… choose the schedule"

setup:
	@deploy/setup.sh

demo: setup
	@$(BIN)/ops demo

up: setup
	@$(BIN)/ops up

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# `alembic check` wants a database: tests/integration/test_schema.py runs it.
test: lint
	$(TEST) -m "not slow and not gpu" tests

test-all: lint
	$(TEST) -m "not gpu" tests

# SEED=… plays a schedule of faults again, FAULTS=… makes it longer.
chaos: setup
	$(TEST) -s --timeout 3600 tests/chaos

bench: setup
	$(BIN)/python benchmarks/checkpoint_stall.py

constraints:
	deploy/constraints.sh 2.13.0
