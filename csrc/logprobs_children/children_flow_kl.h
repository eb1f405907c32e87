// Launcher of csrc/logprobs_children/children_flow_kl.cu. `stream` is a cudaStream_t; the result is a cudaError_t.
#pragma once

#include "logprobs_children/children.h"

namespace gflowgr {

// The rewards of B prompts, as FlowRewards in tree/tree_flows_cpu.h; all of it on the device.
struct DeviceRewards {
  const void* log_reward;  // [B, columns] float32, or float64 where `wide`
  bool wide;
  int64_t columns;
  const int64_t* nodes;    // of pools [B, columns], ascending; null: rewards of every item
  float floor;
  const void* root;        // [B, 1 + children of the root], like log_reward
};

// A divergence from exact flows beside the log-probabilities, as ChildrenDivergence in children_work.h.
struct DivergenceCall {
  DeviceRewards rewards;
  const float* weights;  // [trajectories] of the negative log-likelihood; null: -1 where there is a flow, else 0
  int64_t per_prompt;    // trajectories
  float* policy;         // as many as there are slopes, any contents
  float* value;          // [trajectories, L]
  bool* alive;           // [trajectories, L] whether a child of the row's node has a flow
};

// `call.slopes` is there and `call.keeps_logits` is set: it becomes the slopes of the value.
int children_flow_kl_cuda(const ChildrenCall& call, const DivergenceCall& flow, void* stream);

}  // namespace gflowgr
