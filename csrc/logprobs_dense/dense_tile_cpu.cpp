#include "logprobs_dense/dense_tile_cpu.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "common/simd.h"

namespace gflowgr {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <typename S>
GFLOWGR_INLINE bool raise_body(const TileScores& t, float* factor) {
  typedef typename S::Floats Floats;
  bool any = false;
  for (int64_t first = 0; first < t.tokens; first += kGroup) {
    Floats top[S::kParts];
    for (auto& part : top) part = S::broadcast(-kInfinity);
    for (int64_t row = 0; row < t.rows; ++row) {
      const float bias = t.bias == nullptr ? 0.0f : t.bias[row];
      for (int64_t j = 0; j < S::kParts; ++j) {
        top[j] = S::maximum(S::load(t.logits + row * t.tokens + first + j * S::kLanes) * t.scale + bias, top[j]);
      }
    }
    float tops[kGroup];
    for (int64_t j = 0; j < S::kParts; ++j) S::store(tops + j * S::kLanes, top[j]);
    for (int64_t i = 0; i < kGroup; ++i) {
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

template <typename S>
GFLOWGR_INLINE void exponentiate_body(const TileScores& t, float* exps) {
  typedef typename S::Floats Floats;
  for (int64_t first = 0; first < t.tokens; first += kGroup) {
    Floats reference[S::kParts], sum[S::kParts] = {};
    for (int64_t j = 0; j < S::kParts; ++j) {
      reference[j] = S::load(t.reference + first + j * S::kLanes);
      // All so far forbidden: 2^-inf is 0.
      reference[j] = reference[j] == S::broadcast(-kInfinity) ? Floats{} : reference[j];
    }
    for (int64_t row = 0; row < t.rows; ++row) {
      const float bias = t.bias == nullptr ? 0.0f : t.bias[row];
      for (int64_t j = 0; j < S::kParts; ++j) {
        const int64_t at = row * t.tokens + first + j * S::kLanes;
        const Floats value = S::exp2((S::load(t.logits + at) * t.scale + bias) - reference[j]);
        S::store(exps + at, value);
        sum[j] += value;
      }
    }
    for (int64_t j = 0; t.sum != nullptr && j < S::kParts; ++j) {
      float* const to = t.sum + first + j * S::kLanes;
      S::store(to, S::load(to) + sum[j]);
    }
  }
}

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

GFLOWGR_INLINE void interleave_body(const uint16_t* first, const uint16_t* second, int64_t count,
                                    uint16_t* to) {
  auto* const pairs = reinterpret_cast<unsigned char*>(to);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t pair = static_cast<uint32_t>(first[i]) | static_cast<uint32_t>(second[i]) << 16;
    std::memcpy(pairs + 4 * i, &pair, 4);
  }
}

GFLOWGR_INLINE float dot_body(const float* a, const float* b, int64_t count) {
  float part[kGroup] = {};
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) {
    for (int j = 0; j < kGroup; ++j) part[j] += a[i + j] * b[i + j];
  }
  float total = 0.0f;
  for (int j = 0; j < kGroup; ++j) total += part[j];
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

GFLOWGR_INLINE void multiply_body(const float* a, const float* b, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = a[i] * b[i];
}

#define GFLOWGR_DEFINE(name, bytes, attribute)                                                         \
  attribute bool raise_##name(const TileScores& t, float* factor) {                                    \
    return raise_body<Simd<bytes>>(t, factor);                                                         \
  }                                                                                                    \
  attribute void exponentiate_##name(const TileScores& t, float* exps) {                               \
    exponentiate_body<Simd<bytes>>(t, exps);                                                           \
  }                                                                                                    \
  attribute void transpose_##name(const uint32_t* from, int64_t from_stride, int64_t rows,             \
                                  int64_t columns, uint32_t* to, int64_t to_stride) {                  \
    transpose_body(from, from_stride, rows, columns, to, to_stride);                                   \
  }                                                                                                    \
  attribute void interleave_##name(const uint16_t* first, const uint16_t* second, int64_t count,       \
                                   uint16_t* to) {                                                     \
    interleave_body(first, second, count, to);                                                         \
  }                                                                                                    \
  attribute float dot_##name(const float* a, const float* b, int64_t count) {                          \
    return dot_body(a, b, count);                                                                      \
  }                                                                                                    \
  attribute void multiply_##name(const float* a, const float* b, int64_t count, float* to) {           \
    multiply_body(a, b, count, to);                                                                    \
  }                                                                                                    \
  constexpr TileKernels name = {raise_##name,      exponentiate_##name, transpose_##name,              \
                                interleave_##name, dot_##name,          multiply_##name};
GFLOWGR_EACH_TARGET(GFLOWGR_DEFINE)
#undef GFLOWGR_DEFINE

}  // namespace

const TileKernels& tile_kernels() { return GFLOWGR_BEST(portable, avx2, avx512); }

}  // namespace gflowgr
