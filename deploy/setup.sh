#!/usr/bin/env bash
# Makes .venv, or leaves it alone when it is up to date. Every missing prerequisite gets one line that says what to do.
set -euo pipefail
cd "$(dirname "$0")/.."

NEEDED_KB=$((4 * 1024 * 1024))
STAMP=.venv/.installed

main() {
    local python want
    want=$(cat pyproject.toml constraints.txt deploy/setup.sh | cksum)
    if [ -x .venv/bin/python ] && [ "$(cat $STAMP 2>/dev/null)" = "$want" ] && .venv/bin/python -c '' 2>/dev/null; then
        return
    fi
    python=$(find_python)
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        stop "$python has no venv module: install it (Debian, Ubuntu: apt install python3-venv)"
    [ "$(df -Pk . | awk 'NR == 2 { print $4 }')" -ge $NEEDED_KB ] ||
        stop "this disk has less than 4 GB free, which the environment needs (torch is large): free some, or clone elsewhere"
    echo "Making .venv with $("$python" --version); torch is large, so this takes a minute or more"
    rm -f $STAMP
    "$python" -m venv --clear .venv || stop "$python cannot make a virtual environment (see above)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' 2> >(grep -v '^WARNING: Location' >&2) ||
        stop "pip could not install the dependencies (see above); with the network back, run this again"
    echo "$want" >$STAMP
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.13 python3.12 python3.11 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    stop "no Python 3.11 or newer found: install one, or name it (make PYTHON=/path/to/python3.11 …)"
}

stop() {
    echo "setup: $1" >&2
    exit 1
}

main
