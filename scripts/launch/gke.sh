#!/usr/bin/env bash
# Starts a run on TPU slices of a Google Kubernetes Engine cluster with xpk (https://github.com/AI-Hypercomputer/xpk).
#
#   scripts/launch/gke.sh [--dry_run] NAME CLUSTER TYPE IMAGE train --gin_file=... --gin.MODEL_DIR=gs://...
#
# for example  scripts/launch/gke.sh upcycle-base my-cluster v4-128 gcr.io/PROJECT/upcycle:latest train ...
# IMAGE is a container image with upcycle[tpu]. Environment:
#   SLICES    number of slices joined by the data-centre network (1)
#   RESTARTS  largest number of restarts (100); a restarted run resumes from its last checkpoint
#   XPK_ARGS  further options of xpk
# A run is restarted after status 69 (no answer) and 75 (preempted and saved), with the pauses of Kubernetes, never after 2 (a
# mistake). Written from xpk's documentation and tested only against a stand-in for xpk.
set -euo pipefail

dry_run=false
if [[ "${1:-}" == --dry_run ]]; then dry_run=true; shift; fi
if [[ $# -lt 5 ]]; then
  echo "usage: $0 [--dry_run] NAME CLUSTER TYPE IMAGE train --gin_file=... --gin.MODEL_DIR=gs://..." >&2
  exit 2
fi
name=$1 cluster=$2 type=$3 image=$4
shift 4
read -ra more <<< "${XPK_ARGS:-}"
command=(
  xpk workload create "--workload=$name" "--cluster=$cluster" "--tpu-type=$type" "--num-slices=${SLICES:-1}"
  "--docker-image=$image" "--max-restarts=${RESTARTS:-100}" "--restart-on-exit-codes=69,75" "${more[@]}"
  "--command=upcycle $(printf '%q ' "$@")--distributed"
)
if $dry_run; then
  printf '%q ' "${command[@]}"
  echo
else
  "${command[@]}"
fi
