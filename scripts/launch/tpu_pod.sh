#!/usr/bin/env bash
# Starts a run on a Cloud TPU slice: requests a queued resource, waits, installs upcycle on every host, and starts the run on all.
#
#   scripts/launch/tpu_pod.sh [--dry_run] NAME TYPE ZONE train --gin_file=... --gin.MODEL_DIR=gs://...
#
# for example  scripts/launch/tpu_pod.sh upcycle-base v4-128 us-central2-b train ...   (v4-128 has 64 chips).
#
# Needs the gcloud command, logged in, with a project set. A run that ends early is restarted and resumes from its last checkpoint; a
# mistake (status 2) is not retried. Environment:
#   PACKAGE  the package that the hosts install (default: a wheel of this checkout, which is built and copied)
#   PYTHON_VERSION   on the hosts (3.12), which uv installs: that of Ubuntu 22.04, 3.10, is too old
#   PREPARE  a command that each host runs first, such as 'gcloud storage cp --recursive gs://BUCKET/shards .'
#   VERSION  the runtime image (by TYPE: v2-alpha-tpuv5 of v5p, v2-alpha-tpuv5-lite of v5e, v2-alpha-tpuv6e, tpu-ubuntu2204-base)
#   SPOT     1 requests spot capacity
#   TRIES    largest number of starts (100)
#   PERIOD   seconds before the first restart (30); doubled each time, up to 16 minutes
# The slice is kept; delete it with
#   gcloud compute tpus queued-resources delete NAME --zone=ZONE --force
# Written from Google's documentation and tested only against a stand-in for gcloud.
set -euo pipefail

dry_run=false
if [[ "${1:-}" == --dry_run ]]; then dry_run=true; shift; fi
if [[ $# -lt 4 ]]; then
  echo "usage: $0 [--dry_run] NAME TYPE ZONE train --gin_file=... --gin.MODEL_DIR=gs://..." >&2
  exit 2
fi
name=$1 type=$2 zone=$3
shift 3
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
arguments=$(printf '%q ' "$@")

run() {
  if $dry_run; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

on_all_hosts() { run gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" --worker=all "--command=$1"; }

exists() { ! $dry_run && gcloud compute tpus queued-resources describe "$name" "--zone=$zone" > /dev/null 2>&1; }

state() { gcloud compute tpus queued-resources describe "$name" "--zone=$zone" '--format=value(state.state)'; }

case "$type" in
  v5p-*) version=v2-alpha-tpuv5 ;;
  v5litepod-*) version=v2-alpha-tpuv5-lite ;;
  v6e-*) version=v2-alpha-tpuv6e ;;
  *) version=tpu-ubuntu2204-base ;;
esac
if ! exists; then
  options=("--node-id=$name" "--zone=$zone" "--accelerator-type=$type" "--runtime-version=${VERSION:-$version}")
  [[ "${SPOT:-0}" == 1 ]] && options+=(--spot)
  run gcloud compute tpus queued-resources create "$name" "${options[@]}"
fi
if ! $dry_run; then
  while :; do
    now=$(state)
    case "$now" in
      ACTIVE) break ;;
      FAILED | SUSPENDED)
        echo "$name is $now: delete it and request it again." >&2
        exit 1
        ;;
    esac
    echo "waiting for $name: ${now:-unknown}"
    sleep "${PERIOD:-30}"
  done
fi

package=${PACKAGE:-}
if [[ -z "$package" ]]; then
  wheels=$(mktemp -d)
  trap 'rm -rf "$wheels"' EXIT
  package=./upcycle-0.1.0-py3-none-any.whl
  run python3 -m pip wheel --quiet --no-deps "--wheel-dir=$wheels" "$here"
  run gcloud compute tpus tpu-vm scp "$wheels/$package" "$name:" "--zone=$zone" --worker=all
fi
uv='python3 -m uv'
environment="$uv venv --quiet --allow-existing --python ${PYTHON_VERSION:-3.12} upcycle_env"
on_all_hosts "python3 -m pip install --quiet uv && $environment && $uv pip install --quiet --python upcycle_env '${package}[tpu]'"
[[ -z "${PREPARE:-}" ]] || on_all_hosts "$PREPARE"

pause=${PERIOD:-30}
for ((try = 1; try <= ${TRIES:-100}; try++)); do
  code=0
  on_all_hosts "upcycle_env/bin/python -m upcycle $arguments--distributed" || code=$?
  [[ $code -eq 0 ]] && exit 0
  [[ $code -eq 2 ]] && exit 2
  echo "status $code after try $try: restarting from the last checkpoint" >&2
  sleep "$pause"
  pause=$((pause < 600 ? 2 * pause : pause))
done
exit "$code"
