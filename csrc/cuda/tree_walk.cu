// Walks token sequences down a prefix tree: one thread per row, a binary search per level.
// Bare CUDA: no torch headers.
//
// Speed of light: a row reads its tokens and writes its nodes once (coalesced by the cache, since a warp's
// rows are neighbours), and per level gathers one child range and about log2(children) tokens that share a
// few 32-byte sectors. On a tree larger than L2 the gathers bound it: 2 sectors a level at least.
#include "tree_walk.h"

#include "../tree_layout.h"
#include "launch.h"

namespace gflowgr {
namespace {

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

// The width of the indices stands in the header, on the device: a branch that all threads take alike.
__device__ int64_t load_index(const uint8_t* __restrict__ array, int64_t bytes, int64_t at) {
  return bytes == 4 ? __ldg(reinterpret_cast<const int32_t*>(array) + at)
                    : __ldg(reinterpret_cast<const int64_t*>(array) + at);
}

template <typename Token>
__global__ void walk(const uint8_t* __restrict__ tree, const Token* __restrict__ tokens,
                     const bool* __restrict__ mask, int64_t* __restrict__ nodes, int64_t rows,
                     int64_t columns) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  const int64_t* const header = reinterpret_cast<const int64_t*>(tree);
  const uint8_t* const child_begin = tree + __ldg(header + kChildBegin);
  const int64_t index_bytes = __ldg(header + kIndexBytes);
  const int64_t depth = min(columns, __ldg(header + kMaxLength));
  int64_t node = 0;
  for (int64_t level = 0; level < depth; ++level) {
    const int64_t at = row * columns + level;
    if (mask != nullptr && !mask[at]) node = -1;
    if (node >= 0) {
      const int64_t* const word = header + kTreeWords + kLevelWords * level;
      const int64_t begin = load_index(child_begin, index_bytes, node);
      const int64_t end = load_index(child_begin, index_bytes, node + 1);
      const int64_t token = tokens[at], base = __ldg(word + kTokenBase);
      const int64_t code = token < base ? -1 : token - base;
      const uint8_t* const stored = tree + __ldg(word + kTokenOffset);
      const int64_t offset = begin - __ldg(word + kNodeBegin), width = __ldg(word + kTokenBytes);
      int64_t found;
      if (width == 1) {
        found = find(stored + offset, end - begin, code);
      } else if (width == 2) {
        found = find(reinterpret_cast<const uint16_t*>(stored) + offset, end - begin, code);
      } else {
        found = find(reinterpret_cast<const uint32_t*>(stored) + offset, end - begin, code);
      }
      node = found < 0 ? -1 : begin + found;
    }
    nodes[at] = node;
  }
  for (int64_t level = depth; level < columns; ++level) nodes[row * columns + level] = -1;
}

}  // namespace
}  // namespace gflowgr

extern "C" int gflowgr_tree_walk_cuda(const uint8_t* tree, const void* tokens, bool wide, const bool* mask,
                                      int64_t* nodes, int64_t rows, int64_t columns, void* stream) {
  constexpr int kThreads = 128;
  const int64_t blocks = (rows + kThreads - 1) / kThreads;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto queue = static_cast<cudaStream_t>(stream);
  const auto grid = static_cast<unsigned>(blocks);
  if (wide) {
    GFLOWGR_LAUNCH(gflowgr::walk<int64_t>, grid, kThreads, 0, queue, tree, static_cast<const int64_t*>(tokens), mask,
                   nodes, rows, columns);
  } else {
    GFLOWGR_LAUNCH(gflowgr::walk<int32_t>, grid, kThreads, 0, queue, tree, static_cast<const int32_t*>(tokens), mask,
                   nodes, rows, columns);
  }
  return cudaGetLastError();
}
