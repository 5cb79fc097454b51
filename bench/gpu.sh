#!/usr/bin/env bash
# The whole GPU run, each part under nine minutes, going on where it stopped: correctness, compute-sanitizer, times
# against peers, table, plots and goals. Needs this checkout, a GPU and a Python with torch, triton and transformers.
#
#     bash bench/gpu.sh                        # everything
#     bash bench/gpu.sh correct sanitize       # some parts: see bench/README.md; time:SHAPE = one shape
#     bash bench/gpu.sh first --seconds 300    # five minutes, each part in a box; then `second`, seven (gpu/plan.py)
#     PYTHON=/path/to/python RESULTS=/some/folder bash bench/gpu.sh
#     OPTIONS="--device cpu --tiny" bash bench/gpu.sh      # rehearse it without a GPU
set -uo pipefail
cd "$(dirname "$0")/.."

sees_gpu() { "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if ! sees_gpu python3 && [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
export PYTHONPATH="$PWD/kernels:$PWD/bindings:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
if [ "${1:-}" = first ] || [ "${1:-}" = second ]; then
  # shellcheck disable=SC2086
  exec "$PYTHON" -m bench.gpu.run "$@" ${RESULTS:+--results "$RESULTS"} ${OPTIONS:-}
fi
if [ $# -eq 0 ]; then
  # The shape that most others publish first, so that a session that is cut short has it.
  set -- correct warm time:qwen3-30b-a3b time:olmoe-1b-7b time:mixtral-8x7b time:gpt-oss-20b \
    time:deepseek-moe-16b time:deepseek-v3-slice time:switch-base-8 time:edge routing model kernels sanitize plot
  case "${OPTIONS:-}" in *--tiny*) set -- correct sanitize warm time routing model kernels plot ;; esac
fi

limit() { if command -v timeout >/dev/null; then timeout --kill-after=10 535 "$@"; else "$@"; fi; }
worst=0
for part in "$@"; do
  shapes=()
  case "$part" in time:*) shapes=(--shapes "${part#time:}") ;; esac
  # 75: out of time or the CUDA context is lost; 124: cut off. Both go on where they stopped, but not for ever.
  for attempt in 1 2 3 4 5 6; do
    # shellcheck disable=SC2086
    limit "$PYTHON" -m bench.gpu.run "${part%%:*}" ${shapes[@]+"${shapes[@]}"} ${RESULTS:+--results "$RESULTS"} ${OPTIONS:-}
    code=$?
    if [ $code -ne 75 ] && [ $code -ne 124 ]; then break; fi
    echo "-- $part goes on (after attempt $attempt, code $code)"
  done
  if [ $code -ne 0 ]; then
    echo "-- $part ended with code $code"
    worst=$code
    if [ $code -eq 2 ]; then break; fi
  fi
done
exit $worst
