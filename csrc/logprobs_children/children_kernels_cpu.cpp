#include "logprobs_children/children_kernels.h"

#include <cstdlib>
#include <cstring>

// The vector types are the compiler's (GCC, Clang); the instruction set is a function's attribute, so that
// one build serves every machine.
#if defined(__x86_64__)
#include <immintrin.h>

#define GFLOWGR_SIMD avx512
#define GFLOWGR_SIMD_NAME "avx512"
#define GFLOWGR_SIMD_BYTES 64
#define GFLOWGR_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define GFLOWGR_DOT_ROWS 4
#define GFLOWGR_DOT_COLUMNS 6
#define GFLOWGR_SUM_ROWS 6
#define GFLOWGR_SUM_VECTORS 4
#include "logprobs_children/children_simd.h"

#define GFLOWGR_SIMD avx2
#define GFLOWGR_SIMD_NAME "avx2"
#define GFLOWGR_SIMD_BYTES 32
#define GFLOWGR_TARGET __attribute__((target("avx2,fma")))
#define GFLOWGR_DOT_ROWS 3
#define GFLOWGR_DOT_COLUMNS 4
#define GFLOWGR_SUM_ROWS 6
#define GFLOWGR_SUM_VECTORS 2
#include "logprobs_children/children_simd.h"

#endif

#define GFLOWGR_SIMD baseline
#define GFLOWGR_SIMD_NAME "baseline"
#define GFLOWGR_SIMD_BYTES 16
#define GFLOWGR_TARGET
#define GFLOWGR_DOT_ROWS 3
#define GFLOWGR_DOT_COLUMNS 4
#define GFLOWGR_SUM_ROWS 6
#define GFLOWGR_SUM_VECTORS 2
#include "logprobs_children/children_simd.h"

namespace gflowgr {
namespace {

const ChildrenKernels& choose() {
#if defined(__x86_64__)
  // PyTorch's own variable, so that one setting holds for all kernels of a process.
  const char* const most = std::getenv("ATEN_CPU_CAPABILITY");
  const bool plain = most != nullptr && std::strcmp(most, "default") == 0;
  const bool narrow = most != nullptr && std::strcmp(most, "avx2") == 0;
  const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (fma && wide && !plain && !narrow) return avx512::kernels;
  if (fma && !plain) return avx2::kernels;
#endif
  return baseline::kernels;
}

}  // namespace

const ChildrenKernels& children_kernels() {
  static const ChildrenKernels& chosen = choose();
  return chosen;
}

}  // namespace gflowgr
