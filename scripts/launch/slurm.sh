#!/usr/bin/env bash
# Starts a run on GPU nodes of a Slurm cluster, with one process per GPU.
#
#   scripts/launch/slurm.sh [--dry_run] NODES GPUS_A_NODE train --gin_file=... --gin.MODEL_DIR=/shared/...
#
# The job is requeued when it is preempted, reaches its time limit, was told to stop and has saved (status 75), or got no answer
# (status 69); it resumes from its last checkpoint. A mistake (status 2) is not retried. Output: slurm-JOB.out. Environment:
#   SBATCH_ARGS  further options of sbatch, such as '--partition=a100 --time=24:00:00'
#   VENV         a Python environment to activate on the nodes
#   TRIES        largest number of restarts (100)
#   PERIOD       seconds before the first restart (30); doubled each time, up to 16 minutes
# Written from Slurm's documentation and tested only against a stand-in for sbatch.
set -euo pipefail

dry_run=false
if [[ "${1:-}" == --dry_run ]]; then dry_run=true; shift; fi
if [[ $# -lt 3 || ! "$1" =~ ^[1-9][0-9]*$ || ! "$2" =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 [--dry_run] NODES GPUS_A_NODE train --gin_file=... --gin.MODEL_DIR=..." >&2
  exit 2
fi
nodes=$1 gpus=$2
shift 2

script=$(
  cat << END
#!/usr/bin/env bash
#SBATCH --job-name=upcycle
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$gpus
#SBATCH --gpus-per-node=$gpus
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
${VENV:+source $(printf '%q' "$VENV")/bin/activate}
# Two minutes before its time limit the job gets SIGTERM: requeue it.
trap 'scontrol requeue "\$SLURM_JOB_ID"' TERM
srun --kill-on-bad-exit=1 upcycle $(printf '%q ' "$@")--distributed &
code=0
wait \$! || code=\$?
# Preempted otherwise, such as by a cloud that removes a node, and saved; or no answer.
tries=\${SLURM_RESTART_COUNT:-0}
if [[ (\$code -eq 69 || \$code -eq 75) && \$tries -lt ${TRIES:-100} ]]; then
  pause=$((${PERIOD:-30}))
  for ((try = 0; try < tries && pause < 600; try++)); do pause=\$((2 * pause)); done
  sleep "\$pause"
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$code"
END
)
read -ra more <<< "${SBATCH_ARGS:-}"
if $dry_run; then
  printf '%q ' sbatch "${more[@]}"
  echo
  echo "$script"
else
  sbatch "${more[@]}" <<< "$script"
fi
