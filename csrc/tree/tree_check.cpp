#include "tree/tree_check.h"

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "tree/tree_layout.h"

namespace gflowgr {
namespace {

[[noreturn]] void damaged(const std::string& what) { throw std::invalid_argument("damaged prefix tree: " + what); }

std::string at(const char* name, int64_t index, int64_t value) {
  return std::string(name) + "[" + std::to_string(index) + "] = " + std::to_string(value);
}

// `required`: the value that is expected, or a bound of it.
std::string must_be(const char* name, int64_t index, int64_t value, const std::string& required) {
  return std::string(name) + "[" + std::to_string(index) + "] must be " + required + "; got " + std::to_string(value);
}

struct Header {
  explicit Header(const uint8_t* tree) : tree(tree), words(reinterpret_cast<const int64_t*>(tree)) {}

  const int64_t* level(int64_t depth) const { return words + kTreeWords + kLevelWords * depth; }
  int64_t levels() const { return words[kMaxLength]; }
  int64_t inner() const { return words[kNumInner]; }

  // First node at a depth: 0 for the root, the number of nodes past the last level.
  int64_t first(int64_t depth) const {
    return depth == 0 ? 0 : depth > levels() ? words[kNumNodes] : level(depth - 1)[kNodeBegin];
  }
  template <typename T>
  const T* section(int64_t offset) const {
    return reinterpret_cast<const T*>(tree + offset);
  }
  const int32_t* leaf_rank() const { return words[kLeafRank] == 0 ? nullptr : section<int32_t>(words[kLeafRank]); }

  const uint8_t* tree;
  const int64_t* words;
};

// Loops over all values only count faults, so that they run at the speed of memory. Only when there is one, a
// second loop finds the first.

template <typename Index>
void check_child_begin(const Header& head, const Index* begins) {
  for (int64_t depth = 0; depth < head.levels(); ++depth) {
    const int64_t from = head.first(depth), to = head.first(depth + 1);
    const int64_t begin = head.first(depth + 1), end = head.first(depth + 2);
    if (begins[from] != begin) damaged(must_be("child_begin", from, begins[from], std::to_string(begin)));
    bool falls = false;
    for (int64_t node = from + 1; node < to; ++node) falls |= begins[node] < begins[node - 1];
    for (int64_t node = from + 1; falls && node < to; ++node) {
      if (begins[node] < begins[node - 1]) {
        damaged(at("child_begin", node, begins[node]) + " is below the one before it");
      }
    }
    // The next level's first range, or the end of the last. The last value before it may be above it.
    if (begins[to] != end) damaged(must_be("child_begin", to, begins[to], std::to_string(end)));
    if (begins[to - 1] > end) {
      damaged(must_be("child_begin", to - 1, begins[to - 1], "at most " + std::to_string(end)));
    }
  }
}

void check_leaf_rank(const Header& head) {
  const int64_t inner = head.inner(), deep = head.words[kNumNodes] - inner;
  const int32_t* const rank = head.leaf_rank();
  int64_t shallow = 0;
  if (rank != nullptr) {
    const auto wrong = [&](int64_t i) {  // no identifier ends at the root
      return i < 2 ? rank[i] != 0 : static_cast<uint32_t>(rank[i]) - static_cast<uint32_t>(rank[i - 1]) > 1;
    };
    bool any = wrong(0) || wrong(1);
    for (int64_t i = 2; i <= inner; ++i) {
      any |= static_cast<uint32_t>(rank[i]) - static_cast<uint32_t>(rank[i - 1]) > 1;
    }
    for (int64_t i = 0; any && i <= inner; ++i) {
      if (wrong(i)) damaged(at("leaf_rank", i, rank[i]) + " does not count leaves");
    }
    shallow = rank[inner];
    if (shallow == 0) damaged("leaf_rank counts no leaf");
  }
  if (shallow + deep != head.words[kNumLeaves]) {
    damaged("num_leaves = " + std::to_string(head.words[kNumLeaves]) + ", but there are " +
            std::to_string(shallow + deep));
  }
}

template <typename Index>
void check_fanout(const Header& head, const Index* begins) {
  const int32_t* const rank = head.leaf_rank();
  const auto dead = [&](int64_t node) {
    return begins[node + 1] == begins[node] && (rank == nullptr || rank[node + 1] == rank[node]);
  };
  for (int64_t depth = 0; depth < head.levels(); ++depth) {
    const int64_t from = head.first(depth), to = head.first(depth + 1);
    Index most = 0;
    bool any = false;
    for (int64_t node = from; node < to; ++node) most = std::max<Index>(most, begins[node + 1] - begins[node]);
    if (rank == nullptr) {
      for (int64_t node = from; node < to; ++node) any |= begins[node + 1] == begins[node];
    } else {
      for (int64_t node = from; node < to; ++node) {
        any |= (begins[node + 1] == begins[node]) & (rank[node + 1] == rank[node]);
      }
    }
    for (int64_t node = from; any && node < to; ++node) {
      if (dead(node)) damaged("node " + std::to_string(node) + " has no child and ends no identifier");
    }
    if (most != head.level(depth)[kMaxChildren]) {
      damaged(at("max_children", depth, head.level(depth)[kMaxChildren]) + ", but it is " + std::to_string(most));
    }
  }
}

// Largest token + 1 of a level.
template <typename Index, typename Stored>
int64_t check_tokens(const Header& head, int64_t depth, const Index* begins, const Stored* stored) {
  const int64_t first = head.first(depth + 1), count = head.first(depth + 2) - first;
  const int64_t base = head.level(depth)[kTokenBase];
  Stored least = stored[0], most = stored[0];
  int64_t falls = 0, allowed = 0;
  for (int64_t i = 1; i < count; ++i) {
    falls += stored[i] <= stored[i - 1];
    least = std::min(least, stored[i]);
    most = std::max(most, stored[i]);
  }
  // A node's first child follows another node's last: only there may a token fall.
  for (int64_t node = head.first(depth); node < first; ++node) {
    const int64_t begin = std::min<int64_t>(begins[node] - first, count - 1);  // count: no children follow
    const bool follows = (begin > 0) & (begins[node] < begins[node + 1]);
    allowed += follows & (stored[begin] <= stored[begin - (begin > 0)]);
  }
  for (int64_t node = head.first(depth); falls != allowed && node < first; ++node) {
    for (int64_t i = begins[node] - first + 1; i < begins[node + 1] - first; ++i) {
      if (stored[i] <= stored[i - 1]) {
        damaged("the token of node " + std::to_string(first + i) + " is not above the one of the child before it");
      }
    }
  }
  const int64_t low = least, high = most;
  if (low != 0) {
    damaged(at("token_base", depth, base) + ", but the smallest token is " + std::to_string(base + low));
  }
  if (base + high > INT32_MAX) {
    damaged(at("token_base", depth, base) + " makes a token of " + std::to_string(base + high));
  }
  return base + high + 1;
}

template <typename Index>
std::vector<int64_t> check_tokens(const Header& head, const Index* begins) {
  std::vector<int64_t> ends;
  for (int64_t depth = 0; depth < head.levels(); ++depth) {
    const int64_t offset = head.level(depth)[kTokenOffset], width = head.level(depth)[kTokenBytes];
    ends.push_back(width == 1   ? check_tokens(head, depth, begins, head.section<uint8_t>(offset))
                   : width == 2 ? check_tokens(head, depth, begins, head.section<uint16_t>(offset))
                                : check_tokens(head, depth, begins, head.section<uint32_t>(offset)));
  }
  const int64_t size = *std::max_element(ends.begin(), ends.end());
  if (size != head.words[kVocabSize]) {
    damaged("vocab_size = " + std::to_string(head.words[kVocabSize]) + ", but the largest token is " +
            std::to_string(size - 1));
  }
  return ends;
}

void check_items(const Header& head) {
  const int64_t entries = head.words[kNumEntries], leaves = head.words[kNumLeaves], ids = head.words[kNumItems];
  const int32_t* const items = head.section<int32_t>(head.words[kItemIds]);
  int32_t low = 0, high = -1;
  for (int64_t i = 0; i < entries; ++i) {
    low = std::min(low, items[i]);
    high = std::max(high, items[i]);
  }
  if (low < 0 || high >= ids) {
    int64_t i = 0;
    while (items[i] >= 0 && items[i] < ids) ++i;
    damaged(must_be("item_ids", i, items[i], "0.." + std::to_string(ids - 1)));
  }
  if (high + int64_t{1} != ids) {
    damaged("num_items = " + std::to_string(ids) + ", but the largest item id is " + std::to_string(high));
  }
  // Ids may be few and far apart: the system allocates only those pages of fresh memory that are written.
  const std::unique_ptr<uint64_t, decltype(&std::free)> seen(
      static_cast<uint64_t*>(std::calloc(static_cast<size_t>(ids) / 64 + 1, sizeof(uint64_t))), &std::free);
  if (seen == nullptr) throw std::bad_alloc();
  for (int64_t i = 0; i < entries; ++i) {
    uint64_t& word = seen.get()[items[i] >> 6];
    const uint64_t bit = uint64_t{1} << (items[i] & 63);
    if ((word & bit) != 0) damaged(at("item_ids", i, items[i]) + " is there twice");
    word |= bit;
  }
  if (head.words[kItemBegin] == 0) return;
  const int32_t* const begin = head.section<int32_t>(head.words[kItemBegin]);
  if (begin[0] != 0) damaged(must_be("item_begin", 0, begin[0], "0"));
  for (int64_t leaf = 0; leaf < leaves; ++leaf) {
    if (begin[leaf + 1] <= begin[leaf] || begin[leaf + 1] > entries) {
      damaged(at("item_begin", leaf + 1, begin[leaf + 1]) + " is not above the one before it, or beyond the items");
    }
    for (int64_t i = begin[leaf] + 1; i < begin[leaf + 1]; ++i) {
      if (items[i] < items[i - 1]) damaged(at("item_ids", i, items[i]) + " is below the one before it of its leaf");
    }
  }
  if (begin[leaves] != entries) {
    damaged(must_be("item_begin", leaves, begin[leaves], std::to_string(entries)));
  }
}

template <typename Index>
std::vector<int64_t> check(const Header& head) {
  const Index* const begins = head.section<Index>(head.words[kChildBegin]);
  check_child_begin(head, begins);
  check_leaf_rank(head);
  check_fanout(head, begins);
  const std::vector<int64_t> ends = check_tokens(head, begins);
  check_items(head);
  return ends;
}

}  // namespace

std::vector<int64_t> check_tree(const uint8_t* tree) {
  const Header head(tree);
  return head.words[kIndexBytes] == 4 ? check<int32_t>(head) : check<int64_t>(head);
}

}  // namespace gflowgr
