// gflowgr_cpp::flow_loss and flow_loss_backward: the losses of gflowgr/ops/flow_loss/losses.py in one pass each.
//
// Blocks hold a fixed number of prompts and their sums are added in order: the result does not depend
// on the number of threads.
#include "flow_loss/flow_loss.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#if defined(__GNUC__) || defined(__clang__)
#define GFLOWGR_FLATTEN __attribute__((flatten))
#else
#define GFLOWGR_FLATTEN
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

using gflowgr::FlowArrays;
using gflowgr::FlowKind;
using gflowgr::FlowParams;
using gflowgr::FlowReduction;

// Tokens per block, about 20 us of work: less is not worth a second thread.
constexpr int64_t kTokensPerBlock = 8192;

struct Call {
  FlowParams params;
  FlowReduction reduction;
  bool sums;  // the result is a scalar
  bool wide;  // float64
  int64_t B, N, L;
  const bool* mask;

  int64_t prompts_per_block() const { return std::max<int64_t>(1, kTokensPerBlock / std::max<int64_t>(1, N * L)); }
};

FlowKind parse_kind(const std::string& kind) {
  if (kind == "tb") return FlowKind::tb;
  if (kind == "db") return FlowKind::db;
  if (kind == "subtb") return FlowKind::subtb;
  STD_TORCH_CHECK(kind == "vargrad", "kind must be tb, db, subtb or vargrad; got ", kind);
  return FlowKind::vargrad;
}

FlowReduction parse_reduction(const std::string& reduction) {
  if (reduction == "none") return FlowReduction::none;
  if (reduction == "sum") return FlowReduction::sum;
  if (reduction == "mean") return FlowReduction::mean;
  STD_TORCH_CHECK(reduction == "prompt", "reduction must be none, sum, mean or prompt; got ", reduction);
  return FlowReduction::prompt;
}

void check_like(const char* name, const Tensor& tensor, const Tensor& like, int64_t numel) {
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.scalar_type() == like.scalar_type(), name,
                  " must be contiguous, of the dtype of log_pf");
  STD_TORCH_CHECK(tensor.numel() == numel, name, " must have ", numel, " elements; got ", tensor.numel());
}

Call read_call(const Tensor& log_pf, const Tensor& log_reward, const std::optional<Tensor>& target,
               const std::optional<Tensor>& mask, const std::string& kind, double lam, double beta,
               std::optional<double> floor, const std::string& reduction, double sft_weight,
               std::optional<double> clip) {
  Call call{};
  STD_TORCH_CHECK(log_pf.dim() == 3, "log_pf must be [B, N, L]; got ", log_pf.dim(), " dimensions");
  call.wide = log_pf.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(call.wide || log_pf.scalar_type() == ScalarType::Float, "log_pf must be float32 or float64");
  call.B = log_pf.size(0);
  call.N = log_pf.size(1);
  call.L = log_pf.size(2);
  call.params = {parse_kind(kind), lam, beta, floor.value_or(0.0), floor.has_value(),
                 1.0, 1.0, clip.value_or(INFINITY)};
  call.reduction = parse_reduction(reduction);
  call.sums = call.reduction != FlowReduction::none;
  check_like("log_pf", log_pf, log_pf, log_pf.numel());
  check_like("log_reward", log_reward, log_pf, call.B * call.N);
  STD_TORCH_CHECK(target.has_value() == (call.params.kind != FlowKind::vargrad),
                  "target must be given for all kinds but vargrad");
  if (target.has_value()) {
    check_like("target", *target, log_pf, call.params.kind == FlowKind::tb ? call.B : log_pf.numel());
  }
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() &&
                        mask->numel() == log_pf.numel(),
                    "mask must be bool like log_pf, contiguous");
    call.mask = static_cast<const bool*>(mask->data_ptr());
  }
  int64_t prompts = 0, trajectories = 0;
  if (call.mask == nullptr && call.L > 0) {
    prompts = call.N > 0 ? call.B : 0;
    trajectories = call.B * call.N;
  } else if (call.reduction == FlowReduction::mean || call.reduction == FlowReduction::prompt) {
    for (int64_t b = 0; b < call.B; ++b) {
      const int64_t count = gflowgr::flow_valid_trajectories(call.mask, b, call.N, call.L);
      prompts += count > 0;
      trajectories += count;
    }
  }
  gflowgr::flow_scales(call.reduction, prompts, trajectories, sft_weight, call.params);
  return call;
}

template <typename T>
FlowArrays<T> read_arrays(const Call& call, const Tensor& log_pf, const Tensor& log_reward,
                          const std::optional<Tensor>& target) {
  FlowArrays<T> arrays{};
  arrays.log_pf = static_cast<const T*>(log_pf.data_ptr());
  arrays.log_reward = static_cast<const T*>(log_reward.data_ptr());
  arrays.target = target.has_value() ? static_cast<const T*>(target->data_ptr()) : nullptr;
  arrays.mask = call.mask;
  arrays.N = call.N;
  arrays.L = call.L;
  return arrays;
}

// What the loop over prompts need not ask, as constants: the kind, the usual number of tokens (0: any),
// whether there is a mask, and which of losses and gradients are wanted. All calls are inlined.
template <typename T, FlowKind kind, int64_t L, bool backward, bool masked>
GFLOWGR_FLATTEN void run_constant(FlowParams params, FlowArrays<T> arrays, int64_t begin, int64_t end) {
  params.kind = kind;
  if (L > 0) arrays.L = L;
  if (!masked) arrays.mask = nullptr;
  if (backward) {
    arrays.losses = nullptr;
  } else {
    arrays.upstream = nullptr;
    arrays.grad_log_pf = arrays.grad_log_reward = arrays.grad_target = nullptr;
  }
  for (int64_t b = begin; b < end; ++b) gflowgr::flow_prompt(params, arrays, b);
}

template <typename T, FlowKind kind, int64_t L>
void run_tokens(const FlowParams& params, const FlowArrays<T>& arrays, int64_t begin, int64_t end) {
  const bool masked = arrays.mask != nullptr, backward = arrays.losses == nullptr;
  const auto run = backward ? masked ? &run_constant<T, kind, L, true, true> : &run_constant<T, kind, L, true, false>
                   : masked ? &run_constant<T, kind, L, false, true>
                            : &run_constant<T, kind, L, false, false>;
  run(params, arrays, begin, end);
}

template <typename T, FlowKind kind>
void run_kind(const FlowParams& params, const FlowArrays<T>& arrays, int64_t begin, int64_t end) {
  if (arrays.L == 4) return run_tokens<T, kind, 4>(params, arrays, begin, end);
  run_tokens<T, kind, 0>(params, arrays, begin, end);
}

template <typename T>
void run_prompts(const FlowParams& params, const FlowArrays<T>& arrays, int64_t begin, int64_t end) {
  switch (params.kind) {
    case FlowKind::tb:
      return run_kind<T, FlowKind::tb>(params, arrays, begin, end);
    case FlowKind::db:
      return run_kind<T, FlowKind::db>(params, arrays, begin, end);
    case FlowKind::subtb:
      return run_kind<T, FlowKind::subtb>(params, arrays, begin, end);
    case FlowKind::vargrad:
      return run_kind<T, FlowKind::vargrad>(params, arrays, begin, end);
  }
}

template <typename T>
double sum_of(const T* values, int64_t count) {
  double parts[4] = {0, 0, 0, 0};  // four chains of additions at a time
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    for (int64_t j = 0; j < 4; ++j) parts[j] += values[i + j];
  }
  for (; i < count; ++i) parts[0] += values[i];
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

template <typename T>
void forward(const Call& call, FlowArrays<T> arrays, T* losses, T* sum) {
  const int64_t step = call.prompts_per_block(), blocks = (call.B + step - 1) / step;
  std::vector<double> sums(static_cast<size_t>(blocks));
  arrays.losses = losses;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * step, end = std::min(begin + step, call.B);
      run_prompts(call.params, arrays, begin, end);
      if (sum != nullptr) sums[block] = sum_of(losses + begin * call.N, (end - begin) * call.N);
    }
  });
  if (sum == nullptr) return;
  double total = 0;
  for (const double part : sums) total += part;
  *sum = static_cast<T>(total);
}

Tensor flow_loss(const Tensor& log_pf, const Tensor& log_reward, const std::optional<Tensor>& target,
                 const std::optional<Tensor>& mask, const std::string& kind, double lam, double beta,
                 std::optional<double> floor, const std::string& reduction, double sft_weight,
                 std::optional<double> clip) {
  const Call call = read_call(log_pf, log_reward, target, mask, kind, lam, beta, floor, reduction, sft_weight, clip);
  Tensor losses = torch::stable::new_empty(log_pf, std::vector<int64_t>{call.B, call.N});
  Tensor sum = call.sums ? torch::stable::new_empty(log_pf, std::vector<int64_t>{}) : losses;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    forward(call, read_arrays<T>(call, log_pf, log_reward, target), static_cast<T*>(losses.data_ptr()),
            call.sums ? static_cast<T*>(sum.data_ptr()) : nullptr);
  };
  call.wide ? run(0.0) : run(0.0f);
  return sum;
}

template <typename T>
void backward(Call call, FlowArrays<T> arrays, const Tensor& grad, Tensor& grad_log_pf, Tensor& grad_log_reward,
              Tensor& grad_target) {
  const auto out = [](Tensor& tensor) {
    return tensor.numel() > 0 ? static_cast<T*>(tensor.data_ptr()) : nullptr;
  };
  arrays.grad_log_pf = out(grad_log_pf);
  arrays.grad_log_reward = out(grad_log_reward);
  arrays.grad_target = out(grad_target);
  const auto* const upstream = static_cast<const T*>(grad.data_ptr());
  if (call.sums) {
    call.params.flow_scale *= static_cast<double>(*upstream);
    call.params.nll_scale *= static_cast<double>(*upstream);
  } else {
    arrays.upstream = upstream;
  }
  const int64_t step = call.prompts_per_block(), blocks = (call.B + step - 1) / step;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    run_prompts(call.params, arrays, first * step, std::min(last * step, call.B));
  });
}

std::tuple<Tensor, Tensor, Tensor> flow_loss_backward(
    const Tensor& grad, const Tensor& log_pf, const Tensor& log_reward, const std::optional<Tensor>& target,
    const std::optional<Tensor>& mask, const std::string& kind, double lam, double beta,
    std::optional<double> floor, const std::string& reduction, double sft_weight, std::optional<double> clip,
    bool need_log_pf, bool need_log_reward, bool need_target) {
  const Call call = read_call(log_pf, log_reward, target, mask, kind, lam, beta, floor, reduction, sft_weight, clip);
  check_like("grad", grad, log_pf, call.sums ? 1 : call.B * call.N);
  const auto result = [&](bool needed, const Tensor& like) {
    return needed ? torch::stable::new_empty(like, like.sizes())
                  : torch::stable::new_empty(log_pf, std::vector<int64_t>{0});
  };
  Tensor grad_log_pf = result(need_log_pf, log_pf), grad_log_reward = result(need_log_reward, log_reward);
  Tensor grad_target = result(need_target && target.has_value(), target.value_or(log_pf));
  const auto run = [&](auto zero) {
    backward(call, read_arrays<decltype(zero)>(call, log_pf, log_reward, target), grad, grad_log_pf,
             grad_log_reward, grad_target);
  };
  call.wide ? run(0.0) : run(0.0f);
  return {grad_log_pf, grad_log_reward, grad_target};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gflowgr_cpp, m) {
  m.def(
      "flow_loss(Tensor log_pf, Tensor log_reward, Tensor? target, Tensor? mask, str kind, float lam, "
      "float beta, float? floor, str reduction, float sft_weight, float? clip) -> Tensor");
  m.def(
      "flow_loss_backward(Tensor grad, Tensor log_pf, Tensor log_reward, Tensor? target, Tensor? mask, "
      "str kind, float lam, float beta, float? floor, str reduction, float sft_weight, float? clip, "
      "bool need_log_pf, bool need_log_reward, bool need_target) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gflowgr_cpp, CPU, m) {
  m.impl("flow_loss", TORCH_BOX(&flow_loss));
  m.impl("flow_loss_backward", TORCH_BOX(&flow_loss_backward));
}
