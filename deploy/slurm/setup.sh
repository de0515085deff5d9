# Sourced on every node before `ops worker` starts there (OPS_SLURM_SETUP): make it one that runs.
# module load python/3.12 cuda
export PATH=/shared/relight/venv/bin:$PATH
export OPS_USER_CODE=1   # commands and workloads of its users; they run as the user of the job
# export OPS_WORKER_URL=https://…   # only where the API does not reach a node by the address that it calls from
