#!/usr/bin/env bash
# Build _host and _C with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy under build/sanitize, and run
# the tests of the tree, children, beam, head and loss ops with them (or those that are given). Needs g++ and its
# libasan. A fault ends the process with a report. Some 20 minutes on two cores; the copy is kept, so that a second
# run builds only what has changed.
#
#     tests/sanitize.sh
#     tests/sanitize.sh tests/tree/test_fuzz.py -x
set -euo pipefail
cd "$(dirname "$0")/.."
copy=build/sanitize
mkdir -p "$copy"
git ls-files -z --cached --others --exclude-standard setup.py pyproject.toml README.md LICENSE csrc gflowgr kernels \
  tests | xargs -0 cp -u --parents -t "$copy"
cd "$copy"
GFLOWGR_SANITIZE=1 GFLOWGR_CUDA=0 python setup.py -q build_ext --inplace
[ $# -gt 0 ] || set -- tests/tree/test_prefix_tree.py tests/tree/test_check.py tests/tree/test_fuzz.py tests/tree/test_update.py \
  tests/ops/logprobs_children/test_children.py tests/ops/logprobs_children/test_children_op.py tests/ops/beam_step/test_beam_step.py \
  tests/ops/beam_step/test_beam_step_traps.py tests/ops/logprobs_dense/test_dense.py tests/ops/flow_loss/test_flow.py tests/ops/test_fused.py \
  tests/ops/logprobs_logits/test_logits.py
# The interpreter is not built with the sanitizers: their library comes first, and what Python itself leaks is its own.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
export PYTHONPATH=$PWD
# How long something takes says nothing in such a build.
slow=tests/tree/test_check.py::test_the_proof_takes_less_than_a_fifth_of_a_second_per_100_megabytes
exec python -m pytest -q -p no:cacheprovider --timeout=3000 --deselect "$slow" "$@"
