#!/usr/bin/env bash
# Ten minutes on a GPU, with what an image for PyTorch has: see `tools/gpu_day.sh --help`.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m tools.gpu_day "$@"
