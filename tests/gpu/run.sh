#!/usr/bin/env bash
# All checks of tests/gpu on this machine's first CUDA device, within ten minutes: a table last, and a status other than
# 0 if a result is wrong. Needs Python 3.11 or later with torch, triton, numpy, safetensors, tokenizers and transformers.
#
#   tests/gpu/run.sh [PREFIX ...]        checks whose names begin so; PYTHON names the interpreter
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec timeout --signal=INT --kill-after=10 570 "${PYTHON:-python3}" -m tests.gpu "$@"
