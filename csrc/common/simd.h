// Vectors of floats of one machine register, written once in the compiler's vector types.
//
// Simd<64> is a register of AVX-512, Simd<32> one of AVX2, Simd<16> of the baseline: what is wider than the
// machine's registers is compared element by element (GCC 12), so code is a template of the width. It is
// inlined (GFLOWGR_INLINE) into functions that carry the target's attribute, and run_simd calls the one for
// this machine. Compilers without vector types get one float at a time.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/simd_cpu.h"

namespace gflowgr {

template <int kBytes>
struct SimdTypes;

#ifdef GFLOWGR_VECTORS
#define GFLOWGR_SIMD_TYPES(bytes)                                 \
  template <>                                                     \
  struct SimdTypes<bytes> {                                       \
    typedef float Floats __attribute__((vector_size(bytes)));     \
    typedef int32_t Ints __attribute__((vector_size(bytes)));     \
    typedef uint32_t Words __attribute__((vector_size(bytes)));   \
    static GFLOWGR_INLINE Floats floats(Ints x) {                 \
      return __builtin_convertvector(x, Floats);                  \
    }                                                             \
  };
GFLOWGR_SIMD_TYPES(16)
GFLOWGR_SIMD_TYPES(32)
GFLOWGR_SIMD_TYPES(64)
#undef GFLOWGR_SIMD_TYPES
#else
template <int kBytes>
struct SimdTypes {
  typedef float Floats;
  typedef int32_t Ints;
  typedef uint32_t Words;
  static GFLOWGR_INLINE Floats floats(Ints x) { return static_cast<float>(x); }
};
#endif

template <int kBytes>
struct Simd : SimdTypes<kBytes> {
  typedef typename SimdTypes<kBytes>::Floats Floats;
  typedef typename SimdTypes<kBytes>::Ints Ints;
  typedef typename SimdTypes<kBytes>::Words Words;
  static constexpr int64_t kLanes = sizeof(Floats) / sizeof(float);

  static GFLOWGR_INLINE Floats load(const float* from) {
    Floats x;
    std::memcpy(&x, from, sizeof(x));
    return x;
  }
  static GFLOWGR_INLINE void store(float* to, Floats x) { std::memcpy(to, &x, sizeof(x)); }
  static GFLOWGR_INLINE Floats broadcast(float x) { return Floats{} + x; }
  static GFLOWGR_INLINE Floats maximum(Floats x, Floats y) { return x > y ? x : y; }  // y where x is NaN

  // exp(x) for x <= 0 to 1.5 units in the last place; 0 below -87.3, where float32 has no normal number;
  // NaN for NaN. exp(x) = 2^n exp(r) with r in [-ln 2 / 2, ln 2 / 2], a Taylor polynomial with the remainder
  // below r^8 / 8!.
  static GFLOWGR_INLINE Floats exp_not_positive(Floats x) {
    const Floats lowest = broadcast(-87.3f), magic = broadcast(12582912.0f);  // 1.5 * 2^23: rounds
    const Floats clamped = x < lowest ? lowest : x;
    const Floats shifted = clamped * 1.44269504f + magic;
    const Floats n = shifted - magic;
    const Floats r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
    Floats p = broadcast(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const Floats scaled = bit_cast<Floats>(bit_cast<Words>(p) + (bit_cast<Words>(shifted) << 23));
    return x < lowest ? Floats{} : scaled;
  }

  // log(x) for 1 <= x < infinity to 2 units in the last place: x = 2^n m with m in [sqrt(1/2), sqrt(2)), and
  // the odd series of log m in s = (m - 1) / (m + 1).
  static GFLOWGR_INLINE Floats log_at_least_one(Floats x) {
    const Words bits = bit_cast<Words>(x) - 0x3f3504f3u;  // of sqrt(1/2)
    const Floats m = bit_cast<Floats>((bits & 0x007fffffu) + 0x3f3504f3u);
    const Floats s = (m - 1.0f) / (m + 1.0f), z = s * s;
    Floats p = broadcast(2.0f / 9);
    p = p * z + 2.0f / 7;
    p = p * z + 2.0f / 5;
    p = p * z + 2.0f / 3;
    p = p * z + 2.0f;
    return SimdTypes<kBytes>::floats(bit_cast<Ints>(bits) >> 23) * 0.693147180f + s * p;
  }
};

}  // namespace gflowgr
