// gflowgr_cpp::t5_encode, t5_prompt and t5_step, bound to torch.
#include <string>
#include <tuple>
#include <vector>

#include "common/gemm_cpu.h"
#include "common/tensors_cpu.h"
#include "t5/t5_cpu.h"

using gflowgr::empty_floats;
using gflowgr::floats;
using gflowgr::Shape;
using torch::stable::Tensor;

namespace {

// Weights in the order in which a layer uses them.
class Weights {
 public:
  Weights(const std::vector<Tensor>& weights, const gflowgr::T5Sizes& sizes) : weights_(weights), s_(sizes) {}

  const float* next(const Shape& shape) {
    STD_TORCH_CHECK(at_ < weights_.size(), "weights: too few");
    return floats(weights_[at_++], shape, "weights");
  }
  const float* norm() { return next({s_.width}); }
  const float* in() { return next({s_.inner(), s_.width}); }
  const float* out() { return next({s_.width, s_.inner()}); }

  gflowgr::T5Attention attention(bool cross) {
    gflowgr::T5Attention a{};
    a.norm = norm();
    a.query = in();
    if (!cross) {
      a.key = in();
      a.value = in();
    }
    a.out = out();
    return a;
  }

  std::vector<gflowgr::T5Layer> layers(bool decoder, bool gated) {
    std::vector<gflowgr::T5Layer> made;
    while (at_ + 1 < weights_.size()) {  // the last is the final norm
      gflowgr::T5Layer layer{};
      layer.own = attention(false);
      if (decoder) layer.cross = attention(true);
      layer.feed.norm = norm();
      layer.feed.in = next({s_.hidden, s_.width});
      if (gated) layer.feed.gate = next({s_.hidden, s_.width});
      layer.feed.out = next({s_.width, s_.hidden});
      made.push_back(layer);
    }
    return made;
  }

 private:
  const std::vector<Tensor>& weights_;
  const gflowgr::T5Sizes& s_;
  size_t at_ = 0;
};

gflowgr::T5Pass make_pass(const Tensor& states, int64_t heads, int64_t inner) {
  STD_TORCH_CHECK(gflowgr::gemm_float_available(), "this torch or CPU has no small matrix products");
  STD_TORCH_CHECK(states.dim() == 3 && states.numel() > 0, "states must be [B, tokens, d], not empty");
  STD_TORCH_CHECK(heads > 0 && inner % (heads * gflowgr::kT5Lanes) == 0, "d_kv must be a multiple of ",
                  gflowgr::kT5Lanes);
  gflowgr::T5Pass pass{};
  pass.sizes.width = states.size(2);
  pass.sizes.heads = heads;
  pass.sizes.size = inner / heads;
  pass.prompts = states.size(0);
  pass.tokens = states.size(1);
  pass.threads = torch::stable::get_num_threads();
  pass.parallel = gflowgr::torch_parallel();
  return pass;
}

// The sizes of a whole stack, read from its weights: the first are norm and query, the last but one is the output
// of the feed-forward layer.
gflowgr::T5Pass stack_pass(const Tensor& states, const std::vector<Tensor>& weights, bool decoder, int64_t heads,
                           bool gated, const std::string& activation, double epsilon) {
  STD_TORCH_CHECK(weights.size() > 3 && weights[1].dim() == 2 && weights[weights.size() - 2].dim() == 2,
                  "weights must be those of a stack");
  STD_TORCH_CHECK(activation == "relu" || activation == "gelu_new", "activation: unknown kind ", activation);
  gflowgr::T5Pass pass = make_pass(states, heads, weights[1].size(0));
  pass.sizes.hidden = weights[weights.size() - 2].size(1);
  pass.sizes.activation = activation == "relu" ? gflowgr::Activation::relu : gflowgr::Activation::gelu;
  pass.sizes.epsilon = static_cast<float>(epsilon);
  Weights reader(weights, pass.sizes);
  pass.layers = reader.layers(decoder, gated);
  pass.final_norm = reader.norm();
  return pass;
}

Tensor t5_encode(const Tensor& embedded, const Tensor& mask, const Tensor& bias, const std::vector<Tensor>& weights,
                 int64_t heads, bool gated, const std::string& activation, double epsilon) {
  gflowgr::T5Pass pass = stack_pass(embedded, weights, false, heads, gated, activation, epsilon);
  pass.mask = floats(mask, {pass.prompts, pass.tokens}, "mask");
  const Shape shape{pass.prompts, pass.tokens, pass.sizes.width};
  Tensor encoded = empty_floats(embedded, shape);
  gflowgr::t5_encode(pass, floats(embedded, shape, "embedded"),
                     floats(bias, {heads, pass.padded() + pass.tokens - 1}, "bias"),
                     static_cast<float*>(encoded.data_ptr()));
  return encoded;
}

std::tuple<Tensor, Tensor> t5_prompt(const Tensor& encoded, const std::vector<Tensor>& weights, int64_t heads) {
  STD_TORCH_CHECK(!weights.empty() && weights.size() % 2 == 0 && weights[0].dim() == 2,
                  "weights must be those of keys and values");
  gflowgr::T5Pass pass = make_pass(encoded, heads, weights[0].size(0));
  const gflowgr::T5Sizes& s = pass.sizes;
  Weights reader(weights, s);
  pass.layers.resize(weights.size() / 2);
  for (gflowgr::T5Layer& layer : pass.layers) {
    layer.cross.key = reader.in();
    layer.cross.value = reader.in();
  }
  const auto layers = static_cast<int64_t>(pass.layers.size());
  Tensor keys = empty_floats(encoded, {layers, pass.prompts, heads, pass.padded(), s.size});
  Tensor values = empty_floats(encoded, {layers, pass.prompts, heads, s.size, pass.padded()});
  gflowgr::t5_prompt(pass, floats(encoded, {pass.prompts, pass.tokens, s.width}, "encoded"),
                     static_cast<float*>(keys.data_ptr()), static_cast<float*>(values.data_ptr()));
  return {keys, values};
}

std::tuple<Tensor, Tensor> t5_step(const Tensor& embedded, const Tensor& keys, const Tensor& values,
                                   const Tensor& mask, const Tensor& bias, const std::vector<Tensor>& past,
                                   const std::vector<Tensor>& ancestors, const std::vector<Tensor>& weights,
                                   int64_t heads, bool gated, const std::string& activation, double epsilon) {
  gflowgr::T5Pass pass = stack_pass(embedded, weights, true, heads, gated, activation, epsilon);
  const gflowgr::T5Sizes& s = pass.sizes;
  const int64_t beams = pass.tokens, layers = static_cast<int64_t>(pass.layers.size());
  STD_TORCH_CHECK(mask.dim() == 2, "mask must be [B, S]");
  pass.tokens = mask.size(1);
  pass.mask = floats(mask, {pass.prompts, pass.tokens}, "mask");
  gflowgr::T5Step step{};
  step.rows = pass.prompts * beams;
  step.embedded = floats(embedded, {pass.prompts, beams, s.width}, "embedded");
  step.keys = floats(keys, {layers, pass.prompts, heads, pass.padded(), s.size}, "keys");
  step.values = floats(values, {layers, pass.prompts, heads, s.size, pass.padded()}, "values");
  step.bias = floats(bias, {static_cast<int64_t>(past.size()) + 1, heads}, "bias");
  step.past = gflowgr::step_past(past, ancestors, layers, step.rows, s.inner());
  Tensor hidden = empty_floats(embedded, {pass.prompts, beams, s.width});
  Tensor stored = empty_floats(embedded, {layers, 2, step.rows, s.inner()});
  step.hidden = static_cast<float*>(hidden.data_ptr());
  step.stored = static_cast<float*>(stored.data_ptr());
  gflowgr::t5_step(pass, step);
  return {hidden, stored};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gflowgr_cpp, m) {
  m.def(
      "t5_encode(Tensor embedded, Tensor mask, Tensor bias, Tensor[] weights, int heads, bool gated, "
      "str activation, float epsilon) -> Tensor");
  m.def("t5_prompt(Tensor encoded, Tensor[] weights, int heads) -> (Tensor, Tensor)");
  m.def(
      "t5_step(Tensor embedded, Tensor keys, Tensor values, Tensor mask, Tensor bias, Tensor[] past, "
      "Tensor[] ancestors, Tensor[] weights, int heads, bool gated, str activation, float epsilon) -> "
      "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gflowgr_cpp, CPU, m) {
  m.impl("t5_encode", TORCH_BOX(&t5_encode));
  m.impl("t5_prompt", TORCH_BOX(&t5_prompt));
  m.impl("t5_step", TORCH_BOX(&t5_step));
}
