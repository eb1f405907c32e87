// Exact flows of a prefix tree, summed from the rewards of the items under a node when they are asked for.
// One thread. Bare C++17: no torch.
//
// F(s) = sum of R(i) over the items i whose identifier starts with s. Sums are taken in log space relative to
// their largest term, so nothing under- or overflows.
#pragma once

#include <cstdint>
#include <vector>

#include "tree/tree_view_cpu.h"

namespace gflowgr {

// The rewards of B prompts: of every item, or of the candidates of a pool.
struct FlowRewards {
  const uint8_t* tree;
  const void* log_reward;     // [B, columns] float32, or float64 where `wide`; by item id, or beside `nodes`
  bool wide;
  int64_t columns;
  const int64_t* nodes;       // of a pool [B, columns], ascending: where each candidate's identifier ends,
                              // INT64_MAX = nowhere; null: rewards of every item
  double floor;               // of a pool: log-reward of every other item
  const int64_t* root_counts; // of a pool with a floor: items under each child of the root; may be null
  const void* root;           // [B, 1 + children of the root]: what root_flows() gave; null: not yet known
};

// Memory of one thread that keeps its size from call to call.
struct FlowScratch {
  std::vector<float> values;
  std::vector<double> wide_values, sums;
  std::vector<int64_t> stops, owners, counts;
};

// Writes sums [children] with F(child) = exp(top) * sum, and returns top, the largest log-reward under these
// siblings (-inf: no reward, all sums are 0). NaN where a reward is NaN or +inf.
double child_sums(const FlowRewards& rewards, FlowScratch& scratch, int64_t prompt, NodeRange children, double* sums);

// log F of a node.
double node_flow(const FlowRewards& rewards, FlowScratch& scratch, int64_t prompt, int64_t node);

// log F of the root and of its children; `out` [1 + children] has the type of the rewards.
void root_flows(const FlowRewards& rewards, FlowScratch& scratch, int64_t prompt, void* out);

struct ChildPolicy {
  bool alive;     // whether a child has a flow
  double p_log_p; // sum of p log p over the children, nats: minus the policy's entropy
};

// The flows' policy over the children of a node, p [children]; 0 where no child has a flow.
ChildPolicy child_policy(const FlowRewards& rewards, FlowScratch& scratch, int64_t prompt, int64_t node,
                         NodeRange children, float* p);

// Items whose identifier passes through or ends at a node.
int64_t items_under(const uint8_t* tree, int64_t node);

}  // namespace gflowgr
