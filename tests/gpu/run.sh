#!/usr/bin/env bash
# All checks of tests/gpu on this machine's first CUDA device, and how fast the 0.8B hybrid runs there, within ten
# minutes: two tables last, and a status other than 0 if a result is wrong. Needs Python 3.11 or later with torch, triton,
# numpy, safetensors, tokenizers and transformers.
#
#   tests/gpu/run.sh [PREFIX ...]        checks whose names begin so, and no times; PYTHON names the interpreter
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python="${PYTHON:-python3}"
limit() { timeout --signal=INT --kill-after=10 $((570 - SECONDS)) "$@"; }
status=0
limit "$python" -m tests.gpu "$@" || status=$?
# A time never changes the status; nor does a speed run that has no time left.
[[ $# -gt 0 || $status -eq 2 ]] || limit "$python" -m tests.gpu.speed || echo "the speed run did not end: status $?"
exit "$status"
