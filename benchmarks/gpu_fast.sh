#!/usr/bin/env bash
# Everything that a GPU should be asked first, in less than 500 s and without a network: what runs, what is
# wrong, how fast it is. docs/gpu.md says how to use it.
#
#   [OUT=FOLDER] bash benchmarks/gpu_fast.sh
#
# Takes build/gpu (made by gpu_prepare.sh), or builds here. Each step has a timeout of its own; what it prints
# is in $OUT/fast.log at once; a line of exit status per step is in $OUT/status.txt and printed at the end.
# GFLOWGR_GPU_REHEARSE=1 runs the same steps on the CPU with tiny sizes.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OUT=${OUT:-benchmarks/results/gpu} PYTHONPATH=$PWD:$PWD/build/gpu_site PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/triton} HF_HUB_OFFLINE=1
mkdir -p "$OUT"
: >"$OUT/fast.log"
: >"$OUT/status.txt"
if [ "${GFLOWGR_GPU_REHEARSE:-0}" = 1 ]; then
    # Processors are slower, and others may share them: it is the steps that are rehearsed, not the time.
    slower=20 device=cpu dtype=float32
    sizes=(2x2x4x16x1100 beam_step:2x4x1100x1k search-t5:1x8x4x1k train_step-t5:2x8x2x1k)
    quick=(--repeats 1 --seconds 1 --no-memory --peers none) most=2
else
    slower=1 device=cuda dtype=bfloat16
    sizes=(letter-gpu llm-gpu beam_step:64x20x33124x12101 beam_step:64x20x33124x1m
        search-t5:64x60x20x12101 search-qwen3:8x512x20x12101 train_step-t5:1024x80x4x12101)
    quick=(--repeats 5 --seconds 2 --peers torch compile cut-cross-entropy liger csr transformers) most=1000
fi
ops=(logprobs_dense.fused logprobs_children.fused beam_step.logits beam_step.hidden search train_step)

step() { # NAME SECONDS COMMAND...
    local name=$1 seconds=$(($2 * slower)) begin=$SECONDS status
    shift 2
    echo "== $name: $*" | tee -a "$OUT/fast.log"
    timeout -k 3 "$seconds" "$@" 2>&1 | tee -a "$OUT/fast.log"
    status=${PIPESTATUS[0]}
    echo "$name: exit status $status after $((SECONDS - begin)) s (at most $seconds)" >>"$OUT/status.txt"
}
parts() {
    [ -e gflowgr/kernels ] || ln -s ../kernels gflowgr/kernels
    if [ "$device" = cpu ]; then
        echo "rehearsal: what is built here is used"
    elif [ -f build/gpu/_C_cuda.abi3.so ] &&
        [ "$(bash benchmarks/gpu_sources.sh)" = "$(cat build/gpu/made_of.txt)" ]; then
        cp build/gpu/*.so gflowgr/
    else
        echo "build/gpu is not there, or made of other sources: building"
        GFLOWGR_CUDA=1 MAX_JOBS=$(nproc) python3 setup.py -q build_ext --inplace
    fi
    [ -z "$(ls build/gpu/wheels/*.whl 2>/dev/null)" ] || python3 -m pip install -q --no-index --no-deps \
        --no-compile --upgrade --target build/gpu_site build/gpu/wheels/*.whl || echo "peers are not installed"
    python3 -c 'from gflowgr import backends; print("cuda:", backends.cuda_missing(), "; cpp:", backends.cpp_missing())'
}
sanitized() { # TOOL
    local run=(python3 benchmarks/gpu_smoke.py --device "$device" --most 2 --groups tree flow_loss children beam --here)
    [ "$device" = cpu ] || run=(compute-sanitizer --tool "$1" --error-exitcode 9 "${run[@]}")
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${run[@]}"
}
export -f parts sanitized
export device
step parts 90 bash -c parts
step info 15 python3 -m gflowgr info
step smoke 60 env GFLOWGR_TUNE=0 python3 benchmarks/gpu_smoke.py --device "$device" --most "$most"
step tests 70 env GFLOWGR_TUNE=0 python3 -m pytest -q -m gpu --no-header -p no:cacheprovider tests/cuda/test_on_gpu.py
step bench 150 python3 -m benchmarks "${ops[@]}" --device "$device" --dtype "$dtype" --shapes "${sizes[@]}" \
    "${quick[@]}" --no-progress --out "$OUT"
step profile 25 python3 benchmarks/gpu_profile.py --device "$device" --out "$OUT/profile.txt"
step memcheck 35 bash -c 'sanitized memcheck'
step racecheck 35 bash -c 'sanitized racecheck'
echo "== results in $OUT"
cat "$OUT/status.txt"
! grep -qv 'exit status 0 ' "$OUT/status.txt"
