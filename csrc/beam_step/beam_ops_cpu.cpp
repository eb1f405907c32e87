// gflowgr_cpp::beam_step and beam_step_hidden, bound to torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>

#include "beam_step/beam_step_cpu.h"
#include "common/checks.h"
#include "tree/tree_layout.h"
#include "tree/tree_view_cpu.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
const T* values(const Tensor& tensor, ScalarType type, int64_t count, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.is_contiguous() && (count < 0 || tensor.numel() == count),
                  name, " must be ", count, " contiguous values of its type; got ", tensor.numel());
  return static_cast<const T*>(tensor.data_ptr());
}

template <typename T>
const T* values(const std::optional<Tensor>& tensor, ScalarType type, int64_t count, const char* name) {
  return tensor.has_value() ? values<T>(*tensor, type, count, name) : nullptr;
}

int64_t count(const std::optional<Tensor>& tensor) { return tensor.has_value() ? tensor->numel() : 0; }

// What both ops take; results are made here.
struct Pass {
  gflowgr::BeamStepPass step{};
  Outputs outputs;

  Pass(const Tensor& scores, const Tensor& nodes, const Tensor& tree, const std::optional<Tensor>& codebook_ends,
       const std::string& normalize, double temperature, const std::optional<Tensor>& live,
       const std::optional<Tensor>& barred, const std::optional<Tensor>& live_leaves,
       const std::optional<Tensor>& barred_leaves, int64_t width, int64_t vocabulary)
      : outputs(results(scores, width)) {
    step.tree = gflowgr::tree_of(tree);
    STD_TORCH_CHECK(scores.dim() == 2 && width >= 1 && temperature > 0.0,
                    "scores must be [B, K], width >= 1 and temperature > 0");
    const gflowgr::TreeView view(step.tree);
    step.prompts = scores.size(0);
    step.beams = scores.size(1);
    const int64_t rows = step.prompts * step.beams;
    step.scores = values<float>(scores, ScalarType::Float, rows, "scores");
    step.nodes = values<int64_t>(nodes, ScalarType::Long, rows, "nodes");
    step.normalize = gflowgr::normalize_named(normalize);
    step.codebook_ends = values<int64_t>(codebook_ends, ScalarType::Long, view.levels(), "codebook_ends");
    STD_TORCH_CHECK(step.normalize != gflowgr::Normalize::level || step.codebook_ends != nullptr,
                    "codebook_ends: needed with normalize = level");
    for (int64_t depth = 0; step.codebook_ends != nullptr && depth < view.levels(); ++depth) {
      STD_TORCH_CHECK(step.codebook_ends[depth] > view.level(depth)[gflowgr::kTokenBase] &&
                          step.codebook_ends[depth] <= vocabulary,
                      "codebook_ends: not those of the tree");
    }
    step.vocabulary = vocabulary;
    step.temperature = temperature;
    step.live = values<bool>(live, ScalarType::Bool, view.nodes(), "live");
    step.live_leaves = values<bool>(live_leaves, ScalarType::Bool, view.leaves(), "live_leaves");
    step.barred = values<int64_t>(barred, ScalarType::Long, -1, "barred");
    step.barred_count = count(barred);
    step.barred_leaves = values<int64_t>(barred_leaves, ScalarType::Long, -1, "barred_leaves");
    step.barred_leaves_count = count(barred_leaves);
    step.width = width;
    step.best_scores = static_cast<float*>(std::get<0>(outputs).data_ptr());
    step.best_parents = static_cast<int64_t*>(std::get<1>(outputs).data_ptr());
    step.best_tokens = static_cast<int64_t*>(std::get<2>(outputs).data_ptr());
    step.best_nodes = static_cast<int64_t*>(std::get<3>(outputs).data_ptr());
    step.end_scores = static_cast<float*>(std::get<4>(outputs).data_ptr());
    step.end_nodes = static_cast<int64_t*>(std::get<5>(outputs).data_ptr());
    step.end_parents = static_cast<int64_t*>(std::get<6>(outputs).data_ptr());
    step.threads = torch::stable::get_num_threads();
    step.parallel = [](int64_t items, const std::function<void(int64_t, int64_t)>& body) {
      torch::stable::parallel_for(0, items, 1, body);
    };
  }

  static Outputs results(const Tensor& scores, int64_t width) {
    const auto make = [&](ScalarType type) {
      const int64_t sizes[] = {scores.size(0), width};
      return torch::stable::new_empty(scores, {sizes, 2}, type);
    };
    const ScalarType real = ScalarType::Float, integer = ScalarType::Long;
    return {make(real), make(integer), make(integer), make(integer), make(real), make(integer), make(integer)};
  }
};

Outputs beam_step(const Tensor& logits, const Tensor& scores, const Tensor& nodes, const Tensor& tree,
                  const std::optional<Tensor>& codebook_ends, const std::string& normalize, double temperature,
                  const std::optional<Tensor>& live, const std::optional<Tensor>& barred,
                  const std::optional<Tensor>& live_leaves, const std::optional<Tensor>& barred_leaves,
                  int64_t width) {
  STD_TORCH_CHECK(logits.dim() == 3 && logits.is_contiguous(), "logits must be [B, K, V], contiguous");
  Pass pass(scores, nodes, tree, codebook_ends, normalize, temperature, live, barred, live_leaves, barred_leaves,
            width, logits.size(2));
  STD_TORCH_CHECK(logits.size(0) == scores.size(0) && logits.size(1) == scores.size(1),
                  "logits must be [B, K, V] with B and K of scores");
  pass.step.logits = logits.data_ptr();
  pass.step.logits_type = gflowgr::dtype_of(logits, "logits");
  pass.step.layout = gflowgr::LogitLayout::vocabulary;
  gflowgr::run_beam_step(pass.step);
  return pass.outputs;
}

Outputs beam_step_hidden(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                         const Tensor& scores, const Tensor& nodes, const Tensor& tree,
                         const std::optional<Tensor>& codebook_ends, const std::string& normalize,
                         double temperature, const std::optional<Tensor>& live,
                         const std::optional<Tensor>& barred, const std::optional<Tensor>& live_leaves,
                         const std::optional<Tensor>& barred_leaves, int64_t width) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "weight must be [V, d], contiguous");
  Pass pass(scores, nodes, tree, codebook_ends, normalize, temperature, live, barred, live_leaves, barred_leaves,
            width, weight.size(0));
  STD_TORCH_CHECK(pass.step.normalize != gflowgr::Normalize::vocab, "normalize = vocab needs logits");
  STD_TORCH_CHECK(hidden.is_contiguous() && hidden.numel() == scores.numel() * weight.size(1),
                  "hidden must be [B, K, d], contiguous");
  gflowgr::BeamHead head{};
  head.hidden = hidden.data_ptr();
  head.hidden_type = gflowgr::dtype_of(hidden, "hidden");
  head.weight = weight.data_ptr();
  head.weight_type = gflowgr::dtype_of(weight, "weight");
  head.bias = values<float>(bias, ScalarType::Float, weight.size(0), "bias");
  head.width = weight.size(1);
  gflowgr::run_beam_step_hidden(pass.step, head);
  return pass.outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gflowgr_cpp, m) {
  m.def(
      "beam_step(Tensor logits, Tensor scores, Tensor nodes, Tensor tree, Tensor? codebook_ends, str normalize, "
      "float temperature, Tensor? live, Tensor? barred, Tensor? live_leaves, Tensor? barred_leaves, int width) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "beam_step_hidden(Tensor hidden, Tensor weight, Tensor? bias, Tensor scores, Tensor nodes, Tensor tree, "
      "Tensor? codebook_ends, str normalize, float temperature, Tensor? live, Tensor? barred, Tensor? live_leaves, "
      "Tensor? barred_leaves, int width) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gflowgr_cpp, CPU, m) {
  m.impl("beam_step", TORCH_BOX(&beam_step));
  m.impl("beam_step_hidden", TORCH_BOX(&beam_step_hidden));
}
