// gflowgr_cpp::item_flows and pooled_flows: exact flows of a prefix tree.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <tuple>

#include "common/checks.h"
#include "tree/tree_flows_cpu.h"
#include "tree/tree_view_cpu.h"
#include "tree/tree_walk_cpu.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t kPromptsPerTask = 16;  // what the vector code takes at a time

int64_t items_of(const uint8_t* tree) { return reinterpret_cast<const int64_t*>(tree)[gflowgr::kNumItems]; }

template <typename Number>
void run(const uint8_t* tree, const Tensor& log_reward, Tensor& log_flow) {
  const auto* const from = static_cast<const Number*>(log_reward.data_ptr());
  auto* const to = static_cast<Number*>(log_flow.data_ptr());
  const int64_t prompts = log_reward.size(0), items = log_reward.size(1);
  const int64_t groups = (prompts + kPromptsPerTask - 1) / kPromptsPerTask;
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    gflowgr::item_flows(tree, from, items, to, begin * kPromptsPerTask, std::min(prompts, end * kPromptsPerTask));
  });
}

Tensor item_flows(const Tensor& log_reward, const Tensor& tree) {
  const uint8_t* const data = gflowgr::tree_of(tree);
  STD_TORCH_CHECK(log_reward.dim() == 2 && log_reward.is_contiguous() && log_reward.size(1) == items_of(data),
                  "log_reward must be [B, items] with the tree's ", items_of(data), " items, contiguous");
  Tensor log_flow =
      torch::stable::new_empty(log_reward, {log_reward.size(0), gflowgr::TreeView(data).nodes()});
  if (log_reward.scalar_type() == ScalarType::Double) {
    run<double>(data, log_reward, log_flow);
  } else {
    STD_TORCH_CHECK(log_reward.scalar_type() == ScalarType::Float, "log_reward must be float32 or float64");
    run<float>(data, log_reward, log_flow);
  }
  return log_flow;
}

std::tuple<Tensor, Tensor> pooled_flows(const Tensor& log_reward, const Tensor& items, const Tensor& leaf_of,
                                        double floor, const Tensor& tree) {
  const uint8_t* const data = gflowgr::tree_of(tree);
  STD_TORCH_CHECK(log_reward.dim() == 2 && log_reward.is_contiguous() &&
                      log_reward.scalar_type() == ScalarType::Double,
                  "log_reward must be [B, M], contiguous, float64");
  const int64_t prompts = log_reward.size(0), count = log_reward.size(1), known = items_of(data);
  STD_TORCH_CHECK(items.dim() == 2 && items.is_contiguous() && items.scalar_type() == ScalarType::Long &&
                      items.size(0) == prompts && items.size(1) == count,
                  "items must be [B, M] like log_reward, contiguous, int64");
  STD_TORCH_CHECK(leaf_of.dim() == 1 && leaf_of.is_contiguous() && leaf_of.scalar_type() == ScalarType::Int &&
                      leaf_of.numel() == known,
                  "leaf_of must be int32 [", known, "], contiguous");
  const auto* const ids = static_cast<const int64_t*>(items.data_ptr());
  for (int64_t i = 0; i < items.numel(); ++i) {
    STD_TORCH_CHECK(ids[i] >= -1 && ids[i] < known, "items: ", ids[i], " is no item of the tree, nor -1");
  }
  const int64_t places = count * gflowgr::TreeView(data).levels() + 1;
  Tensor nodes = torch::stable::new_empty(items, {prompts, places});
  Tensor log_flow = torch::stable::new_empty(log_reward, {prompts, places});
  const auto* const rewards = static_cast<const double*>(log_reward.data_ptr());
  const auto* const leaves = static_cast<const int32_t*>(leaf_of.data_ptr());
  auto* const to_nodes = static_cast<int64_t*>(nodes.data_ptr());
  auto* const to_flow = static_cast<double*>(log_flow.data_ptr());
  torch::stable::parallel_for(0, prompts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      gflowgr::pooled_flows(data, leaves, ids + b * count, rewards + b * count, count, floor,
                            to_nodes + b * places, to_flow + b * places);
    }
  });
  return {nodes, log_flow};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gflowgr_cpp, m) {
  m.def("item_flows(Tensor log_reward, Tensor tree) -> Tensor");
  m.def(
      "pooled_flows(Tensor log_reward, Tensor items, Tensor leaf_of, float floor, Tensor tree) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gflowgr_cpp, CPU, m) {
  m.impl("item_flows", TORCH_BOX(&item_flows));
  m.impl("pooled_flows", TORCH_BOX(&pooled_flows));
}
