// Exact flows of a prefix tree on the device, summed by one thread when they are asked for.
//
// As in tree_flows_cpu.h; a sum is kept relative to its largest term so far, and is added up in float64.
#pragma once

#include "logprobs_children/children_flow_kl.h"
#include "tree/tree_device.h"

namespace gflowgr {

// log of a sum of exponentials.
struct LogSum {
  double top = -INFINITY, sum = 0;

  __device__ void add(double x, double times = 1.0) {
    if (x > top) {
      sum *= static_cast<double>(expf(static_cast<float>(top - x)));
      top = x;
    }
    if (x != -INFINITY) sum += times * static_cast<double>(expf(static_cast<float>(x - top)));
  }
  __device__ double value() const { return top + static_cast<double>(logf(static_cast<float>(sum))); }
};

__device__ inline double load_reward(const DeviceRewards& rewards, const void* data, int64_t at) {
  return rewards.wide ? __ldg(static_cast<const double*>(data) + at)
                      : static_cast<double>(__ldg(static_cast<const float*>(data) + at));
}

// Leaves before a node.
__device__ inline int64_t leaf_rank(const uint8_t* __restrict__ tree, int64_t node) {
  const int64_t inner = tree_word(tree, kNumInner), offset = tree_word(tree, kLeafRank);
  const auto* const rank = reinterpret_cast<const int32_t*>(tree + offset);
  if (node >= inner) return node - inner + (offset == 0 ? 0 : __ldg(rank + inner));
  return offset == 0 ? 0 : __ldg(rank + node);
}

// Where the items of a leaf begin among kItemIds.
__device__ inline int64_t item_entry(const uint8_t* __restrict__ tree, int64_t leaf) {
  const int64_t offset = tree_word(tree, kItemBegin);
  return offset == 0 ? leaf : __ldg(reinterpret_cast<const int32_t*>(tree + offset) + leaf);
}

__device__ inline int64_t first_not_below(const int64_t* __restrict__ sorted, int64_t count, int64_t value) {
  int64_t low = 0;
  for (int64_t high = count; low < high;) {
    const int64_t middle = (low + high) >> 1;
    if (__ldg(sorted + middle) < value) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// log F of a node that is not the root.
__device__ inline double device_log_flow(const uint8_t* __restrict__ tree, const DeviceRewards& rewards, int64_t prompt,
                                         int64_t node) {
  const int64_t inner = tree_word(tree, kNumInner), base = prompt * rewards.columns;
  const auto* const ids = reinterpret_cast<const int32_t*>(tree + tree_word(tree, kItemIds));
  LogSum flow;
  int64_t others = 0;  // items under the node that are no candidates
  for (NodeSpan nodes = {node, node + 1}; nodes.size() > 0;) {
    const int64_t first = leaf_rank(tree, nodes.begin), last = leaf_rank(tree, nodes.end);
    if (last > first) {
      const int64_t begin = item_entry(tree, first), end = item_entry(tree, last);
      if (rewards.nodes == nullptr) {
        for (int64_t i = begin; i < end; ++i) flow.add(load_reward(rewards, rewards.log_reward, base + __ldg(ids + i)));
      } else {
        const int64_t from = first_not_below(rewards.nodes + base, rewards.columns, nodes.begin);
        const int64_t to = first_not_below(rewards.nodes + base, rewards.columns, nodes.end);
        for (int64_t i = from; i < to; ++i) flow.add(load_reward(rewards, rewards.log_reward, base + i));
        others += end - begin - (to - from);
      }
    }
    if (nodes.begin >= inner) break;
    nodes = {child_begin(tree, nodes.begin), child_begin(tree, nodes.end)};
  }
  if (others > 0) flow.add(rewards.floor, static_cast<double>(others));
  return flow.top == -INFINITY ? -INFINITY : flow.value();
}

}  // namespace gflowgr
