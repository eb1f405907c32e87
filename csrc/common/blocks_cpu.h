// How the steps of small models divide tokens among threads, and the memory of each thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <vector>

namespace gflowgr {

// Runs body(begin, end) over parts of [0, items), on several threads.
using Parallel = std::function<void(int64_t, const std::function<void(int64_t, int64_t)>&)>;

constexpr int64_t kBlockTokens = 64;  // tokens of a block: its activations stay in the L2 cache
constexpr int64_t kHiddenTile = 512;  // features of the feed-forward layer at a time

inline int64_t ceil_div(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }
inline int64_t round_up(int64_t count, int64_t unit) { return ceil_div(count, unit) * unit; }

// What earlier steps of a search stored [layers, 2, their rows, width], oldest first, and for each row of this step
// its ancestor there.
struct StepPast {
  std::vector<const float*> stored;
  std::vector<int64_t> rows;
  std::vector<const int64_t*> ancestors;
};

// Uninitialised memory on cache lines.
class Floats {
 public:
  float* reserve(int64_t count) {
    if (count > count_) {
      data_.reset(static_cast<float*>(::operator new(static_cast<size_t>(count) * sizeof(float), kAlign)));
      count_ = count;
    }
    return data_.get();
  }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(float* data) const { ::operator delete(data, kAlign); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t count_ = 0;
};

}  // namespace gflowgr
