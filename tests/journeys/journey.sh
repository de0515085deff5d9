# What journeys share: each runs the commands of a page, block after block, as they are written, in an empty HOME.
# Sourced with: BIN DIRECTORY, where `ops` and `python` are, and an empty directory to work in.
set -euo pipefail
shopt -s expand_aliases
bin=$(realpath "$1") root=$(realpath "$2")
repository=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../..")
mkdir -p "$root/home" "$root/project" "$root/blocks"
export HOME=$root/home PATH=$bin:$PATH PYTHONUNBUFFERED=1
unset XDG_DATA_HOME XDG_CONFIG_HOME XDG_STATE_HOME ${!OPS_*}
cd "$root/project"
trap leave EXIT
number=0 up='' id=''

fail() { echo "${0##*/}: $*" >&2; exit 1; }

page() { # FILE: whose blocks are run from now on
    python "$repository/tests/helpers/documents.py" "$1" "$root/blocks"
}

fill() { cat; } # what stands in a block for a reader's own; a journey says which

next_block() { # runs it in this shell: what it sets is there afterwards
    number=$((number + 1))
    fill <"$root/blocks/$number.sh" >"$root/now.sh"
    echo "--- $number"
    cat "$root/now.sh"
    . "$root/now.sh" >"$root/said" 2>&1 # a command that fails ends the journey
    cat "$root/said"
}

next_file() { # FILE: puts a block of Python there
    number=$((number + 1))
    fill <"$root/blocks/$number.python" >"$1"
}

no_block_is_left() {
    [ "$number" = "$(ls "$root/blocks" | wc -l)" ] || fail "it ran $number of the page's $(ls "$root/blocks" | wc -l) blocks"
}

serve() { # command…: the service, which ends with the journey
    setsid "$@" >"$root/up.log" 2>&1 &
    up=$!
    until_true 300 ops list
    address=$(python -c 'from relight.settings import find_server; print(find_server().url)')
}

leave() {
    local code=$?
    [ $code = 0 ] || cat "$root/said" >&2 || true
    if [ -n "$up" ]; then
        kill -- "-$up" 2>/dev/null || true
        wait "$up" || true
        [ $code = 0 ] || tail -n 40 "$root/up.log" >&2
    fi
    exit $code
}

until_true() { # seconds command…: what a person looks at until it is so
    local end=$((SECONDS + $1))
    until "${@:2}" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || fail "it did not come to this: ${*:2}"
        [ -z "$up" ] || kill -0 "$up" 2>/dev/null || fail "the service has ended"
        sleep 0.2
    done
}

said_id() { grep -oE '[0-9a-f]{8}-[0-9a-f-]{27}' "$root/said" | head -n 1 | cut -c1-8; }
of() { python -c "import json, sys; it = json.load(sys.stdin); print($1)"; }
is() { [ "$(ops status "$id" --json | of 'it["status"]')" = "$1" ]; }
saved() { [ "$(ops checkpoints list "$id" --json | of "sum(c['attempt'] == $1 and c['step'] > 0 for c in it)")" -gt 0 ]; }
