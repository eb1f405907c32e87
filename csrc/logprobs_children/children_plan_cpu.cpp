#include "logprobs_children/children_plan.h"

#include <limits>

#include "tree/tree_layout.h"
#include "tree/tree_sort.h"

namespace gflowgr {
namespace {

const int64_t* header_of(const uint8_t* tree) { return reinterpret_cast<const int64_t*>(tree); }

// Whether an identifier ends at the node; PrefixTree.terminal in gflowgr/tree/prefix_tree.py.
bool is_terminal(const uint8_t* tree, int64_t node) {
  const int64_t* const header = header_of(tree);
  if (node < 0) return false;
  if (node >= header[kNumInner]) return true;
  if (header[kLeafRank] == 0) return false;
  const auto* rank = reinterpret_cast<const int32_t*>(tree + header[kLeafRank]);
  return rank[node + 1] > rank[node];
}

bool is_identifier(const uint8_t* tree, const int64_t* nodes, const bool* mask, int64_t steps) {
  int64_t length = 0;
  while (length < steps && (mask == nullptr || mask[length])) ++length;
  for (int64_t l = length; l < steps; ++l) {
    if (mask[l]) return false;
  }
  if (length == 0) return mask != nullptr;
  return is_terminal(tree, nodes[length - 1]);
}

template <typename Stored>
void append(const Stored* stored, int64_t base, Range range, std::vector<int64_t>& tokens) {
  for (int64_t i = range.begin; i < range.end; ++i) {
    tokens.push_back(base + static_cast<int64_t>(stored[i]));
  }
}

}  // namespace

Range tree_children(const uint8_t* tree, int64_t node) {
  const int64_t* const header = header_of(tree);
  const uint8_t* const begins = tree + header[kChildBegin];
  if (header[kIndexBytes] == 4) {
    const auto* begin = reinterpret_cast<const int32_t*>(begins) + node;
    return {begin[0], begin[1]};
  }
  const auto* begin = reinterpret_cast<const int64_t*>(begins) + node;
  return {begin[0], begin[1]};
}

void append_child_tokens(const uint8_t* tree, int64_t node, int64_t level, std::vector<int64_t>& tokens) {
  const int64_t* const word = header_of(tree) + kTreeWords + kLevelWords * level;
  const uint8_t* const stored = tree + word[kTokenOffset];
  Range range = tree_children(tree, node);
  range = {range.begin - word[kNodeBegin], range.end - word[kNodeBegin]};
  if (word[kTokenBytes] == 1) {
    append(stored, word[kTokenBase], range, tokens);
  } else if (word[kTokenBytes] == 2) {
    append(reinterpret_cast<const uint16_t*>(stored), word[kTokenBase], range, tokens);
  } else {
    append(reinterpret_cast<const uint32_t*>(stored), word[kTokenBase], range, tokens);
  }
}

int64_t plan_children(const uint8_t* tree, const int64_t* nodes, const bool* mask, int64_t trajectories,
                      int64_t steps, ChildrenPlan& plan, float* log_pf) {
  const int64_t inner = header_of(tree)[kNumInner];
  const int64_t total = trajectories * steps;
  std::vector<KeyRow> active;
  active.reserve(total);
  int64_t passive = 0, invalid = 0;
  // The other rows are gathered from the end of the array, in descending order.
  int64_t* const last = plan.rows + total - 1;
  uint64_t all = 0;
  for (int64_t n = 0; n < trajectories; ++n) {
    const int64_t* const after = nodes + n * steps;
    const bool* const valid = mask == nullptr ? nullptr : mask + n * steps;
    invalid += !is_identifier(tree, after, valid, steps);
    int64_t node = 0;
    for (int64_t l = 0; l < steps; ++l) {
      const int64_t row = n * steps + l;
      log_pf[row] = 0.0f;
      if (valid != nullptr && !valid[l]) {
        last[-passive++] = row;
      } else if (node < 0 || node >= inner || after[l] < 0) {
        log_pf[row] = -std::numeric_limits<float>::infinity();
        last[-passive++] = row;
      } else {
        const Range range = tree_children(tree, node);
        if (range.end - range.begin >= 2) {
          active.push_back({static_cast<uint64_t>(node), static_cast<uint32_t>(row)});
          all |= node;
        } else {
          last[-passive++] = row;
        }
      }
      node = after[l];
    }
  }
  radix_sort(active, 0, bit_width(all));
  std::reverse(last - passive + 1, last + 1);
  int64_t groups = 0, products = 0;
  for (size_t i = 0; i < active.size(); ++i) {
    const int64_t node = static_cast<int64_t>(active[i].key), row = active[i].row;
    const Range range = tree_children(tree, node);
    plan.rows[i] = row;
    plan.targets[i] = nodes[row] - range.begin;
    products += range.end - range.begin;
    if (i == 0 || active[i - 1].key != active[i].key) {
      plan.group_node[groups] = node;
      plan.group_begin[groups++] = static_cast<int64_t>(i);
    }
  }
  plan.words[0] = static_cast<int64_t>(active.size());
  plan.words[1] = groups;
  plan.words[2] = products;
  // Nothing is left undefined: what the op returns is compared as a whole by torch.library.opcheck.
  std::fill(plan.words + 3, plan.words + kPlanWords, 0);
  std::fill(plan.targets + active.size(), plan.targets + total, 0);
  std::fill(plan.group_node + groups, plan.group_node + total, 0);
  std::fill(plan.group_begin + groups, plan.group_begin + total, 0);
  return invalid;
}

}  // namespace gflowgr
