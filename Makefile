# `make demo` and `make test` are all that a fresh machine with Python 3.11 or newer needs.
BIN := .venv/bin
TEST := $(BIN)/python -m pytest

.PHONY: help setup demo up lint test test-all docs bench chaos constraints

help:
	@echo "make demo      a training is killed, goes on elsewhere, and is compared bit for bit (about 2 minutes)"
	@echo "make up        the whole service: database, API, worker"
	@echo "make test      lint and tests, nine to fourteen minutes on two cores"
	@echo "make test-all  everything, an hour and a quarter on two slow cores"
	@echo "make bench     the table of docs/performance.md, measured here (about half an hour); of scale the quick form"
	@echo "make docs      the documentation as pages, in build/docs"
	@echo "make chaos     real faults, then a check of the whole history; SEED=… and FAULTS=… or MINUTES=… choose them;"
	@echo "               KILLS=… real kills of each training of the matrix of exactness, compared bit for bit"

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
	@deploy/test.sh -m "not slow and not gpu"

test-all: lint
	@deploy/test.sh -m "not gpu"

# SEED=… plays a schedule of faults again (docs/reliability.md); FAULTS=… or MINUTES=… is how long it is. KILLS=… is how often
# each of the some forty trainings that meet every two circumstances is killed (about a second each, so 20 are a quarter of
# an hour); EXACTNESS_SEED=… plays those kills again.
chaos: setup
	SEED=$(SEED) FAULTS=$(FAULTS) MINUTES=$(MINUTES) $(TEST) -s tests/chaos/test_chaos.py
	EXACTNESS_KILLS=$(KILLS) $(TEST) -s -m slow tests/unit/test_exactness_matrix.py

# Warnings are errors: what does not lead anywhere would be found by a reader.
docs: setup
	$(BIN)/python -m sphinx -W -n -q -b html docs build/docs
	@echo "build/docs/index.html"

bench: setup
	$(BIN)/python benchmarks/bench.py --into docs/performance.md
	$(BIN)/python benchmarks/energy_sampler.py
	$(BIN)/python benchmarks/measurement.py
	$(BIN)/python benchmarks/scale.py --quick

constraints:
	deploy/constraints.sh 2.13.0
