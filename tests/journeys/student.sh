#!/usr/bin/env bash
# A student's first afternoon: the commands of docs/tutorial.md, one block after the other, in an empty HOME.
# usage: student.sh BIN DIRECTORY: where `ops` and `python` are, and an empty directory to work in.
set -euo pipefail
bin=$(realpath "$1") root=$(realpath "$2")
tutorial=$(realpath "$(dirname "$0")/../../docs/tutorial.md")
mkdir -p "$root/home" "$root/project" "$root/blocks"
export HOME=$root/home PATH=$bin:$PATH PYTHONUNBUFFERED=1
unset XDG_DATA_HOME XDG_CONFIG_HOME XDG_STATE_HOME ${!OPS_*}
cd "$root/project"

fail() { echo "student.sh: $*" >&2; exit 1; }

# The blocks as files, in their order: 1.sh, 2.python, 3.sh, …
awk -v to="$root/blocks" '/^```$/ {file = ""} file {print >file} /^```[a-z]/ {file = to "/" ++n "." substr($0, 4)}' "$tutorial"
shell=("$root"/blocks/*.sh)
[ ${#shell[@]} -eq 8 ] || fail "the tutorial has ${#shell[@]} blocks of commands, and this knows 8"
id= pid=

block() { # number: runs it as it is written, with the reader's ID and PID
    echo "--- $1"
    sed -E "s/\bPID\b/$pid/g; s/\bID\b/$id/g" "$root/blocks/$1.sh" | tee "$root/now.sh"
    bash -euo pipefail "$root/now.sh" | tee "$root/said" || fail "a command of block $1 failed"
}

until_true() { # seconds command…: what the student looks at until it is so
    local end=$((SECONDS + $1))
    until "${@:2}" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || fail "it did not come to this: ${*:2}"
        sleep 0.2
    done
}

of() { python -c "import json, sys; it = json.load(sys.stdin); print($1)"; }
status() { ops status "$id" --json | of 'it["status"]'; }
is() { [ "$(status)" = "$1" ]; }
saved() { [ "$(ops checkpoints list "$id" --json | of "sum(c['attempt'] == $1 and c['step'] > 0 for c in it)")" -gt 0 ]; }
every_value() { for name in loss accuracy learning_rate epoch; do ops metrics "$1" "$name" --json | of 'it[0]["points"]'; done; }

setsid bash -c 'exec $(cat "$1")' up "$root/blocks/1.sh" >"$root/up.log" 2>&1 &
up=$!
trap 'kill $up 2>/dev/null; wait $up || true; [ ${done_:-0} = 1 ] || tail -n 40 "$root/up.log" >&2' EXIT
until_true 120 ops list

cp "$root/blocks/2.python" train.py
[ "$(wc -l <train.py)" -le 65 ] || fail "train.py has more than some 60 lines"
block 3
id=$(grep -oE '[0-9a-f]{8}-[0-9a-f-]{27}' "$root/said" | head -1 | cut -c1-8)
[ -n "$id" ] || fail "ops run named no id"
until_true 120 saved 1
block 4
pid=$(ops attempts "$id" --json | of 'it[-1]["trainer_pid"]')
block 5
echo "raise SystemExit('this is not what was sent')" >train.py
until_true 60 saved 2
block 6
grep -q 'attempt 2 began' "$root/said" || fail "ops events does not tell of the second attempt"
block 7
until_true 60 is cancelled
block 8
is completed || fail "it is $(status)"
block 9
[ -s loss.png ] || fail "nothing was drawn"

# Beside the tutorial: is it true what it says?
cp "$root/blocks/2.python" train.py
undisturbed=$(ops run --json -- python train.py | of 'it["id"]')
ops watch "$undisturbed"
ops download "$undisturbed" --to undisturbed
[ "$(every_value "$id")" = "$(every_value "$undisturbed")" ] || fail "the curves differ"
cmp out/model.safetensors undisturbed/model.safetensors || fail "the weights differ"
[ "$(ops metrics "$id" loss --json | of 'len(it[0]["points"])')" -eq 1880 ] || fail "some step is missing, or there twice"
python -c "from safetensors.torch import load_file; assert len(load_file('out/model.safetensors')) > 5"
done_=1
echo "The student went home content."
