#!/usr/bin/env bash
# A run on a Cloud TPU slice: asks for it as a queued resource, waits, installs upcycle on every host and starts the run on all of them.
#
#   scripts/launch/tpu_pod.sh [--dry_run] NAME TYPE ZONE train --gin_file=... --gin.MODEL_DIR=gs://...
#
# such as  scripts/launch/tpu_pod.sh upcycle-base v4-128 us-central2-b train ...   (v4-128 is 64 chips).
#
# Environment: PACKAGE, what pip installs on the hosts (a wheel of this checkout, which is built and copied there); VERSION, the
# runtime image (tpu-ubuntu2204-base); SPOT=1 asks for spot capacity; TRIES, how often a run that was cut off is started again (100):
# it resumes from its last checkpoint; a user's mistake (status 2) is not tried again; PERIOD, the seconds before the first new try (30),
# which double up to ten minutes. Needs the gcloud command, logged in, with a
# project set. The slice stays: delete it with
#   gcloud compute tpus queued-resources delete NAME --zone=ZONE --force
# Written from Google's documentation, and run against a stand-in for gcloud only.
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

if ! exists; then
  options=("--node-id=$name" "--zone=$zone" "--accelerator-type=$type" "--runtime-version=${VERSION:-tpu-ubuntu2204-base}")
  [[ "${SPOT:-0}" == 1 ]] && options+=(--spot)
  run gcloud compute tpus queued-resources create "$name" "${options[@]}"
fi
if ! $dry_run; then
  while :; do
    now=$(state)
    case "$now" in
      ACTIVE) break ;;
      FAILED | SUSPENDED)
        echo "$name is $now: delete it and ask again." >&2
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
on_all_hosts "python3 -m pip install --quiet '${package}[tpu]'"

pause=${PERIOD:-30}
for ((try = 1; try <= ${TRIES:-100}; try++)); do
  code=0
  on_all_hosts "python3 -m upcycle $arguments--distributed" || code=$?
  [[ $code -eq 0 ]] && exit 0
  [[ $code -eq 2 ]] && exit 2
  echo "status $code after try $try: the same again, from the last checkpoint" >&2
  sleep "$pause"
  pause=$((pause < 600 ? 2 * pause : pause))
done
exit "$code"
