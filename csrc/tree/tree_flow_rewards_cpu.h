// Checks the tensors of the rewards that flows are summed from, and collects them in a FlowRewards.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "common/checks.h"
#include "tree/tree_flows_cpu.h"
#include "tree/tree_walk_cpu.h"

namespace gflowgr {

inline FlowRewards flow_rewards(const torch::stable::Tensor& log_reward, const std::optional<torch::stable::Tensor>& pool,
                                double floor, const std::optional<torch::stable::Tensor>& root,
                                const torch::stable::Tensor& tree) {
  using torch::headeronly::ScalarType;
  const uint8_t* const data = tree_of(tree);
  const int64_t items = reinterpret_cast<const int64_t*>(data)[kNumItems];
  STD_TORCH_CHECK(log_reward.dim() == 2 && log_reward.is_contiguous() &&
                      (log_reward.scalar_type() == ScalarType::Float || log_reward.scalar_type() == ScalarType::Double),
                  "log_reward must be [B, items] or [B, M], contiguous, float32 or float64");
  FlowRewards rewards{data, log_reward.data_ptr(), log_reward.scalar_type() == ScalarType::Double,
                      log_reward.size(1), nullptr, floor, nullptr, nullptr};
  if (pool.has_value()) {
    STD_TORCH_CHECK(pool->dim() == 2 && pool->is_contiguous() && pool->scalar_type() == ScalarType::Long &&
                        pool->size(0) == log_reward.size(0) && pool->size(1) == log_reward.size(1),
                    "pool must be [B, M] like log_reward, contiguous, int64");
    rewards.nodes = static_cast<const int64_t*>(pool->data_ptr());
  } else {
    STD_TORCH_CHECK(log_reward.size(1) == items, "log_reward must hold the rewards of the tree's ", items, " items");
  }
  if (root.has_value()) {
    STD_TORCH_CHECK(root->dim() == 2 && root->is_contiguous() && root->scalar_type() == log_reward.scalar_type() &&
                        root->size(0) == log_reward.size(0) && root->size(1) == TreeView(data).children(0).size() + 1,
                    "root must be [B, 1 + children of the root] like log_reward");
    rewards.root = root->data_ptr();
  }
  return rewards;
}

}  // namespace gflowgr
