#!/usr/bin/env bash
# Branch coverage of the packages by the quick tests, with the processes that they start; one that is killed writes nothing
# down, so that agents and trainers show less than is run. The machine of faults is left out: traced, it is too slow for its
# leases of a few seconds. Pages with each line: build/coverage/html. Arguments go to pytest.
set -uo pipefail
cd "$(dirname "$0")/.."
rm -rf build/coverage
mkdir -p build/coverage
export COVERAGE_PROCESS_START=$PWD/pyproject.toml COVERAGE_FILE=$PWD/build/coverage/data
[ $# -gt 0 ] || set -- -m "not slow and not gpu"
deploy/test.sh --deselect tests/chaos/test_chaos.py "$@"
failed=$?
unset COVERAGE_PROCESS_START
.venv/bin/python -m coverage combine --quiet
.venv/bin/python -m coverage html --quiet --directory build/coverage/html
.venv/bin/python -m coverage report
exit $failed
