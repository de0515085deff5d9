#!/usr/bin/env bash
# Runs unit, integration and the other tests beside each other: much of them waits for processes. Each has its report.
# Arguments go to pytest.
set -uo pipefail
cd "$(dirname "$0")/.."
reports=$(mktemp -d)
beside=()
trap 'kill "${beside[@]}" 2>/dev/null; rm -rf "$reports"' EXIT
for part in unit integration; do
    .venv/bin/python -m pytest "$@" "tests/$part" >"$reports/$part" 2>&1 &
    beside+=($!)
done
# The machine of faults comes last, when it has the cores to itself.
.venv/bin/python -m pytest "$@" tests/e2e tests/journeys tests/chaos
failed=$?
for part in "${beside[@]}"; do
    wait "$part" || failed=1
done
cat "$reports"/*
exit $failed
