#!/usr/bin/env bash
# Make what a machine with a GPU and no network would have to build or fetch, into build/gpu
# (ignored by git; carry it there, benchmarks/gpu_fast.sh takes it). Needs nvcc and torch, no GPU.
#
#   bash benchmarks/gpu_prepare.sh
#
# GPU_ARCH (90): the GPU's architecture; GPU_PYTHON (3.12): the Python there, whose headers must be here.
# What could not be made is said at the end; gpu_fast.sh builds it there or goes without.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
parts=build/gpu arch=${GPU_ARCH:-90} version=${GPU_PYTHON:-3.12}
rm -rf "$parts"
mkdir -p "$parts/wheels" "$parts/objects"
missing=()
make() { # NAME COMMAND...: run it, or note that NAME is missing
    local name=$1
    shift
    echo "== $name"
    "$@" || missing+=("$name")
}
torch=$(python -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent)') || exit 1
nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
cxx=(g++ -std=c++17 -fvisibility=hidden -O3 -g0 -fPIC -Icsrc -isystem "$torch/include")
stable=(-DTORCH_TARGET_VERSION=0x020a000000000000)

cuda() {
    # In torch's stable ABI nothing depends on whether this torch has CUDA. What it calls of libtorch_cuda
    # is found through a name alone: an empty library of that name stands for it when linking.
    mkdir -p "$parts/empty"
    g++ -shared -x c++ /dev/null -Wl,-soname,libtorch_cuda.so -o "$parts/empty/libtorch_cuda.so" || return 1
    for source in csrc/*/*_cuda.cpp; do
        echo "${cxx[*]} ${stable[*]} -DUSE_CUDA=1 -c $source -o $parts/objects/$(basename "$source").o"
    done >"$parts/commands"
    for source in csrc/*/*.cu; do
        echo "$nvcc -O3 -std=c++17 -Icsrc --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden" \
            "-gencode=arch=compute_$arch,code=sm_$arch -c $source -o $parts/objects/$(basename "$source").o"
    done >>"$parts/commands"
    xargs -P "${MAX_JOBS:-2}" -I{} sh -c '{}' <"$parts/commands" || return 1
    "$nvcc" -shared "-gencode=arch=compute_$arch,code=sm_$arch" "$parts"/objects/*.o -o "$parts/_C_cuda.abi3.so" -L"$parts/empty" -L"$torch/lib" \
        -ltorch -ltorch_cpu -lc10 -Xlinker --no-as-needed -ltorch_cuda
}
cpp() {
    [ -n "$(ls gflowgr/_C.*so 2>/dev/null)" ] || GFLOWGR_CUDA=0 python setup.py -q build_ext --inplace
    cp gflowgr/_C.*so "$parts/"
}
host() {
    local headers
    headers=$(ls -d /usr/include "${HOME:-/root}"/.pyenv/versions/"$version"*/include 2>/dev/null |
        while read -r folder; do [ ! -f "$folder/python$version/Python.h" ] || echo "$folder/python$version"; done | head -1)
    [ -n "$headers" ] || { echo "no headers of Python $version"; return 1; }
    "${cxx[@]}" -I"$headers" csrc/tree/host_bindings.cpp csrc/tree/tree_build.cpp \
        csrc/tree/tree_check.cpp -shared -o "$parts/_host.cpython-${version/./}-$(uname -m)-linux-gnu.so"
}
wheel() {
    python -m pip download -q --no-deps --only-binary=:all: --python-version "$version" \
        --platform manylinux2014_x86_64 -d "$parts/wheels" "$1"
}
make "_C_cuda for sm_$arch" cuda
make _C cpp
make "_host for Python $version" host
for name in cut-cross-entropy liger-kernel; do make "the wheel of $name" wheel "$name"; done
rm -rf "$parts/objects" "$parts/empty" "$parts/commands"
bash benchmarks/gpu_sources.sh >"$parts/made_of.txt"
# The keys of Triton's cache hold its own library, built for the Python there: nothing made here would be found.
missing+=("a Triton cache: made there, by the first steps")
echo "== in $parts, $(du -sm "$parts" | cut -f1) MiB (at most 60):"
ls -l "$parts" "$parts/wheels"
printf 'not made: %s\n' "${missing[@]}"
[ "$(du -sm "$parts" | cut -f1)" -le 60 ]
