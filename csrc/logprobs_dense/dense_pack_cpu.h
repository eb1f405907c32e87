// Packing of rows of states and of the head into the layout of the small products.
//
// T is the type of a product's factors: float, or uint16_t for bfloat16, whose right factors come in pairs
// of rows: [K / 2, N, 2].
#pragma once

#include <cstring>
#include <type_traits>
#include <vector>

#include "common/convert_cpu.h"
#include "logprobs_dense/dense_plan_cpu.h"

namespace gflowgr {

template <typename T>
constexpr bool kPairs = std::is_same_v<T, uint16_t>;
template <typename T>
constexpr Dtype kStored = kPairs<T> ? Dtype::bfloat16 : Dtype::float32;

// A matrix [rows, width] of any floating type.
struct Rows {
  const void* data;
  Dtype type;
  int64_t width;

  const void* at(int64_t row) const { return element(data, type, row * width); }
};

// States of the given rows as the right factor of the logits, [width, tokens]; zero beyond `count`.
// `scratch` has room for tokens * width floats.
template <typename T>
void pack_states(const TileKernels& kernels, const Rows& states, const int64_t* rows, int64_t count,
                 int64_t tokens, float* scratch, T* to) {
  const int64_t width = states.width;
  if constexpr (kPairs<T>) {
    auto* const gathered = reinterpret_cast<uint16_t*>(scratch);
    std::memset(gathered + count * width, 0, (tokens - count) * width * 2);
    for (int64_t i = 0; i < count; ++i) std::memcpy(gathered + i * width, states.at(rows[i]), width * 2);
    kernels.transpose(reinterpret_cast<const uint32_t*>(gathered), width / 2, tokens, width / 2,
                      reinterpret_cast<uint32_t*>(to), tokens);
  } else {
    std::memset(scratch + count * width, 0, (tokens - count) * width * 4);
    for (int64_t i = 0; i < count; ++i) {
      widen(states.at(rows[i]), states.type, width, scratch + i * width);
    }
    kernels.transpose(reinterpret_cast<const uint32_t*>(scratch), width, tokens, width,
                      reinterpret_cast<uint32_t*>(to), tokens);
  }
}

// States times a coefficient each as the right factor of the head's gradient, rows [begin, end) of it;
// rows whose coefficient is 0 are zero, whatever they hold. For bfloat16 `begin` and `end` are even.
template <typename T>
void pack_scaled_states(const TileKernels& kernels, const Rows& states, const int64_t* rows,
                        const float* coefficient, int64_t begin, int64_t end, T* to) {
  const int64_t width = states.width;
  std::vector<float> state(width);
  std::vector<uint16_t> rounded(kPairs<T> ? 2 * width : 0);
  for (int64_t i = begin; i < end; ++i) {
    if (coefficient[i] == 0.0f) {
      std::fill(state.begin(), state.end(), 0.0f);
    } else {
      widen(states.at(rows[i]), states.type, width, state.data());
      for (int64_t k = 0; k < width; ++k) state[k] *= coefficient[i];
    }
    if constexpr (kPairs<T>) {
      narrow(state.data(), width, Dtype::bfloat16, rounded.data() + i % 2 * width);
      if (i % 2 == 1) kernels.interleave(rounded.data(), rounded.data() + width, width, to + (i - 1) * width);
    } else {
      std::copy(state.begin(), state.end(), to + i * width);
    }
  }
}

// Rows of the head as the left factor of the logits; `scratch` holds them where they need converting.
template <typename T>
const T* pack_head_left(const Rows& head, int64_t first, int64_t rows, T* scratch) {
  if constexpr (kPairs<T>) {
    return static_cast<const T*>(head.at(first));
  } else {
    if (head.type == Dtype::float32) return static_cast<const float*>(head.at(first));
    widen(head.at(first), head.type, rows * head.width, scratch);
    return scratch;
  }
}

// The same rows as the right factor of the weighted sum of head rows, an odd last one followed by zeros.
template <typename T>
const T* pack_head_right(const TileKernels& kernels, const T* left, int64_t rows, int64_t width, T* scratch) {
  if constexpr (kPairs<T>) {
    const std::vector<uint16_t> zeros(rows % 2 == 0 ? 0 : width, 0);
    for (int64_t v = 0; v < rows; v += 2) {
      const uint16_t* const second = v + 1 < rows ? left + (v + 1) * width : zeros.data();
      kernels.interleave(left + v * width, second, width, scratch + v * width);
    }
    return scratch;
  } else {
    if (rows % 2 == 0) return left;
    if (left != scratch) std::copy(left, left + rows * width, scratch);
    std::fill(scratch + rows * width, scratch + (rows + 1) * width, T{0});
    return scratch;
  }
}

// A tile of exponentials [rows, tokens] by token, [tokens, kTile], an odd last row followed by zeros;
// and, where `held` is given, by vocabulary row, [rows, held_stride]. `exps` has room for one row more,
// `scratch` for twice the tile.
template <typename T>
void pack_exponentials(const TileKernels& kernels, float* exps, int64_t rows, int64_t tokens, T* by_token,
                       T* held, int64_t held_stride, uint16_t* scratch) {
  const int64_t even = round_up(rows, 2);
  std::fill(exps + rows * tokens, exps + even * tokens, 0.0f);
  const T* values;
  if constexpr (kPairs<T>) {
    narrow(exps, even * tokens, Dtype::bfloat16, scratch);
    values = scratch;
  } else {
    values = exps;
  }
  for (int64_t v = 0; held != nullptr && v < rows; ++v) {
    std::copy(values + v * tokens, values + (v + 1) * tokens, held + v * held_stride);
  }
  if (by_token == nullptr) return;
  if constexpr (kPairs<T>) {
    uint16_t* const pairs = scratch + even * tokens;
    for (int64_t v = 0; v < even; v += 2) {
      kernels.interleave(values + v * tokens, values + (v + 1) * tokens, tokens, pairs + v * tokens);
    }
    kernels.transpose(reinterpret_cast<const uint32_t*>(pairs), tokens, even / 2, tokens,
                      reinterpret_cast<uint32_t*>(by_token), kTile / 2);
  } else {
    kernels.transpose(reinterpret_cast<const uint32_t*>(values), tokens, even, tokens,
                      reinterpret_cast<uint32_t*>(by_token), kTile);
  }
}

}  // namespace gflowgr
