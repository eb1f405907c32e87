#!/usr/bin/env bash
# Set up a virtual environment (in .venv, or where VENV says) and run all tests that this machine can
# run, on all cores (WORKERS=0: in one process). Arguments go to pytest: bash tests/run.sh tests/ops -x
# What is left out as slow: bash tests/run.sh -m slow
# Tests that need Ray, which takes a minute to install, are skipped without it: EXTRAS=dev,ray installs it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -c "import torch" 2>/dev/null || "$venv/bin/pip" install "torch==${TORCH_VERSION:-2.13.0}"
# An install takes minutes: only where what it depends on has changed. The compiler works while pip
# downloads and unpacks what the package needs.
state() {
  find pyproject.toml setup.py csrc -type f -print0 | sort -z | xargs -0 sha256sum
  find gflowgr -name '*.so' | sort
  echo "${EXTRAS:-dev}"
  "$venv/bin/python" -c "import torch; print(torch.__version__)"
  pwd
}
if [ "$(state)" != "$(cat "$venv/installed" 2>/dev/null)" ]; then
  "$venv/bin/pip" install --quiet "setuptools>=77" ninja "pybind11>=2.13"
  "$venv/bin/python" setup.py -q build_ext --inplace >"$venv/build.log" 2>&1 &
  GFLOWGR_NO_EXT=1 "$venv/bin/pip" install --quiet -e ".[${EXTRAS:-dev}]"
  wait $! || { cat "$venv/build.log" && exit 1; }
  state >"$venv/installed"
fi
# A process per core, each with one thread: more threads would only wait for one another. What takes
# longest comes first (tests/conftest.py), and a file, which shares fixtures, stays in one process.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
workers=${WORKERS:-auto}
exec "$venv/bin/python" -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder "$@"
