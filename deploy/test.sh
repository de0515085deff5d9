#!/usr/bin/env bash
# Runs the unit tests beside the others, which mostly wait for processes; each half has its report. Arguments go to pytest.
set -uo pipefail
cd "$(dirname "$0")/.."
report=$(mktemp)
.venv/bin/python -m pytest "$@" tests/unit >"$report" 2>&1 &
units=$!
trap 'kill $units 2>/dev/null; rm -f "$report"' EXIT
# The machine of faults comes last, when it has the cores to itself.
.venv/bin/python -m pytest "$@" tests/integration tests/e2e tests/chaos
others_failed=$?
wait $units
units_failed=$?
cat "$report"
exit $((others_failed || units_failed))
