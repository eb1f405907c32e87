#include "tree/tree_flows_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/simd.h"
#include "tree/tree_layout.h"
#include "tree/tree_view_cpu.h"

namespace gflowgr {
namespace {

// The items of each leaf.
struct ItemsMap {
  explicit ItemsMap(const uint8_t* tree) {
    const auto* const header = reinterpret_cast<const int64_t*>(tree);
    ids = reinterpret_cast<const int32_t*>(tree + header[kItemIds]);
    begin = header[kItemBegin] == 0 ? nullptr : reinterpret_cast<const int32_t*>(tree + header[kItemBegin]);
  }
  NodeRange of(int64_t leaf) const {
    if (begin == nullptr) return {leaf, leaf + 1};
    return {begin[leaf], begin[leaf + 1]};
  }
  const int32_t* ids;
  const int32_t* begin;
};

// ------------------------------------------------------------------ groups of prompts, one per lane

template <int kBytes>
struct Floats {  // one prompt per lane
  typedef Simd<kBytes> S;
  typedef float Number;
  typedef typename S::Floats Value;
  static constexpr int64_t kPrompts = S::kLanes;
  static GFLOWGR_INLINE Value get(const float* from) { return S::load(from); }
  static GFLOWGR_INLINE void put(float* to, const Value& x) { S::store(to, x); }
  static GFLOWGR_INLINE Value none() { return S::broadcast(-INFINITY); }
  static GFLOWGR_INLINE Value larger(const Value& x, const Value& y) { return S::maximum(x, y); }
  static GFLOWGR_INLINE Value share(const Value& x, const Value& top) {  // exp(x - top); 0 where both are -inf
    return S::exp_not_positive(x - (top == none() ? Value{} : top));
  }
  static GFLOWGR_INLINE Value whole(const Value& top, const Value& sum) {  // sum >= 1, or NaN, or top is -inf
    const Value value = top == none() ? top : top + S::log_at_least_one(sum);
    return sum == sum ? value : sum;
  }
};

struct Double {  // one prompt
  typedef double Number;
  typedef double Value;
  static constexpr int64_t kPrompts = 1;
  static GFLOWGR_INLINE Value get(const double* from) { return *from; }
  static GFLOWGR_INLINE void put(double* to, Value x) { *to = x; }
  static GFLOWGR_INLINE Value none() { return -INFINITY; }
  static GFLOWGR_INLINE Value larger(Value x, Value y) { return x > y ? x : y; }
  static GFLOWGR_INLINE Value share(Value x, Value top) { return std::exp(top == none() ? x : x - top); }
  static GFLOWGR_INLINE Value whole(Value top, Value sum) {
    return top == none() && sum == sum ? top : top + std::log(sum);
  }
};

// Log of the sum of exp over `count` groups that lie one after the other.
template <typename G>
GFLOWGR_INLINE typename G::Value log_sum(const typename G::Number* values, int64_t count) {
  if (count == 1) return G::get(values);
  typename G::Value top = G::none(), sum{};
  for (int64_t i = 0; i < count; ++i) top = G::larger(G::get(values + i * G::kPrompts), top);
  for (int64_t i = 0; i < count; ++i) sum += G::share(G::get(values + i * G::kPrompts), top);
  return G::whole(top, sum);
}

// The rewards of a group's prompts, item by item with the prompts side by side, and memory for their flows.
// Where a group is short its first prompt fills it up.
template <typename G>
struct Work {
  typedef typename G::Number Number;
  std::vector<Number> rewards, here, below, shared;
  std::vector<NodeRange> levels;
  Number* flow[G::kPrompts];
};

template <typename G>
GFLOWGR_INLINE typename G::Number* room(std::vector<typename G::Number>& memory, int64_t groups) {
  const size_t count = static_cast<size_t>(groups * G::kPrompts);
  if (memory.size() < count) memory.resize(count);
  return memory.data();
}

template <typename G>
GFLOWGR_INLINE void start(Work<G>& work, const typename G::Number* log_reward, int64_t items, typename G::Number* log_flow,
                          int64_t nodes, int64_t first, int64_t end) {
  typedef typename G::Number Number;
  const Number* from[G::kPrompts];
  for (int64_t i = 0; i < G::kPrompts; ++i) {
    const int64_t prompt = first + i < end ? first + i : first;
    from[i] = log_reward + prompt * items;
    work.flow[i] = log_flow + prompt * nodes;
  }
  Number* const to = room<G>(work.rewards, items);
  for (int64_t item = 0; item < items; ++item) {
    for (int64_t i = 0; i < G::kPrompts; ++i) to[item * G::kPrompts + i] = from[i][item];
  }
}

// log R of a leaf: its own item's, or the sum over those that share its identifier.
template <typename G>
GFLOWGR_INLINE typename G::Value leaf_reward(const ItemsMap& map, Work<G>& work, int64_t leaf) {
  const NodeRange entries = map.of(leaf);
  const auto* const rewards = work.rewards.data();
  if (entries.size() == 1) return G::get(rewards + map.ids[entries.begin] * G::kPrompts);
  auto* const values = room<G>(work.shared, entries.size());
  for (int64_t i = 0; i < entries.size(); ++i) {
    G::put(values + i * G::kPrompts, G::get(rewards + map.ids[entries.begin + i] * G::kPrompts));
  }
  return log_sum<G>(values, entries.size());
}

// log F of a node, from those of its children, which lie at `children`.
template <typename G>
GFLOWGR_INLINE typename G::Value node_flow(const TreeView& view, const ItemsMap& map,
                                                       Work<G>& work, int64_t node, NodeRange range,
                                             const typename G::Number* children) {
  const int64_t leaf = view.leaf(node);
  if (leaf < 0) return log_sum<G>(children, range.size());
  if (range.size() == 0) return leaf_reward<G>(map, work, leaf);
  typename G::Number both[2 * G::kPrompts];
  G::put(both, leaf_reward<G>(map, work, leaf));
  G::put(both + G::kPrompts, log_sum<G>(children, range.size()));
  return log_sum<G>(both, 2);
}

// All nodes below and at `top`, level by level from the deepest up.
template <typename G>
GFLOWGR_INLINE void subtree(const TreeView& view, const ItemsMap& map, Work<G>& work, int64_t top) {
  typedef typename G::Number Number;
  work.levels.assign(1, {top, top + 1});
  while (work.levels.back().begin < view.inner()) {
    const NodeRange last = work.levels.back();
    const NodeRange next = {view.children(last.begin).begin, view.children(last.end - 1).end};
    if (next.size() == 0) break;
    work.levels.push_back(next);
  }
  const Number* children = nullptr;
  int64_t children_begin = 0;
  for (int64_t depth = static_cast<int64_t>(work.levels.size()) - 1; depth >= 0; --depth) {
    const NodeRange nodes = work.levels[depth];
    Number* const values = room<G>(depth % 2 == 0 ? work.here : work.below, nodes.size());
    if (nodes.begin >= view.inner()) {
      for (int64_t node = nodes.begin; node < nodes.end; ++node) {
        G::put(values + (node - nodes.begin) * G::kPrompts, leaf_reward<G>(map, work, view.leaf(node)));
      }
    } else {
      for (int64_t node = nodes.begin; node < nodes.end; ++node) {
        const NodeRange range = view.children(node);
        const Number* const first = children + (range.begin - children_begin) * G::kPrompts;
        G::put(values + (node - nodes.begin) * G::kPrompts, node_flow<G>(view, map, work, node, range, first));
      }
    }
    for (int64_t j = 0; j < nodes.size(); ++j) {
      for (int64_t i = 0; i < G::kPrompts; ++i) work.flow[i][nodes.begin + j] = values[j * G::kPrompts + i];
    }
    children = values;
    children_begin = nodes.begin;
  }
}

template <typename G>
GFLOWGR_INLINE void flows(const uint8_t* tree, const typename G::Number* log_reward, int64_t items, typename G::Number* log_flow,
                          int64_t begin, int64_t end) {
  const TreeView view(tree);
  const ItemsMap map(tree);
  Work<G> work;
  for (int64_t prompt = begin; prompt < end; prompt += G::kPrompts) {
    start<G>(work, log_reward, items, log_flow, view.nodes(), prompt, end);
    subtree<G>(view, map, work, 0);
  }
}

#define GFLOWGR_DEFINE(name, bytes, attribute)                                                                   \
  attribute void flows_##name(const uint8_t* tree, const float* log_reward, int64_t items, float* log_flow,      \
                              int64_t begin, int64_t end) {                                                      \
    flows<Floats<bytes>>(tree, log_reward, items, log_flow, begin, end);                                         \
  }
GFLOWGR_EACH_TARGET(GFLOWGR_DEFINE)
#undef GFLOWGR_DEFINE

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

// A node with candidates at or below it.
struct Sum {
  int64_t node;
  double top;    // the largest log-reward of its candidates
  double sum;    // of exp(log-reward - top) over them
  int64_t count;  // of its candidates

  void add(const Sum& other) {
    if (other.top > top) {
      sum = (top == -INFINITY ? 0.0 : sum * std::exp(top - other.top)) + other.sum;
      top = other.top;
    } else if (other.top != -INFINITY) {
      sum += other.sum * std::exp(other.top - top);
    }
    count += other.count;
  }
};

int64_t node_of(const TreeView& view, const int32_t* leaf_rank, int64_t leaf) {
  if (leaf_rank == nullptr) return leaf + view.inner();
  if (leaf >= leaf_rank[view.inner()]) return leaf - leaf_rank[view.inner()] + view.inner();
  return std::upper_bound(leaf_rank, leaf_rank + view.inner() + 1, static_cast<int32_t>(leaf)) - leaf_rank - 1;
}

}  // namespace

void item_flows(const uint8_t* tree, const float* log_reward, int64_t items, float* log_flow, int64_t begin,
                int64_t end) {
  GFLOWGR_BEST(flows_portable, flows_avx2, flows_avx512)(tree, log_reward, items, log_flow, begin, end);
}

void item_flows(const uint8_t* tree, const double* log_reward, int64_t items, double* log_flow, int64_t begin,
                int64_t end) {
  flows<Double>(tree, log_reward, items, log_flow, begin, end);
}

int64_t items_under(const uint8_t* tree, int64_t node) {
  const TreeView view(tree);
  const ItemsMap map(tree);
  const int32_t* const leaf_rank = view.leaf_rank();
  const auto rank = [&](int64_t at) -> int64_t {  // leaves before a node
    if (at >= view.inner()) return at - view.inner() + (leaf_rank == nullptr ? 0 : leaf_rank[view.inner()]);
    return leaf_rank == nullptr ? 0 : leaf_rank[at];
  };
  int64_t count = 0;
  for (NodeRange nodes = {node, node + 1}; nodes.size() > 0;) {
    const int64_t first = rank(nodes.begin), last = rank(nodes.end);
    if (last > first) count += map.of(last - 1).end - map.of(first).begin;
    if (nodes.begin >= view.inner()) break;
    nodes = {view.children(nodes.begin).begin, view.children(nodes.end - 1).end};
  }
  return count;
}

void pooled_flows(const uint8_t* tree, const int32_t* leaf_of, const int64_t* items, const double* log_reward,
                  int64_t count, double floor, int64_t* nodes, double* log_flow) {
  const TreeView view(tree);
  std::vector<Sum> candidates;
  candidates.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t leaf = items[i] < 0 ? -1 : leaf_of[items[i]];
    if (leaf < 0) continue;
    candidates.push_back({node_of(view, view.leaf_rank(), leaf), log_reward[i], 1.0, 1});
    if (log_reward[i] == -INFINITY) candidates.back().sum = 0.0;
  }
  std::sort(candidates.begin(), candidates.end(), [](const Sum& a, const Sum& b) { return a.node < b.node; });

  // From the deepest level up: the candidates that end there, and the parents of the level below.
  std::vector<Sum> level, above, all;
  int64_t left = static_cast<int64_t>(candidates.size());
  for (int64_t depth = view.levels(); depth >= 0; --depth) {
    const int64_t begin = depth == 0 ? 0 : view.level(depth - 1)[kNodeBegin];
    int64_t own = left;
    while (own > 0 && candidates[own - 1].node >= begin) --own;
    // Two ascending lists into one, equal nodes added up.
    level.clear();
    const auto take = [&](const Sum& sum) {
      if (!level.empty() && level.back().node == sum.node) {
        level.back().add(sum);
      } else {
        level.push_back(sum);
      }
    };
    size_t next = 0;
    for (int64_t i = own; i < left; ++i) {
      while (next < above.size() && above[next].node <= candidates[i].node) take(above[next++]);
      take(candidates[i]);
    }
    while (next < above.size()) take(above[next++]);
    left = own;
    all.insert(all.end(), level.rbegin(), level.rend());
    above.clear();
    if (depth == 0) break;
    const NodeRange parents = {depth == 1 ? 0 : view.level(depth - 2)[kNodeBegin], begin};
    for (const Sum& sum : level) {
      if (above.empty() || sum.node >= view.children(above.back().node).end) {
        above.push_back(sum);
        above.back().node = parent(view, parents, sum.node);
      } else {
        above.back().add(sum);
      }
    }
  }
  if (all.empty()) all.push_back({0, -INFINITY, 0.0, 0});

  const int64_t places = count * view.levels() + 1, found = static_cast<int64_t>(all.size());
  for (int64_t i = 0; i < found; ++i) {
    Sum sum = all[found - 1 - i];
    if (floor != -INFINITY) {
      const int64_t others = items_under(tree, sum.node) - sum.count;
      if (others > 0) sum.add({0, floor, static_cast<double>(others), 0});
    }
    nodes[i] = sum.node;
    log_flow[i] = sum.top == -INFINITY ? sum.top : sum.top + std::log(sum.sum);
  }
  std::fill(nodes + found, nodes + places, std::numeric_limits<int64_t>::max());
  std::fill(log_flow + found, log_flow + places, -INFINITY);
}

}  // namespace gflowgr
