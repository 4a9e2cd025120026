#!/usr/bin/env bash
# Starts several processes of one run on this machine: one per GPU, or several on the CPU as a test.
#
#   scripts/launch/processes.sh [--dry_run] NUMBER train --gin_file=... --gin.MODEL_DIR=...
#
# Process i prints to LOGS/i.txt. The script ends when all processes have ended, or with the first status other than 0; then, or when
# it is stopped itself, it stops the others. Processes that were preempted and have saved (status 75), or got no answer (status 69),
# are restarted. Environment:
#   LOGS    folder of the logs (processes)
#   TRIES   largest number of starts (100)
#   PERIOD  seconds before the first restart (1); doubled each time, up to a minute
#   PORT    port of the coordinator (default: a free one)
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

# Returns the first status other than 0, or 0 when all processes have ended.
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
  # After a 69, the others may wait forever for the process that has ended.
  [[ $status -eq 75 ]] || kill "${pids[@]}" 2> /dev/null || true
  # Preempted processes stop at the same step. Wait by pid: after a bare `wait`, the next `wait -n` would return an old status.
  for pid in "${pids[@]}"; do wait "$pid" || true; done
  if [[ $status -eq 75 ]]; then echo "preempted and saved: restarting" >&2; else echo "no answer: restarting" >&2; fi
  sleep "$pause"
  pause=$((pause < 60 ? 2 * pause : pause))
done
[[ $status -eq 0 ]] || echo "a process ended with status $status: see $logs" >&2
exit "$status"
