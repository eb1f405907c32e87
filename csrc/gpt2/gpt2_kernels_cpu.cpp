#include "gpt2/gpt2_kernels_cpu.h"

#include <cmath>
#include <limits>

#include "common/simd.h"

namespace gflowgr {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <typename S>
GFLOWGR_INLINE void norm_body(const float* from, const float* weight, const float* bias, float epsilon, int64_t width,
                              float* to) {
  typedef typename S::Floats Floats;
  const auto count = static_cast<float>(width);
  Floats sums[S::kParts] = {}, squares[S::kParts] = {};
  for (int64_t i = 0; i < width; i += kGroup) {
    for (int64_t j = 0; j < S::kParts; ++j) sums[j] = sums[j] + S::load(from + i + j * S::kLanes);
  }
  const float mean = S::total(sums) / count;
  for (int64_t i = 0; i < width; i += kGroup) {
    for (int64_t j = 0; j < S::kParts; ++j) {
      const Floats apart = S::load(from + i + j * S::kLanes) - mean;
      squares[j] = squares[j] + apart * apart;
    }
  }
  const float factor = 1.0f / std::sqrt(S::total(squares) / count + epsilon);
  for (int64_t i = 0; i < width; i += S::kLanes) {
    S::store(to + i, (S::load(from + i) - mean) * factor * S::load(weight + i) + S::load(bias + i));
  }
}

template <typename S>
GFLOWGR_INLINE void add_body(float* x, const float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += S::kLanes) S::store(x + i, S::load(x + i) + S::load(y + i));
}

template <typename S>
GFLOWGR_INLINE void attend_body(const Gpt2Attend& a) {
  typedef typename S::Floats Floats;
  const int64_t count = a.padded + (a.steps + kGroup - 1) / kGroup * kGroup;
  float* const own = a.scores + a.padded;
  for (int64_t t = 0; t < a.steps; ++t) {
    const float* const key = a.keys[t] + a.offset;
    Floats product[S::kParts] = {};
    for (int64_t c = 0; c < a.size; c += kGroup) {
      for (int64_t j = 0; j < S::kParts; ++j) {
        const int64_t at = c + j * S::kLanes;
        product[j] = product[j] + S::load(a.query + at) * S::load(key + at);
      }
    }
    own[t] = a.scaling * S::total(product);
  }
  for (int64_t t = a.steps; t < count - a.padded; ++t) own[t] = -kInfinity;
  Floats best = S::broadcast(-kInfinity);
  for (int64_t i = 0; i < a.padded; i += S::kLanes) {
    const Floats score = S::load(a.scores + i) * a.scaling + S::load(a.mask + i);
    S::store(a.scores + i, score);
    best = S::maximum(best, score);
  }
  for (int64_t i = a.padded; i < count; i += S::kLanes) best = S::maximum(best, S::load(a.scores + i));
  const float most = S::largest(best);
  Floats sums[S::kParts] = {};
  for (int64_t i = 0; i < count; i += kGroup) {
    for (int64_t j = 0; j < S::kParts; ++j) {
      float* const at = a.scores + i + j * S::kLanes;
      const Floats power = S::exp_not_positive(S::load(at) - most);
      S::store(at, power);
      sums[j] = sums[j] + power;
    }
  }
  const float total = S::total(sums);
  for (int64_t i = 0; i < count; i += S::kLanes) S::store(a.scores + i, S::load(a.scores + i) / total);
  for (int64_t c = 0; c < a.size; c += S::kLanes) {
    Floats mixed{};
    for (int64_t t = 0; t < a.steps; ++t) mixed = mixed + S::load(a.values[t] + a.offset + c) * own[t];
    S::store(a.mixed + c, mixed);
  }
}

#define GFLOWGR_DEFINE(name, bytes, attribute)                                                                \
  attribute void norm_##name(const float* from, const float* weight, const float* bias, float epsilon,        \
                             int64_t width, float* to) {                                                      \
    norm_body<Simd<bytes>>(from, weight, bias, epsilon, width, to);                                           \
  }                                                                                                           \
  attribute void add_##name(float* x, const float* y, int64_t count) { add_body<Simd<bytes>>(x, y, count); }  \
  attribute void attend_##name(const Gpt2Attend& a) { attend_body<Simd<bytes>>(a); }                          \
  constexpr Gpt2Kernels name = {norm_##name, add_##name, attend_##name};
GFLOWGR_EACH_TARGET(GFLOWGR_DEFINE)
#undef GFLOWGR_DEFINE

}  // namespace

const Gpt2Kernels& gpt2_kernels() { return GFLOWGR_BEST(portable, avx2, avx512); }

}  // namespace gflowgr
