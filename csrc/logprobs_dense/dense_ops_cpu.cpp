// gflowgr_cpp::dense_*: the dense output head, bound to torch. gflowgr/ops/logprobs/dense.py documents them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <memory>
#include <optional>
#include <tuple>

#include "common/checks.h"
#include "common/gemm_cpu.h"
#include "flow_loss/flow_loss.h"
#include "logprobs_dense/dense_cpu.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

const float* floats(const Tensor& tensor, int64_t count, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() == count,
                  name, " must be ", count, " contiguous float32 values");
  return static_cast<const float*>(tensor.data_ptr());
}

const float* floats(const std::optional<Tensor>& tensor, int64_t count, const char* name) {
  return tensor.has_value() ? floats(*tensor, count, name) : nullptr;
}

Tensor make(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, type);
}

float* data(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

// hidden [..., width] and targets [...] with as many rows.
gflowgr::DensePass make_pass(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                            const Tensor& targets, double temperature) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous() && weight.size(0) > 0,
                  "weight must be [V, d], contiguous, V > 0");
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long && targets.is_contiguous(),
                  "targets must be int64, contiguous");
  gflowgr::DensePass pass;
  pass.rows = targets.numel();
  pass.vocabulary = weight.size(0);
  pass.width = weight.size(1);
  STD_TORCH_CHECK(hidden.is_contiguous() && hidden.numel() == pass.rows * pass.width,
                  "hidden must be [rows, d], contiguous");
  STD_TORCH_CHECK(gflowgr::gemm_float_available(), "this torch or CPU has no small matrix products");
  pass.hidden = hidden.data_ptr();
  pass.hidden_type = gflowgr::dtype_of(hidden, "hidden");
  pass.weight = weight.data_ptr();
  pass.weight_type = gflowgr::dtype_of(weight, "weight");
  pass.bias = floats(bias, pass.vocabulary, "bias");
  pass.targets = static_cast<const int64_t*>(targets.data_ptr());
  pass.temperature = static_cast<float>(temperature);
  pass.threads = torch::stable::get_num_threads();
  pass.parallel = [](int64_t count, const std::function<void(int64_t, int64_t)>& body) {
    torch::stable::parallel_for(0, count, 1, body);
  };
  return pass;
}

// Gradients are bfloat16 where the input is, float32 otherwise (float16 is converted by the caller).
ScalarType gradient_type(const Tensor& input) {
  return input.scalar_type() == ScalarType::BFloat16 ? ScalarType::BFloat16 : ScalarType::Float;
}

struct Gradients {
  Tensor hidden, weight, bias;
};

Gradients want_gradients(gflowgr::DensePass& pass, const Tensor& hidden, const Tensor& weight, bool need_hidden,
                         bool need_weight, bool need_bias) {
  Gradients g{make(hidden, {need_hidden ? pass.rows : 0, pass.width}, gradient_type(hidden)),
              make(weight, {need_weight ? pass.vocabulary : 0, pass.width}, gradient_type(weight)),
              make(weight, {need_bias ? pass.vocabulary : 0}, ScalarType::Float)};
  if (need_hidden) {
    pass.grad_hidden = g.hidden.data_ptr();
    pass.grad_hidden_type = gflowgr::dtype_of(g.hidden, "hidden");
  }
  if (need_weight) {
    pass.grad_weight = g.weight.data_ptr();
    pass.grad_weight_type = gflowgr::dtype_of(g.weight, "weight");
  }
  if (need_bias) pass.grad_bias = data(g.bias);
  return g;
}

std::tuple<Tensor, Tensor, Tensor> dense_logprobs(const Tensor& hidden, const Tensor& weight,
                                                 const std::optional<Tensor>& bias, const Tensor& targets,
                                                 double temperature, bool jacobian) {
  gflowgr::DensePass pass = make_pass(hidden, weight, bias, targets, temperature);
  Tensor log_pf = make(hidden, {pass.rows}, ScalarType::Float);
  Tensor lse = make(hidden, {pass.rows}, ScalarType::Float);
  Tensor slopes = make(hidden, {jacobian ? pass.rows : 0, pass.width}, ScalarType::Float);
  pass.log_pf = data(log_pf);
  pass.lse = data(lse);
  if (jacobian) pass.grad_hidden = slopes.data_ptr();
  gflowgr::run_dense(pass);
  return {log_pf, lse, slopes};
}

std::tuple<Tensor, Tensor, Tensor> dense_backward(const Tensor& grad, const Tensor& hidden, const Tensor& weight,
                                                 const std::optional<Tensor>& bias, const Tensor& targets,
                                                 const Tensor& log_pf, const Tensor& lse, double temperature,
                                                 bool need_hidden, bool need_weight, bool need_bias) {
  gflowgr::DensePass pass = make_pass(hidden, weight, bias, targets, temperature);
  pass.known = true;
  pass.log_pf = const_cast<float*>(floats(log_pf, pass.rows, "log_pf"));
  pass.lse = const_cast<float*>(floats(lse, pass.rows, "lse"));
  pass.upstream = floats(grad, pass.rows, "grad");
  Gradients g = want_gradients(pass, hidden, weight, need_hidden, need_weight, need_bias);
  gflowgr::run_dense(pass);
  return {g.hidden, g.weight, g.bias};
}

// hidden [B, N, L, d], targets [B, N, L]; kind and reduction are numbers of FlowKind and FlowReduction.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dense_flow_loss(
    const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& targets,
    double temperature, const Tensor& log_reward, const std::optional<Tensor>& flow, int64_t kind, double lam,
    double beta, std::optional<double> floor, int64_t reduction, double sft_weight, std::optional<double> clip,
    bool need_hidden, bool need_weight, bool need_bias, bool need_log_reward, bool need_flow) {
  gflowgr::DensePass pass = make_pass(hidden, weight, bias, targets, temperature);
  STD_TORCH_CHECK(targets.dim() == 3, "targets must be [B, N, L]");
  const int64_t prompts = targets.size(0), N = targets.size(1), L = targets.size(2);
  const int64_t trajectories = prompts * N;
  Tensor log_pf = make(hidden, {prompts, N, L}, ScalarType::Float);
  Tensor lse = make(hidden, {pass.rows}, ScalarType::Float);
  Tensor losses = make(hidden, {trajectories}, ScalarType::Float);
  Tensor slopes = make(hidden, {pass.rows}, ScalarType::Float);
  const auto mask = std::make_unique<bool[]>(pass.rows);
  for (int64_t row = 0; row < pass.rows; ++row) mask[row] = pass.targets[row] >= 0;
  Tensor grad_reward = make(hidden, {need_log_reward ? prompts : 0, N}, ScalarType::Float);
  const int64_t flows = flow.has_value() ? flow->numel() : 0;
  Tensor grad_flow = make(hidden, {need_flow ? flows : 0}, ScalarType::Float);

  gflowgr::FlowParams params{};
  params.kind = static_cast<gflowgr::FlowKind>(kind);
  params.lam = lam;
  params.beta = beta;
  params.has_floor = floor.has_value();
  params.floor = floor.value_or(0.0);
  params.clip = clip.value_or(INFINITY);
  int64_t valid_prompts = 0, valid_trajectories = 0;
  for (int64_t b = 0; b < prompts; ++b) {
    const int64_t valid = gflowgr::flow_valid_trajectories(mask.get(), b, N, L);
    valid_prompts += valid > 0;
    valid_trajectories += valid;
  }
  gflowgr::flow_scales(static_cast<gflowgr::FlowReduction>(reduction), valid_prompts, valid_trajectories,
                       sft_weight, params);
  gflowgr::FlowArrays<float> arrays{};
  arrays.log_pf = data(log_pf);
  arrays.log_reward = floats(log_reward, trajectories, "log_reward");
  arrays.target = floats(flow, flows, "target");
  arrays.mask = mask.get();
  arrays.losses = data(losses);
  arrays.grad_log_pf = data(slopes);
  arrays.grad_log_reward = need_log_reward ? data(grad_reward) : nullptr;
  arrays.grad_target = need_flow ? data(grad_flow) : nullptr;
  arrays.N = N;
  arrays.L = L;

  pass.log_pf = data(log_pf);
  pass.lse = data(lse);
  pass.upstream = data(slopes);
  pass.rows_per_prompt = std::max<int64_t>(N * L, 1);
  pass.on_block = [&](int64_t first, int64_t last) {
    for (int64_t b = first / pass.rows_per_prompt; b < last / pass.rows_per_prompt; ++b) {
      gflowgr::flow_prompt(params, arrays, b);
    }
  };
  Gradients g = want_gradients(pass, hidden, weight, need_hidden, need_weight, need_bias);
  gflowgr::run_dense(pass);
  if (pass.rows == 0) {  // no tokens: still losses and gradients to be zeroed
    for (int64_t b = 0; b < prompts; ++b) gflowgr::flow_prompt(params, arrays, b);
  }

  double total = 0.0;
  for (int64_t i = 0; i < trajectories; ++i) total += arrays.losses[i];
  Tensor loss = make(hidden, {}, ScalarType::Float);
  *data(loss) = static_cast<float>(total);
  return {loss, log_pf, g.hidden, g.weight, g.bias, grad_reward, grad_flow};
}

bool dense_available() { return gflowgr::gemm_float_available(); }

bool dense_in_bfloat16() { return gflowgr::gemm_bfloat16_available(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gflowgr_cpp, m) {
  m.def(
      "dense_logprobs(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float temperature, "
      "bool jacobian) -> (Tensor, Tensor, Tensor)");
  m.def(
      "dense_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor log_pf, "
      "Tensor lse, float temperature, bool need_hidden, bool need_weight, bool need_bias) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "dense_flow_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float temperature, "
      "Tensor log_reward, Tensor? flow, int kind, float lam, float beta, float? floor, int reduction, "
      "float sft_weight, float? clip, bool need_hidden, bool need_weight, bool need_bias, bool need_log_reward, "
      "bool need_flow) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("dense_available() -> bool");
  m.def("dense_in_bfloat16() -> bool");  // whether bfloat16 factors are multiplied as such, not widened
}

STABLE_TORCH_LIBRARY_IMPL(gflowgr_cpp, CPU, m) {
  m.impl("dense_logprobs", TORCH_BOX(&dense_logprobs));
  m.impl("dense_backward", TORCH_BOX(&dense_backward));
  m.impl("dense_flow_loss", TORCH_BOX(&dense_flow_loss));
}

STABLE_TORCH_LIBRARY_IMPL(gflowgr_cpp, CompositeExplicitAutograd, m) {
  m.impl("dense_available", TORCH_BOX(&dense_available));
  m.impl("dense_in_bfloat16", TORCH_BOX(&dense_in_bfloat16));
}
