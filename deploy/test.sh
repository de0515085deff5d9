#!/usr/bin/env bash
# Runs the tests of the parts beside those of the whole service, which mostly wait for processes; each half has its report.
# Arguments go to pytest.
set -uo pipefail
cd "$(dirname "$0")/.."
report=$(mktemp)
.venv/bin/python -m pytest "$@" tests/unit tests/integration >"$report" 2>&1 &
parts=$!
trap 'kill $parts 2>/dev/null; rm -f "$report"' EXIT
# The machine of faults comes last, when it has the cores to itself.
.venv/bin/python -m pytest "$@" tests/e2e tests/journeys tests/chaos
whole_failed=$?
wait $parts
parts_failed=$?
cat "$report"
exit $((whole_failed || parts_failed))
