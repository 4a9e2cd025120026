#!/usr/bin/env bash
# A run on TPU slices of a Google Kubernetes Engine cluster, by xpk (https://github.com/AI-Hypercomputer/xpk).
#
#   scripts/launch/gke.sh [--dry_run] NAME CLUSTER TYPE IMAGE train --gin_file=... --gin.MODEL_DIR=gs://...
#
# such as  scripts/launch/gke.sh upcycle-base my-cluster v4-128 gcr.io/PROJECT/upcycle:latest train ...
# IMAGE is a container image with upcycle[tpu] in it. Environment: SLICES, slices joined by the data-centre network (1); RESTARTS, how
# often a run that was cut off is started again (100): it goes on from its last checkpoint; XPK_ARGS, more options of xpk.
# Restarted after status 69 (no answer) and 75 (told to stop, and saved), with the pauses of Kubernetes, never after 2 (a mistake). Written from xpk's documentation, and run against a stand-in for xpk only.
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
