#include "common/gemm_cpu.h"

#include <exception>
#include <vector>

#if (defined(__GNUC__) || defined(__clang__)) && defined(__linux__)
#define GFLOWGR_WEAK __attribute__((weak))
namespace c10 {
struct BFloat16;
}
namespace at::native::cpublas {
GFLOWGR_WEAK void brgemm(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const float*,
                         const float*, float*, bool);
GFLOWGR_WEAK void brgemm(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool,
                         const c10::BFloat16*, const c10::BFloat16*, float*, bool);
GFLOWGR_WEAK void brgemm_release(bool);
}  // namespace at::native::cpublas
#endif

namespace gflowgr {
namespace {

#ifdef GFLOWGR_WEAK
using FloatGemm = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const float*,
                           const float*, float*, bool);
using BFloat16Gemm = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool,
                              const c10::BFloat16*, const c10::BFloat16*, float*, bool);
const FloatGemm float_gemm = &at::native::cpublas::brgemm;
const BFloat16Gemm bfloat16_gemm = &at::native::cpublas::brgemm;

// Small integers are exact in both types: the product must be too.
template <typename Value, typename Encode, typename Multiply>
bool tried(Encode encode, bool pairs, Multiply multiply) {
  constexpr int64_t m = 5, n = 16, k = 6;
  std::vector<Value> a(m * k), b(k * n);
  std::vector<float> c(m * n, 1.0f);
  const auto left = [](int64_t i, int64_t j) { return static_cast<float>((i * 3 + j * 5) % 7 - 3); };
  const auto right = [](int64_t i, int64_t j) { return static_cast<float>((i * 5 + j * 2) % 9 - 4); };
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < k; ++j) a[i * k + j] = encode(left(i, j));
  }
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      b[pairs ? (i / 2 * n + j) * 2 + i % 2 : i * n + j] = encode(right(i, j));
    }
  }
  try {
    multiply(m, n, k, a.data(), b.data(), c.data());
  } catch (const std::exception&) {  // torch throws where the machine has no such product
    return false;
  }
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      float sum = 1.0f;
      for (int64_t l = 0; l < k; ++l) sum += left(i, l) * right(l, j);
      if (c[i * n + j] != sum) return false;
    }
  }
  return true;
}
#endif

}  // namespace

#ifdef GFLOWGR_WEAK

bool gemm_float_available() {
  static const bool works = float_gemm != nullptr &&
      tried<float>([](float x) { return x; }, false,
                   [](int64_t m, int64_t n, int64_t k, const float* a, const float* b, float* c) {
                     gemm(m, n, k, k, n, n, true, a, b, c);
                   });
  return works;
}

bool gemm_bfloat16_available() {
  // Without these instructions oneDNN emulates them, which is slower than float32.
  static const bool works = bfloat16_gemm != nullptr && at::native::cpublas::brgemm_release != nullptr &&
#if defined(__x86_64__)
      __builtin_cpu_supports("avx512bf16") &&
#endif
      tried<uint16_t>(
          [](float x) {
            uint32_t bits;
            __builtin_memcpy(&bits, &x, sizeof bits);
            return static_cast<uint16_t>(bits >> 16);
          },
          true,
          [](int64_t m, int64_t n, int64_t k, const uint16_t* a, const uint16_t* b, float* c) {
            gemm(m, n, k, k, n, n, true, a, b, c);
            gemm_release();
          });
  return works;
}

void gemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
          const float* a, const float* b, float* c) {
  float_gemm(m, n, k, lda, ldb, ldc, add, a, b, c, false);
}

void gemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
          const uint16_t* a, const uint16_t* b, float* c) {
  bfloat16_gemm(m, n, k, lda, ldb, ldc, add, reinterpret_cast<const c10::BFloat16*>(a),
                reinterpret_cast<const c10::BFloat16*>(b), c, true);
}

void gemm_release() { at::native::cpublas::brgemm_release(true); }

#else

bool gemm_float_available() { return false; }
bool gemm_bfloat16_available() { return false; }
void gemm(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const float*, const float*, float*) {}
void gemm(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const uint16_t*, const uint16_t*,
          float*) {}
void gemm_release() {}

#endif

}  // namespace gflowgr
