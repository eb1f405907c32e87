#include "beam_step/beam_kernels_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/convert_cpu.h"
#include "common/simd.h"

namespace gflowgr {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kBlock = 1024;  // values read twice while they are in the L1 cache
constexpr int64_t kGroups = 4;    // summed side by side
static_assert(kBlock % (kGroups * kGroup) == 0, "whole groups");

// NaN is ignored.
template <typename S>
GFLOWGR_INLINE float block_top(const float* x, int64_t count) {
  typedef typename S::Floats Floats;
  constexpr int64_t kTops = 4;
  Floats top[kTops];
  for (auto& t : top) t = S::broadcast(-kInfinity);
  int64_t i = 0;
  for (; i + kTops * S::kLanes <= count; i += kTops * S::kLanes) {
    for (int64_t j = 0; j < kTops; ++j) top[j] = S::maximum(S::load(x + i + j * S::kLanes), top[j]);
  }
  for (; i < count; i += S::kLanes) top[0] = S::maximum(S::load(x + i), top[0]);
  return S::largest(top);
}

// Sum of 2^((x - reference) * scale); `count` is whole groups.
template <typename S>
GFLOWGR_INLINE float block_sum(const float* x, int64_t count, float reference, float scale) {
  typedef typename S::Floats Floats;
  constexpr int64_t kSums = kGroups * S::kParts;
  Floats sum[kSums] = {};
  int64_t i = 0;
  for (; i + kGroups * kGroup <= count; i += kGroups * kGroup) {
    for (int64_t j = 0; j < kSums; ++j) sum[j] += S::exp2((S::load(x + i + j * S::kLanes) - reference) * scale);
  }
  for (; i < count; i += kGroup) {
    for (int64_t j = 0; j < S::kParts; ++j) sum[j] += S::exp2((S::load(x + i + j * S::kLanes) - reference) * scale);
  }
  Floats all[S::kParts];
  for (int64_t j = 0; j < S::kParts; ++j) {
    all[j] = (sum[j] + sum[j + S::kParts]) + (sum[j + 2 * S::kParts] + sum[j + 3 * S::kParts]);
  }
  return S::total_by_halves(all);
}

template <typename S>
GFLOWGR_INLINE float log_sum_exp_body(const void* values, Dtype type, int64_t count, double temperature) {
  alignas(64) float copy[kBlock];
  const float scale = static_cast<float>(1.4426950408889634 / temperature);
  float reference = -kInfinity;
  double sum = 0.0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t size = std::min(kBlock, count - begin);
    const int64_t padded = (size + kGroup - 1) / kGroup * kGroup;
    const float* x = static_cast<const float*>(element(values, type, begin));
    if (type != Dtype::float32 || padded != size) {
      widen(element(values, type, begin), type, size, copy);
      std::fill(copy + size, copy + padded, -kInfinity);
      x = copy;
    }
    const float top = block_top<S>(x, padded);
    if (top > reference) {
      sum *= std::exp((static_cast<double>(reference) - top) / temperature);
      reference = top;
    }
    if (reference == kInfinity) {
      // Infinity makes the sum NaN too, so look for NaN itself.
      for (int64_t i = begin; i < count; i += kBlock) {
        const int64_t rest = std::min(kBlock, count - i);
        widen(element(values, type, i), type, rest, copy);
        for (int64_t j = 0; j < rest; ++j) {
          if (std::isnan(copy[j])) return copy[j];
        }
      }
      return std::isnan(sum) ? std::numeric_limits<float>::quiet_NaN() : kInfinity;
    }
    // Where all so far are -inf, any reference will do: 2^-inf is 0.
    sum += block_sum<S>(x, padded, reference == -kInfinity ? 0.0f : reference, scale);
  }
  return static_cast<float>(static_cast<double>(reference) / temperature + std::log(sum));
}

template <typename Code>
GFLOWGR_INLINE void gather_body(const void* values, Dtype type, const Code* codes, int64_t count, float* to) {
  const auto* const floats = static_cast<const float*>(values);
  const auto* const halves = static_cast<const uint16_t*>(values);
  if (count == 0) return;
  if (static_cast<int64_t>(codes[count - 1]) - static_cast<int64_t>(codes[0]) == count - 1) {  // no gaps
    widen(element(values, type, static_cast<int64_t>(codes[0])), type, count, to);
  } else if (type == Dtype::float32) {
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

GFLOWGR_INLINE void gather_any(const void* values, Dtype type, const void* codes, int64_t code_bytes, int64_t count,
                               float* to) {
  if (code_bytes == 1) {
    gather_body(values, type, static_cast<const uint8_t*>(codes), count, to);
  } else if (code_bytes == 2) {
    gather_body(values, type, static_cast<const uint16_t*>(codes), count, to);
  } else {
    gather_body(values, type, static_cast<const uint32_t*>(codes), count, to);
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

#define GFLOWGR_DEFINE(name, bytes, attribute)                                                              \
  attribute float log_sum_exp_##name(const void* values, Dtype type, int64_t count, double temperature) {   \
    return log_sum_exp_body<Simd<bytes>>(values, type, count, temperature);                                 \
  }                                                                                                         \
  attribute void gather_##name(const void* values, Dtype type, const void* codes, int64_t code_bytes,       \
                               int64_t count, float* to) {                                                  \
    gather_any(values, type, codes, code_bytes, count, to);                                                 \
  }                                                                                                         \
  attribute void add_scores_##name(const float* logits, int64_t count, float scale, float normaliser,       \
                                   float score, float* to) {                                                \
    add_scores_body(logits, count, scale, normaliser, score, to);                                           \
  }                                                                                                         \
  attribute int64_t find_above_##name(const float* values, int64_t from, int64_t count, float threshold) {  \
    return find_above_body(values, from, count, threshold);                                                 \
  }                                                                                                         \
  constexpr BeamKernels name = {log_sum_exp_##name, gather_##name, add_scores_##name, find_above_##name};
GFLOWGR_EACH_TARGET(GFLOWGR_DEFINE)
#undef GFLOWGR_DEFINE

}  // namespace

const BeamKernels& beam_kernels() { return GFLOWGR_BEST(portable, avx2, avx512); }

}  // namespace gflowgr
