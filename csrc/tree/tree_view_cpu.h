// Reading a prefix tree's buffer, node by node.
#pragma once

#include <cstdint>

#include "tree/tree_layout.h"

namespace gflowgr {

struct NodeRange {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

class TreeView {
 public:
  explicit TreeView(const uint8_t* tree)
      : tree_(tree),
        header_(reinterpret_cast<const int64_t*>(tree)),
        leaf_rank_(header_[kLeafRank] == 0 ? nullptr
                                           : reinterpret_cast<const int32_t*>(tree + header_[kLeafRank])),
        child_begin_(tree + header_[kChildBegin]),
        inner_(header_[kNumInner]),
        wide_(header_[kIndexBytes] == 8) {}

  int64_t levels() const { return header_[kMaxLength]; }
  int64_t nodes() const { return header_[kNumNodes]; }
  int64_t inner() const { return inner_; }  // nodes above the deepest level: 0 .. inner() - 1
  int64_t leaves() const { return header_[kNumLeaves]; }
  const int32_t* leaf_rank() const { return leaf_rank_; }  // null where all identifiers are equally long
  bool ragged() const { return leaf_rank_ != nullptr; }  // identifiers differ in length
  const int64_t* level(int64_t depth) const { return header_ + kTreeWords + kLevelWords * depth; }

  // Empty for -1 and for what is no node.
  NodeRange children(int64_t node) const {
    if (node < 0 || node >= inner_) return {0, 0};
    if (wide_) {
      const auto* const begin = reinterpret_cast<const int64_t*>(child_begin_);
      return {begin[node], begin[node + 1]};
    }
    const auto* const begin = reinterpret_cast<const int32_t*>(child_begin_);
    return {begin[node], begin[node + 1]};
  }

  // Where the children of a node begin, or of what follows the inner nodes: 0 <= node <= inner().
  int64_t first_child(int64_t node) const {
    return wide_ ? reinterpret_cast<const int64_t*>(child_begin_)[node]
                 : reinterpret_cast<const int32_t*>(child_begin_)[node];
  }

  const void* child_begin(int64_t node) const { return child_begin_ + node * (wide_ ? 8 : 4); }

  // Tokens on the way to the node.
  int64_t depth(int64_t node) const {
    int64_t depth = 0;
    while (depth < levels() && node >= level(depth)[kNodeBegin]) ++depth;
    return depth;
  }

  // Stored token on the edge into `node` at depth `depth` + 1, and those of its next siblings after it.
  const uint8_t* codes(int64_t depth, int64_t node) const {
    const int64_t* const word = level(depth);
    return tree_ + word[kTokenOffset] + (node - word[kNodeBegin]) * word[kTokenBytes];
  }

  int64_t token(int64_t depth, int64_t node) const {
    const int64_t* const word = level(depth);
    const uint8_t* const at = codes(depth, node);
    const int64_t code = word[kTokenBytes] == 1   ? *at
                         : word[kTokenBytes] == 2 ? *reinterpret_cast<const uint16_t*>(at)
                                                  : *reinterpret_cast<const uint32_t*>(at);
    return word[kTokenBase] + code;
  }

  // Number of the identifier that ends at a node, -1 if none does.
  int64_t leaf(int64_t node) const {
    if (node >= inner_) return node - inner_ + (leaf_rank_ == nullptr ? 0 : leaf_rank_[inner_]);
    if (leaf_rank_ == nullptr || leaf_rank_[node + 1] == leaf_rank_[node]) return -1;
    return leaf_rank_[node];
  }

 private:
  const uint8_t* tree_;
  const int64_t* header_;
  const int32_t* leaf_rank_;
  const uint8_t* child_begin_;
  int64_t inner_;
  bool wide_;
};

}  // namespace gflowgr
