#!/usr/bin/env bash
# Several processes of one run on this machine: one for each GPU, or to try the multi-process path on CPU.
#
#   scripts/launch/processes.sh [--dry_run] NUMBER train --gin_file=... --gin.MODEL_DIR=...
#
# Process i prints to LOGS/i.txt (LOGS: processes). Ends when all have ended, or with the first status that is not 0, and then, or when
# it is stopped itself, stops the others. Processes that were told to stop and have saved (status 75), or got no answer (status 69), are
# started again, TRIES times at most (100); PERIOD: the seconds before the first new try (1), which double up to a minute. PORT is the coordinator's (any free one if not set).
set -euo pipefail

dry_run=false
if [[ "${1:-}" == --dry_run ]]; then dry_run=true; shift; fi
if [[ $# -lt 2 || ! "$1" =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 [--dry_run] NUMBER train --gin_file=... --gin.MODEL_DIR=..." >&2
  exit 2
fi
number=$1
shift
logs=${LOGS:-processes}
pids=()

trap 'kill "${pids[@]}" 2> /dev/null || true' EXIT

start() {
  local port=${PORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
  pids=()
  for ((i = 0; i < number; i++)); do
    command=(upcycle "$@" "--coordinator_address=127.0.0.1:$port" "--process_count=$number" "--process_index=$i")
    if $dry_run; then
      printf '%q ' "${command[@]}"
      echo
      continue
    fi
    mkdir -p "$logs"
    "${command[@]}" >> "$logs/$i.txt" 2>&1 &
    pids+=($!)
  done
}

# The first status that is not 0, or 0 when all have ended.
first_bad() {
  local code=0
  for ((i = 0; i < number; i++)); do
    wait -n || code=$?
    [[ $code -eq 0 ]] || break
  done
  return "$code"
}

for ((i = 0; i < number; i++)); do $dry_run || rm -f "$logs/$i.txt"; done
pause=${PERIOD:-1}
for ((try = 1; try <= ${TRIES:-100}; try++)); do
  start "$@"
  $dry_run && exit 0
  status=0
  first_bad || status=$?
  [[ $status -eq 69 || $status -eq 75 ]] || break
  # After a 69 the others may wait for the one that has ended.
  [[ $status -eq 75 ]] || kill "${pids[@]}" 2> /dev/null || true
  # All of them stop at the same step. By name: a bare `wait` leaves the status of one that has ended already to the next `wait -n`.
  for pid in "${pids[@]}"; do wait "$pid" || true; done
  if [[ $status -eq 75 ]]; then echo "told to stop, and saved: the same again" >&2; else echo "no answer: the same again" >&2; fi
  sleep "$pause"
  pause=$((pause < 60 ? 2 * pause : pause))
done
[[ $status -eq 0 ]] || echo "a process ended with status $status: see $logs" >&2
exit "$status"
