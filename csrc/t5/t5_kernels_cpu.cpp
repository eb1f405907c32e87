#include "t5/t5_kernels_cpu.h"

#include <cmath>
#include <limits>

#include "common/simd_cpu.h"

namespace gflowgr {
namespace {

static_assert(kT5Lanes % kLanes == 0, "blocks of lanes are whole vectors");

constexpr float kInfinity = std::numeric_limits<float>::infinity();

GFLOWGR_INLINE void norm_body(const float* from, const float* weight, float epsilon, int64_t rows, int64_t lanes,
                              float* to) {
  for (int64_t lane_0 = 0; lane_0 < lanes; lane_0 += kLanes) {
    Lanes squares{};
    for (int64_t i = 0; i < rows; ++i) {
      const Lanes x = load(from + i * lanes + lane_0);
      squares = squares + x * x;
    }
    float factors[kLanes];
    store(factors, squares);
    for (float& factor : factors) factor = 1.0f / std::sqrt(factor / static_cast<float>(rows) + epsilon);
    const Lanes factor = load(factors);
    for (int64_t i = 0; i < rows; ++i) {
      store(to + i * lanes + lane_0, load(from + i * lanes + lane_0) * factor * weight[i]);
    }
  }
}

// x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3): x (1 + tanh u) / 2.
GFLOWGR_INLINE Lanes gelu(Lanes x) {
  const Lanes twice = (x + x * x * x * 0.044715f) * 1.5957691216057308f;
  const Lanes power = exp_not_positive(twice > Lanes{} ? -twice : twice);
  const Lanes one = broadcast(1.0f);
  return x * (twice > Lanes{} ? one : power) / (one + power);
}

template <Activation kind>
GFLOWGR_INLINE void activate_all(float* x, const float* gate, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Lanes value = load(x + i);
    // A NaN is not below zero.
    Lanes active = kind == Activation::relu ? (value < Lanes{} ? Lanes{} : value) : gelu(value);
    if (gate != nullptr) active = active * load(gate + i);
    store(x + i, active);
  }
}

GFLOWGR_INLINE void activate_body(Activation kind, float* x, const float* gate, int64_t count) {
  if (kind == Activation::relu) {
    activate_all<Activation::relu>(x, gate, count);
  } else {
    activate_all<Activation::gelu>(x, gate, count);
  }
}

GFLOWGR_INLINE void softmax_body(const T5Softmax& s) {
  for (int64_t lane_0 = 0; lane_0 < s.lanes; lane_0 += kLanes) {
    Lanes best = broadcast(-kInfinity);
    for (int64_t j = 0; j < s.keys; ++j) {
      float* const at = s.scores + j * s.lanes + lane_0;
      Lanes score = load(at);
      if (s.bias != nullptr) score = score + load(s.bias + lane_0 - j);
      score = score + s.mask[j];
      store(at, score);
      best = maximum(best, score);
    }
    Lanes sum{};
    for (int64_t j = 0; j < s.keys; ++j) {
      float* const at = s.scores + j * s.lanes + lane_0;
      const Lanes power = exp_not_positive(load(at) - best);
      store(at, power);
      sum = sum + power;
    }
    for (int64_t j = s.keys; j < s.padded; ++j) store(s.scores + j * s.lanes + lane_0, Lanes{});
    store(s.sum + lane_0, sum);
  }
}

GFLOWGR_INLINE void own_body(const T5Own& o) {
  const int64_t padded = (o.steps + kLanes - 1) / kLanes * kLanes;
  for (int64_t head = 0; head < o.heads; ++head) {
    const int64_t first = head * o.size;
    for (int64_t t = 0; t < o.steps; ++t) {
      Lanes product{};
      for (int64_t c = first; c < first + o.size; c += kLanes) {
        product = product + load(o.query + c) * load(o.keys[t] + c);
      }
      o.weights[t] = total(product) + o.bias[t * o.heads + head];
    }
    for (int64_t t = o.steps; t < padded; ++t) o.weights[t] = -kInfinity;
    Lanes highest = load(o.weights);
    for (int64_t t = kLanes; t < padded; t += kLanes) highest = maximum(highest, load(o.weights + t));
    const float best = largest(highest);
    float sum = 0;
    for (int64_t t = 0; t < padded; t += kLanes) {
      const Lanes power = exp_not_positive(load(o.weights + t) - best);
      store(o.weights + t, power);
      sum += total(power);
    }
    for (int64_t c = first; c < first + o.size; c += kLanes) {
      Lanes mixed{};
      for (int64_t t = 0; t < o.steps; ++t) mixed = mixed + load(o.values[t] + c) * o.weights[t];
      store(o.mixed + c, mixed / sum);
    }
  }
}

// Four rows at a time, so that products need not wait for each other.
GFLOWGR_INLINE void one_body(const T5One& p) {
  constexpr int64_t kRows = 4;
  for (int64_t first = 0; first < p.rows; first += kRows) {
    const int64_t count = first + kRows < p.rows ? kRows : p.rows - first;
    const float* rows[kRows];
    Lanes products[kRows] = {};
    for (int64_t r = 0; r < kRows; ++r) rows[r] = p.weight + (first + (r < count ? r : 0)) * p.stride;
    int64_t i = 0;
    for (; i + kLanes <= p.depth; i += kLanes) {
      const Lanes x = load(p.x + i);
      for (int64_t r = 0; r < kRows; ++r) products[r] = products[r] + load(rows[r] + i) * x;
    }
    for (int64_t r = 0; r < count; ++r) {
      float sum = total(products[r]);
      for (int64_t rest = i; rest < p.depth; ++rest) sum += rows[r][rest] * p.x[rest];
      float& to = p.to[(first + r) * p.to_stride];
      to = p.add ? to + sum : sum;
    }
  }
}

#define GFLOWGR_KERNELS(name, attribute)                                                                    \
  attribute void norm_##name(const float* from, const float* weight, float epsilon, int64_t rows,           \
                             int64_t lanes, float* to) {                                                    \
    norm_body(from, weight, epsilon, rows, lanes, to);                                                      \
  }                                                                                                         \
  attribute void activate_##name(Activation kind, float* x, const float* gate, int64_t count) {             \
    activate_body(kind, x, gate, count);                                                                    \
  }                                                                                                         \
  attribute void softmax_##name(const T5Softmax& s) { softmax_body(s); }                                    \
  attribute void own_##name(const T5Own& o) { own_body(o); }                                                \
  attribute void one_##name(const T5One& p) { one_body(p); }                                                \
  constexpr T5Kernels name = {norm_##name, activate_##name, softmax_##name, own_##name, one_##name};

GFLOWGR_KERNELS(baseline, )
#ifdef GFLOWGR_X86
GFLOWGR_KERNELS(avx2, GFLOWGR_AVX2)
GFLOWGR_KERNELS(avx512, GFLOWGR_AVX512)
#endif

}  // namespace

const T5Kernels& t5_kernels() {
#ifdef GFLOWGR_X86
  if (simd_level() == SimdLevel::avx512) return avx512;
  if (simd_level() == SimdLevel::avx2) return avx2;
#endif
  return baseline;
}

}  // namespace gflowgr
