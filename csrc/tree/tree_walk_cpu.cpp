#include "tree/tree_walk_cpu.h"

#include <algorithm>

#include "tree/tree_layout.h"

#if defined(__GNUC__) || defined(__clang__)
#define GFLOWGR_PREFETCH(address) __builtin_prefetch(address)
#else
#define GFLOWGR_PREFETCH(address) (void)(address)
#endif

namespace gflowgr {
namespace {

// Rows walked together. On a tree larger than the caches every step is two cache misses (the child range,
// then the children's tokens); going level by level over a block has the block's misses in flight at once.
constexpr int kBlock = 32;

// Position of `code` among the n ascending, distinct values at `first`, or -1.
template <typename Stored>
int64_t find(const Stored* first, int64_t n, int64_t code) {
  if (n <= 0 || code < first[0] || code > first[n - 1]) return -1;
  // Distinct values: at most code - first[0] of them are below, at most first[n - 1] - code above. So the
  // children of a full node are indexed directly, and those of a nearly full one nearly so.
  int64_t low = std::max<int64_t>(0, n - 1 - (static_cast<int64_t>(first[n - 1]) - code));
  const int64_t high = std::min<int64_t>(n - 1, code - static_cast<int64_t>(first[0]));
  // Branch-free binary search: the outcomes of the comparisons are random, so a branch would be mispredicted.
  for (int64_t left = high - low + 1; left > 1;) {
    const int64_t half = left >> 1;
    low += static_cast<int64_t>(first[low + half - 1]) < code ? half : 0;
    left -= half;
  }
  return static_cast<int64_t>(first[low]) == code ? low : -1;
}

struct Block {
  int64_t node[kBlock];   // -1: ended
  int64_t begin[kBlock];
  int64_t end[kBlock];
  int64_t code[kBlock];
};

template <typename Stored>
void step(const Stored* stored, int64_t level_begin, int count, Block& block) {
  for (int i = 0; i < count; ++i) {
    if (block.node[i] >= 0) GFLOWGR_PREFETCH(stored + (block.begin[i] - level_begin));
  }
  for (int i = 0; i < count; ++i) {
    if (block.node[i] < 0) continue;
    const int64_t at =
        find(stored + (block.begin[i] - level_begin), block.end[i] - block.begin[i], block.code[i]);
    block.node[i] = at < 0 ? -1 : block.begin[i] + at;
  }
}

template <typename Index, typename Token>
void walk(const uint8_t* tree, const Token* tokens, const bool* mask, int64_t* nodes, int64_t columns,
          int64_t row_begin, int64_t row_end) {
  const int64_t* const header = reinterpret_cast<const int64_t*>(tree);
  const Index* const child_begin = reinterpret_cast<const Index*>(tree + header[kChildBegin]);
  const int64_t depth = std::min(columns, header[kMaxLength]);
  Block block;
  for (int64_t row = row_begin; row < row_end; row += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, row_end - row));
    std::fill(block.node, block.node + count, 0);
    for (int64_t level = 0; level < depth; ++level) {
      const int64_t* const word = header + kTreeWords + kLevelWords * level;
      const int64_t base = word[kTokenBase];
      for (int i = 0; i < count; ++i) {
        if (block.node[i] >= 0) GFLOWGR_PREFETCH(child_begin + block.node[i]);
      }
      for (int i = 0; i < count; ++i) {
        const int64_t at = (row + i) * columns + level;
        if (mask != nullptr && !mask[at]) block.node[i] = -1;
        if (block.node[i] < 0) continue;
        block.begin[i] = child_begin[block.node[i]];
        block.end[i] = child_begin[block.node[i] + 1];
        // The subtraction must not wrap around for a garbage token.
        const int64_t token = static_cast<int64_t>(tokens[at]);
        block.code[i] = token < base ? -1 : token - base;
      }
      const uint8_t* const stored = tree + word[kTokenOffset];
      if (word[kTokenBytes] == 1) {
        step(stored, word[kNodeBegin], count, block);
      } else if (word[kTokenBytes] == 2) {
        step(reinterpret_cast<const uint16_t*>(stored), word[kNodeBegin], count, block);
      } else {
        step(reinterpret_cast<const uint32_t*>(stored), word[kNodeBegin], count, block);
      }
      for (int i = 0; i < count; ++i) nodes[(row + i) * columns + level] = block.node[i];
    }
    for (int i = 0; i < count; ++i) {
      std::fill(nodes + (row + i) * columns + depth, nodes + (row + i + 1) * columns, -1);
    }
  }
}

}  // namespace

template <typename Token>
void tree_walk_cpu(const uint8_t* tree, const Token* tokens, const bool* mask, int64_t* nodes,
                   int64_t columns, int64_t row_begin, int64_t row_end) {
  const int64_t* const header = reinterpret_cast<const int64_t*>(tree);
  if (header[kIndexBytes] == 4) {
    walk<int32_t>(tree, tokens, mask, nodes, columns, row_begin, row_end);
  } else {
    walk<int64_t>(tree, tokens, mask, nodes, columns, row_begin, row_end);
  }
}

template void tree_walk_cpu(const uint8_t*, const int32_t*, const bool*, int64_t*, int64_t, int64_t,
                            int64_t);
template void tree_walk_cpu(const uint8_t*, const int64_t*, const bool*, int64_t*, int64_t, int64_t,
                            int64_t);

}  // namespace gflowgr
