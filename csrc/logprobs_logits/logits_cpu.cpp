// gflowgr_cpp::logits_logprobs and its gradient: one pass over the logits each, in float32, whatever the
// number of tokens of the vocabulary. The reference is gflowgr/ops/logprobs/logits.py.
//
// A row's logits x have x = (logit - row_max) / temperature <= 0 and log_sum = log(sum(exp(x))): the
// log-probability x_target - log_sum is exact to float32 however large the logits are.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>

#include "common/checks.h"
#include "common/dtype.h"
#include "common/simd.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

using gflowgr::Dtype;
using gflowgr::kGroup;

// About 50 us of work: less is not worth a second thread.
constexpr int64_t kLogitsPerThread = 65536;

// Logits whose maximum is taken before their exponentials are summed: they stay in the L1 cache.
constexpr int64_t kBlock = 2048;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Rows {
  void* logits;  // [rows, V]; the gradient goes to `out`, which may be the same
  void* out;
  const int64_t* targets;  // negative: masked; V: in another shard; more: no token, NaN
  float* log_pf;
  float* row_max;
  float* log_sum;
  const float* grad;
  int64_t V;
  float scale;  // 1 / temperature
};

// The last V % kGroup logits as floats, filled up with -inf.
template <typename S, typename Element>
GFLOWGR_INLINE void read_rest(const Element* logits, int64_t count, float* rest) {
  for (int64_t i = 0; i < kGroup; i += S::kLanes) {
    const int64_t own = std::clamp<int64_t>(count - i, 0, S::kLanes);
    S::store(rest + i, S::load_some(logits + std::min(i, count), own, -INFINITY));
  }
}

template <typename S, typename Element>
GFLOWGR_INLINE void forward_rows(const Rows& rows, int64_t begin, int64_t end) {
  typedef typename S::Floats Floats;
  const int64_t V = rows.V, whole = V - V % kGroup;
  float rest[kGroup];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t target = rows.targets[row];
    rows.log_pf[row] = rows.row_max[row] = rows.log_sum[row] = 0;
    if (target < 0) continue;
    const auto* const logits = static_cast<const Element*>(rows.logits) + row * V;
    // Finite from the start: what is -inf then has the exponential 0, and NaN stays NaN.
    float top = -std::numeric_limits<float>::max(), sum = 0;
    for (int64_t from = 0; from < V; from += kBlock) {
      const int64_t to = std::min(from + kBlock, whole);
      const bool ends = from + kBlock >= V && whole < V;
      if (ends) read_rest<S>(logits + whole, V - whole, rest);
      Floats highest[S::kParts];
      for (auto& part : highest) part = S::broadcast(top);
      for (int64_t v = from; v < to; v += kGroup) {
        for (int64_t j = 0; j < S::kParts; ++j) {
          highest[j] = S::maximum(S::load(logits + v + j * S::kLanes), highest[j]);
        }
      }
      for (int64_t j = 0; ends && j < S::kParts; ++j) {
        highest[j] = S::maximum(S::load(rest + j * S::kLanes), highest[j]);
      }
      const float higher = S::largest(highest);
      sum *= std::exp((top - higher) * rows.scale);
      top = higher;
      Floats part[S::kParts] = {};
      for (int64_t v = from; v < to; v += kGroup) {
        for (int64_t j = 0; j < S::kParts; ++j) {
          part[j] += S::exp_not_positive((S::load(logits + v + j * S::kLanes) - top) * rows.scale);
        }
      }
      for (int64_t j = 0; ends && j < S::kParts; ++j) {
        part[j] += S::exp_not_positive((S::load(rest + j * S::kLanes) - top) * rows.scale);
      }
      sum += S::total(part);
    }
    rows.row_max[row] = top;
    rows.log_sum[row] = std::log(sum);
    const float own = target < V ? (S::widen(logits[target]) - top) * rows.scale : -top * rows.scale;
    // Where every token is forbidden the difference would be NaN; the probability is zero.
    rows.log_pf[row] = target > V ? kNaN
                       : sum == 0 ? -std::numeric_limits<float>::infinity()
                                  : own - rows.log_sum[row];
  }
}

template <typename S, typename Element>
GFLOWGR_INLINE void backward_rows(const Rows& rows, int64_t begin, int64_t end) {
  typedef typename S::Floats Floats;
  const int64_t V = rows.V, whole = V - V % S::kLanes;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t target = rows.targets[row];
    const auto* const logits = static_cast<const Element*>(rows.logits) + row * V;
    auto* const out = static_cast<Element*>(rows.out) + row * V;
    const float slope = target > V ? kNaN : rows.grad[row] * rows.scale;
    const float top = rows.row_max[row], log_sum = rows.log_sum[row];
    const bool forbidden = log_sum == -std::numeric_limits<float>::infinity() && target <= V;
    if (target < 0 || slope == 0 || forbidden) {
      std::memset(out, 0, static_cast<size_t>(V) * sizeof(Element));
      continue;
    }
    float own = 0;
    if (target < V) own = -slope * std::expm1((S::widen(logits[target]) - top) * rows.scale - log_sum);
    for (int64_t v = 0; v < whole; v += S::kLanes) {
      const Floats x = (S::load(logits + v) - top) * rows.scale - log_sum;
      S::store(out + v, -slope * S::exp_not_positive(x));
    }
    if (whole < V) {
      const Floats x = (S::load_some(logits + whole, V - whole, -INFINITY) - top) * rows.scale - log_sum;
      S::store_some(out + whole, -slope * S::exp_not_positive(x), V - whole);
    }
    if (target < V) out[target] = S::template narrow<Element>(own);
  }
}

struct RowKernels {
  void (*forward)(const Rows& rows, Dtype type, int64_t begin, int64_t end);
  void (*backward)(const Rows& rows, Dtype type, int64_t begin, int64_t end);
};

#define GFLOWGR_DEFINE(name, bytes, attribute)                                                          \
  attribute void forward_##name(const Rows& rows, Dtype type, int64_t begin, int64_t end) {             \
    typedef gflowgr::Simd<bytes> S;                                                                     \
    if (type == Dtype::float32) return forward_rows<S, float>(rows, begin, end);                        \
    if (type == Dtype::bfloat16) return forward_rows<S, gflowgr::Bfloat>(rows, begin, end);             \
    forward_rows<S, gflowgr::Half>(rows, begin, end);                                                   \
  }                                                                                                     \
  attribute void backward_##name(const Rows& rows, Dtype type, int64_t begin, int64_t end) {            \
    typedef gflowgr::Simd<bytes> S;                                                                     \
    if (type == Dtype::float32) return backward_rows<S, float>(rows, begin, end);                       \
    if (type == Dtype::bfloat16) return backward_rows<S, gflowgr::Bfloat>(rows, begin, end);            \
    backward_rows<S, gflowgr::Half>(rows, begin, end);                                                  \
  }                                                                                                     \
  constexpr RowKernels name = {forward_##name, backward_##name};
GFLOWGR_EACH_TARGET(GFLOWGR_DEFINE)
#undef GFLOWGR_DEFINE

void run(const Rows& rows, Dtype type, int64_t count, bool backward) {
  const RowKernels& kernels = GFLOWGR_BEST(portable, avx2, avx512);
  const int64_t grain = std::max<int64_t>(1, kLogitsPerThread / std::max<int64_t>(1, rows.V));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    (backward ? kernels.backward : kernels.forward)(rows, type, begin, end);
  });
}

Rows read_rows(const Tensor& logits, const Tensor& targets, double temperature) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(), "logits must be [rows, V], contiguous");
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long && targets.is_contiguous() &&
                      targets.numel() == logits.size(0),
                  "targets must be int64 [rows], contiguous");
  Rows rows{};
  rows.logits = logits.data_ptr();
  rows.targets = static_cast<const int64_t*>(targets.data_ptr());
  rows.V = logits.size(1);
  rows.scale = static_cast<float>(1.0 / temperature);
  return rows;
}

std::tuple<Tensor, Tensor, Tensor> logits_logprobs(const Tensor& logits, const Tensor& targets,
                                                   double temperature) {
  Rows rows = read_rows(logits, targets, temperature);
  const auto result = [&] { return torch::stable::new_empty(logits, targets.sizes(), ScalarType::Float); };
  Tensor log_pf = result(), row_max = result(), log_sum = result();
  rows.log_pf = static_cast<float*>(log_pf.data_ptr());
  rows.row_max = static_cast<float*>(row_max.data_ptr());
  rows.log_sum = static_cast<float*>(log_sum.data_ptr());
  run(rows, gflowgr::dtype_of(logits, "logits"), logits.size(0), false);
  return {log_pf, row_max, log_sum};
}

void backward_into(Tensor& out, const Tensor& grad, const Tensor& logits, const Tensor& targets,
                   const Tensor& row_max, const Tensor& log_sum, double temperature) {
  Rows rows = read_rows(logits, targets, temperature);
  for (const Tensor* tensor : {&grad, &row_max, &log_sum}) {
    STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous() &&
                        tensor->numel() == targets.numel(),
                    "grad, row_max, log_sum must be float32 [rows], contiguous");
  }
  rows.out = out.data_ptr();
  rows.grad = static_cast<const float*>(grad.data_ptr());
  rows.row_max = static_cast<float*>(row_max.data_ptr());
  rows.log_sum = static_cast<float*>(log_sum.data_ptr());
  run(rows, gflowgr::dtype_of(logits, "logits"), logits.size(0), true);
}

Tensor logits_backward(const Tensor& grad, const Tensor& logits, const Tensor& targets, const Tensor& row_max,
                       const Tensor& log_sum, double temperature) {
  Tensor out = torch::stable::empty_like(logits);
  backward_into(out, grad, logits, targets, row_max, log_sum, temperature);
  return out;
}

void logits_backward_(const Tensor& grad, Tensor logits, const Tensor& targets, const Tensor& row_max,
                      const Tensor& log_sum, double temperature) {
  backward_into(logits, grad, logits, targets, row_max, log_sum, temperature);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gflowgr_cpp, m) {
  m.def(
      "logits_logprobs(Tensor logits, Tensor targets, float temperature) -> (Tensor log_pf, Tensor row_max, "
      "Tensor log_sum)");
  m.def(
      "logits_backward(Tensor grad, Tensor logits, Tensor targets, Tensor row_max, Tensor log_sum, "
      "float temperature) -> Tensor");
  m.def(
      "logits_backward_(Tensor grad, Tensor(a!) logits, Tensor targets, Tensor row_max, Tensor log_sum, "
      "float temperature) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gflowgr_cpp, CPU, m) {
  m.impl("logits_logprobs", TORCH_BOX(&logits_logprobs));
  m.impl("logits_backward", TORCH_BOX(&logits_backward));
  m.impl("logits_backward_", TORCH_BOX(&logits_backward_));
}
