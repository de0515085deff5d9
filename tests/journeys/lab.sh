#!/usr/bin/env bash
# An administrator's first hour with Slurm: the commands of docs/slurm.md, on a cluster of two nodes that is this host.
. "$(dirname "$0")/journey.sh"
mkfifo "$root/cluster"
python "$repository/tests/helpers/slurm.py" <"$root/cluster" >"$root/slurm.env" 2>"$root/slurm.log" &
exec 9>"$root/cluster"
until_true 60 grep -q SLURM_CONF "$root/slurm.env"
. "$root/slurm.env"
port=$(python -c 'from ops_cli.up import free_port; print(free_port())')
mkdir "$root/shared"
fill() {
    sed -e "s#/shared/venv/bin#$bin#; s#/shared#$root/shared#g; s#login.example.org:8470#127.0.0.1:$port#" \
        -e "s#--port 8470#--port $port#; s#0\.0\.0\.0#127.0.0.1#; s#\b3b9b\b#$id#"
}
end() {
    local code=$?
    ops down >/dev/null 2>&1 || true
    exec 9>&- # the cluster ends with its stdin
    wait
    [ $code = 0 ] || cat "$root/said" >&2
    exit $code
}
trap end EXIT
runs_on() { ops attempts "$id" --json | of "it[-1]['worker'].startswith('slurm-') and len(it) == $1" | grep -q True; }

page "$repository/docs/slurm.md"
next_block # a cluster, the service, a token
[ "$(stat -c %a "$root/shared/relight-token")" = 600 ] || fail "others may read the token"
next_block # the setup
next_block # the settings
grep -q 'Slurm: .*low' "$root/said" || fail "ops doctor says nothing of Slurm"
next_block # a training
id=$(said_id)
waits() { ops status "$id" | grep -qE 'Slurm job [0-9]+: (PENDING|RUNNING)'; }
until_true 60 waits
next_block # what it waits for
until_true 120 runs_on 1
until_true 120 saved 1
next_block # its job is taken away
until_true 120 runs_on 2
next_block # and it goes on
is completed || fail "it is not completed"
grep -q 'was handed back by slurm-' "$root/said" || fail "ops events does not tell that it was handed back"
grep -q 'has ended: CANCELLED' "$root/said" || fail "ops events does not tell of Slurm's job"
no_block_is_left
echo "The administrator goes to lunch."
