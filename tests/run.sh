#!/usr/bin/env bash
# Set up a virtual environment (in .venv, or where VENV says) and run all tests that this machine can
# run, on all cores (WORKERS=0: in one process). Arguments go to pytest: bash tests/run.sh tests/ops -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -c "import torch" 2>/dev/null || "$venv/bin/pip" install "torch==${TORCH_VERSION:-2.13.0}"
"$venv/bin/pip" install --quiet -e ".[dev]"
# A process per core, each with one thread: more threads would only wait for one another.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$venv/bin/python" -m pytest -n "${WORKERS:-auto}" "$@"
