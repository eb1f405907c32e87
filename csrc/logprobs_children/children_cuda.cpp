// gflowgr_cuda::children_logprobs, children_flow_kl and their backward pass, for PyTorch; same arguments as in gflowgr_cpp.
#include "logprobs_children/children.h"
#include "logprobs_children/children_flow_kl.h"

#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/cuda_binding.h"
#include "tree/tree_layout.h"

namespace {

using gflowgr::ChildrenCall;
using gflowgr::ChildrenGradients;
using gflowgr::ChildrenWorkspace;
using gflowgr::Numbers;
using gflowgr::binding::on_device_of;

using Shape = std::vector<int64_t>;

Numbers numbers_of(const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(on_device_of(tensor, like), name, " must be on the device of hidden; got another");
  return {tensor.data_ptr(), gflowgr::dtype_of(tensor, name)};
}

// Everything but the outputs.
ChildrenCall read_call(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                       const Tensor& tokens, const std::optional<Tensor>& mask, const Tensor& tree,
                       double temperature) {
  ChildrenCall call{};
  STD_TORCH_CHECK(hidden.dim() == 4, "hidden must be [B, N, L, d]; got ", hidden.dim(), " dimensions");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == hidden.size(3), "weight must be [V, d]");
  call.hidden = numbers_of("hidden", hidden, hidden);
  call.weight = numbers_of("weight", weight, hidden);
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), "bias must be [V]");
    call.bias = numbers_of("bias", *bias, hidden);
  }
  call.trajectories = hidden.size(0) * hidden.size(1);
  call.L = hidden.size(2);
  call.d = hidden.size(3);
  call.V = weight.size(0);
  const int64_t rows = call.trajectories * call.L;
  STD_TORCH_CHECK(tokens.scalar_type() == ScalarType::Long && tokens.is_contiguous() && tokens.numel() == rows &&
                      on_device_of(tokens, hidden),
                  "tokens must be int64 [B, N, L], contiguous, on the device of hidden");
  call.tokens = static_cast<const int64_t*>(tokens.data_ptr());
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() && mask->numel() == rows &&
                        on_device_of(*mask, hidden),
                    "mask must be bool [B, N, L], contiguous, on the device of hidden");
    call.mask = static_cast<const bool*>(mask->data_ptr());
  }
  // The tree is on the device: gflowgr/tree/facts.py has validated it and compared its tokens with the
  // head; reading it here would synchronise with the GPU.
  STD_TORCH_CHECK(tree.scalar_type() == ScalarType::Byte && tree.dim() == 1 && tree.is_contiguous() &&
                      tree.numel() >= 8 * gflowgr::kTreeWords && on_device_of(tree, hidden),
                  "tree must be the buffer of a prefix tree (uint8, 1-D, contiguous), on the device of hidden");
  call.tree = static_cast<const uint8_t*>(tree.data_ptr());
  STD_TORCH_CHECK(temperature > 0, "temperature must be a number above 0; got ", temperature);
  call.temperature = static_cast<float>(temperature);
  return call;
}

template <typename T>
T* pointer(const Tensor& tensor) {
  return tensor.numel() > 0 ? static_cast<T*>(tensor.data_ptr()) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> children_logprobs(const Tensor& hidden, const Tensor& weight,
                                                             const std::optional<Tensor>& bias, const Tensor& tokens,
                                                             const std::optional<Tensor>& mask, const Tensor& tree,
                                                             double temperature, int64_t saved) {
  ChildrenCall call = read_call(hidden, weight, bias, tokens, mask, tree, temperature);
  STD_TORCH_CHECK(saved >= 0, "saved must be >= 0; got ", saved);
  const int64_t rows = call.trajectories * call.L;
  const gflowgr::binding::Launch launch(hidden);
  Tensor log_pf = torch::stable::new_empty(tokens, tokens.sizes(), ScalarType::Float);
  Tensor slopes = torch::stable::new_empty(tokens, Shape{saved}, ScalarType::Float);
  Tensor plan = torch::stable::new_empty(tokens, Shape{gflowgr::kPlanWords * rows + gflowgr::kPlanSpare});
  Tensor invalid = torch::stable::new_zeros(tokens, Shape{1});
  call.log_pf = pointer<float>(log_pf);
  call.slopes = pointer<float>(slopes);
  call.plan = pointer<int64_t>(plan);
  call.invalid = pointer<int64_t>(invalid);
  gflowgr::binding::check_launch("children_logprobs", gflowgr::children_forward_cuda(call, launch.stream()));
  return {log_pf, slopes, plan, invalid};
}

// `saved` is what the rows could need at most: the logits are kept there until they are slopes.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> children_flow_kl(
    const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& tokens,
    const std::optional<Tensor>& mask, const Tensor& tree, double temperature, int64_t saved,
    const std::optional<Tensor>& nll_weights, const Tensor& log_reward, const std::optional<Tensor>& pool, double floor,
    const Tensor& root) {
  ChildrenCall call = read_call(hidden, weight, bias, tokens, mask, tree, temperature);
  const int64_t rows = call.trajectories * call.L;
  STD_TORCH_CHECK(saved > 0 || rows == 0, "saved must be above 0; got ", saved);
  const auto like_rewards = [&](const Tensor& tensor) {
    return tensor.dim() == 2 && tensor.is_contiguous() && on_device_of(tensor, hidden) &&
           tensor.size(0) == tokens.size(0);
  };
  const bool wide = log_reward.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(like_rewards(log_reward) && (wide || log_reward.scalar_type() == ScalarType::Float),
                  "log_reward must be [B, items] or [B, M], float32 or float64, contiguous, on the device of hidden");
  STD_TORCH_CHECK(like_rewards(root) && root.scalar_type() == log_reward.scalar_type(),
                  "root must be [B, 1 + children of the root] like log_reward");
  gflowgr::DivergenceCall flow{};
  flow.rewards = {log_reward.data_ptr(), wide, log_reward.size(1), nullptr, static_cast<float>(floor), root.data_ptr()};
  if (pool.has_value()) {
    STD_TORCH_CHECK(like_rewards(*pool) && pool->scalar_type() == ScalarType::Long &&
                        pool->size(1) == log_reward.size(1),
                    "pool must be int64 [B, M] like log_reward");
    flow.rewards.nodes = static_cast<const int64_t*>(pool->data_ptr());
  }
  if (nll_weights.has_value()) {
    STD_TORCH_CHECK(nll_weights->scalar_type() == ScalarType::Float && nll_weights->is_contiguous() &&
                        nll_weights->numel() == call.trajectories && on_device_of(*nll_weights, hidden),
                    "nll_weights must be float32 [B, N], contiguous, on the device of hidden");
    flow.weights = pointer<float>(*nll_weights);
  }
  flow.per_prompt = tokens.size(1);
  const gflowgr::binding::Launch launch(hidden);
  Tensor value = torch::stable::new_empty(tokens, tokens.sizes(), ScalarType::Float);
  Tensor log_pf = torch::stable::new_empty(tokens, tokens.sizes(), ScalarType::Float);
  Tensor alive = torch::stable::new_empty(tokens, tokens.sizes(), ScalarType::Bool);
  Tensor slopes = torch::stable::new_empty(tokens, Shape{saved}, ScalarType::Float);
  Tensor policy = torch::stable::new_empty(tokens, Shape{saved}, ScalarType::Float);
  Tensor plan = torch::stable::new_empty(tokens, Shape{gflowgr::kPlanWords * rows + gflowgr::kPlanSpare});
  Tensor invalid = torch::stable::new_zeros(tokens, Shape{1});
  call.log_pf = pointer<float>(log_pf);
  call.slopes = pointer<float>(slopes);
  call.keeps_logits = true;
  call.plan = pointer<int64_t>(plan);
  call.invalid = pointer<int64_t>(invalid);
  flow.policy = pointer<float>(policy);
  flow.value = pointer<float>(value);
  flow.alive = pointer<bool>(alive);
  gflowgr::binding::check_launch("children_flow_kl", gflowgr::children_flow_kl_cuda(call, flow, launch.stream()));
  return {value, log_pf, alive, slopes, plan, invalid};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> children_backward(
    const Tensor& grad, const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
    const Tensor& tokens, const std::optional<Tensor>& mask, const Tensor& tree, double temperature,
    const Tensor& log_pf, const Tensor& slopes, const Tensor& plan, bool need_hidden,
    const std::optional<Tensor>& d_weight, bool need_bias, bool sparse) {
  ChildrenCall call = read_call(hidden, weight, bias, tokens, mask, tree, temperature);
  const int64_t rows = call.trajectories * call.L;
  const auto is_float = [&](const Tensor& tensor) {
    return tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && on_device_of(tensor, hidden);
  };
  STD_TORCH_CHECK(is_float(grad) && grad.numel() == rows, "grad must be float32 [B, N, L], contiguous");
  STD_TORCH_CHECK(is_float(log_pf) && log_pf.numel() == rows, "log_pf must be float32 [B, N, L], contiguous");
  STD_TORCH_CHECK(is_float(slopes), "slopes must be float32, contiguous");
  STD_TORCH_CHECK(plan.scalar_type() == ScalarType::Long && plan.is_contiguous() && on_device_of(plan, hidden) &&
                      plan.numel() == gflowgr::kPlanWords * rows + gflowgr::kPlanSpare,
                  "plan must be that of children_logprobs");
  STD_TORCH_CHECK(!(sparse && d_weight.has_value()), "d_weight must be none for a sparse gradient");
  if (d_weight.has_value()) {
    STD_TORCH_CHECK(d_weight->scalar_type() == weight.scalar_type() && d_weight->is_contiguous() &&
                        d_weight->numel() == weight.numel() && on_device_of(*d_weight, hidden),
                    "d_weight must be zeros like weight, contiguous");
  }
  need_bias = need_bias && bias.has_value();
  const gflowgr::binding::Launch launch(hidden);
  const auto check = [](int error) { gflowgr::binding::check_launch("children_backward", error); };
  call.log_pf = pointer<float>(log_pf);
  call.slopes = pointer<float>(slopes);
  call.plan = pointer<int64_t>(plan);

  Tensor d_hidden = torch::stable::new_empty(hidden, need_hidden ? Shape{hidden.size(0), hidden.size(1), call.L, call.d}
                                                                 : Shape{0});
  Tensor d_bias = need_bias ? torch::stable::new_zeros(*bias, Shape{call.V}) : torch::stable::new_empty(hidden, Shape{0});
  Tensor used = torch::stable::new_empty(tokens, Shape{0}), values = torch::stable::new_empty(weight, Shape{0});
  ChildrenGradients out{};
  out.grad = pointer<float>(grad);
  out.hidden = pointer<void>(d_hidden);
  out.bias = pointer<void>(d_bias);
  out.weight = d_weight.has_value() ? pointer<void>(*d_weight) : nullptr;
  out.sparse = sparse;
  if (rows > 0 && out.hidden != nullptr) check(children_backward_hidden_cuda(call, out, launch.stream()));
  if (!sparse && out.weight == nullptr && out.bias == nullptr) return {d_hidden, used, values, d_bias};

  // One allocation: parts are multiples of 16 bytes.
  const int64_t V = (call.V + 15) / 16 * 16, capacity = children_workspace_capacity(call);
  const int64_t bytes = V + 4 * V + 16 + 16 * ((rows + 1) / 2) + 4 * capacity;
  const Tensor memory = torch::stable::new_empty(tokens, Shape{bytes}, ScalarType::Byte);
  Tensor all = torch::stable::new_empty(tokens, Shape{call.V});
  auto* const at = static_cast<uint8_t*>(memory.data_ptr());
  ChildrenWorkspace workspace{};
  workspace.touched = at;
  workspace.rank = reinterpret_cast<int32_t*>(at + V);
  workspace.used = pointer<int64_t>(all);
  workspace.counts = reinterpret_cast<int64_t*>(at + 5 * V);
  workspace.buckets = workspace.counts + 2;
  workspace.partial = reinterpret_cast<float*>(at + 5 * V + 16 + 16 * ((rows + 1) / 2));
  workspace.capacity = capacity;
  if (rows > 0) check(children_find_used_cuda(call, workspace, launch.stream()));
  if (sparse) {
    int64_t count = 0;
    if (rows > 0) check(children_read_used_cuda(workspace, &count, launch.stream()));
    used = torch::stable::clone(torch::stable::narrow(all, 0, 0, count));
    values = torch::stable::new_empty(weight, Shape{count, call.d});
    out.weight = pointer<void>(values);
  }
  if (rows > 0 && (out.weight != nullptr || out.bias != nullptr)) {
    check(children_backward_weight_cuda(call, out, workspace, launch.stream()));
  }
  return {d_hidden, used, values, d_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gflowgr_cuda, m) {
  m.def(
      "children_logprobs(Tensor hidden, Tensor weight, Tensor? bias, Tensor tokens, Tensor? mask, Tensor tree, "
      "float temperature, int saved) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "children_flow_kl(Tensor hidden, Tensor weight, Tensor? bias, Tensor tokens, Tensor? mask, Tensor tree, "
      "float temperature, int saved, Tensor? nll_weights, Tensor log_reward, Tensor? pool, float floor, Tensor root) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "children_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor? bias, Tensor tokens, Tensor? mask, "
      "Tensor tree, float temperature, Tensor log_pf, Tensor slopes, Tensor plan, bool need_hidden, "
      "Tensor(a!)? d_weight, bool need_bias, bool sparse) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gflowgr_cuda, GFLOWGR_CUDA_KEY, m) {
  m.impl("children_logprobs", TORCH_BOX(&children_logprobs));
  m.impl("children_flow_kl", TORCH_BOX(&children_flow_kl));
  m.impl("children_backward", TORCH_BOX(&children_backward));
}
