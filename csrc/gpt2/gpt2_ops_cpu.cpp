// gflowgr_cpp::gpt2_prompt and gpt2_step, bound to torch.
#include <string>
#include <tuple>
#include <vector>

#include "common/gemm_cpu.h"
#include "common/tensors_cpu.h"
#include "gpt2/gpt2_cpu.h"

using gflowgr::empty_floats;
using gflowgr::floats;
using gflowgr::Shape;
using torch::stable::Tensor;

namespace {

constexpr size_t kOfLayer = 12;  // weights of a layer; two more are the last norm's
constexpr size_t kIn = 8;        // the place of the feed-forward layer's first among them

gflowgr::Gpt2Pass make_pass(const Tensor& embedded, const Tensor& mask, const std::vector<Tensor>& weights,
                            int64_t heads, const std::string& activation, double epsilon, double scaling) {
  STD_TORCH_CHECK(gflowgr::gemm_float_available(), "this torch or CPU has no small matrix products");
  STD_TORCH_CHECK(embedded.dim() == 3 && embedded.numel() > 0, "embedded must be [B, tokens, d], not empty");
  STD_TORCH_CHECK(activation == "relu" || activation == "gelu_new", "activation: unknown kind ", activation);
  STD_TORCH_CHECK(weights.size() > kOfLayer && weights.size() % kOfLayer == 2 && weights[kIn].dim() == 2,
                  "weights must be those of a stack");
  gflowgr::Gpt2Pass pass{};
  gflowgr::Gpt2Sizes& s = pass.sizes;
  s.width = embedded.size(2);
  s.heads = heads;
  s.hidden = weights[kIn].size(1);
  STD_TORCH_CHECK(heads > 0 && s.width % (heads * gflowgr::kGroup) == 0 && s.hidden % gflowgr::kGroup == 0,
                  "d_head and the feed-forward layer must be multiples of ", gflowgr::kGroup);
  s.size = s.width / heads;
  s.activation = activation == "relu" ? gflowgr::Activation::relu : gflowgr::Activation::gelu;
  s.epsilon = static_cast<float>(epsilon);
  s.scaling = static_cast<float>(scaling);
  size_t at = 0;
  const auto affine = [&](const Shape& shape) {
    const float* const weight = floats(weights[at], shape, "weights");
    const float* const bias = floats(weights[at + 1], {shape.back()}, "weights");
    at += 2;
    return gflowgr::Gpt2Affine{weight, bias};
  };
  while (at + 2 < weights.size()) {
    gflowgr::Gpt2Layer layer{};
    layer.attention_norm = affine({s.width});
    layer.all = affine({s.width, s.all()});
    layer.out = affine({s.width, s.width});
    layer.feed_norm = affine({s.width});
    layer.in = affine({s.width, s.hidden});
    layer.back = affine({s.hidden, s.width});
    pass.layers.push_back(layer);
  }
  pass.last_norm = affine({s.width});
  pass.prompts = embedded.size(0);
  STD_TORCH_CHECK(mask.dim() == 2 && mask.size(1) % gflowgr::kGroup == 0, "mask must be [B, S16]");
  pass.padded = mask.size(1);
  pass.mask = floats(mask, {pass.prompts, pass.padded}, "mask");
  pass.threads = torch::stable::get_num_threads();
  pass.parallel = gflowgr::torch_parallel();
  return pass;
}

Shape shape_of_keys(const gflowgr::Gpt2Pass& pass) {
  const gflowgr::Gpt2Sizes& s = pass.sizes;
  return {static_cast<int64_t>(pass.layers.size()), pass.prompts, s.heads, s.size, pass.padded};
}
Shape shape_of_values(const gflowgr::Gpt2Pass& pass) {
  return {static_cast<int64_t>(pass.layers.size()), pass.prompts, pass.padded, pass.sizes.width};
}

std::tuple<Tensor, Tensor, Tensor> gpt2_prompt(const Tensor& embedded, const Tensor& mask, const Tensor& last,
                                               const std::vector<Tensor>& weights, int64_t heads,
                                               const std::string& activation, double epsilon, double scaling) {
  const gflowgr::Gpt2Pass pass = make_pass(embedded, mask, weights, heads, activation, epsilon, scaling);
  const int64_t tokens = embedded.size(1), width = pass.sizes.width;
  STD_TORCH_CHECK(gflowgr::round_up(tokens, gflowgr::kGroup) == pass.padded, "mask must be [B, S16]");
  const auto* places = static_cast<const int64_t*>(
      gflowgr::checked(last, torch::headeronly::ScalarType::Long, {pass.prompts}, "last"));
  for (int64_t i = 0; i < pass.prompts; ++i) {
    STD_TORCH_CHECK(places[i] >= 0 && places[i] < tokens, "last: out of range");
  }
  Tensor hidden = empty_floats(embedded, {pass.prompts, width});
  Tensor keys = empty_floats(embedded, shape_of_keys(pass));
  Tensor values = empty_floats(embedded, shape_of_values(pass));
  gflowgr::gpt2_prompt(pass, tokens, floats(embedded, {pass.prompts, tokens, width}, "embedded"), places,
                       static_cast<float*>(keys.data_ptr()), static_cast<float*>(values.data_ptr()),
                       static_cast<float*>(hidden.data_ptr()));
  return {hidden, keys, values};
}

std::tuple<Tensor, Tensor> gpt2_step(const Tensor& embedded, const Tensor& keys, const Tensor& values,
                                     const Tensor& mask, const std::vector<Tensor>& past,
                                     const std::vector<Tensor>& ancestors, const std::vector<Tensor>& weights,
                                     int64_t heads, const std::string& activation, double epsilon, double scaling) {
  const gflowgr::Gpt2Pass pass = make_pass(embedded, mask, weights, heads, activation, epsilon, scaling);
  const int64_t width = pass.sizes.width, layers = static_cast<int64_t>(pass.layers.size());
  gflowgr::Gpt2Step step{};
  step.beams = embedded.size(1);
  const int64_t rows = pass.prompts * step.beams;
  step.keys = floats(keys, shape_of_keys(pass), "keys");
  step.values = floats(values, shape_of_values(pass), "values");
  step.embedded = floats(embedded, {pass.prompts, step.beams, width}, "embedded");
  step.past = gflowgr::step_past(past, ancestors, layers, rows, width);
  Tensor hidden = empty_floats(embedded, {pass.prompts, step.beams, width});
  Tensor stored = empty_floats(embedded, {layers, 2, rows, width});
  step.hidden = static_cast<float*>(hidden.data_ptr());
  step.stored = static_cast<float*>(stored.data_ptr());
  gflowgr::gpt2_step(pass, step);
  return {hidden, stored};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gflowgr_cpp, m) {
  m.def(
      "gpt2_prompt(Tensor embedded, Tensor mask, Tensor last, Tensor[] weights, int heads, str activation, "
      "float epsilon, float scaling) -> (Tensor, Tensor, Tensor)");
  m.def(
      "gpt2_step(Tensor embedded, Tensor keys, Tensor values, Tensor mask, Tensor[] past, Tensor[] ancestors, "
      "Tensor[] weights, int heads, str activation, float epsilon, float scaling) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gflowgr_cpp, CPU, m) {
  m.impl("gpt2_prompt", TORCH_BOX(&gpt2_prompt));
  m.impl("gpt2_step", TORCH_BOX(&gpt2_step));
}
