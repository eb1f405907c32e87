#include "beam_step/beam_kernels_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/lanes_cpu.h"

namespace gflowgr {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kBlock = 1024;  // values read twice while they are in the first cache
static_assert(kBlock % (4 * kWidth) == 0, "whole registers");

GFLOWGR_INLINE float largest(Lanes values) {
  float part[kWidth];
  store(part, values);
  float top = part[0];
  for (int64_t i = 1; i < kWidth; ++i) top = part[i] > top ? part[i] : top;
  return top;
}

// By halves: few additions in a row, and a rounding error that grows with log2 of the lanes.
GFLOWGR_INLINE float total(Lanes values) {
  float part[kWidth];
  store(part, values);
  for (int64_t half = kWidth / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) part[i] += part[i + half];
  }
  return part[0];
}

// NaN is passed over.
GFLOWGR_INLINE float block_top(const float* x, int64_t count) {
  Lanes top[4];
  for (auto& t : top) t = Lanes{} - kInfinity;
  int64_t i = 0;
  for (; i + 4 * kWidth <= count; i += 4 * kWidth) {
    for (int64_t j = 0; j < 4; ++j) {
      const Lanes v = load(x + i + j * kWidth);
      top[j] = v > top[j] ? v : top[j];
    }
  }
  for (; i < count; i += kWidth) {
    const Lanes v = load(x + i);
    top[0] = v > top[0] ? v : top[0];
  }
  for (int64_t j = 1; j < 4; ++j) top[0] = top[j] > top[0] ? top[j] : top[0];
  return largest(top[0]);
}

GFLOWGR_INLINE Lanes power(const float* x, float reference, float scale) {
  const Lanes least = Lanes{} - 127.0f;
  const Lanes v = (load(x) - reference) * scale;
  return exp2_in_range(least > v ? least : v);  // in this order NaN stays NaN
}

// Sum of 2^((x - reference) * scale).
GFLOWGR_INLINE float block_sum(const float* x, int64_t count, float reference, float scale) {
  Lanes sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWidth <= count; i += 4 * kWidth) {
    for (int64_t j = 0; j < 4; ++j) sum[j] += power(x + i + j * kWidth, reference, scale);
  }
  for (; i < count; i += kWidth) sum[0] += power(x + i, reference, scale);
  return total((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

GFLOWGR_INLINE float log_sum_exp_body(const void* values, Float type, int64_t count, double temperature,
                                      void (*widen)(const void*, Float, int64_t, float*)) {
  alignas(64) float copy[kBlock];
  const float scale = static_cast<float>(1.4426950408889634 / temperature);
  const int64_t bytes = type == Float::f32 ? 4 : 2;
  const char* const from = static_cast<const char*>(values);
  float reference = -kInfinity;
  double sum = 0.0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t size = std::min(kBlock, count - begin);
    const int64_t padded = (size + kWidth - 1) / kWidth * kWidth;
    const float* x = reinterpret_cast<const float*>(from + begin * bytes);
    if (type != Float::f32 || padded != size) {
      widen(from + begin * bytes, type, size, copy);
      std::fill(copy + size, copy + padded, -kInfinity);
      x = copy;
    }
    const float top = block_top(x, padded);
    if (top > reference) {
      sum *= std::exp((static_cast<double>(reference) - top) / temperature);
      reference = top;
    }
    if (reference == kInfinity) {
      // The sum would be NaN of infinity already: look for NaN itself.
      for (int64_t i = begin; i < count; i += kBlock) {
        const int64_t rest = std::min(kBlock, count - i);
        widen(from + i * bytes, type, rest, copy);
        for (int64_t j = 0; j < rest; ++j) {
          if (std::isnan(copy[j])) return copy[j];
        }
      }
      return std::isnan(sum) ? std::numeric_limits<float>::quiet_NaN() : kInfinity;
    }
    // Where all so far are -inf, any reference will do: 2^-inf is 0.
    sum += block_sum(x, padded, reference == -kInfinity ? 0.0f : reference, scale);
  }
  return static_cast<float>(static_cast<double>(reference) / temperature + std::log(sum));
}

template <typename Code>
GFLOWGR_INLINE void gather_body(const void* values, Float type, const Code* codes, int64_t count, float* to,
                                void (*widen)(const void*, Float, int64_t, float*)) {
  const auto* const floats = static_cast<const float*>(values);
  const auto* const halves = static_cast<const uint16_t*>(values);
  if (count == 0) return;
  if (static_cast<int64_t>(codes[count - 1]) - static_cast<int64_t>(codes[0]) == count - 1) {  // no gaps
    widen(type == Float::f32 ? static_cast<const void*>(floats + codes[0]) : halves + codes[0], type, count, to);
  } else if (type == Float::f32) {
    for (int64_t i = 0; i < count; ++i) to[i] = floats[codes[i]];
  } else {
    uint16_t chosen[256];
    for (int64_t i = 0; i < count; i += 256) {
      const int64_t size = std::min<int64_t>(256, count - i);
      for (int64_t j = 0; j < size; ++j) chosen[j] = halves[codes[i + j]];
      widen(chosen, type, size, to + i);
    }
  }
}

GFLOWGR_INLINE void gather_any(const void* values, Float type, const void* codes, int64_t code_bytes,
                               int64_t count, float* to, void (*widen)(const void*, Float, int64_t, float*)) {
  if (code_bytes == 1) {
    gather_body(values, type, static_cast<const uint8_t*>(codes), count, to, widen);
  } else if (code_bytes == 2) {
    gather_body(values, type, static_cast<const uint16_t*>(codes), count, to, widen);
  } else {
    gather_body(values, type, static_cast<const uint32_t*>(codes), count, to, widen);
  }
}

GFLOWGR_INLINE void add_scores_body(const float* logits, int64_t count, float scale, float normaliser,
                                    float score, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = score + (logits[i] * scale - normaliser);
}

GFLOWGR_INLINE int64_t find_above_body(const float* values, int64_t from, int64_t count, float threshold) {
  constexpr int64_t kTogether = 32;
  int64_t i = from;
  for (; i + kTogether <= count; i += kTogether) {
    int any = 0;
    for (int64_t j = 0; j < kTogether; ++j) any |= !(values[i + j] <= threshold);
    if (any != 0) break;
  }
  while (i < count && values[i] <= threshold) ++i;
  return i;
}

// kLeft x kRight dot products at once: every element that is loaded serves several of them.
template <int kLeft, int kRight>
GFLOWGR_INLINE void product_block(const float* const* left, const float* const* right, int64_t width,
                                  float* to, int64_t stride) {
  Lanes sum[kLeft][kRight] = {};
  int64_t k = 0;
  for (; k + kWidth <= width; k += kWidth) {
    Lanes a[kLeft];
    for (int i = 0; i < kLeft; ++i) a[i] = load(left[i] + k);
    for (int j = 0; j < kRight; ++j) {
      const Lanes b = load(right[j] + k);
      for (int i = 0; i < kLeft; ++i) sum[i][j] += a[i] * b;
    }
  }
  for (int i = 0; i < kLeft; ++i) {
    for (int j = 0; j < kRight; ++j) {
      float value = total(sum[i][j]);
      for (int64_t rest = k; rest < width; ++rest) value += left[i][rest] * right[j][rest];
      to[i * stride + j] = value;
    }
  }
}

template <int kLeft>
GFLOWGR_INLINE void product_rows(const float* const* left, const float* const* right, int64_t right_count,
                                 int64_t width, float* to, int64_t stride) {
  int64_t j = 0;
  for (; j + 4 <= right_count; j += 4) product_block<kLeft, 4>(left, right + j, width, to + j, stride);
  for (; j < right_count; ++j) product_block<kLeft, 1>(left, right + j, width, to + j, stride);
}

GFLOWGR_INLINE void products_body(const float* const* left, int64_t left_count, const float* const* right,
                                  int64_t right_count, int64_t width, float* to, int64_t stride) {
  int64_t i = 0;
  for (; i + 2 <= left_count; i += 2) {
    product_rows<2>(left + i, right, right_count, width, to + i * stride, stride);
  }
  if (i < left_count) product_rows<1>(left + i, right, right_count, width, to + i * stride, stride);
}

#define GFLOWGR_KERNELS(name, attribute)                                                                \
  attribute float log_sum_exp_##name(const void* values, Float type, int64_t count, double temperature) { \
    return log_sum_exp_body(values, type, count, temperature, tile_kernels().widen);                    \
  }                                                                                                     \
  attribute void gather_##name(const void* values, Float type, const void* codes, int64_t code_bytes,   \
                               int64_t count, float* to) {                                              \
    gather_any(values, type, codes, code_bytes, count, to, tile_kernels().widen);                       \
  }                                                                                                     \
  attribute void add_scores_##name(const float* logits, int64_t count, float scale, float normaliser,   \
                                   float score, float* to) {                                            \
    add_scores_body(logits, count, scale, normaliser, score, to);                                       \
  }                                                                                                     \
  attribute int64_t find_above_##name(const float* values, int64_t from, int64_t count,                 \
                                      float threshold) {                                                \
    return find_above_body(values, from, count, threshold);                                             \
  }                                                                                                     \
  attribute void products_##name(const float* const* left, int64_t left_count, const float* const* right, \
                                 int64_t right_count, int64_t width, float* to, int64_t stride) {       \
    products_body(left, left_count, right, right_count, width, to, stride);                             \
  }                                                                                                     \
  constexpr BeamKernels name = {log_sum_exp_##name, gather_##name, add_scores_##name,                   \
                                find_above_##name, products_##name};

GFLOWGR_KERNELS(baseline, )
#ifdef GFLOWGR_X86
GFLOWGR_KERNELS(avx2, GFLOWGR_AVX2)
GFLOWGR_KERNELS(avx512, GFLOWGR_AVX512)
#endif

}  // namespace

const BeamKernels& beam_kernels() {
#ifdef GFLOWGR_X86
  static const BeamKernels& best = []() -> const BeamKernels& {
    if (has_avx512()) return avx512;
    return has_avx2() ? avx2 : baseline;
  }();
  return best;
#else
  return baseline;
#endif
}

}  // namespace gflowgr
