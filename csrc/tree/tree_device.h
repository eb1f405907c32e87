// Reading the prefix tree's buffer on the device. Its header is on the device too; all threads take the same
// branches on its values.
#pragma once

#include <cstdint>

#include "tree/tree_layout.h"
#include "common/cuda_launch.h"

namespace gflowgr {

__device__ inline int64_t tree_word(const uint8_t* __restrict__ tree, int64_t word) {
  return __ldg(reinterpret_cast<const int64_t*>(tree) + word);
}

__device__ inline int64_t level_word(const uint8_t* __restrict__ tree, int64_t level, int word) {
  return tree_word(tree, kTreeWords + kLevelWords * level + word);
}

// First child of a node at any depth but the last; of node + 1 it is the end of the children.
__device__ inline int64_t child_begin(const uint8_t* __restrict__ tree, int64_t node) {
  const uint8_t* const array = tree + tree_word(tree, kChildBegin);
  return tree_word(tree, kIndexBytes) == 4 ? __ldg(reinterpret_cast<const int32_t*>(array) + node)
                                           : __ldg(reinterpret_cast<const int64_t*>(array) + node);
}

struct NodeSpan {
  int64_t begin, end;
  __device__ int64_t size() const { return end - begin; }
};

// Children of any number that stands for a node; empty for -1 and for what is no node.
__device__ inline NodeSpan child_span(const uint8_t* __restrict__ tree, int64_t node) {
  if (node < 0 || node >= tree_word(tree, kNumInner)) return {0, 0};
  return {child_begin(tree, node), child_begin(tree, node + 1)};
}

// Tokens on the way to a node.
__device__ inline int64_t node_depth(const uint8_t* __restrict__ tree, int64_t node) {
  const int64_t levels = tree_word(tree, kMaxLength);
  int64_t depth = 0;
  while (depth < levels && node >= level_word(tree, depth, kNodeBegin)) ++depth;
  return depth;
}

// Number of the identifier that ends at a node, -1 if none does.
__device__ inline int64_t node_leaf(const uint8_t* __restrict__ tree, int64_t node) {
  const int64_t inner = tree_word(tree, kNumInner), offset = tree_word(tree, kLeafRank);
  if (offset == 0) return node >= inner ? node - inner : -1;
  const auto* const rank = reinterpret_cast<const int32_t*>(tree + offset);
  if (node >= inner) return node - inner + __ldg(rank + inner);
  const int32_t before = __ldg(rank + node);
  return __ldg(rank + node + 1) > before ? before : -1;
}

// Position of `code` among the n ascending, distinct values at `first`, or -1.
template <typename Stored>
__device__ int64_t find(const Stored* __restrict__ first, int64_t n, int64_t code) {
  int64_t low = 0;
  for (int64_t left = n; left > 1;) {
    const int64_t half = left >> 1;
    low += static_cast<int64_t>(__ldg(first + low + half - 1)) < code ? half : 0;
    left -= half;
  }
  return n > 0 && static_cast<int64_t>(__ldg(first + low)) == code ? low : -1;
}

// The tokens of some node's children, ascending.
struct ChildTokens {
  const uint8_t* stored;
  int64_t base;
  int width;

  __device__ int64_t operator[](int64_t child) const {
    const int64_t code = width == 1   ? __ldg(stored + child)
                         : width == 2 ? __ldg(reinterpret_cast<const uint16_t*>(stored) + child)
                                      : __ldg(reinterpret_cast<const uint32_t*>(stored) + child);
    return base + code;
  }

  __device__ int64_t find(int64_t count, int64_t token) const {
    // The subtraction must not wrap around for a garbage token.
    const int64_t code = token < base ? -1 : token - base;
    if (width == 1) return gflowgr::find(stored, count, code);
    if (width == 2) return gflowgr::find(reinterpret_cast<const uint16_t*>(stored), count, code);
    return gflowgr::find(reinterpret_cast<const uint32_t*>(stored), count, code);
  }

  // Number of children whose token is less than `token`.
  __device__ int64_t count_below(int64_t count, int64_t token) const {
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) >> 1;
      if ((*this)[middle] < token) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

// `level` is the depth of the node, `begin` its first child.
__device__ inline ChildTokens child_tokens(const uint8_t* __restrict__ tree, int64_t level, int64_t begin) {
  const int64_t width = level_word(tree, level, kTokenBytes);
  const int64_t offset = level_word(tree, level, kTokenOffset) + width * (begin - level_word(tree, level, kNodeBegin));
  return {tree + offset, level_word(tree, level, kTokenBase), static_cast<int>(width)};
}

}  // namespace gflowgr
