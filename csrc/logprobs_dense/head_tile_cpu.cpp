#include "logprobs_dense/head_tile_cpu.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "common/lanes_cpu.h"

namespace gflowgr {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

static_assert(kLanes % kWidth == 0, "a tile's tokens are whole registers");

GFLOWGR_INLINE bool raise_body(const TileScores& t, float* factor) {
  bool any = false;
  for (int64_t first = 0; first < t.tokens; first += kWidth) {
    Lanes top = Lanes{} - kInfinity;
    for (int64_t row = 0; row < t.rows; ++row) {
      const Lanes x = load(t.logits + row * t.tokens + first) * t.scale +
                      (t.bias == nullptr ? 0.0f : t.bias[row]);
      top = x > top ? x : top;
    }
    float tops[kWidth];
    store(tops, top);
    for (int64_t i = 0; i < kWidth; ++i) {
      float& reference = t.reference[first + i];
      factor[first + i] = 1.0f;
      if (!(tops[i] > reference + kHeadroom)) continue;
      any = true;
      // Nothing has been accumulated over a reference of -inf: any finite factor will do.
      factor[first + i] = reference == -kInfinity ? 0.0f : std::exp2(reference - tops[i]);
      t.sum[first + i] *= factor[first + i];
      reference = tops[i];
    }
  }
  return any;
}

GFLOWGR_INLINE void exponentiate_body(const TileScores& t, float* exps) {
  for (int64_t first = 0; first < t.tokens; first += kWidth) {
    Lanes reference = load(t.reference + first);
    // All so far forbidden: 2^-inf is 0.
    reference = reference == Lanes{} - kInfinity ? Lanes{} : reference;
    Lanes total = {};
    for (int64_t row = 0; row < t.rows; ++row) {
      const int64_t at = row * t.tokens + first;
      const float bias = t.bias == nullptr ? 0.0f : t.bias[row];
      const Lanes value = exp2_approx((load(t.logits + at) * t.scale + bias) - reference);
      store(exps + at, value);
      total += value;
    }
    if (t.sum != nullptr) store(t.sum + first, load(t.sum + first) + total);
  }
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define GFLOWGR_SHUFFLE 1
#endif
#endif

#ifdef GFLOWGR_SHUFFLE
typedef uint32_t Eight __attribute__((vector_size(32), aligned(4), may_alias));

// Eight rows of eight.
GFLOWGR_INLINE void transpose_block(const uint32_t* from, int64_t from_stride, uint32_t* to,
                                    int64_t to_stride) {
  Eight a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = *reinterpret_cast<const Eight*>(from + i * from_stride);
  for (int i = 0; i < 8; i += 2) {
    b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = __builtin_shufflevector(b[i], b[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    a[i + 1] = __builtin_shufflevector(b[i], b[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    a[i + 2] = __builtin_shufflevector(b[i + 1], b[i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
    a[i + 3] = __builtin_shufflevector(b[i + 1], b[i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  for (int i = 0; i < 4; ++i) {
    *reinterpret_cast<Eight*>(to + i * to_stride) =
        __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    *reinterpret_cast<Eight*>(to + (i + 4) * to_stride) =
        __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}
#endif

GFLOWGR_INLINE void transpose_body(const uint32_t* from, int64_t from_stride, int64_t rows,
                                   int64_t columns, uint32_t* to, int64_t to_stride) {
  int64_t whole_rows = 0, whole_columns = 0;
#ifdef GFLOWGR_SHUFFLE
  whole_rows = rows / 8 * 8;
  whole_columns = columns / 8 * 8;
  for (int64_t j = 0; j < whole_columns; j += 8) {
    for (int64_t i = 0; i < whole_rows; i += 8) {
      transpose_block(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
    }
  }
#endif
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = j < whole_columns ? whole_rows : 0; i < rows; ++i) {
      to[j * to_stride + i] = from[i * from_stride + j];
    }
  }
}

GFLOWGR_INLINE void round_body(const float* from, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = to_bits(from[i]);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    // Rounding could carry the last bits of a NaN into infinity or zero.
    to[i] = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits >> 16) | 0x40u : rounded);
  }
}

GFLOWGR_INLINE void interleave_body(const uint16_t* first, const uint16_t* second, int64_t count,
                                    uint16_t* to) {
  auto* const pairs = reinterpret_cast<unsigned char*>(to);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t pair = static_cast<uint32_t>(first[i]) | static_cast<uint32_t>(second[i]) << 16;
    std::memcpy(pairs + 4 * i, &pair, 4);
  }
}

GFLOWGR_INLINE void widen_body(const void* from, Float type, int64_t count, float* to) {
  if (type == Float::f32) {
    std::memcpy(to, from, count * sizeof(float));
    return;
  }
  const auto* const bits = static_cast<const uint16_t*>(from);
  if (type == Float::bf16) {
    for (int64_t i = 0; i < count; ++i) to[i] = from_bits(static_cast<uint32_t>(bits[i]) << 16);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t sign = static_cast<uint32_t>(bits[i] & 0x8000u) << 16, rest = bits[i] & 0x7FFFu;
    // The product puts the exponent right, subnormal numbers included; infinity and NaN keep theirs.
    const uint32_t scaled = to_bits(from_bits(rest << 13) * 5.192296858534828e33f);  // 2^112
    to[i] = from_bits(sign | (rest >= 0x7C00u ? rest << 13 | 0x7F800000u : scaled));
  }
}

GFLOWGR_INLINE float dot_body(const float* a, const float* b, int64_t count) {
  float part[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) part[j] += a[i + j] * b[i + j];
  }
  float total = 0.0f;
  for (int j = 0; j < kLanes; ++j) total += part[j];
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

GFLOWGR_INLINE void multiply_body(const float* a, const float* b, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = a[i] * b[i];
}

#define GFLOWGR_KERNELS(name, attribute)                                                               \
  attribute bool raise_##name(const TileScores& t, float* factor) { return raise_body(t, factor); }    \
  attribute void exponentiate_##name(const TileScores& t, float* exps) { exponentiate_body(t, exps); } \
  attribute void transpose_##name(const uint32_t* from, int64_t from_stride, int64_t rows,             \
                                  int64_t columns, uint32_t* to, int64_t to_stride) {                  \
    transpose_body(from, from_stride, rows, columns, to, to_stride);                                   \
  }                                                                                                    \
  attribute void round_##name(const float* from, int64_t count, uint16_t* to) {                        \
    round_body(from, count, to);                                                                       \
  }                                                                                                    \
  attribute void interleave_##name(const uint16_t* first, const uint16_t* second, int64_t count,       \
                                   uint16_t* to) {                                                     \
    interleave_body(first, second, count, to);                                                         \
  }                                                                                                    \
  attribute void widen_##name(const void* from, Float type, int64_t count, float* to) {                \
    widen_body(from, type, count, to);                                                                 \
  }                                                                                                    \
  attribute float dot_##name(const float* a, const float* b, int64_t count) {                          \
    return dot_body(a, b, count);                                                                      \
  }                                                                                                    \
  attribute void multiply_##name(const float* a, const float* b, int64_t count, float* to) {           \
    multiply_body(a, b, count, to);                                                                    \
  }                                                                                                    \
  constexpr TileKernels name = {raise_##name, exponentiate_##name, transpose_##name, round_##name,     \
                                interleave_##name, widen_##name, dot_##name, multiply_##name};

GFLOWGR_KERNELS(baseline, )
#ifdef GFLOWGR_X86
GFLOWGR_KERNELS(avx2, GFLOWGR_AVX2)
GFLOWGR_KERNELS(avx512, GFLOWGR_AVX512)
#endif

}  // namespace

const TileKernels& tile_kernels() {
#ifdef GFLOWGR_X86
  static const TileKernels& best = [] () -> const TileKernels& {
    if (has_avx512()) return avx512;
    return has_avx2() ? avx2 : baseline;
  }();
  return best;
#else
  return baseline;
#endif
}

}  // namespace gflowgr
