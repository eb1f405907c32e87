// Launchers of csrc/tree/tree_walk.cu. `stream` is a cudaStream_t; the result is a cudaError_t.
#pragma once

#include <cstdint>

extern "C" {

// Device pointers, contiguous: tokens and nodes [rows, columns], mask like them or null, tree: the buffer.
// wide: tokens are int64, else int32.
int gflowgr_tree_walk_cuda(const uint8_t* tree, const void* tokens, bool wide, const bool* mask,
                           int64_t* nodes, int64_t rows, int64_t columns, void* stream);
}
