// gflowgr_cpp::children_logprobs, children_flow_kl and their backward pass: softmax over the children of each
// token's node.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/convert_cpu.h"
#include "logprobs_children/children_plan.h"
#include "logprobs_children/children_work.h"
#include "tree/tree_flow_rewards_cpu.h"
#include "tree/tree_flows_cpu.h"
#include "tree/tree_layout.h"
#include "tree/tree_sort.h"
#include "tree/tree_walk_cpu.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t kTrajectoriesPerThread = 1024;  // as in tree_walk

struct Arguments {
  const uint8_t* tree;
  const int64_t* tokens;
  const bool* mask = nullptr;
  gflowgr::ChildrenHead head;
  int64_t trajectories, steps, rows;
};

Arguments check(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                const Tensor& tokens, const std::optional<Tensor>& mask, const Tensor& tree,
                double temperature) {
  Arguments result;
  result.tree = gflowgr::tree_of(tree);
  STD_TORCH_CHECK(tokens.dim() == 3 && tokens.is_contiguous() && tokens.scalar_type() == ScalarType::Long,
                  "tokens must be [B, N, L], contiguous, int64");
  result.tokens = static_cast<const int64_t*>(tokens.data_ptr());
  result.trajectories = tokens.size(0) * tokens.size(1);
  result.steps = tokens.size(2);
  result.rows = tokens.numel();
  STD_TORCH_CHECK(result.rows <= std::numeric_limits<uint32_t>::max(), "tokens: more than 2^32 - 1 rows");
  STD_TORCH_CHECK(hidden.dim() == 4 && weight.dim() == 2 && hidden.size(3) == weight.size(1) &&
                      hidden.size(0) == tokens.size(0) && hidden.size(1) == tokens.size(1) &&
                      hidden.size(2) == tokens.size(2),
                  "hidden must be [B, N, L, d], weight [V, d] and tokens [B, N, L]");
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() &&
                        mask->numel() == result.rows,
                    "mask must be bool like tokens, contiguous");
    result.mask = static_cast<const bool*>(mask->data_ptr());
  }
  gflowgr::ChildrenHead& head = result.head;
  head.hidden = hidden.data_ptr();
  head.hidden_type = gflowgr::dtype_of(hidden, "hidden");
  head.weight = weight.data_ptr();
  head.weight_type = gflowgr::dtype_of(weight, "weight");
  head.bias = nullptr;
  head.bias_type = gflowgr::Dtype::float32;
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), "bias must be [V]");
    head.bias = bias->data_ptr();
    head.bias_type = gflowgr::dtype_of(*bias, "bias");
  }
  head.width = weight.size(1);
  head.temperature = static_cast<float>(temperature);
  return result;
}

int threads() { return static_cast<int>(torch::stable::get_num_threads()); }

void parallel(int64_t count, const std::function<void(int64_t)>& body) {
  if (count == 1) return body(0);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

// Checks every token that is used: the header of a damaged tree must not lead to reads beyond the head.
void check_token(int64_t token, const Tensor& head) {
  STD_TORCH_CHECK(token >= 0 && token < head.size(0), "weight: the tree holds token ", token, ", beyond its ",
                  head.size(0), " rows");
}

// A node with one child leaves no choice, unless the bias forbids that child.
void forbid_only_children(const Arguments& given, const Tensor& weight, const gflowgr::ChildrenPlan& plan,
                          float* log_pf) {
  const gflowgr::ChildrenHead& head = given.head;
  for (int64_t i = plan.active(); i < given.rows; ++i) {
    const int64_t row = plan.rows[i];
    if (log_pf[row] != 0.0f || (given.mask != nullptr && !given.mask[row])) continue;
    check_token(given.tokens[row], weight);
    float value;
    gflowgr::widen(gflowgr::element(head.bias, head.bias_type, given.tokens[row]), head.bias_type, 1, &value);
    if (value == -std::numeric_limits<float>::infinity()) log_pf[row] = value;
  }
}

// The rows that need no product: masked ones, those off the tree, and those whose node has one child.
void diverge_only_children(const Arguments& given, const int64_t* nodes, const gflowgr::ChildrenPlan& plan,
                           const float* log_pf, const gflowgr::ChildrenDivergence& divergence) {
  gflowgr::FlowScratch scratch;
  for (int64_t i = plan.active(); i < given.rows; ++i) {
    const int64_t row = plan.rows[i], trajectory = row / given.steps;
    bool alive = (given.mask == nullptr || given.mask[row]) && nodes[row] >= 0;
    // Only where the caller asks for the difference of two policies does it matter whether there is a flow.
    if (alive && divergence.weights == nullptr) {
      alive = gflowgr::node_flow(*divergence.rewards, scratch, trajectory / divergence.per_prompt, nodes[row]) !=
              -std::numeric_limits<double>::infinity();
    }
    divergence.alive[row] = alive;
    const float weight = divergence.weights == nullptr ? 0.0f : divergence.weights[trajectory];
    divergence.value[row] = weight == 0.0f ? 0.0f : -weight * log_pf[row];
  }
}

struct Forward {
  Tensor log_pf, slopes, plan, invalid;
};

// `divergence`, of which value and alive are allocated: written beside the log-probabilities.
Forward run_forward(const Arguments& given, const Tensor& weight, const Tensor& tokens, int64_t saved,
                    const gflowgr::ChildrenDivergence* divergence) {
  Forward result{torch::stable::new_empty(tokens, tokens.sizes(), ScalarType::Float),
                 torch::stable::new_empty(tokens, {saved}, ScalarType::Float),
                 torch::stable::new_empty(tokens, {gflowgr::plan_size(given.rows)}, ScalarType::Long),
                 torch::stable::new_empty(tokens, {1}, ScalarType::Long)};
  auto* const out = static_cast<float*>(result.log_pf.data_ptr());

  const std::unique_ptr<int64_t[]> nodes(new int64_t[std::max<int64_t>(given.rows, 1)]);
  if (given.rows > 0) {
    torch::stable::parallel_for(
        0, given.trajectories, kTrajectoriesPerThread, [&](int64_t begin, int64_t end) {
          gflowgr::tree_walk_cpu(given.tree, given.tokens, given.mask, nodes.get(), given.steps, begin, end);
        });
  }
  gflowgr::ChildrenPlan plan(static_cast<int64_t*>(result.plan.data_ptr()), given.rows);
  *static_cast<int64_t*>(result.invalid.data_ptr()) = gflowgr::plan_children(
      given.tree, nodes.get(), given.mask, given.trajectories, given.steps, plan, out);
  if (given.head.bias != nullptr) forbid_only_children(given, weight, plan, out);
  STD_TORCH_CHECK(saved == 0 || saved >= plan.products(), "saved: ", saved, ", but there are ",
                  plan.products(), " products");
  if (divergence != nullptr) diverge_only_children(given, nodes.get(), plan, out, *divergence);
  const gflowgr::ChildrenWork work(given.tree, given.steps, plan, given.head, threads(), parallel);
  for (const int64_t token : work.tokens()) check_token(token, weight);
  work.forward(out, saved == 0 ? nullptr : static_cast<float*>(result.slopes.data_ptr()), divergence);
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> children_logprobs(
    const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& tokens,
    const std::optional<Tensor>& mask, const Tensor& tree, double temperature, int64_t saved) {
  const Arguments given = check(hidden, weight, bias, tokens, mask, tree, temperature);
  Forward result = run_forward(given, weight, tokens, saved, nullptr);
  return {result.log_pf, result.slopes, result.plan, result.invalid};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> children_flow_kl(
    const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& tokens,
    const std::optional<Tensor>& mask, const Tensor& tree, double temperature, int64_t saved,
    const std::optional<Tensor>& nll_weights, const Tensor& log_reward, const std::optional<Tensor>& pool, double floor,
    const Tensor& root) {
  const Arguments given = check(hidden, weight, bias, tokens, mask, tree, temperature);
  const gflowgr::FlowRewards rewards = gflowgr::flow_rewards(log_reward, pool, floor, root, tree);
  STD_TORCH_CHECK(log_reward.size(0) == tokens.size(0), "log_reward must hold the rewards of ", tokens.size(0),
                  " prompts");
  if (nll_weights.has_value()) {
    STD_TORCH_CHECK(nll_weights->is_contiguous() && nll_weights->scalar_type() == ScalarType::Float &&
                        nll_weights->numel() == given.trajectories,
                    "nll_weights must be [B, N], contiguous, float32");
  }
  Tensor value = torch::stable::new_empty(tokens, tokens.sizes(), ScalarType::Float);
  Tensor alive = torch::stable::new_empty(tokens, tokens.sizes(), ScalarType::Bool);
  const gflowgr::ChildrenDivergence divergence{
      &rewards, nll_weights.has_value() ? static_cast<const float*>(nll_weights->data_ptr()) : nullptr, tokens.size(1),
      static_cast<float*>(value.data_ptr()), static_cast<bool*>(alive.data_ptr())};
  Forward result = run_forward(given, weight, tokens, saved, &divergence);
  return {value, result.log_pf, alive, result.slopes, result.plan, result.invalid};
}

// Ascending distinct tokens, and for each element of `tokens` its position among them.
std::vector<int64_t> distinct(const std::vector<int64_t>& tokens, std::vector<int64_t>& position) {
  std::vector<gflowgr::KeyRow> sorted;
  sorted.reserve(tokens.size());
  uint64_t all = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    sorted.push_back({static_cast<uint64_t>(tokens[i]), static_cast<uint32_t>(i)});
    all |= tokens[i];
  }
  gflowgr::radix_sort(sorted, 0, gflowgr::bit_width(all));
  std::vector<int64_t> used;
  position.resize(tokens.size());
  for (const gflowgr::KeyRow& entry : sorted) {
    if (used.empty() || used.back() != static_cast<int64_t>(entry.key)) {
      used.push_back(static_cast<int64_t>(entry.key));
    }
    position[entry.row] = static_cast<int64_t>(used.size()) - 1;
  }
  return used;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> children_backward(
    const Tensor& grad, const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
    const Tensor& tokens, const std::optional<Tensor>& mask, const Tensor& tree, double temperature,
    const Tensor& log_pf, const Tensor& slopes, const Tensor& plan_words, bool need_hidden,
    const std::optional<Tensor>& d_weight, bool need_bias, bool sparse) {
  const Arguments given = check(hidden, weight, bias, tokens, mask, tree, temperature);
  const gflowgr::Dtype weight_type = given.head.weight_type;
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float && grad.is_contiguous() &&
                      grad.numel() == given.rows && log_pf.numel() == given.rows,
                  "grad must be [B, N, L], contiguous, float32");
  STD_TORCH_CHECK(plan_words.numel() == gflowgr::plan_size(given.rows), "plan: not that of these tokens");
  const bool dense = d_weight.has_value();
  STD_TORCH_CHECK(!(dense && sparse), "d_weight: given, but the gradient is to be row-sparse");
  STD_TORCH_CHECK(!dense || (d_weight->is_contiguous() && d_weight->scalar_type() == weight.scalar_type() &&
                             d_weight->numel() == weight.numel()),
                  "d_weight must be zeros like weight, contiguous");
  STD_TORCH_CHECK(!need_bias || bias.has_value(), "need_bias: there is no bias");
  const gflowgr::ChildrenPlan plan(static_cast<int64_t*>(plan_words.data_ptr()), given.rows);
  const gflowgr::ChildrenWork work(given.tree, given.steps, plan, given.head, threads(), parallel);
  for (const int64_t token : work.tokens()) check_token(token, weight);

  Tensor d_hidden = need_hidden ? torch::stable::empty_like(hidden) : torch::stable::new_empty(hidden, {0});
  gflowgr::ChildrenGradients gradients{static_cast<const float*>(grad.data_ptr()),
                                       static_cast<const float*>(log_pf.data_ptr())};
  gradients.hidden = need_hidden ? d_hidden.data_ptr() : nullptr;

  // A float32 gradient is added up where it belongs, another one in float32 rows of the used tokens.
  const bool direct = weight_type == gflowgr::Dtype::float32;
  const bool compact = sparse || need_bias || (dense && !direct);
  std::vector<int64_t> position;
  const std::vector<int64_t> used = compact ? distinct(work.tokens(), position) : std::vector<int64_t>();
  const int64_t d = given.head.width, rows = static_cast<int64_t>(used.size());
  Tensor sparse_rows = torch::stable::new_empty(tokens, {sparse ? rows : 0});
  Tensor values = sparse ? torch::stable::new_empty(weight, {rows, d}) : torch::stable::new_empty(weight, {0});
  std::unique_ptr<float[]> sums;
  if (dense && direct) {
    gradients.weight = static_cast<float*>(d_weight->data_ptr());
    gradients.weight_row = work.tokens().data();
  } else if (dense || sparse) {
    if (!direct) sums.reset(new float[std::max<int64_t>(rows * d, 1)]);
    gradients.weight = direct ? static_cast<float*>(values.data_ptr()) : sums.get();
    gradients.weight_row = position.data();
    gradients.clear = rows;
  }
  std::vector<double> bias_sums(need_bias ? used.size() : 0);
  gradients.bias = need_bias ? bias_sums.data() : nullptr;
  gradients.bias_row = position.data();

  work.backward(slopes.numel() == 0 ? nullptr : static_cast<const float*>(slopes.data_ptr()), gradients);

  if (sparse) std::copy(used.begin(), used.end(), static_cast<int64_t*>(sparse_rows.data_ptr()));
  if (sums != nullptr) {
    void* const out = dense ? d_weight->data_ptr() : values.data_ptr();
    parallel(rows, [&](int64_t i) {
      gflowgr::narrow(sums.get() + i * d, d, weight_type,
                      gflowgr::element(out, weight_type, (dense ? used[i] : i) * d));
    });
  }
  if (!need_bias) return {d_hidden, sparse_rows, values, torch::stable::new_empty(weight, {0})};
  Tensor d_bias = torch::stable::new_zeros(*bias, bias->sizes());
  for (int64_t i = 0; i < rows; ++i) {
    const float sum = static_cast<float>(bias_sums[i]);
    const gflowgr::Dtype type = given.head.bias_type;
    gflowgr::narrow(&sum, 1, type, gflowgr::element(d_bias.data_ptr(), type, used[i]));
  }
  return {d_hidden, sparse_rows, values, d_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gflowgr_cpp, m) {
  m.def(
      "children_logprobs(Tensor hidden, Tensor weight, Tensor? bias, Tensor tokens, Tensor? mask, "
      "Tensor tree, float temperature, int saved) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "children_flow_kl(Tensor hidden, Tensor weight, Tensor? bias, Tensor tokens, Tensor? mask, Tensor tree, "
      "float temperature, int saved, Tensor? nll_weights, Tensor log_reward, Tensor? pool, float floor, "
      "Tensor root) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "children_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor? bias, Tensor tokens, "
      "Tensor? mask, Tensor tree, float temperature, Tensor log_pf, Tensor slopes, Tensor plan, "
      "bool need_hidden, Tensor(a!)? d_weight, bool need_bias, bool sparse) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gflowgr_cpp, CPU, m) {
  m.impl("children_logprobs", TORCH_BOX(&children_logprobs));
  m.impl("children_flow_kl", TORCH_BOX(&children_flow_kl));
  m.impl("children_backward", TORCH_BOX(&children_backward));
}
