// How a pass over the head is cut up: rows that count, blocks of whole prompts, chunks for the threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "logprobs_dense/dense_cpu.h"

namespace gflowgr {

constexpr int64_t kTile = 64;        // rows of the head per tile
constexpr int64_t kDepth = 1024;     // longest inner dimension, widest output of one small product
constexpr int64_t kBlockRows = 512;  // rows per block, at least

template <typename T>
struct Free {
  void operator()(T* memory) const { std::free(memory); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free<T>>;

template <typename T>
Buffer<T> allocate(int64_t count) {
  const size_t bytes = (std::max<int64_t>(count, 1) * sizeof(T) + 63) / 64 * 64;
  void* const memory = std::aligned_alloc(64, bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(memory));
}

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

struct DensePlan {
  std::vector<int64_t> valid;        // rows with a target, ascending
  std::vector<int64_t> block_begin;  // into `valid`, with its size at the end
  int64_t chunk = 0;                 // rows per chunk, a multiple of kGroup
  int64_t columns = 0;               // most rows of a block, rounded up to kGroup
  int64_t tiles = 0;
  bool holds = false;                // exponentials are held for the gradients of head and bias ...
  bool in_place = false;             // ... in the memory of the gradient of the head

  int64_t blocks() const { return static_cast<int64_t>(block_begin.size()) - 1; }

  DensePlan(const DensePass& pass, int64_t exponential_bytes) {
    for (int64_t row = 0; row < pass.rows; ++row) {
      if (pass.targets[row] >= 0) valid.push_back(row);
    }
    const auto count = static_cast<int64_t>(valid.size());
    const int64_t most = pass.width <= 512 ? 256 : 128;  // fits the caches beside a tile
    tiles = (pass.vocabulary + kTile - 1) / kTile;
    holds = pass.grad_weight != nullptr || pass.grad_bias != nullptr;
    // A tile of the gradient is written after the tile's exponentials were read for the last time.
    in_place = pass.grad_weight != nullptr && count > 0 &&
               round_up(count, kGroup) * exponential_bytes <=
                   pass.width * bytes_of(pass.grad_weight_type);
    int64_t rows = std::max(kBlockRows, pass.threads * most);
    if (in_place) rows = std::max(rows, count);
    block_begin.push_back(0);
    for (int64_t begin = 0, end = 0; begin < count; begin = end) {
      const int64_t prompt = valid[begin] / pass.rows_per_prompt;
      while (end < count && valid[end] / pass.rows_per_prompt == prompt) ++end;
      if (end - block_begin.back() > rows && begin > block_begin.back()) block_begin.push_back(begin);
    }
    if (count > 0) block_begin.push_back(count);
    int64_t widest = 0;
    for (int64_t i = 0; i < blocks(); ++i) widest = std::max(widest, block_begin[i + 1] - block_begin[i]);
    const int64_t share = (widest + pass.threads - 1) / pass.threads;
    chunk = std::max(kGroup, std::min(most, round_up(share, kGroup)));
    columns = round_up(widest, kGroup);
  }
};

}  // namespace gflowgr
