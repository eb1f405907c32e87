// What the kernel files use of CUDA, so that they also run in the emulator (tests/cuda/emulate.h).
//
//     GFLOWGR_LAUNCH(kernel, grid, block, shared, stream, arguments...)   kernel<<<...>>>(arguments...)
//     GFLOWGR_DYNAMIC_SHARED(name)                                        unsigned char name[], 16-byte aligned
#pragma once

#if defined(GFLOWGR_EMULATE)

#include "emulate.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define GFLOWGR_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<(grid), (block), (shared), (stream)>>>(__VA_ARGS__)
#define GFLOWGR_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

#endif
