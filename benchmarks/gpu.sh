#!/usr/bin/env bash
# Everything that a machine with a GPU should be asked, in one call: build, all tests,
# compute-sanitizer on the CUDA tests, benchmarks. Results go to benchmarks/results/ (or $1).
#
#   bash benchmarks/gpu.sh [RESULTS]
#
# Uses the Python, torch and CUDA toolkit that are there; goes on after a failure, and fails at the end.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=${1:-benchmarks/results}
mkdir -p "$results"
status=0
step() {
    echo "== $*" && "$@" || { echo "== failed: $*"; status=1; }
}
GFLOWGR_CUDA=1 step python -m pip install --no-build-isolation -e ".[dev]"
step python -m gflowgr info
python -m gflowgr info --json >"$results/gpu_info.json" || status=1
step python -m pytest -m "gpu or not gpu" --durations=20
if command -v compute-sanitizer >/dev/null; then
    # Children too: some tests run in processes of their own. Without torch's cache of memory, so that a
    # tensor's end is the end of its memory.
    for tool in memcheck racecheck initcheck synccheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 step compute-sanitizer --tool "$tool" --target-processes all \
            --error-exitcode 9 python -m pytest -q -m gpu --timeout 3600 tests
    done
else
    echo "== compute-sanitizer was not found: not run"
fi
step python -m benchmarks tree --out "$results/bench_tree"
# What is missing of these is left out of the comparison, with the reason printed.
python -m pip install cut-cross-entropy liger-kernel trl || echo "== not all peers were installed"
# Losses, decoding and training steps; the steps of a beam search in CUDA graphs too.
step python -m benchmarks --device cuda --dtype bfloat16 float32 --out "$results/bench_gpu"
# The paper's table, as far as the time goes (EXPERIMENT_SECONDS); the same call goes on with it.
if [ -n "${GFLOWGR_DATA:-}" ]; then
    timeout "${EXPERIMENT_SECONDS:-1200}" python -m gflowgr experiment paper_main --out runs/paper_main
    code=$?
    [ $code -eq 0 ] || [ $code -eq 124 ] || { echo "== failed: the experiment"; status=1; }
    step python -m gflowgr experiment paper_main --out runs/paper_main --report
    step benchmarks/keep_experiment.sh runs/paper_main "$results/paper_main"
else
    echo "== GFLOWGR_DATA is not set: no experiment"
fi
exit $status
