// Exact flows of a prefix tree from the rewards of its items, on one thread. Bare C++17: no torch.
//
// F(s) = sum of R(i) over the items i whose identifier starts with s, in logs: every node takes the maximum
// of its children out, so nothing under- or overflows, and nothing is subtracted.
#pragma once

#include <cstdint>

namespace gflowgr {

// log F of all nodes for prompts `begin` .. `end` - 1: log_reward [B, items] by item id, log_flow [B, nodes].
void item_flows(const uint8_t* tree, const float* log_reward, int64_t items, float* log_flow, int64_t begin,
                int64_t end);
void item_flows(const uint8_t* tree, const double* log_reward, int64_t items, double* log_flow, int64_t begin,
                int64_t end);

// Of one prompt whose rewards are known for `count` candidates only: items [count] (-1 = padding) and their
// log_reward; every other item has the log-reward `floor` (-inf: none). leaf_of [num_items]: leaf of each
// item, -1 where it has no identifier. Writes the nodes at and above the candidates' leaves, ascending, and
// their log F; the rest of the count * max_length + 1 places is filled with INT64_MAX and -inf.
void pooled_flows(const uint8_t* tree, const int32_t* leaf_of, const int64_t* items, const double* log_reward,
                  int64_t count, double floor, int64_t* nodes, double* log_flow);

// Items whose identifier passes through or ends at a node.
int64_t items_under(const uint8_t* tree, int64_t node);

}  // namespace gflowgr
