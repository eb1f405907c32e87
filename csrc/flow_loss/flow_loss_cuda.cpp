// gflowgr_cuda::flow_loss and flow_loss_backward, for PyTorch; same arguments as in gflowgr_cpp.
#include "flow_loss/flow_loss_cuda.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "common/cuda_binding.h"

namespace {

using gflowgr::FlowArrays;
using gflowgr::FlowCall;
using gflowgr::FlowKind;
using gflowgr::FlowReduction;
using gflowgr::binding::on_device_of;

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
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.scalar_type() == like.scalar_type() && on_device_of(tensor, like),
                  name, " must be contiguous, of the dtype and on the device of log_pf");
  STD_TORCH_CHECK(tensor.numel() == numel, name, " must have ", numel, " elements; got ", tensor.numel());
}

struct Inputs {
  FlowCall call;
  const Tensor& log_pf;
  const Tensor& log_reward;
  const std::optional<Tensor>& target;
  const bool* mask;

  bool wide() const { return log_pf.scalar_type() == ScalarType::Double; }
  int64_t B() const { return log_pf.size(0); }
  int64_t N() const { return log_pf.size(1); }
  bool sums() const { return call.reduction != FlowReduction::none; }

  Tensor workspace() const {
    const auto bytes = static_cast<int64_t>(flow_loss_workspace(call));
    return torch::stable::new_empty(log_pf, std::vector<int64_t>{bytes}, ScalarType::Byte);
  }

  template <typename T>
  FlowArrays<T> arrays() const {
    FlowArrays<T> arrays{};
    arrays.log_pf = static_cast<const T*>(log_pf.data_ptr());
    arrays.log_reward = static_cast<const T*>(log_reward.data_ptr());
    arrays.target = target.has_value() ? static_cast<const T*>(target->data_ptr()) : nullptr;
    arrays.mask = mask;
    arrays.N = log_pf.size(1);
    arrays.L = log_pf.size(2);
    return arrays;
  }
};

Inputs read_inputs(const Tensor& log_pf, const Tensor& log_reward, const std::optional<Tensor>& target,
                   const std::optional<Tensor>& mask, const std::string& kind, double lam, double beta,
                   std::optional<double> floor, const std::string& reduction, double sft_weight,
                   std::optional<double> clip) {
  STD_TORCH_CHECK(log_pf.dim() == 3, "log_pf must be [B, N, L]; got ", log_pf.dim(), " dimensions");
  STD_TORCH_CHECK(log_pf.scalar_type() == ScalarType::Double || log_pf.scalar_type() == ScalarType::Float,
                  "log_pf must be float32 or float64");
  FlowCall call{};
  call.params = {parse_kind(kind), lam, beta, floor.value_or(0.0), floor.has_value(),
                 1.0, 1.0, clip.value_or(INFINITY)};
  call.reduction = parse_reduction(reduction);
  call.sft_weight = sft_weight;
  call.B = log_pf.size(0);
  check_like("log_pf", log_pf, log_pf, log_pf.numel());
  check_like("log_reward", log_reward, log_pf, call.B * log_pf.size(1));
  STD_TORCH_CHECK(target.has_value() == (call.params.kind != FlowKind::vargrad),
                  "target must be given for all kinds but vargrad");
  if (target.has_value()) {
    check_like("target", *target, log_pf, call.params.kind == FlowKind::tb ? call.B : log_pf.numel());
  }
  const bool* masked = nullptr;
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() &&
                        mask->numel() == log_pf.numel() && on_device_of(*mask, log_pf),
                    "mask must be bool like log_pf, contiguous, on the same device");
    masked = static_cast<const bool*>(mask->data_ptr());
  }
  return {call, log_pf, log_reward, target, masked};
}

template <typename T>
Tensor forward(const Inputs& inputs) {
  Tensor losses = torch::stable::new_empty(inputs.log_pf, std::vector<int64_t>{inputs.B(), inputs.N()});
  const bool empty = losses.numel() == 0;
  if (!inputs.sums() && empty) return losses;
  Tensor total = losses;
  if (inputs.sums()) {
    const std::vector<int64_t> scalar;
    if (empty) return torch::stable::new_zeros(inputs.log_pf, scalar);
    total = torch::stable::new_empty(inputs.log_pf, scalar);
  }
  const gflowgr::binding::Launch launch(inputs.log_pf);
  const Tensor workspace = inputs.workspace();
  FlowArrays<T> arrays = inputs.arrays<T>();
  arrays.losses = static_cast<T*>(losses.data_ptr());
  gflowgr::binding::check_launch(
      "flow_loss", gflowgr::flow_loss_cuda<T>(inputs.call, arrays,
                                              inputs.sums() ? static_cast<T*>(total.data_ptr()) : nullptr,
                                              workspace.data_ptr(), launch.stream()));
  return total;
}

Tensor flow_loss(const Tensor& log_pf, const Tensor& log_reward, const std::optional<Tensor>& target,
                 const std::optional<Tensor>& mask, const std::string& kind, double lam, double beta,
                 std::optional<double> floor, const std::string& reduction, double sft_weight,
                 std::optional<double> clip) {
  const Inputs inputs =
      read_inputs(log_pf, log_reward, target, mask, kind, lam, beta, floor, reduction, sft_weight, clip);
  return inputs.wide() ? forward<double>(inputs) : forward<float>(inputs);
}

template <typename T>
void backward(const Inputs& inputs, const Tensor& grad, Tensor& grad_log_pf, Tensor& grad_log_reward,
              Tensor& grad_target) {
  const auto out = [](Tensor& tensor) {
    return tensor.numel() > 0 ? static_cast<T*>(tensor.data_ptr()) : nullptr;
  };
  FlowArrays<T> arrays = inputs.arrays<T>();
  arrays.grad_log_pf = out(grad_log_pf);
  arrays.grad_log_reward = out(grad_log_reward);
  arrays.grad_target = out(grad_target);
  if (arrays.grad_log_pf == nullptr && arrays.grad_log_reward == nullptr && arrays.grad_target == nullptr) return;
  const auto* upstream = static_cast<const T*>(grad.data_ptr());
  if (!inputs.sums()) {
    arrays.upstream = upstream;
    upstream = nullptr;
  }
  const gflowgr::binding::Launch launch(inputs.log_pf);
  const Tensor workspace = inputs.workspace();
  gflowgr::binding::check_launch("flow_loss_backward",
                                 gflowgr::flow_loss_backward_cuda<T>(inputs.call, arrays, upstream,
                                                                     workspace.data_ptr(), launch.stream()));
}

std::tuple<Tensor, Tensor, Tensor> flow_loss_backward(
    const Tensor& grad, const Tensor& log_pf, const Tensor& log_reward, const std::optional<Tensor>& target,
    const std::optional<Tensor>& mask, const std::string& kind, double lam, double beta,
    std::optional<double> floor, const std::string& reduction, double sft_weight, std::optional<double> clip,
    bool need_log_pf, bool need_log_reward, bool need_target) {
  const Inputs inputs =
      read_inputs(log_pf, log_reward, target, mask, kind, lam, beta, floor, reduction, sft_weight, clip);
  check_like("grad", grad, log_pf, inputs.sums() ? 1 : inputs.B() * inputs.N());
  const auto result = [&](bool needed, const Tensor& like) {
    return needed ? torch::stable::new_empty(like, like.sizes())
                  : torch::stable::new_empty(log_pf, std::vector<int64_t>{0});
  };
  Tensor grad_log_pf = result(need_log_pf, log_pf), grad_log_reward = result(need_log_reward, log_reward);
  Tensor grad_target = result(need_target && target.has_value(), target.value_or(log_pf));
  if (inputs.wide()) {
    backward<double>(inputs, grad, grad_log_pf, grad_log_reward, grad_target);
  } else {
    backward<float>(inputs, grad, grad_log_pf, grad_log_reward, grad_target);
  }
  return {grad_log_pf, grad_log_reward, grad_target};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gflowgr_cuda, m) {
  m.def(
      "flow_loss(Tensor log_pf, Tensor log_reward, Tensor? target, Tensor? mask, str kind, float lam, "
      "float beta, float? floor, str reduction, float sft_weight, float? clip) -> Tensor");
  m.def(
      "flow_loss_backward(Tensor grad, Tensor log_pf, Tensor log_reward, Tensor? target, Tensor? mask, "
      "str kind, float lam, float beta, float? floor, str reduction, float sft_weight, float? clip, "
      "bool need_log_pf, bool need_log_reward, bool need_target) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gflowgr_cuda, GFLOWGR_CUDA_KEY, m) {
  m.impl("flow_loss", TORCH_BOX(&flow_loss));
  m.impl("flow_loss_backward", TORCH_BOX(&flow_loss_backward));
}
