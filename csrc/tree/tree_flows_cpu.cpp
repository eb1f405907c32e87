#include "tree/tree_flows_cpu.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "tree/tree_flow_kernels_cpu.h"
#include "tree/tree_layout.h"

namespace gflowgr {
namespace {

// The items of each leaf.
struct ItemsMap {
  explicit ItemsMap(const uint8_t* tree) {
    const auto* const header = reinterpret_cast<const int64_t*>(tree);
    ids = reinterpret_cast<const int32_t*>(tree + header[kItemIds]);
    begin = header[kItemBegin] == 0 ? nullptr : reinterpret_cast<const int32_t*>(tree + header[kItemBegin]);
  }
  int64_t entry(int64_t leaf) const { return begin == nullptr ? leaf : begin[leaf]; }
  const int32_t* ids;
  const int32_t* begin;
};

// Leaves before a node.
int64_t leaf_rank(const TreeView& view, int64_t node) {
  const int32_t* const rank = view.leaf_rank();
  if (node >= view.inner()) return node - view.inner() + (rank == nullptr ? 0 : rank[view.inner()]);
  return rank == nullptr ? 0 : rank[node];
}

// Calls visit(first, end) with the entries of the items under a node: a range for each level of the tree.
template <typename Visit>
void each_range(const TreeView& view, const ItemsMap& map, int64_t node, const Visit& visit) {
  for (NodeRange nodes = {node, node + 1}; nodes.size() > 0;) {
    const int64_t first = leaf_rank(view, nodes.begin), last = leaf_rank(view, nodes.end);
    if (last > first) visit(map.entry(first), map.entry(last));
    if (nodes.begin >= view.inner()) break;
    nodes = {view.children(nodes.begin).begin, view.children(nodes.end - 1).end};
  }
}

// ------------------------------------------------------------------ rewards of every item

// Collects the entries under siblings, child after child, from identifiers of any lengths.
template <typename Number>
void gather_levels(const TreeView& view, const ItemsMap& map, const Number* from, NodeRange children,
                   std::vector<Number>& memory, std::vector<int64_t>& stops) {
  int64_t count = 0, waiting = 0, next = 0;  // entries collected, and those of a range not yet read
  const auto read = [&] {
    const int64_t needed = count + waiting + kFlowPadding;
    if (memory.size() < static_cast<size_t>(needed)) memory.resize(2 * needed);
    gather(from, map.ids + next - waiting, waiting, memory.data() + count);
    count += waiting;
    waiting = 0;
  };
  for (int64_t child = children.begin; child < children.end; ++child) {
    each_range(view, map, child, [&](int64_t first, int64_t end) {
      if (first != next) read();  // ranges that follow each other are read at once
      waiting += end - first;
      next = end;
    });
    stops[child - children.begin] = count + waiting;
  }
  read();
}

// The same where all identifiers are equally long: one range.
template <typename Number>
void gather_leaves(const TreeView& view, const ItemsMap& map, const Number* from, NodeRange children,
                   std::vector<Number>& memory, std::vector<int64_t>& stops) {
  int64_t first = children.begin;
  for (int64_t c = 0; c < children.size(); ++c) stops[c] = children.begin + c + 1;
  for (; first < view.inner(); first = view.first_child(first)) {
    for (int64_t& stop : stops) stop = view.first_child(stop);
  }
  const int64_t begin = map.entry(first - view.inner());
  for (int64_t& stop : stops) stop = map.entry(stop - view.inner()) - begin;
  const int64_t count = stops.back();
  if (memory.size() < static_cast<size_t>(count + kFlowPadding)) memory.resize(2 * (count + kFlowPadding));
  gather(from, map.ids + begin, count, memory.data());
}

template <typename Number>
double sums_of_all(const FlowRewards& rewards, FlowScratch& scratch, std::vector<Number>& memory, int64_t prompt,
                   NodeRange children, double* sums) {
  const TreeView view(rewards.tree);
  const ItemsMap map(rewards.tree);
  const auto* const from = static_cast<const Number*>(rewards.log_reward) + prompt * rewards.columns;
  // Where every item is asked for, the rewards are first read in memory order, so that the gather finds them in cache.
  const bool all = children.begin == 1 && children.end == view.children(0).end && map.entry(view.leaves()) == rewards.columns;
  Number top = all ? largest(from, rewards.columns) : Number{0};
  scratch.stops.resize(children.size());
  if (view.ragged()) {
    gather_levels(view, map, from, children, memory, scratch.stops);
  } else {
    gather_leaves(view, map, from, children, memory, scratch.stops);
  }
  Number* const values = memory.data();
  const int64_t count = scratch.stops.back();
  if (!all) top = largest(values, count);
  if (top == -INFINITY) {
    double wrong = 0;  // NaN where a reward is NaN: `largest` ignores those
    for (int64_t i = 0; i < count; ++i) wrong = values[i] == values[i] ? wrong : NAN;
    std::fill(sums, sums + children.size(), wrong);
    return top;
  }
  sum_exp(values, top, scratch.stops.data(), children.size(), sums);
  return top;
}

// ------------------------------------------------------------------ pools

// Parent of a node other than the root, which is at depth `depth` and within `range` of the inner nodes.
// The nodes above one level share its nodes out nearly evenly: a guess, then doubling steps, then halves.
int64_t parent(const TreeView& view, NodeRange range, int64_t node) {
  int64_t low = range.begin, high = range.end - 1;  // the parent lies within
  const int64_t first = view.children(low).begin, last = view.children(high).end;
  int64_t guess = low + static_cast<int64_t>(static_cast<double>(node - first) * static_cast<double>(high - low + 1) /
                                             static_cast<double>(std::max<int64_t>(last - first, 1)));
  guess = std::clamp(guess, low, high);
  for (int64_t step = 8; low < high; step *= 4) {
    if (view.children(guess).begin > node) {
      high = guess - 1;
      guess = std::max(low, guess - step);
      if (view.children(guess).begin <= node) {
        low = guess;
        break;
      }
    } else if (view.children(guess).end <= node) {
      low = guess + 1;
      guess = std::min(high, guess + step);
      if (view.children(guess).end > node) {
        high = guess;
        break;
      }
    } else {
      return guess;
    }
  }
  while (low < high) {
    const int64_t middle = (low + high) >> 1;
    if (view.children(middle).end > node) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Ancestor at depth `to` of a node at depth `depth`.
int64_t ancestor(const TreeView& view, int64_t node, int64_t depth, int64_t to) {
  for (; depth > to; --depth) {
    const int64_t begin = depth == 1 ? 0 : view.level(depth - 2)[kNodeBegin];
    node = parent(view, {begin, view.level(depth - 1)[kNodeBegin]}, node);
  }
  return node;
}

// End, among the nodes at depth `to`, of what lies below a node at depth `depth` and before it.
int64_t end_below(const TreeView& view, int64_t node, int64_t depth, int64_t to) {
  int64_t end = node + 1;
  for (; depth < to; ++depth) end = view.children(end - 1).end;
  return end;
}

template <typename Number>
double sums_of_pool(const FlowRewards& rewards, FlowScratch& scratch, int64_t prompt, NodeRange children, double* sums) {
  const TreeView view(rewards.tree);
  const auto* const from = static_cast<const Number*>(rewards.log_reward) + prompt * rewards.columns;
  const int64_t* const nodes = rewards.nodes + prompt * rewards.columns;
  const int64_t* const none = nodes + rewards.columns;
  std::vector<int64_t>& counts = scratch.stops;  // candidates under each child
  std::vector<int64_t>& owners = scratch.owners;
  std::vector<double>& values = scratch.wide_values;
  counts.assign(children.size(), 0);
  owners.clear();
  values.clear();
  std::fill(sums, sums + children.size(), 0.0);
  double top = -INFINITY;
  const int64_t depth = view.depth(children.begin);
  NodeRange range = children;
  for (int64_t level = depth; range.size() > 0; ++level) {
    const int64_t* const first = std::lower_bound(nodes, none, range.begin);
    const int64_t* const last = std::lower_bound(first, none, range.end);
    int64_t child = -1, end = range.begin;  // of the nodes under `child`
    for (const int64_t* at = first; at < last; ++at) {
      if (*at >= end) {
        child = ancestor(view, *at, level, depth);
        end = end_below(view, child, depth, level);
      }
      const double reward = from[at - nodes];
      ++counts[child - children.begin];
      owners.push_back(child - children.begin);
      values.push_back(reward);
      top = std::max(top, reward);
    }
    if (range.begin >= view.inner()) break;
    range = {view.children(range.begin).begin, view.children(range.end - 1).end};
  }
  if (rewards.floor != -INFINITY) {
    const bool known = rewards.root_counts != nullptr && children.begin == 1;
    bool any = false;
    for (int64_t c = 0; c < children.size(); ++c) {
      const int64_t under = known ? rewards.root_counts[c] : items_under(rewards.tree, children.begin + c);
      sums[c] = static_cast<double>(under - counts[c]);
      any = any || under > counts[c];
    }
    if (any) top = std::max(top, rewards.floor);
    const double share = any ? std::exp(rewards.floor - top) : 0.0;
    for (int64_t c = 0; c < children.size(); ++c) sums[c] *= share;
  }
  if (top == -INFINITY) return top;
  for (size_t i = 0; i < values.size(); ++i) sums[owners[i]] += std::exp(values[i] - top);
  return top;
}

template <typename Number>
void write_root(const FlowRewards& rewards, FlowScratch& scratch, int64_t prompt, Number* out) {
  const NodeRange children = TreeView(rewards.tree).children(0);
  scratch.sums.resize(children.size());
  double* const sums = scratch.sums.data();
  const double top = child_sums(rewards, scratch, prompt, children, sums);
  const bool sparse = rewards.nodes != nullptr && rewards.floor == -INFINITY;
  // Of a pool without a floor: candidates under each child.
  if (sparse) scratch.counts.assign(scratch.stops.begin(), scratch.stops.end());
  add_logs(sums, children.size(), top, out + 1);
  double whole = 0;
  for (int64_t c = 0; c < children.size(); ++c) {
    whole += sums[c];
    if (sums[c] >= 1e-25 || sums[c] != sums[c]) continue;
    // Much smaller than the largest: subtract the child's own maximum instead.
    const bool any = !sparse || scratch.counts[c] > 0;
    out[1 + c] = static_cast<Number>(any ? node_flow(rewards, scratch, prompt, children.begin + c) : -INFINITY);
  }
  out[0] = static_cast<Number>(top == -INFINITY && whole == 0 ? top : top + std::log(whole));
}

template <typename Number>
ChildPolicy root_policy(const FlowRewards& rewards, int64_t prompt, int64_t count, float* p) {
  const auto* const flows = static_cast<const Number*>(rewards.root) + prompt * (count + 1);
  if (!(flows[0] > -INFINITY)) return {false, 0.0};
  // The root's own flow may be rounded to less than a child's.
  const Number top = std::max(flows[0], largest(flows + 1, count));
  for (int64_t c = 0; c < count; ++c) p[c] = static_cast<float>(flows[1 + c] - top);
  return {true, policy_of_logs(p, count)};
}

}  // namespace

int64_t items_under(const uint8_t* tree, int64_t node) {
  const TreeView view(tree);
  const ItemsMap map(tree);
  int64_t count = 0;
  each_range(view, map, node, [&](int64_t first, int64_t end) { count += end - first; });
  return count;
}

double child_sums(const FlowRewards& rewards, FlowScratch& scratch, int64_t prompt, NodeRange children, double* sums) {
  if (rewards.nodes != nullptr) {
    return rewards.wide ? sums_of_pool<double>(rewards, scratch, prompt, children, sums)
                        : sums_of_pool<float>(rewards, scratch, prompt, children, sums);
  }
  return rewards.wide ? sums_of_all(rewards, scratch, scratch.wide_values, prompt, children, sums)
                      : sums_of_all(rewards, scratch, scratch.values, prompt, children, sums);
}

double node_flow(const FlowRewards& rewards, FlowScratch& scratch, int64_t prompt, int64_t node) {
  if (node == 0) {  // an identifier has at least one token
    const NodeRange children = TreeView(rewards.tree).children(0);
    std::vector<double> sums(children.size());
    const double top = child_sums(rewards, scratch, prompt, children, sums.data());
    return top == -INFINITY ? top : top + std::log(std::accumulate(sums.begin(), sums.end(), 0.0));
  }
  double sum = 0;
  const double top = child_sums(rewards, scratch, prompt, {node, node + 1}, &sum);
  return top == -INFINITY && sum == 0 ? top : top + std::log(sum);
}

void root_flows(const FlowRewards& rewards, FlowScratch& scratch, int64_t prompt, void* out) {
  if (rewards.wide) return write_root(rewards, scratch, prompt, static_cast<double*>(out));
  write_root(rewards, scratch, prompt, static_cast<float*>(out));
}

ChildPolicy child_policy(const FlowRewards& rewards, FlowScratch& scratch, int64_t prompt, int64_t node,
                         NodeRange children, float* p) {
  const int64_t count = children.size();
  ChildPolicy policy{false, 0.0};
  if (node == 0 && rewards.root != nullptr) {
    policy = rewards.wide ? root_policy<double>(rewards, prompt, count, p) : root_policy<float>(rewards, prompt, count, p);
  } else {
    scratch.sums.resize(count);
    const double top = child_sums(rewards, scratch, prompt, children, scratch.sums.data());
    if (top != -INFINITY) policy = {true, policy_of_sums(scratch.sums.data(), count, p)};
  }
  if (!policy.alive) std::fill(p, p + count, 0.0f);
  return policy;
}

}  // namespace gflowgr
