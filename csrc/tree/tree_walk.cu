// Walks token sequences down a prefix tree: one thread per row, a binary search per level.
// Bare CUDA: no torch headers.
//
// Speed of light: a row reads its tokens and writes its nodes once (coalesced by the cache, since a warp's
// rows are neighbours), and per level gathers one child range and about log2(children) tokens that share a
// few 32-byte sectors. On a tree larger than L2 the gathers bound it: 2 sectors a level at least.
#include "tree/tree_walk.h"

#include "common/cuda_launch.h"
#include "tree/tree_device.h"

namespace gflowgr {
namespace {

template <typename Token>
__global__ void walk(const uint8_t* __restrict__ tree, const Token* __restrict__ tokens,
                     const bool* __restrict__ mask, int64_t* __restrict__ nodes, int64_t rows,
                     int64_t columns) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  const int64_t depth = min(columns, tree_word(tree, kMaxLength));
  int64_t node = 0;
  for (int64_t level = 0; level < depth; ++level) {
    const int64_t at = row * columns + level;
    if (mask != nullptr && !mask[at]) node = -1;
    if (node >= 0) {
      const int64_t begin = child_begin(tree, node), end = child_begin(tree, node + 1);
      const int64_t found = child_tokens(tree, level, begin).find(end - begin, tokens[at]);
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
