// Sixteen floats at a time, written once in the compiler's vector types and compiled for each instruction
// set: a function marked GFLOWGR_AVX512 or GFLOWGR_AVX2 inlines what is marked GFLOWGR_INLINE. Compilers
// without vector types get one float at a time.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__GNUC__) || defined(__clang__)
#define GFLOWGR_INLINE inline __attribute__((always_inline))
#define GFLOWGR_VECTORS 1
#else
#define GFLOWGR_INLINE inline
#endif

#if defined(GFLOWGR_VECTORS) && defined(__x86_64__)
#define GFLOWGR_X86 1
#define GFLOWGR_AVX2 __attribute__((target("avx2,fma")))
#define GFLOWGR_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")))
#endif

#if defined(__GNUC__) && !defined(__clang__)
// Vectors are passed between functions that are all inlined: how that would be done otherwise is no matter.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace gflowgr {

enum class SimdLevel { portable, avx2, avx512 };

inline SimdLevel simd_level() {
#ifdef GFLOWGR_X86
  static const SimdLevel level =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
          ? SimdLevel::avx512
      : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? SimdLevel::avx2
                                                                        : SimdLevel::portable;
  return level;
#else
  return SimdLevel::portable;
#endif
}

struct Bfloat {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

#ifdef GFLOWGR_VECTORS
constexpr int64_t kLanes = 16;
typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Shorts __attribute__((vector_size(32)));
GFLOWGR_INLINE Shorts shorts(Words x) { return __builtin_convertvector(x, Shorts); }
GFLOWGR_INLINE Words words(Shorts x) { return __builtin_convertvector(x, Words); }
GFLOWGR_INLINE float lane(const Lanes& x, int64_t i) { return x[i]; }
#else
constexpr int64_t kLanes = 1;
typedef float Lanes;
typedef int32_t Ints;
typedef uint32_t Words;
typedef uint16_t Shorts;
inline Shorts shorts(Words x) { return static_cast<Shorts>(x); }
inline Words words(Shorts x) { return x; }
inline float lane(const Lanes& x, int64_t) { return x; }
#endif

template <typename To, typename From>
GFLOWGR_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

GFLOWGR_INLINE Lanes broadcast(float x) { return Lanes{} + x; }

// The second where the first is NaN.
GFLOWGR_INLINE Lanes maximum(Lanes x, Lanes y) { return x > y ? x : y; }

GFLOWGR_INLINE float largest(Lanes x) {
  float best = lane(x, 0);
  for (int64_t i = 1; i < kLanes; ++i) best = lane(x, i) > best ? lane(x, i) : best;
  return best;
}

// In a fixed order.
GFLOWGR_INLINE float total(Lanes x) {
  float sum = 0;
  for (int64_t i = 0; i < kLanes; ++i) sum += lane(x, i);
  return sum;
}

// exp(x) for x <= 0 to 1.5 units in the last place; 0 below -87.3, where float32 has no normal number;
// NaN for NaN. exp(x) = 2^n exp(r) with r in [-ln 2 / 2, ln 2 / 2], a Taylor polynomial with the
// remainder below r^8 / 8!.
GFLOWGR_INLINE Lanes exp_not_positive(Lanes x) {
  const Lanes lowest = broadcast(-87.3f), magic = broadcast(12582912.0f);  // 1.5 * 2^23: rounds to integers
  const Lanes clamped = x < lowest ? lowest : x;
  const Lanes shifted = clamped * 1.44269504f + magic;
  const Lanes n = shifted - magic;
  const Lanes r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  Lanes p = broadcast(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Words power = bit_cast<Words>(shifted) << 23;
  const Lanes scaled = bit_cast<Lanes>(bit_cast<Words>(p) + power);
  return x < lowest ? Lanes{} : scaled;
}

// ------------------------------------------------------------------ element types

GFLOWGR_INLINE Lanes from_bfloat(Words bits) { return bit_cast<Lanes>(bits << 16); }

GFLOWGR_INLINE Words to_bfloat(Lanes x) {  // to nearest, ties to even
  const Words bits = bit_cast<Words>(x);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return x == x ? rounded : (bits >> 16) | 0x40u;
}

GFLOWGR_INLINE Lanes from_half(Words bits) {
  const Words magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
  // The exponents of the two formats are 112 apart; a product gets subnormal numbers right too.
  const Lanes finite = bit_cast<Lanes>(magnitude) * 5.192296858534828e33f;  // 2^112
  const Words special = magnitude | 0x7f800000u;  // infinite or NaN
  const Words value = magnitude >= 0x0f800000u ? special : bit_cast<Words>(finite);
  return bit_cast<Lanes>(value | sign);
}

GFLOWGR_INLINE Words to_half(Lanes x) {  // to nearest, ties to even
  const Words bits = bit_cast<Words>(x), sign = (bits & 0x80000000u) >> 16, magnitude = bits & 0x7fffffffu;
  // Normal: rebias the exponent, round at bit 13. Subnormal: adding 0.5 aligns and rounds them.
  const Words normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Words small = bit_cast<Words>(bit_cast<Lanes>(magnitude) + 0.5f) - 0x3f000000u;
  const Words finite = magnitude < 0x38800000u ? small : normal;
  const Words infinite = Words{} + 0x7c00u, not_a_number = Words{} + 0x7e00u;
  const Words over = magnitude > 0x7f800000u ? not_a_number : infinite;
  return sign | (magnitude >= 0x477ff000u ? over : finite);
}

GFLOWGR_INLINE Lanes load(const float* from) {
  Lanes x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}
GFLOWGR_INLINE Words load_bits(const void* from) {
  Shorts bits;
  std::memcpy(&bits, from, sizeof(bits));
  return words(bits);
}
GFLOWGR_INLINE Lanes load(const Bfloat* from) { return from_bfloat(load_bits(from)); }
GFLOWGR_INLINE Lanes load(const Half* from) { return from_half(load_bits(from)); }

GFLOWGR_INLINE void store(float* to, Lanes x) { std::memcpy(to, &x, sizeof(x)); }
GFLOWGR_INLINE void store(Bfloat* to, Lanes x) {
  const Shorts bits = shorts(to_bfloat(x));
  std::memcpy(to, &bits, sizeof(bits));
}
GFLOWGR_INLINE void store(Half* to, Lanes x) {
  const Shorts bits = shorts(to_half(x));
  std::memcpy(to, &bits, sizeof(bits));
}

// One element.
GFLOWGR_INLINE float widen(float x) { return x; }
GFLOWGR_INLINE float widen(Bfloat x) { return lane(from_bfloat(Words{} + x.bits), 0); }
GFLOWGR_INLINE float widen(Half x) { return lane(from_half(Words{} + x.bits), 0); }

template <typename Element>
GFLOWGR_INLINE Element narrow(float x) {
  Element found[kLanes];
  store(found, broadcast(x));
  return found[0];
}

// The first `count` elements; the other lanes are -inf.
template <typename Element>
GFLOWGR_INLINE Lanes load_some(const Element* from, int64_t count) {
  Element some[kLanes];
  store(some, broadcast(-INFINITY));
  std::memcpy(some, from, static_cast<size_t>(count) * sizeof(Element));
  return load(some);
}

template <typename Element>
GFLOWGR_INLINE void store_some(Element* to, Lanes x, int64_t count) {
  Element some[kLanes];
  store(some, x);
  std::memcpy(to, some, static_cast<size_t>(count) * sizeof(Element));
}

}  // namespace gflowgr
