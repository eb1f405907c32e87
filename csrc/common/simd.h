// Vectors of floats of one machine register, written once in the compiler's vector types.
//
// Simd<64> is a register of AVX-512, Simd<32> one of AVX2, Simd<16> of the baseline: what is wider than the
// machine's registers is compared element by element (GCC 12), so code is a template of the width. It is
// inlined (GFLOWGR_INLINE) into functions that carry a target's attribute, one for each entry of
// GFLOWGR_EACH_TARGET, and GFLOWGR_BEST says which of them is for this machine. Compilers without vector
// types get one float at a time.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "common/dtype.h"

#if defined(__GNUC__) || defined(__clang__)
#define GFLOWGR_INLINE inline __attribute__((always_inline))
#define GFLOWGR_VECTORS 1
#else
#define GFLOWGR_INLINE inline
#endif

#if defined(GFLOWGR_VECTORS) && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define GFLOWGR_SHUFFLE 1
#endif
#endif

#if defined(__GNUC__) && !defined(__clang__)
// GCC warns that the ABI of vector arguments depends on flags; all functions here are inlined, so no ABI is used.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

// GFLOWGR_EACH_TARGET(define): define(name, bytes of a register, attribute of a function) for each target.
// GFLOWGR_BEST(portable, avx2, avx512): the one of the three that this machine can run.
#if defined(GFLOWGR_VECTORS) && defined(__x86_64__)
#define GFLOWGR_X86 1
#define GFLOWGR_AVX2 __attribute__((target("avx2,fma")))
#define GFLOWGR_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")))
#define GFLOWGR_EACH_TARGET(define) define(portable, 16, ) define(avx2, 32, GFLOWGR_AVX2) define(avx512, 64, GFLOWGR_AVX512)
#define GFLOWGR_BEST(for_portable, for_avx2, for_avx512)                  \
  (::gflowgr::simd_level() == ::gflowgr::SimdLevel::avx512 ? (for_avx512) \
   : ::gflowgr::simd_level() == ::gflowgr::SimdLevel::avx2 ? (for_avx2)   \
                                                           : (for_portable))
#else
#define GFLOWGR_EACH_TARGET(define) define(portable, 16, )
#define GFLOWGR_BEST(for_portable, for_avx2, for_avx512) (for_portable)
#endif

namespace gflowgr {

enum class SimdLevel { portable, avx2, avx512 };

// The machine's instruction set, or a smaller one where ATEN_CPU_CAPABILITY asks for it. That is PyTorch's own
// variable, so one setting holds for all kernels of a process.
inline SimdLevel simd_level() {
#ifdef GFLOWGR_X86
  static const SimdLevel level = [] {
    const char* const most = std::getenv("ATEN_CPU_CAPABILITY");
    const bool plain = most != nullptr && std::strcmp(most, "default") == 0;
    const bool narrow = most != nullptr && std::strcmp(most, "avx2") == 0;
    const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (fma && wide && !plain && !narrow) return SimdLevel::avx512;
    return fma && !plain ? SimdLevel::avx2 : SimdLevel::portable;
  }();
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

template <typename To, typename From>
GFLOWGR_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <int kBytes>
struct SimdTypes;

#ifdef GFLOWGR_VECTORS
// Dependent typedefs would lose the attribute: each width has its own.
#define GFLOWGR_SIMD_TYPES(bytes)                                                                \
  template <>                                                                                    \
  struct SimdTypes<bytes> {                                                                      \
    typedef float Floats __attribute__((vector_size(bytes)));                                    \
    typedef int32_t Ints __attribute__((vector_size(bytes)));                                    \
    typedef uint32_t Words __attribute__((vector_size(bytes)));                                  \
    typedef uint16_t Shorts __attribute__((vector_size(bytes / 2)));                             \
    static GFLOWGR_INLINE Floats floats(const Ints& x) { return __builtin_convertvector(x, Floats); }   \
    static GFLOWGR_INLINE Shorts shorts(const Words& x) { return __builtin_convertvector(x, Shorts); }  \
    static GFLOWGR_INLINE Words words(const Shorts& x) { return __builtin_convertvector(x, Words); }    \
    static GFLOWGR_INLINE float lane(const Floats& x, int64_t i) { return x[i]; }                \
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
  typedef uint16_t Shorts;
  static Floats floats(Ints x) { return static_cast<float>(x); }
  static Shorts shorts(Words x) { return static_cast<Shorts>(x); }
  static Words words(Shorts x) { return x; }
  static float lane(const Floats& x, int64_t) { return x; }
};
#endif

template <int kBytes>
struct Simd : SimdTypes<kBytes> {
  typedef SimdTypes<kBytes> Types;
  typedef typename Types::Floats Floats;
  typedef typename Types::Ints Ints;
  typedef typename Types::Words Words;
  typedef typename Types::Shorts Shorts;
  static constexpr int64_t kLanes = sizeof(Floats) / sizeof(float);
  static constexpr int64_t kParts = kGroup / kLanes;  // registers of a group

  static GFLOWGR_INLINE Floats broadcast(float x) { return Floats{} + x; }
  static GFLOWGR_INLINE Floats maximum(const Floats& x, const Floats& y) { return x > y ? x : y; }  // returns y where x is NaN

  // ---------------------------------------------------------------- across lanes

  // The largest lane, of registers without NaN.
  static GFLOWGR_INLINE float largest(const Floats& x) {
    float best = Types::lane(x, 0);
    for (int64_t i = 1; i < kLanes; ++i) best = Types::lane(x, i) > best ? Types::lane(x, i) : best;
    return best;
  }
  template <int64_t parts>
  static GFLOWGR_INLINE float largest(const Floats (&x)[parts]) {
    Floats top = x[0];
    for (int64_t j = 1; j < parts; ++j) top = maximum(x[j], top);
    return largest(top);
  }

  // Sum of the lanes of a group, the first first.
  static GFLOWGR_INLINE float total(const Floats (&x)[kParts]) {
    float sum = 0;
    for (int64_t i = 0; i < kGroup; ++i) sum += Types::lane(x[i / kLanes], i % kLanes);
    return sum;
  }

  // Sum of all lanes by halves: few additions in a row, and a rounding error that grows with log2 of the lanes.
  static GFLOWGR_INLINE float total_by_halves(const Floats& x) {
#ifdef GFLOWGR_SHUFFLE
    if constexpr (kLanes == 16) {
      return Simd<32>::total_by_halves(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                                       __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
    } else if constexpr (kLanes == 8) {
      return Simd<16>::total_by_halves(__builtin_shufflevector(x, x, 0, 1, 2, 3) +
                                       __builtin_shufflevector(x, x, 4, 5, 6, 7));
    } else {
      const Floats pairs = x + __builtin_shufflevector(x, x, 2, 3, 2, 3);
      return Types::lane(pairs, 0) + Types::lane(pairs, 1);
    }
#else
    float lane[kLanes];
    std::memcpy(lane, &x, sizeof lane);
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) lane[i] += lane[i + half];
    }
    return lane[0];
#endif
  }
  template <int64_t parts>
  static GFLOWGR_INLINE float total_by_halves(Floats (&x)[parts]) {
    for (int64_t half = parts / 2; half > 0; half /= 2) {
      for (int64_t j = 0; j < half; ++j) x[j] += x[j + half];
    }
    return total_by_halves(x[0]);
  }

  // True in the first `count` lanes.
  static GFLOWGR_INLINE Ints first_lanes(int64_t count) {
    Ints lane{};
    if constexpr (kLanes == 1) return count > 0 ? ~lane : lane;
    int32_t numbers[kLanes];
    for (int i = 0; i < kLanes; ++i) numbers[i] = i;
    std::memcpy(&lane, numbers, sizeof lane);
    return lane < static_cast<int32_t>(count);
  }

  // ---------------------------------------------------------------- functions

  // exp(x) for x <= 0 to 1.5 units in the last place; 0 below -87.3, where float32 has no normal number;
  // NaN for NaN. exp(x) = 2^n exp(r) with r in [-ln 2 / 2, ln 2 / 2], a Taylor polynomial with the remainder
  // below r^8 / 8!.
  static GFLOWGR_INLINE Floats exp_not_positive(const Floats& x) {
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

  // 2^x for x <= 127, relative error below 1e-6 (2e-7 but for the rounding of x); 0 at and below -127, -inf
  // included; NaN for NaN.
  static GFLOWGR_INLINE Floats exp2(const Floats& exponent) {
    const Floats least = broadcast(-127.0f);
    const Floats x = least > exponent ? least : exponent;  // in this order a NaN stays one
    const Floats shifted = x + 12582912.0f;
    const Floats r = x - (shifted - 12582912.0f);
    Floats p = r * 1.54035304e-4f + 1.33335581e-3f;  // ln(2)^k / k!
    p = p * r + 9.61812911e-3f;
    p = p * r + 5.55041087e-2f;
    p = p * r + 2.40226507e-1f;
    p = p * r + 6.93147181e-1f;
    p = p * r + 1.0f;
    return p * bit_cast<Floats>((bit_cast<Words>(shifted) + 127u) << 23);
  }

  // log(x) for a normal 0 < x < infinity to 2 units in the last place: x = 2^n m, m in [sqrt(1/2), sqrt(2)), and
  // the odd series of log m in s = (m - 1) / (m + 1).
  static GFLOWGR_INLINE Floats log_positive(const Floats& x) {
    const Words bits = bit_cast<Words>(x) - 0x3f3504f3u;  // of sqrt(1/2)
    const Floats m = bit_cast<Floats>((bits & 0x007fffffu) + 0x3f3504f3u);
    const Floats s = (m - 1.0f) / (m + 1.0f), z = s * s;
    Floats p = broadcast(2.0f / 9);
    p = p * z + 2.0f / 7;
    p = p * z + 2.0f / 5;
    p = p * z + 2.0f / 3;
    p = p * z + 2.0f;
    return Types::floats(bit_cast<Ints>(bits) >> 23) * 0.693147180f + s * p;
  }

  // ---------------------------------------------------------------- memory

  static GFLOWGR_INLINE Floats load(const float* from) {
    Floats x;
    std::memcpy(&x, from, sizeof(x));
    return x;
  }
  static GFLOWGR_INLINE Floats load(const Bfloat* from) { return bit_cast<Floats>(load_bits(from) << 16); }
  static GFLOWGR_INLINE Floats load(const Half* from) {
    const Words bits = load_bits(from), rest = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
    // The exponents of the two formats are 112 apart. A subnormal number is what its bits say above 2^-14.
    const Words small = bit_cast<Words>(bit_cast<Floats>(rest + (113u << 23)) - 0x1p-14f);
    const Words finite = rest < (1u << 23) ? small : rest + (112u << 23);
    const Words value = rest >= (31u << 23) ? rest | 0x7f800000u : finite;  // infinity, NaN
    return bit_cast<Floats>(value | sign);
  }

  static GFLOWGR_INLINE void store(float* to, const Floats& x) { std::memcpy(to, &x, sizeof(x)); }
  static GFLOWGR_INLINE void store(Bfloat* to, const Floats& x) {  // to nearest, ties to even
    const Words bits = bit_cast<Words>(x);
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    // Rounding could carry the last bits of a NaN into infinity or zero.
    store_bits(to, x == x ? rounded : (bits >> 16) | 0x40u);
  }
  static GFLOWGR_INLINE void store(Half* to, const Floats& x) {  // to nearest, ties to even
    const Words bits = bit_cast<Words>(x), sign = (bits & 0x80000000u) >> 16, rest = bits & 0x7fffffffu;
    // Normal: rebias the exponent, round at bit 13. Subnormal: adding 0.5 aligns and rounds them.
    const Words normal = (rest - (112u << 23) + 0xfffu + ((rest >> 13) & 1u)) >> 13;
    const Words small = bit_cast<Words>(bit_cast<Floats>(rest) + 0.5f) - 0x3f000000u;
    const Words finite = rest < (113u << 23) ? small : normal;
    const Words infinite = Words{} + 0x7c00u, not_a_number = Words{} + 0x7e00u;
    const Words over = rest > 0x7f800000u ? not_a_number : infinite;
    store_bits(to, sign | (rest >= 0x477ff000u ? over : finite));
  }

  // The first `count` <= kLanes elements; the other lanes are `fill`.
  template <typename Element>
  static GFLOWGR_INLINE Floats load_some(const Element* from, int64_t count, float fill) {
    Element some[kLanes];
    store(some, broadcast(fill));
    copy_some(some, from, count);
    return load(some);
  }
  // The `count` < kLanes numbers before `end` in the last lanes, 0 in the others; kLanes numbers before `end` are
  // read. Faster than load_some, whose load depends on its own stores.
  static GFLOWGR_INLINE Floats load_last(const float* end, int64_t count) {
    return first_lanes(kLanes - count) ? Floats{} : load(end - kLanes);
  }
  template <typename Element>
  static GFLOWGR_INLINE void store_some(Element* to, const Floats& x, int64_t count) {
    Element some[kLanes];
    store(some, x);
    copy_some(to, some, count);
  }

  // `count` elements as floats, and floats as elements.
  template <typename Element>
  static GFLOWGR_INLINE void widen(const Element* from, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
    if (i < count) store_some(to + i, load_some(from + i, count - i, 0.0f), count - i);
  }
  template <typename Element>
  static GFLOWGR_INLINE void narrow(const float* from, int64_t count, Element* to) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
    if (i < count) store_some(to + i, load_some(from + i, count - i, 0.0f), count - i);
  }

  // One element.
  template <typename Element>
  static GFLOWGR_INLINE float widen(Element x) {
    float wide;
    widen(&x, 1, &wide);
    return wide;
  }
  template <typename Element>
  static GFLOWGR_INLINE Element narrow(float x) {
    Element narrowed;
    narrow(&x, 1, &narrowed);
    return narrowed;
  }

 private:
  static GFLOWGR_INLINE Words load_bits(const void* from) {
    Shorts bits;
    std::memcpy(&bits, from, sizeof(bits));
    return Types::words(bits);
  }
  static GFLOWGR_INLINE void store_bits(void* to, const Words& x) {
    const Shorts bits = Types::shorts(x);
    std::memcpy(to, &bits, sizeof(bits));
  }
  // Copies in powers of two, because memcpy with a variable length would be a function call.
  template <typename Element>
  static GFLOWGR_INLINE void copy_some(Element* to, const Element* from, int64_t count) {
    if (count == kLanes) {
      std::memcpy(to, from, kLanes * sizeof(Element));
      return;
    }
    if constexpr (kLanes > 8) count = copy_part<8>(to, from, count);
    if constexpr (kLanes > 4) count = copy_part<4>(to, from, count);
    if constexpr (kLanes > 2) count = copy_part<2>(to, from, count);
    copy_part<1>(to, from, count);
  }
  template <int64_t size, typename Element>
  static GFLOWGR_INLINE int64_t copy_part(Element*& to, const Element*& from, int64_t count) {
    if (count < size) return count;
    std::memcpy(to, from, size * sizeof(Element));
    to += size;
    from += size;
    return count - size;
  }
};

}  // namespace gflowgr
