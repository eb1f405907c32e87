// Walks token sequences down a prefix tree, on the CPU. Bare C++17: no torch, no Python.
#pragma once

#include <cstdint>

namespace gflowgr {

// For rows [row_begin, row_end) of `tokens` [rows, columns] (int32 or int64) and the optional `mask` of
// the same shape, writes the node after each token to `nodes` [rows, columns]: -1 from the first token on
// that is no child of the node before, or is masked out.
template <typename Token>
void tree_walk_cpu(const uint8_t* tree, const Token* tokens, const bool* mask, int64_t* nodes,
                   int64_t columns, int64_t row_begin, int64_t row_end);

}  // namespace gflowgr
