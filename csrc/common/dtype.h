// Types of numbers in memory, on the CPU and on CUDA devices, and how many of them CPU kernels sum side by side.
#pragma once

#include <cstdint>

namespace gflowgr {

enum class Dtype : int { float32, bfloat16, float16 };

inline int64_t bytes_of(Dtype type) { return type == Dtype::float32 ? 4 : 2; }

inline const void* element(const void* array, Dtype type, int64_t at) {
  return static_cast<const char*>(array) + at * bytes_of(type);
}
inline void* element(void* array, Dtype type, int64_t at) {
  return static_cast<char*>(array) + at * bytes_of(type);
}

// Sums across the lanes of vectors are taken over this many floats, in as many registers as they need: their order
// is the same on every CPU. Blocks of tokens that are lanes are multiples of it.
constexpr int64_t kGroup = 16;

}  // namespace gflowgr
