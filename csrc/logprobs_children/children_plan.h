// Which rows of a batch of trajectories need a product, grouped by the node they stand at. Bare C++17.
#pragma once

#include <cstdint>
#include <vector>

namespace gflowgr {

// The plan lies in one array of int64 (a tensor that the forward pass saves for the backward pass):
// kPlanWords words, then rows [T], targets [T], group_node [T], group_begin [T]; T = trajectories * L.
constexpr int64_t kPlanWords = 8;
constexpr int64_t plan_size(int64_t rows) { return kPlanWords + 4 * rows; }

struct ChildrenPlan {
  int64_t* words;
  int64_t* rows;         // [active] by node, then the other rows (which get no gradient), both ascending
  int64_t* targets;      // [active] position of the row's token among the children
  int64_t* group_node;   // [groups] ascending
  int64_t* group_begin;  // [groups] first active row

  ChildrenPlan(int64_t* data, int64_t total)
      : words(data), rows(data + kPlanWords), targets(rows + total), group_node(targets + total),
        group_begin(group_node + total) {}
  int64_t active() const { return words[0]; }
  int64_t groups() const { return words[1]; }
  int64_t products() const { return words[2]; }  // sum over active rows of their children
  int64_t group_end(int64_t g) const { return g + 1 < groups() ? group_begin[g + 1] : active(); }
};

struct Range {
  int64_t begin, end;
};

// Children of an inner node, as node ids.
Range tree_children(const uint8_t* tree, int64_t node);

// Appends the tokens of the children of an inner node at depth `level`.
void append_child_tokens(const uint8_t* tree, int64_t node, int64_t level, std::vector<int64_t>& tokens);

// `nodes` [trajectories, steps] are those after each token (tree_walk_cpu). A row is active when it is
// valid, its node has two or more children and its token is one of them. Writes the plan and log_pf of the
// other rows: 0, or -inf where the trajectory has left the tree. Returns how many trajectories are not
// identifiers of the tree (or masked out as a whole).
int64_t plan_children(const uint8_t* tree, const int64_t* nodes, const bool* mask, int64_t trajectories,
                      int64_t steps, ChildrenPlan& plan, float* log_pf);

}  // namespace gflowgr
