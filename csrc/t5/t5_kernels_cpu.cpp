#include "t5/t5_kernels_cpu.h"

#include <cmath>
#include <limits>

#include "common/simd.h"

namespace gflowgr {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <typename S>
GFLOWGR_INLINE void norm_body(const float* from, const float* weight, float epsilon, int64_t rows, int64_t lanes,
                              float* to) {
  typedef typename S::Floats Floats;
  for (int64_t first = 0; first < lanes; first += kGroup) {
    Floats squares[S::kParts] = {}, factor[S::kParts];
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < S::kParts; ++j) {
        const Floats x = S::load(from + i * lanes + first + j * S::kLanes);
        squares[j] = squares[j] + x * x;
      }
    }
    float factors[kGroup];
    for (int64_t j = 0; j < S::kParts; ++j) S::store(factors + j * S::kLanes, squares[j]);
    for (float& one : factors) one = 1.0f / std::sqrt(one / static_cast<float>(rows) + epsilon);
    for (int64_t j = 0; j < S::kParts; ++j) factor[j] = S::load(factors + j * S::kLanes);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < S::kParts; ++j) {
        const int64_t at = i * lanes + first + j * S::kLanes;
        S::store(to + at, S::load(from + at) * factor[j] * weight[i]);
      }
    }
  }
}

// x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3): x (1 + tanh u) / 2.
template <typename S, typename Floats>
GFLOWGR_INLINE Floats gelu(const Floats& x) {
  const Floats twice = (x + x * x * x * 0.044715f) * 1.5957691216057308f;
  const Floats power = S::exp_not_positive(twice > Floats{} ? -twice : twice);
  const Floats one = S::broadcast(1.0f);
  return x * (twice > Floats{} ? one : power) / (one + power);
}

template <typename S, Activation kind>
GFLOWGR_INLINE void activate_all(float* x, const float* gate, int64_t count) {
  typedef typename S::Floats Floats;
  for (int64_t i = 0; i < count; i += S::kLanes) {
    const Floats value = S::load(x + i);
    // A NaN is not below zero.
    Floats active = kind == Activation::relu ? (value < Floats{} ? Floats{} : value) : gelu<S, Floats>(value);
    if (gate != nullptr) active = active * S::load(gate + i);
    S::store(x + i, active);
  }
}

template <typename S>
GFLOWGR_INLINE void activate_body(Activation kind, float* x, const float* gate, int64_t count) {
  if (kind == Activation::relu) {
    activate_all<S, Activation::relu>(x, gate, count);
  } else {
    activate_all<S, Activation::gelu>(x, gate, count);
  }
}

template <typename S>
GFLOWGR_INLINE void softmax_body(const T5Softmax& s) {
  typedef typename S::Floats Floats;
  for (int64_t first = 0; first < s.lanes; first += kGroup) {
    Floats best[S::kParts], sum[S::kParts] = {};
    for (auto& part : best) part = S::broadcast(-kInfinity);
    for (int64_t j = 0; j < s.keys; ++j) {
      for (int64_t k = 0; k < S::kParts; ++k) {
        const int64_t lane = first + k * S::kLanes;
        float* const at = s.scores + j * s.lanes + lane;
        Floats score = S::load(at);
        if (s.bias != nullptr) score = score + S::load(s.bias + lane - j);
        score = score + s.mask[j];
        S::store(at, score);
        best[k] = S::maximum(best[k], score);
      }
    }
    for (int64_t j = 0; j < s.keys; ++j) {
      for (int64_t k = 0; k < S::kParts; ++k) {
        float* const at = s.scores + j * s.lanes + first + k * S::kLanes;
        const Floats power = S::exp_not_positive(S::load(at) - best[k]);
        S::store(at, power);
        sum[k] = sum[k] + power;
      }
    }
    for (int64_t j = s.keys; j < s.padded; ++j) {
      for (int64_t k = 0; k < S::kParts; ++k) S::store(s.scores + j * s.lanes + first + k * S::kLanes, Floats{});
    }
    for (int64_t k = 0; k < S::kParts; ++k) S::store(s.sum + first + k * S::kLanes, sum[k]);
  }
}

template <typename S>
GFLOWGR_INLINE void own_body(const T5Own& o) {
  typedef typename S::Floats Floats;
  const int64_t padded = (o.steps + kGroup - 1) / kGroup * kGroup;
  for (int64_t head = 0; head < o.heads; ++head) {
    const int64_t first = head * o.size;
    for (int64_t t = 0; t < o.steps; ++t) {
      Floats product[S::kParts] = {};
      for (int64_t c = first; c < first + o.size; c += kGroup) {
        for (int64_t j = 0; j < S::kParts; ++j) {
          const int64_t at = c + j * S::kLanes;
          product[j] = product[j] + S::load(o.query + at) * S::load(o.keys[t] + at);
        }
      }
      o.weights[t] = S::total(product) + o.bias[t * o.heads + head];
    }
    for (int64_t t = o.steps; t < padded; ++t) o.weights[t] = -kInfinity;
    Floats highest = S::load(o.weights);
    for (int64_t t = S::kLanes; t < padded; t += S::kLanes) highest = S::maximum(highest, S::load(o.weights + t));
    const float best = S::largest(highest);
    float sum = 0;
    for (int64_t t = 0; t < padded; t += kGroup) {
      Floats power[S::kParts];
      for (int64_t j = 0; j < S::kParts; ++j) {
        float* const at = o.weights + t + j * S::kLanes;
        power[j] = S::exp_not_positive(S::load(at) - best);
        S::store(at, power[j]);
      }
      sum += S::total(power);
    }
    for (int64_t c = first; c < first + o.size; c += S::kLanes) {
      Floats mixed{};
      for (int64_t t = 0; t < o.steps; ++t) mixed = mixed + S::load(o.values[t] + c) * o.weights[t];
      S::store(o.mixed + c, mixed / sum);
    }
  }
}

// Four rows at a time, so that products need not wait for each other.
template <typename S>
GFLOWGR_INLINE void one_body(const T5One& p) {
  typedef typename S::Floats Floats;
  constexpr int64_t kRows = 4;
  for (int64_t first = 0; first < p.rows; first += kRows) {
    const int64_t count = first + kRows < p.rows ? kRows : p.rows - first;
    const float* rows[kRows];
    Floats products[kRows][S::kParts] = {};
    for (int64_t r = 0; r < kRows; ++r) rows[r] = p.weight + (first + (r < count ? r : 0)) * p.stride;
    int64_t i = 0;
    for (; i + kGroup <= p.depth; i += kGroup) {
      for (int64_t j = 0; j < S::kParts; ++j) {
        const Floats x = S::load(p.x + i + j * S::kLanes);
        for (int64_t r = 0; r < kRows; ++r) {
          products[r][j] = products[r][j] + S::load(rows[r] + i + j * S::kLanes) * x;
        }
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      float sum = S::total(products[r]);
      for (int64_t rest = i; rest < p.depth; ++rest) sum += rows[r][rest] * p.x[rest];
      float& to = p.to[(first + r) * p.to_stride];
      to = p.add ? to + sum : sum;
    }
  }
}

#define GFLOWGR_DEFINE(name, bytes, attribute)                                                              \
  attribute void norm_##name(const float* from, const float* weight, float epsilon, int64_t rows,           \
                             int64_t lanes, float* to) {                                                    \
    norm_body<Simd<bytes>>(from, weight, epsilon, rows, lanes, to);                                         \
  }                                                                                                         \
  attribute void activate_##name(Activation kind, float* x, const float* gate, int64_t count) {             \
    activate_body<Simd<bytes>>(kind, x, gate, count);                                                       \
  }                                                                                                         \
  attribute void softmax_##name(const T5Softmax& s) { softmax_body<Simd<bytes>>(s); }                       \
  attribute void own_##name(const T5Own& o) { own_body<Simd<bytes>>(o); }                                   \
  attribute void one_##name(const T5One& p) { one_body<Simd<bytes>>(p); }                                   \
  constexpr T5Kernels name = {norm_##name, activate_##name, softmax_##name, own_##name, one_##name};
GFLOWGR_EACH_TARGET(GFLOWGR_DEFINE)
#undef GFLOWGR_DEFINE

}  // namespace

const T5Kernels& t5_kernels() { return GFLOWGR_BEST(portable, avx2, avx512); }

}  // namespace gflowgr
