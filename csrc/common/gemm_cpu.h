// Small matrix products on one thread: C [M, N] (+)= A [M, K] B [K, N], row-major, float32 accumulation.
//
// They are oneDNN's batch-reduce kernels, just-in-time compiled for the machine (AVX2, AVX-512, AMX), as
// torch exports them. The export is not part of torch's stable ABI, so it is bound as a weak symbol and tested
// once; where it is missing or wrong, these products are unavailable and the callers use PyTorch's own ops.
#pragma once

#include <cstdint>

namespace gflowgr {

// Whether gemm() of this type works here; false too where the machine has no fast product of it.
bool gemm_float_available();
bool gemm_bfloat16_available();

// lda, ldb, ldc: distances of rows in elements. `add`: C += A B instead of C = A B.
void gemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
          const float* a, const float* b, float* c);

// bfloat16 as raw bits. K is even, and B is laid out in pairs of rows, [K / 2, N, 2]: ldb is N of it.
void gemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
          const uint16_t* a, const uint16_t* b, float* c);

// Releases the AMX tile registers; each thread calls it after its last bfloat16 product.
void gemm_release();

}  // namespace gflowgr
