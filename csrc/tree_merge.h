// Reads a tree's rows in sorted order, and merges them with sorted rows. Used by tree_build.cpp alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "tree_layout.h"
#include "tree_sort.h"

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
// back. Throws std::invalid_argument for a buffer whose child ranges do not follow each other.
class TreeRows {
 public:
  explicit TreeRows(const uint8_t* tree) : tree_(tree), header_(reinterpret_cast<const int64_t*>(tree)) {
    length_ = static_cast<int>(header_[kMaxLength]);
    rewind();
  }

  void rewind() {
    next_.assign(length_ + 1, 0);
    node_.assign(length_ + 1, 0);
    end_.assign(length_ + 1, 0);
    tokens.assign(length_, 0);
    for (int level = 0; level < length_; ++level) next_[level + 1] = level_word(level, kNodeBegin);
    depth_ = 0;
    entry_ = entries_end_ = 0;
  }

  // Moves to the next row; false after the last.
  bool next() {
    if (entry_ + 1 < entries_end_) {
      item = items()[++entry_];
      return true;
    }
    do {
      if (!descend() && !move_on()) return false;
    } while (!open_leaf(node_[depth_]));
    item = items()[entry_];
    return true;
  }

  int length() const { return depth_; }
  std::vector<int64_t> tokens;  // the first length() are the row's
  int64_t item = 0;

 private:
  int64_t level_word(int level, LevelWord word) const {
    return header_[kTreeWords + kLevelWords * level + word];
  }
  int64_t child_begin(int64_t node) const {
    const uint8_t* const begins = tree_ + header_[kChildBegin];
    return header_[kIndexBytes] == 4 ? reinterpret_cast<const int32_t*>(begins)[node]
                                     : reinterpret_cast<const int64_t*>(begins)[node];
  }
  const int32_t* items() const { return reinterpret_cast<const int32_t*>(tree_ + header_[kItemIds]); }

  bool descend() {
    const int64_t node = node_[depth_];
    if (depth_ == length_ || node >= header_[kNumInner]) return false;
    const int64_t begin = child_begin(node), end = child_begin(node + 1);
    if (begin != next_[depth_ + 1] || end < begin || end > level_end(depth_)) damaged();
    if (begin == end) return false;
    end_[++depth_] = end;
    enter(begin);
    return true;
  }

  bool move_on() {
    while (depth_ > 0 && node_[depth_] + 1 == end_[depth_]) --depth_;
    if (depth_ == 0) return false;
    enter(node_[depth_] + 1);
    return true;
  }

  void enter(int64_t node) {
    const int level = depth_ - 1;
    node_[depth_] = node;
    next_[depth_] = node + 1;
    const uint8_t* const stored = tree_ + level_word(level, kTokenOffset);
    const int64_t at = node - level_word(level, kNodeBegin);
    const int64_t width = level_word(level, kTokenBytes);
    const int64_t token = width == 1   ? stored[at]
                          : width == 2 ? reinterpret_cast<const uint16_t*>(stored)[at]
                                       : reinterpret_cast<const uint32_t*>(stored)[at];
    tokens[level] = token + level_word(level, kTokenBase);
  }

  // Opens the entries of the leaf at `node`; false when no identifier ends there.
  bool open_leaf(int64_t node) {
    const int64_t inner = header_[kNumInner];
    const int32_t* const rank = reinterpret_cast<const int32_t*>(tree_ + header_[kLeafRank]);
    int64_t leaf = node - inner;
    if (node < inner) {
      if (header_[kLeafRank] == 0 || rank[node + 1] == rank[node]) return false;
      leaf = rank[node];
    } else if (header_[kLeafRank] != 0) {
      leaf += rank[inner];
    }
    entry_ = leaf;
    entries_end_ = leaf + 1;
    if (header_[kItemBegin] != 0) {
      const int32_t* const begin = reinterpret_cast<const int32_t*>(tree_ + header_[kItemBegin]);
      entry_ = begin[leaf];
      entries_end_ = begin[leaf + 1];
    }
    if (leaf < 0 || leaf >= header_[kNumLeaves] || entry_ < 0 || entries_end_ <= entry_ ||
        entries_end_ > header_[kNumEntries]) {
      damaged();
    }
    return true;
  }

  // One past the last node at depth `level` + 1.
  int64_t level_end(int level) const {
    return level + 1 < length_ ? level_word(level + 1, kNodeBegin) : header_[kNumNodes];
  }

  [[noreturn]] static void damaged() { throw std::invalid_argument("damaged prefix tree: ranges are not in order"); }

  const uint8_t* tree_;
  const int64_t* header_;
  int length_ = 0;
  int depth_ = 0;
  std::vector<int64_t> next_, node_, end_;  // by depth: the next node, the node of the path, the last + 1
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
    length = from_tree ? tree_.length() : added_->length;
    item = from_tree ? tree_.item : added_->item;
    shared = 0;
    bool same = !first_;
    for (int level = 0; level < length; ++level) {
      const int64_t token = from_tree ? tree_.tokens[level] : added_token(level);
      const uint64_t code = static_cast<uint64_t>(token - base[level] + 1);
      same = same && code == codes[level];
      shared += same;
      codes[level] = code;
      low[level] = std::min(low[level], token);
      high[level] = std::max(high[level], token);
    }
    longest = std::max(longest, length);
    shortest = std::min(shortest, length);
    top_item = std::max(top_item, item);
    std::fill(codes.begin() + length, codes.end(), 0);
    first_ = false;
    if (from_tree) {
      next_of_tree();
    } else {
      has_added_ = added_->next();
    }
    return true;
  }

  void rewind() override {
    first_ = true;
    tree_.rewind();
    next_of_tree();
    if (added_ != nullptr) added_->rewind();
    has_added_ = added_ != nullptr && added_->next();
  }

  std::vector<int64_t> base;
  // Of the rows so far: the smallest and the largest token of each level, lengths, the highest item.
  std::vector<int64_t> low, high;
  int longest = 0, shortest;
  int64_t top_item = -1;

 private:
  int64_t added_token(int level) const {
    return static_cast<int64_t>(added_->codes[level]) - 1 + added_base_[level];
  }

  void next_of_tree() {
    do {
      has_tree_ = tree_.next();
    } while (has_tree_ && removed_.has(tree_.item));
  }

  // Of the two rows' identifiers; one sorts before its extensions.
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
  bool has_tree_ = false, has_added_ = false, first_ = true;
};

}  // namespace gflowgr
