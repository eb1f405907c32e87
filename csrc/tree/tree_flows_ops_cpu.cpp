// gflowgr_cpp::item_flows and node_flows: exact flows of a prefix tree, summed when they are asked for.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>
#include <vector>

#include "tree/tree_flow_rewards_cpu.h"
#include "tree/tree_flows_cpu.h"
#include "tree/tree_view_cpu.h"
#include "tree/tree_walk_cpu.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t kNodesPerTask = 256;

Tensor item_flows(const Tensor& log_reward, const std::optional<Tensor>& pool, double floor, const Tensor& tree) {
  gflowgr::FlowRewards rewards = gflowgr::flow_rewards(log_reward, pool, floor, std::nullopt, tree);
  const gflowgr::NodeRange children = gflowgr::TreeView(rewards.tree).children(0);
  std::vector<int64_t> counts;
  if (rewards.nodes != nullptr && floor != -INFINITY) {
    for (int64_t node = children.begin; node < children.end; ++node) {
      counts.push_back(gflowgr::items_under(rewards.tree, node));
    }
    rewards.root_counts = counts.data();
  }
  const int64_t prompts = log_reward.size(0), width = children.size() + 1;
  Tensor out = torch::stable::new_empty(log_reward, {prompts, width});
  auto* const to = static_cast<uint8_t*>(out.data_ptr());
  const int64_t bytes = rewards.wide ? 8 : 4;
  torch::stable::parallel_for(0, prompts, 1, [&](int64_t begin, int64_t end) {
    gflowgr::FlowScratch scratch;
    for (int64_t b = begin; b < end; ++b) gflowgr::root_flows(rewards, scratch, b, to + b * width * bytes);
  });
  return out;
}

template <typename Number>
void run(const gflowgr::FlowRewards& rewards, const int64_t* nodes, int64_t each, int64_t width, int64_t total,
         Number* out) {
  const auto* const root = static_cast<const Number*>(rewards.root);
  torch::stable::parallel_for(0, total, kNodesPerTask, [&](int64_t begin, int64_t end) {
    gflowgr::FlowScratch scratch;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t prompt = i / each, node = nodes[i];
      if (node < 0) {
        out[i] = -INFINITY;
      } else if (node < width) {
        out[i] = root[prompt * width + node];
      } else {
        out[i] = static_cast<Number>(gflowgr::node_flow(rewards, scratch, prompt, node));
      }
    }
  });
}

Tensor node_flows(const Tensor& log_reward, const std::optional<Tensor>& pool, double floor, const Tensor& root,
                  const Tensor& nodes, const Tensor& tree) {
  const gflowgr::FlowRewards rewards = gflowgr::flow_rewards(log_reward, pool, floor, root, tree);
  STD_TORCH_CHECK(nodes.dim() == 2 && nodes.is_contiguous() && nodes.scalar_type() == ScalarType::Long &&
                      nodes.size(0) == log_reward.size(0),
                  "nodes must be [B, K], contiguous, int64");
  const auto* const ids = static_cast<const int64_t*>(nodes.data_ptr());
  const int64_t total = nodes.numel(), known = gflowgr::TreeView(rewards.tree).nodes();
  for (int64_t i = 0; i < total; ++i) {
    STD_TORCH_CHECK(ids[i] >= -1 && ids[i] < known, "nodes: ", ids[i], " is no node of the tree, nor -1");
  }
  Tensor out = torch::stable::new_empty(log_reward, {nodes.size(0), nodes.size(1)});
  if (rewards.wide) {
    run(rewards, ids, nodes.size(1), root.size(1), total, static_cast<double*>(out.data_ptr()));
  } else {
    run(rewards, ids, nodes.size(1), root.size(1), total, static_cast<float*>(out.data_ptr()));
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gflowgr_cpp, m) {
  m.def("item_flows(Tensor log_reward, Tensor? pool, float floor, Tensor tree) -> Tensor");
  m.def("node_flows(Tensor log_reward, Tensor? pool, float floor, Tensor root, Tensor nodes, Tensor tree) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gflowgr_cpp, CPU, m) {
  m.impl("item_flows", TORCH_BOX(&item_flows));
  m.impl("node_flows", TORCH_BOX(&node_flows));
}
