#!/usr/bin/env bash
# Runs unit, integration and the other tests beside each other, in three groups that take about as long: much of them
# waits for processes. Each has its report.
# Arguments go to pytest.
set -uo pipefail
cd "$(dirname "$0")/.."
# Some hundred processes are started, which need not compile all of ours each time.
unset PYTHONDONTWRITEBYTECODE
reports=$(mktemp -d)
pids=()
trap 'kill "${pids[@]}" 2>/dev/null; rm -rf "$reports"' EXIT
beside() {
    .venv/bin/python -m pytest "${@:2}" >"$reports/$1" 2>&1 &
    pids+=($!)
}
beside unit "$@" tests/unit
# The store's machine is long in test-all, and the last group too.
machine=tests/integration/test_store_machine.py
beside integration "$@" tests/integration/test_[a-r]*.py tests/integration/test_s[a-m]*.py $machine
# The machine of faults comes last, when it has the cores to itself.
.venv/bin/python -m pytest "$@" --deselect $machine tests/integration/test_s[n-z]*.py tests/integration/test_[t-z]*.py tests/e2e tests/journeys tests/chaos
failed=$?
for pid in "${pids[@]}"; do
    wait "$pid" || failed=1
done
cat "$reports"/*
exit $failed
