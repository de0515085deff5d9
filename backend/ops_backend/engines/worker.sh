#!/bin/bash
# The batch script of a job that Relight asks Slurm for: one `ops worker` on each of its nodes.
set -eu

read -r -d '' worker <<'WORKER' || true
set -eu
if [ -n "$RELIGHT_SETUP" ]; then . "$RELIGHT_SETUP"; fi
# Read here: an argument would be in `ps`, and a variable of the job in its environment on every node.
OPS_API_TOKEN=$(cat "$RELIGHT_TOKEN_FILE")
# By the address from which this node reaches the API, the API reaches this node.
if [ -z "${OPS_WORKER_BIND:-}" ]; then
    OPS_WORKER_BIND=$(python3 -c '
import os, socket, urllib.parse
url = urllib.parse.urlsplit(os.environ["OPS_API_URL"])
port = url.port or {"http": 80, "https": 443}[url.scheme]
with socket.create_connection((url.hostname, port), 10) as there:
    print(there.getsockname()[0])')
fi
OPS_WORKER_NAME=slurm-$SLURM_JOB_ID-$SLURMD_NODENAME
OPS_CPU_CORES=${SLURM_CPUS_PER_TASK:-1}
if [ -z "${CUDA_VISIBLE_DEVICES:-}" ]; then OPS_GPUS=none; fi
# On the node's own disk: a socket's path is short, and SQLite does not work on every NFS.
OPS_WORKER_STATE_DIR=$(mktemp -d "${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/relight-$SLURM_JOB_ID-XXXXXX")
export OPS_API_TOKEN OPS_WORKER_BIND OPS_WORKER_NAME OPS_CPU_CORES OPS_WORKER_STATE_DIR ${OPS_GPUS:+OPS_GPUS}
trap : TERM  # Slurm's goes to the agent itself; this shell outlives it, and clears away
code=0
ops worker || code=$?
rm -rf "$OPS_WORKER_STATE_DIR"
exit $code
WORKER

# As this process: Slurm's signals reach srun's tasks, and a shell between would end before them.
exec srun --export=ALL --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 \
    bash -c "$worker"
