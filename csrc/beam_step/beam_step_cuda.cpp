// gflowgr_cuda::beam_step and beam_step_hidden, for PyTorch; as in gflowgr_cpp, but for the device of
// codebook_ends and for `most`.
#include "beam_step/beam_step.h"

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/cuda_binding.h"
#include "tree/tree_layout.h"

namespace {

using gflowgr::BeamHead;
using gflowgr::BeamStepCall;
using gflowgr::LogitLayout;
using gflowgr::Normalize;
using gflowgr::Numbers;
using gflowgr::binding::on_device_of;

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Shape = std::vector<int64_t>;

// Bytes of logits that are held at once; in the emulator few, so that tests meet several groups of prompts.
#if defined(GFLOWGR_EMULATE)
constexpr int64_t kMostLogits = 32 << 10;
#else
constexpr int64_t kMostLogits = 256 << 20;
#endif

Numbers numbers_of(const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(on_device_of(tensor, like), name, " must be on the device of scores; got another");
  return {tensor.data_ptr(), gflowgr::dtype_of(tensor, name)};
}

template <typename T>
const T* values(const char* name, const std::optional<Tensor>& tensor, ScalarType type, const Tensor& like) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == type && tensor->is_contiguous() && on_device_of(*tensor, like), name,
                  " must be of its type, contiguous, on the device of scores");
  return static_cast<const T*>(tensor->data_ptr());
}

int64_t count(const std::optional<Tensor>& tensor) { return tensor.has_value() ? tensor->numel() : 0; }

// What both ops take; results are made here.
struct Step {
  BeamStepCall call{};
  const Tensor& scores;
  Outputs outputs;

  Step(const Tensor& scores_, const Tensor& nodes, const Tensor& tree, const std::optional<Tensor>& codebook_ends,
       const std::string& normalize, double temperature, const std::optional<Tensor>& live,
       const std::optional<Tensor>& barred, const std::optional<Tensor>& live_leaves,
       const std::optional<Tensor>& barred_leaves, int64_t width)
      : scores(scores_) {
    STD_TORCH_CHECK(scores.dim() == 2 && width >= 1, "scores must be [B, K] and width >= 1");
    STD_TORCH_CHECK(temperature > 0, "temperature must be a number above 0; got ", temperature);
    call.prompts = scores.size(0);
    call.beams = scores.size(1);
    call.width = width;
    call.scores = values<float>("scores", scores, ScalarType::Float, scores);
    call.nodes = values<int64_t>("nodes", nodes, ScalarType::Long, scores);
    STD_TORCH_CHECK(nodes.numel() == scores.numel(), "nodes must be [B, K] as scores");
    // The tree is on the device: gflowgr/tree/facts.py has validated it and compared its tokens with the
    // head; reading it here would synchronise with the GPU. So the sizes of the masks are not checked either.
    call.tree = values<uint8_t>("tree", tree, ScalarType::Byte, scores);
    STD_TORCH_CHECK(tree.dim() == 1 && tree.numel() >= 8 * gflowgr::kTreeWords,
                    "tree must be the buffer of a prefix tree (uint8, 1-D)");
    call.normalize = gflowgr::normalize_named(normalize);
    call.temperature = static_cast<float>(temperature);
    call.codebook_ends = values<int64_t>("codebook_ends", codebook_ends, ScalarType::Long, scores);
    STD_TORCH_CHECK(call.normalize != Normalize::level || call.codebook_ends != nullptr,
                    "codebook_ends: needed with normalize = level");
    call.live = values<bool>("live", live, ScalarType::Bool, scores);
    call.live_leaves = values<bool>("live_leaves", live_leaves, ScalarType::Bool, scores);
    call.barred = values<int64_t>("barred", barred, ScalarType::Long, scores);
    call.barred_count = count(barred);
    call.barred_leaves = values<int64_t>("barred_leaves", barred_leaves, ScalarType::Long, scores);
    call.barred_leaves_count = count(barred_leaves);

    const auto make = [&](ScalarType type) {
      return torch::stable::new_empty(scores, Shape{call.prompts, width}, type);
    };
    const ScalarType real = ScalarType::Float, integer = ScalarType::Long;
    outputs = {make(real), make(integer), make(integer), make(integer), make(real), make(integer), make(integer)};
    call.best_scores = static_cast<float*>(std::get<0>(outputs).data_ptr());
    call.best_parents = static_cast<int64_t*>(std::get<1>(outputs).data_ptr());
    call.best_tokens = static_cast<int64_t*>(std::get<2>(outputs).data_ptr());
    call.best_nodes = static_cast<int64_t*>(std::get<3>(outputs).data_ptr());
    call.end_scores = static_cast<float*>(std::get<4>(outputs).data_ptr());
    call.end_nodes = static_cast<int64_t*>(std::get<5>(outputs).data_ptr());
    call.end_parents = static_cast<int64_t*>(std::get<6>(outputs).data_ptr());
  }

  // The call for some of the prompts.
  BeamStepCall part(int64_t first, int64_t prompts) const {
    BeamStepCall part = call;
    const int64_t result = first * call.width;
    part.prompts = prompts;
    part.first_prompt = first;
    part.scores += first * call.beams;
    part.nodes += first * call.beams;
    part.best_scores += result, part.best_parents += result, part.best_tokens += result, part.best_nodes += result;
    part.end_scores += result, part.end_nodes += result, part.end_parents += result;
    return part;
  }

  // For calls of so many prompts.
  Tensor workspace(std::initializer_list<int64_t> groups) {
    int64_t bytes = 0;
    for (const int64_t prompts : groups) {
      const BeamStepCall some = part(0, prompts);
      STD_TORCH_CHECK(beam_step_fits(some), "too many candidates: ", prompts, " prompts x ", call.beams,
                      " beams, width ", call.width, ", at most ", call.pitch, " tokens each");
      bytes = std::max(bytes, beam_step_workspace(some));
    }
    Tensor memory = torch::stable::new_empty(scores, Shape{bytes}, ScalarType::Byte);
    call.workspace = static_cast<uint8_t*>(memory.data_ptr());
    return memory;
  }
};

Outputs beam_step(const Tensor& logits, const Tensor& scores, const Tensor& nodes, const Tensor& tree,
                  const std::optional<Tensor>& codebook_ends, const std::string& normalize, double temperature,
                  const std::optional<Tensor>& live, const std::optional<Tensor>& barred,
                  const std::optional<Tensor>& live_leaves, const std::optional<Tensor>& barred_leaves,
                  int64_t width) {
  const gflowgr::binding::Launch launch(scores);
  Step step(scores, nodes, tree, codebook_ends, normalize, temperature, live, barred, live_leaves, barred_leaves,
            width);
  STD_TORCH_CHECK(logits.dim() == 3 && logits.size(0) == scores.size(0) && logits.size(1) == scores.size(1),
                  "logits must be [B, K, V] with B and K of scores");
  step.call.logits = numbers_of("logits", logits, scores);
  step.call.layout = LogitLayout::vocabulary;
  step.call.pitch = logits.size(2);
  const Tensor memory = step.workspace({step.call.prompts});
  gflowgr::binding::check_launch("beam_step", beam_step_cuda(step.call, launch.stream()));
  return step.outputs;
}

Outputs beam_step_hidden(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                         const Tensor& scores, const Tensor& nodes, const Tensor& tree,
                         const std::optional<Tensor>& codebook_ends, const std::string& normalize,
                         double temperature, const std::optional<Tensor>& live,
                         const std::optional<Tensor>& barred, const std::optional<Tensor>& live_leaves,
                         const std::optional<Tensor>& barred_leaves, int64_t width, int64_t most) {
  const gflowgr::binding::Launch launch(scores);
  Step step(scores, nodes, tree, codebook_ends, normalize, temperature, live, barred, live_leaves, barred_leaves,
            width);
  BeamStepCall& call = step.call;
  STD_TORCH_CHECK(call.normalize != Normalize::vocab, "normalize = vocab needs logits");
  STD_TORCH_CHECK(most >= 1, "most must be >= 1, the most tokens that a beam may need; got ", most);
  STD_TORCH_CHECK(weight.dim() == 2 && hidden.numel() == scores.numel() * weight.size(1),
                  "hidden must be [B, K, d] for weight [V, d]");
  BeamHead head{};
  head.hidden = numbers_of("hidden", hidden, scores);
  head.weight = numbers_of("weight", weight, scores);
  head.d = weight.size(1);
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->numel() == weight.size(0), "bias must be [V]");
    head.bias = numbers_of("bias", *bias, scores);
  }
  call.layout = call.normalize == Normalize::level ? LogitLayout::codebook : LogitLayout::children;
  call.pitch = most;

  // As many prompts at a time as fit into the memory for their logits.
  const int64_t bytes_each = std::max<int64_t>(1, 4 * call.beams * most), total = call.prompts;
  const int64_t group = std::max<int64_t>(1, std::min(total, kMostLogits / bytes_each));
  const Tensor logits =
      torch::stable::new_empty(scores, Shape{std::min(group, total) * call.beams, most}, ScalarType::Float);
  head.logits = static_cast<float*>(logits.data_ptr());
  call.logits = {head.logits, gflowgr::Dtype::float32};
  const auto* const states = static_cast<const char*>(head.hidden.data);
  const int64_t state_bytes = head.d * gflowgr::bytes_of(head.hidden.type);
  const Tensor memory = step.workspace({std::min(group, total), total % group});
  for (int64_t first = 0; first < total; first += group) {
    const BeamStepCall part = step.part(first, std::min(group, total - first));
    head.hidden.data = states + first * call.beams * state_bytes;
    gflowgr::binding::check_launch("beam_step_hidden", beam_logits_cuda(part, head, launch.stream()));
    gflowgr::binding::check_launch("beam_step_hidden", beam_step_cuda(part, launch.stream()));
  }
  return step.outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gflowgr_cuda, m) {
  m.def(
      "beam_step(Tensor logits, Tensor scores, Tensor nodes, Tensor tree, Tensor? codebook_ends, str normalize, "
      "float temperature, Tensor? live, Tensor? barred, Tensor? live_leaves, Tensor? barred_leaves, int width) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "beam_step_hidden(Tensor hidden, Tensor weight, Tensor? bias, Tensor scores, Tensor nodes, Tensor tree, "
      "Tensor? codebook_ends, str normalize, float temperature, Tensor? live, Tensor? barred, Tensor? live_leaves, "
      "Tensor? barred_leaves, int width, int most) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gflowgr_cuda, GFLOWGR_CUDA_KEY, m) {
  m.impl("beam_step", TORCH_BOX(&beam_step));
  m.impl("beam_step_hidden", TORCH_BOX(&beam_step_hidden));
}
