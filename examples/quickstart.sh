#!/usr/bin/env bash
# Set up a virtual environment (in .venv, or where VENV says), install gflowgr and run its main job:
# train SASRec, SFT, continued SFT and GFlowGR, and compare them. Arguments go to `gflowgr
# quickstart`, such as: bash examples/quickstart.sh --data /path/to/dataset
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -c "import torch" 2>/dev/null || "$venv/bin/pip" install "torch==${TORCH_VERSION:-2.13.0}"
"$venv/bin/pip" install --quiet ".[train]"
exec "$venv/bin/gflowgr" quickstart "$@"
