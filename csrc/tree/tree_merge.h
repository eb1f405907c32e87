// Reads a tree's rows in sorted order, and merges them with sorted rows. Used by tree_build.cpp alone.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>
#include <vector>

#include "tree/tree_layout.h"
#include "tree/tree_sort.h"

namespace gflowgr {

// A set of item ids, one bit each.
class ItemSet {
 public:
  template <typename Item>
  ItemSet(const Item* items, int64_t count) {
    int64_t top = -1;
    for (int64_t i = 0; i < count; ++i) top = std::max(top, static_cast<int64_t>(items[i]));
    bits_.assign(static_cast<size_t>(top + 1 + 63) / 64, 0);
    for (int64_t i = 0; i < count; ++i) bits_[items[i] >> 6] |= uint64_t{1} << (items[i] & 63);
  }
  bool has(int64_t item) const {
    const auto word = static_cast<size_t>(item >> 6);
    return word < bits_.size() && ((bits_[word] >> (item & 63)) & 1) != 0;
  }

 private:
  std::vector<uint64_t> bits_;
};

// The rows of a tree, from its first identifier to its last, ascending items within one: a walk from the
// root, depth first. Nodes of a level come in that very order, so every array is read once from front to
// back. The tree has passed check_tree.
class TreeRows {
 public:
  explicit TreeRows(const uint8_t* tree)
      : header_(reinterpret_cast<const int64_t*>(tree)),
        length_(static_cast<int>(header_[kMaxLength])),
        inner_(header_[kNumInner]),
        wide_(header_[kIndexBytes] == 8),
        begins_(tree + header_[kChildBegin]),
        rank_(header_[kLeafRank] ? reinterpret_cast<const int32_t*>(tree + header_[kLeafRank]) : nullptr),
        items_(reinterpret_cast<const int32_t*>(tree + header_[kItemIds])),
        item_begin_(header_[kItemBegin] ? reinterpret_cast<const int32_t*>(tree + header_[kItemBegin])
                                        : nullptr) {
    levels_.resize(length_ + 1);
    for (int level = 0; level < length_; ++level) {
      const int64_t* const word = header_ + kTreeWords + kLevelWords * level;
      levels_[level + 1] = {tree + word[kTokenOffset], word[kNodeBegin], word[kTokenBase],
                            static_cast<int>(word[kTokenBytes])};
    }
    rewind();
  }

  void rewind() {
    path_.assign(length_ + 1, {});
    tokens.assign(length_, 0);
    depth_ = 0;
    entry_ = entries_end_ = 0;
  }

  // Moves to the next row; false after the last.
  bool next() {
    shared = depth_;
    if (++entry_ < entries_end_) {
      item = items_[entry_];
      return true;
    }
    do {
      if (!descend() && !move_on()) return false;
    } while (!open_leaf(path_[depth_].node));
    item = items_[entry_];
    return true;
  }

  int length() const { return depth_; }
  std::vector<int64_t> tokens;  // the first length() are the row's
  int64_t item = 0;
  int shared = 0;  // leading tokens that are those of the row before

 private:
  struct Level {
    const uint8_t* stored = nullptr;
    int64_t begin = 0, base = 0;  // first node, smallest token
    int width = 1;
  };
  struct Place {
    int64_t node = 0, end = 0;  // a node of the path, its last sibling + 1
  };

  int64_t child_begin(int64_t node) const {
    return wide_ ? reinterpret_cast<const int64_t*>(begins_)[node]
                 : reinterpret_cast<const int32_t*>(begins_)[node];
  }

  bool descend() {
    const int64_t node = path_[depth_].node;
    if (node >= inner_) return false;
    const int64_t begin = child_begin(node), end = child_begin(node + 1);
    if (begin == end) return false;
    path_[++depth_].end = end;
    enter(begin);
    return true;
  }

  bool move_on() {
    while (depth_ > 0 && path_[depth_].node + 1 == path_[depth_].end) --depth_;
    if (depth_ == 0) return false;
    shared = std::min(shared, depth_ - 1);
    enter(path_[depth_].node + 1);
    return true;
  }

  void enter(int64_t node) {
    path_[depth_].node = node;
    const Level& level = levels_[depth_];
    const int64_t at = node - level.begin;
    const int64_t token = level.width == 1   ? level.stored[at]
                          : level.width == 2 ? reinterpret_cast<const uint16_t*>(level.stored)[at]
                                             : reinterpret_cast<const uint32_t*>(level.stored)[at];
    tokens[depth_ - 1] = token + level.base;
  }

  // Opens the entries of the leaf at `node`; false when no identifier ends there.
  bool open_leaf(int64_t node) {
    int64_t leaf = node - inner_;
    if (node < inner_) {
      if (rank_ == nullptr || rank_[node + 1] == rank_[node]) return false;
      leaf = rank_[node];
    } else if (rank_ != nullptr) {
      leaf += rank_[inner_];
    }
    entry_ = item_begin_ == nullptr ? leaf : item_begin_[leaf];
    entries_end_ = item_begin_ == nullptr ? leaf + 1 : item_begin_[leaf + 1];
    return true;
  }

  const int64_t* header_;
  int length_;
  int64_t inner_;
  bool wide_;
  const uint8_t* begins_;
  const int32_t *rank_, *items_, *item_begin_;
  std::vector<Level> levels_;  // by depth
  std::vector<Place> path_;    // by depth
  int depth_ = 0;
  int64_t entry_ = 0, entries_end_ = 0;
};

// A tree's rows without some items, merged with added rows. Codes are relative to base(level), 0 at first.
class MergedRows final : public SortedRows {
 public:
  // `added` may be null; its codes are relative to `added_base`.
  MergedRows(const uint8_t* tree, const ItemSet& removed, SortedRows* added,
             const std::vector<int64_t>& added_base, int levels)
      : base(levels, 0),
        low(levels, INT64_MAX),
        high(levels, -1),
        shortest(levels),
        tree_(tree),
        removed_(removed),
        added_(added),
        added_base_(added_base) {
    codes.assign(levels, 0);
    rewind();
  }

  bool next() override {
    if (!has_tree_ && !has_added_) return false;
    const int order = !has_tree_ ? 1 : !has_added_ ? -1 : compare();
    const bool from_tree = order < 0 || (order == 0 && tree_.item < added_->item);
    const int before = length;
    length = from_tree ? tree_.length() : added_->length;
    item = from_tree ? tree_.item : added_->item;
    // Two successive rows of the tree: the reader knows how many tokens they share.
    shared = from_tree && last_from_tree_ ? std::min(tree_shared_, length) : 0;
    bool same = !first_ && !(from_tree && last_from_tree_);
    for (int level = shared; level < length; ++level) {
      const int64_t token = from_tree ? tree_.tokens[level] : added_token(level);
      const uint64_t code = static_cast<uint64_t>(token - base[level] + 1);
      same = same && code == codes[level];
      shared += same;
      codes[level] = code;
      low[level] = std::min(low[level], token);
      high[level] = std::max(high[level], token);
    }
    for (int level = length; level < before; ++level) codes[level] = 0;
    longest = std::max(longest, length);
    shortest = std::min(shortest, length);
    top_item = std::max(top_item, item);
    first_ = false;
    last_from_tree_ = from_tree;
    if (from_tree) {
      next_of_tree();
    } else {
      has_added_ = added_->next();
    }
    return true;
  }

  void rewind() override {
    first_ = true;
    last_from_tree_ = false;
    length = 0;
    std::fill(codes.begin(), codes.end(), 0);
    tree_.rewind();
    next_of_tree();
    if (added_ != nullptr) added_->rewind();
    has_added_ = added_ != nullptr && added_->next();
  }

  std::vector<int64_t> base;
  // Statistics of the rows so far: smallest and largest token of each level, lengths, highest item.
  std::vector<int64_t> low, high;
  int longest = 0, shortest;
  int64_t top_item = -1;

 private:
  int64_t added_token(int level) const {
    return static_cast<int64_t>(added_->codes[level]) - 1 + added_base_[level];
  }

  void next_of_tree() {
    tree_shared_ = INT_MAX;
    do {
      has_tree_ = tree_.next();
      tree_shared_ = std::min(tree_shared_, tree_.shared);
    } while (has_tree_ && removed_.has(tree_.item));
  }

  // Compares the two rows' identifiers; an identifier sorts before its extensions.
  int compare() const {
    const int common = std::min(tree_.length(), added_->length);
    for (int level = 0; level < common; ++level) {
      const int64_t difference = tree_.tokens[level] - added_token(level);
      if (difference != 0) return difference < 0 ? -1 : 1;
    }
    return tree_.length() - added_->length;
  }

  TreeRows tree_;
  const ItemSet& removed_;
  SortedRows* added_;
  const std::vector<int64_t>& added_base_;
  bool has_tree_ = false, has_added_ = false, first_ = true, last_from_tree_ = false;
  int tree_shared_ = 0;  // leading tokens of the tree's row that its last kept row has
};

}  // namespace gflowgr
