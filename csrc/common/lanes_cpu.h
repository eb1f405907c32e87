// Sixteen floats at a time, for code that is compiled once per instruction set by target attributes.
//
// Everything here is inlined into functions that carry GFLOWGR_AVX512, GFLOWGR_AVX2 or neither.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__) || defined(__clang__)
#define GFLOWGR_INLINE inline __attribute__((always_inline))
#else
#define GFLOWGR_INLINE inline
#endif
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define GFLOWGR_X86 1
#define GFLOWGR_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")))
#define GFLOWGR_AVX2 __attribute__((target("avx2,fma")))
#endif

namespace gflowgr {
namespace {

GFLOWGR_INLINE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

GFLOWGR_INLINE uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// One register of AVX-512, two of AVX2.
#if defined(__GNUC__) || defined(__clang__)
typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t LaneBits __attribute__((vector_size(64), aligned(4), may_alias));
#else
using Lanes = float;
using LaneBits = uint32_t;
#endif
constexpr int64_t kWidth = sizeof(Lanes) / sizeof(float);

GFLOWGR_INLINE Lanes load(const float* from) {
  Lanes value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

GFLOWGR_INLINE void store(float* to, Lanes value) { std::memcpy(to, &value, sizeof value); }

// 2^x, relative error below 1e-6 (2e-7 but for the rounding of x); 0 at -127. -127 <= x <= 127, or NaN.
GFLOWGR_INLINE Lanes exp2_in_range(Lanes x) {
  const Lanes shifted = x + 12582912.0f;  // 1.5 * 2^23: rounds to an integer, in the low bits
  const Lanes r = x - (shifted - 12582912.0f);
  Lanes p = r * 1.54035304e-4f + 1.33335581e-3f;  // ln(2)^k / k!
  p = p * r + 9.61812911e-3f;
  p = p * r + 5.55041087e-2f;
  p = p * r + 2.40226507e-1f;
  p = p * r + 6.93147181e-1f;
  p = p * r + 1.0f;
  LaneBits exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent = (exponent + 127u) << 23;
  Lanes power;
  std::memcpy(&power, &exponent, sizeof power);
  return p * power;
}

// The same for all x <= 127: 0 below 2^-126, -inf included; 0 for NaN.
GFLOWGR_INLINE Lanes exp2_approx(Lanes x) {
  const Lanes least = Lanes{} - 127.0f;
  return exp2_in_range(x < least ? least : x);  // in this order a NaN stays one
}

}  // namespace

// Whether this machine has what GFLOWGR_AVX512 and GFLOWGR_AVX2 compile for.
#ifdef GFLOWGR_X86
inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

}  // namespace gflowgr
