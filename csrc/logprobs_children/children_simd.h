// The bodies of ChildrenKernels. No include guard: children_kernels_cpu.cpp includes this file once for
// each instruction set, with GFLOWGR_SIMD (namespace), GFLOWGR_SIMD_BYTES (of a vector), GFLOWGR_TARGET
// (attribute of functions) and the shapes of the register blocks defined:
//   GFLOWGR_DOT_ROWS x GFLOWGR_DOT_COLUMNS accumulators, GFLOWGR_SUM_ROWS x GFLOWGR_SUM_VECTORS.

namespace gflowgr {
namespace GFLOWGR_SIMD {

constexpr int kLanes = GFLOWGR_SIMD_BYTES / 4;
typedef float Vec __attribute__((vector_size(GFLOWGR_SIMD_BYTES)));
typedef float LooseVec __attribute__((vector_size(GFLOWGR_SIMD_BYTES), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(GFLOWGR_SIMD_BYTES)));

#define GFLOWGR_INLINE GFLOWGR_TARGET inline __attribute__((always_inline))

GFLOWGR_INLINE Vec load(const float* from) { return *reinterpret_cast<const LooseVec*>(from); }
GFLOWGR_INLINE void store(float* to, Vec value) { *reinterpret_cast<LooseVec*>(to) = value; }

// The first `count` < kLanes numbers; the other lanes are 0.
GFLOWGR_INLINE Vec load_some(const float* from, int64_t count) {
#if GFLOWGR_SIMD_BYTES == 64
  return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
#else
  Vec value = {};
  for (int i = 0; i < kLanes - 1; ++i) value[i] = i < count ? from[i] : 0.0f;
  return value;
#endif
}
GFLOWGR_INLINE void store_some(float* to, Vec value, int64_t count) {
#if GFLOWGR_SIMD_BYTES == 64
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), (__m512)value);
#else
  for (int i = 0; i < kLanes - 1; ++i) {
    if (i < count) to[i] = value[i];
  }
#endif
}

GFLOWGR_INLINE float sum_lanes(Vec value) {
#if GFLOWGR_SIMD_BYTES == 64
  // Not _mm512_reduce_add_ps: GCC 12 warns inside it. The masks keep undefined values out.
  const __m512 all = (__m512)value;
  const __m256 lower = _mm512_maskz_extractf32x8_ps(0xFF, all, 0);
  const __m256 eight = _mm256_add_ps(lower, _mm512_maskz_extractf32x8_ps(0xFF, all, 1));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
#else
  float lane[kLanes];
  __builtin_memcpy(lane, &value, sizeof value);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
#endif
}

// ------------------------------------------------------------------ dots

template <int M, int N>
GFLOWGR_TARGET void dot_block(const float* const* a, const float* const* b, int64_t d, float* out,
                              int64_t stride) {
  Vec sum[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) sum[i][j] = Vec{};
  }
  const float* left[M];
  const float* right[N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) left[i] = a[i];
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) right[j] = b[j];
  int64_t x = 0;
  for (; x + kLanes <= d; x += kLanes) {
    Vec u[M];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) u[i] = load(left[i] + x);
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      const Vec v = load(right[j] + x);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) sum[i][j] += u[i] * v;
    }
  }
  if (x < d) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      const Vec v = load_some(right[j] + x, d - x);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) sum[i][j] += load_some(left[i] + x, d - x) * v;
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) {
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) out[i * stride + j] = sum_lanes(sum[i][j]);
  }
}

template <int M>
GFLOWGR_TARGET void dot_rows(const float* const* a, const float* const* b, int64_t n, int64_t d, float* out,
                             int64_t stride) {
  switch (n) {
    case 1: return dot_block<M, 1>(a, b, d, out, stride);
    case 2: return dot_block<M, 2>(a, b, d, out, stride);
    case 3: return dot_block<M, 3>(a, b, d, out, stride);
    case 4: return dot_block<M, 4>(a, b, d, out, stride);
#if GFLOWGR_DOT_COLUMNS > 4
    case 5: return dot_block<M, 5>(a, b, d, out, stride);
    case 6: return dot_block<M, 6>(a, b, d, out, stride);
#endif
  }
}

// The size of the blocks when `count` is cut into as few as possible of nearly equal size.
GFLOWGR_INLINE int64_t even_block(int64_t count, int64_t most) {
  const int64_t blocks = (count + most - 1) / most;
  return (count + blocks - 1) / blocks;
}

GFLOWGR_TARGET void dots(const float* const* a, int64_t m, const float* const* b, int64_t n, int64_t d,
                         float* out, int64_t stride) {
  const int64_t rows = even_block(m, GFLOWGR_DOT_ROWS), columns = even_block(n, GFLOWGR_DOT_COLUMNS);
  // The rows of one block of columns stay in the first cache while the rows of `a` pass.
  for (int64_t j = 0; j < n; j += columns) {
    const int64_t wide = n - j < columns ? n - j : columns;
    for (int64_t i = 0; i < m; i += rows) {
      float* const to = out + i * stride + j;
      switch (m - i < rows ? m - i : rows) {
        case 1: dot_rows<1>(a + i, b + j, wide, d, to, stride); break;
        case 2: dot_rows<2>(a + i, b + j, wide, d, to, stride); break;
        case 3: dot_rows<3>(a + i, b + j, wide, d, to, stride); break;
#if GFLOWGR_DOT_ROWS > 3
        case 4: dot_rows<4>(a + i, b + j, wide, d, to, stride); break;
#endif
      }
    }
  }
}

// ------------------------------------------------------------------ accumulate

template <int M, int N, bool kSome>
GFLOWGR_TARGET void sum_block(float* const* out, const float* a, int64_t row_step, int64_t step,
                              const float* const* b, int64_t count, int64_t x, int64_t some, bool add) {
  Vec sum[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      if (!add) {
        sum[i][j] = Vec{};
      } else {
        sum[i][j] = kSome ? load_some(out[i] + x, some) : load(out[i] + x + j * kLanes);
      }
    }
  }
  for (int64_t p = 0; p < count; ++p) {
    Vec v[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) v[j] = kSome ? load_some(b[p] + x, some) : load(b[p] + x + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const float factor = a[i * row_step + p * step];
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sum[i][j] += factor * v[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      if (kSome) {
        store_some(out[i] + x, sum[i][j], some);
      } else {
        store(out[i] + x + j * kLanes, sum[i][j]);
      }
    }
  }
}

template <int N, bool kSome>
GFLOWGR_TARGET void sum_rows(float* const* out, int64_t m, const float* a, int64_t row_step, int64_t step,
                             const float* const* b, int64_t count, int64_t x, int64_t some, bool add) {
  const int64_t rows = even_block(m, GFLOWGR_SUM_ROWS);
  for (int64_t i = 0; i < m; i += rows) {
    const float* const from = a + i * row_step;
    switch (m - i < rows ? m - i : rows) {
      case 1: sum_block<1, N, kSome>(out + i, from, row_step, step, b, count, x, some, add); break;
      case 2: sum_block<2, N, kSome>(out + i, from, row_step, step, b, count, x, some, add); break;
      case 3: sum_block<3, N, kSome>(out + i, from, row_step, step, b, count, x, some, add); break;
      case 4: sum_block<4, N, kSome>(out + i, from, row_step, step, b, count, x, some, add); break;
      case 5: sum_block<5, N, kSome>(out + i, from, row_step, step, b, count, x, some, add); break;
      case 6: sum_block<6, N, kSome>(out + i, from, row_step, step, b, count, x, some, add); break;
    }
  }
}

GFLOWGR_TARGET void accumulate(float* const* out, int64_t m, const float* a, int64_t row_step, int64_t step,
                               const float* const* b, int64_t count, int64_t width, bool add) {
  int64_t x = 0;
  for (; x + GFLOWGR_SUM_VECTORS * kLanes <= width; x += GFLOWGR_SUM_VECTORS * kLanes) {
    sum_rows<GFLOWGR_SUM_VECTORS, false>(out, m, a, row_step, step, b, count, x, 0, add);
  }
  for (; x + kLanes <= width; x += kLanes) {
    sum_rows<1, false>(out, m, a, row_step, step, b, count, x, 0, add);
  }
  if (x < width) sum_rows<1, true>(out, m, a, row_step, step, b, count, x, width - x, add);
}

// ------------------------------------------------------------------ softmax

// e^x for x <= 0, within 2 ulp; 0 where e^x is below the normal numbers, NaN for NaN.
GFLOWGR_INLINE Vec exp_negative(Vec x) {
  const IntVec tiny = x < -87.33654f;
  const Vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const Vec n = shifted - 12582912.0f;
  Vec r = x - n * 0.693145752f;  // ln 2 in two parts, the first exact times n
  r = r - n * 1.42860677e-6f;
  Vec p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  IntVec bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + (127 << 23);
  Vec scale;
  __builtin_memcpy(&scale, &bits, sizeof bits);
  return tiny ? Vec{} : p * scale;
}

// True in the first `count` lanes.
GFLOWGR_INLINE IntVec first_lanes(int64_t count) {
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(count);
}

GFLOWGR_TARGET float softmax(float* x, int64_t count, const float* bias, float temperature, int64_t target) {
  const float low = -__builtin_inff();
  const Vec lows = Vec{} + low;
  const int64_t whole = count / kLanes * kLanes, some = count - whole;
  Vec tops = lows, last = lows;
  for (int64_t j = 0; j < whole; j += kLanes) {
    Vec value = load(x + j);
    if (bias != nullptr) value += load(bias + j);
    if (temperature != 1.0f) value /= temperature;
    store(x + j, value);
    tops = value > tops ? value : tops;
  }
  if (some > 0) {
    last = load_some(x + whole, some);
    if (bias != nullptr) last += load_some(bias + whole, some);
    if (temperature != 1.0f) last /= temperature;
    store_some(x + whole, last, some);
    last = first_lanes(some) ? last : lows;
    tops = last > tops ? last : tops;
  }
  float top = low;
  for (int i = 0; i < kLanes; ++i) top = tops[i] > top ? tops[i] : top;
  const float chosen = x[target];
  if (chosen == low) {
    for (int64_t j = 0; j < count; ++j) x[j] = 0.0f;
    return low;
  }
  x[target] = low;
  Vec sums = {};
  for (int64_t j = 0; j < whole; j += kLanes) {
    const Vec value = exp_negative(load(x + j) - top);
    sums += value;
    store(x + j, value);
  }
  if (some > 0) {
    last = first_lanes(some) ? load_some(x + whole, some) : lows;
    last = exp_negative(last - top);
    sums += last;
  }
  const float others = sum_lanes(sums);
  const float own = chosen == top ? 1.0f : __builtin_expf(chosen - top);
  const float factor = 1.0f / (own + others);
  for (int64_t j = 0; j < whole; j += kLanes) store(x + j, load(x + j) * -factor);
  if (some > 0) store_some(x + whole, last * -factor, some);
  x[target] = others * factor;
  if (chosen == top) return -__builtin_log1pf(others);
  return (chosen - top) - __builtin_logf(own + others);
}

// ------------------------------------------------------------------ 16-bit numbers

GFLOWGR_INLINE float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
GFLOWGR_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

GFLOWGR_TARGET void widen(const void* from, Store store, float* to, int64_t count) {
  if (store == Store::float32) {
    __builtin_memcpy(to, from, count * 4);
    return;
  }
  const uint16_t* const half = static_cast<const uint16_t*>(from);
  if (store == Store::bfloat16) {
    for (int64_t i = 0; i < count; ++i) to[i] = float_of(static_cast<uint32_t>(half[i]) << 16);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t sign = static_cast<uint32_t>(half[i] & 0x8000) << 16;
    const uint32_t rest = static_cast<uint32_t>(half[i] & 0x7FFF) << 13;
    const uint32_t normal = rest + (112u << 23);  // the exponents' biases differ by 112
    const uint32_t small = bits_of(float_of(rest + (113u << 23)) - 0x1p-14f);
    uint32_t bits = rest < (1u << 23) ? small : normal;
    bits = rest >= (31u << 23) ? rest | 0x7F800000u : bits;  // infinity, NaN
    to[i] = float_of(bits | sign);
  }
}

GFLOWGR_TARGET void narrow(const float* from, Store store, void* to, int64_t count) {
  if (store == Store::float32) {
    __builtin_memcpy(to, from, count * 4);
    return;
  }
  uint16_t* const half = static_cast<uint16_t*>(to);
  if (store == Store::bfloat16) {
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = bits_of(from[i]);
      const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // ties to even
      half[i] = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_of(from[i]);
    const uint32_t sign = (bits >> 16) & 0x8000;
    const uint32_t rest = bits & 0x7FFFFFFF;
    // Adding 1/2 leaves, rounded, the multiple of 2^-24 that a subnormal number is.
    const uint32_t small = bits_of(float_of(rest) + 0.5f) - bits_of(0.5f);
    const uint32_t normal = (rest - (112u << 23) + 0xFFF + ((rest >> 13) & 1)) >> 13;
    uint32_t value = rest < (113u << 23) ? small : normal;
    value = rest >= (143u << 23) ? 0x7C00 : value;
    value = rest > 0x7F800000 ? 0x7E00 : value;
    half[i] = static_cast<uint16_t>(value | sign);
  }
}

const ChildrenKernels kernels = {GFLOWGR_SIMD_NAME, dots, accumulate, softmax, widen, narrow};

}  // namespace GFLOWGR_SIMD
}  // namespace gflowgr

#undef GFLOWGR_INLINE
#undef GFLOWGR_SIMD
#undef GFLOWGR_SIMD_NAME
#undef GFLOWGR_SIMD_BYTES
#undef GFLOWGR_TARGET
#undef GFLOWGR_DOT_ROWS
#undef GFLOWGR_DOT_COLUMNS
#undef GFLOWGR_SUM_ROWS
#undef GFLOWGR_SUM_VECTORS
