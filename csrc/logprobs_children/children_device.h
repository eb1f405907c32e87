// Device code shared by the kernels of the tree-restricted log-probabilities: reading numbers and rows, and a product.
#pragma once

#include "logprobs_children/children.h"
#include "common/cuda_launch.h"
#include "tree/tree_device.h"

namespace gflowgr {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 256, kWarps = kThreads / 32;

// ------------------------------------------------------------------ numbers

__device__ inline float load(const Numbers& numbers, int64_t at) {
  if (numbers.type == Dtype::float32) return __ldg(static_cast<const float*>(numbers.data) + at);
  if (numbers.type == Dtype::bfloat16) {
    return __bfloat162float(static_cast<const __nv_bfloat16*>(numbers.data)[at]);
  }
  return __half2float(static_cast<const __half*>(numbers.data)[at]);
}

__device__ inline void store(void* data, Dtype type, int64_t at, float value) {
  if (type == Dtype::float32) {
    static_cast<float*>(data)[at] = value;
  } else if (type == Dtype::bfloat16) {
    static_cast<__nv_bfloat16*>(data)[at] = __float2bfloat16_rn(value);
  } else {
    static_cast<__half*>(data)[at] = __float2half_rn(value);
  }
}

union Halves {
  uint4 words;
  __half half[8];
  __nv_bfloat16 bfloat[8];
};

// Rows of d numbers each.
struct Rows {
  Numbers numbers;
  int64_t d;
  bool aligned;  // every eighth number of a row is at a multiple of 16 bytes

  // Numbers k .. k + 7 of a row, zero past its end.
  __device__ void load8(int64_t row, int64_t k, float (&out)[8]) const {
    const int64_t at = row * d + k;
    if (!aligned || k + 8 > d) {
      for (int i = 0; i < 8; ++i) out[i] = k + i < d ? load(numbers, at + i) : 0.0f;
      return;
    }
    if (numbers.type == Dtype::float32) {
      const auto* const from = reinterpret_cast<const float4*>(static_cast<const float*>(numbers.data) + at);
      const float4 low = __ldg(from), high = __ldg(from + 1);
      out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
      out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
      return;
    }
    Halves halves;
    halves.words = __ldg(reinterpret_cast<const uint4*>(static_cast<const __half*>(numbers.data) + at));
    if (numbers.type == Dtype::bfloat16) {
      for (int i = 0; i < 8; ++i) out[i] = __bfloat162float(halves.bfloat[i]);
    } else {
      for (int i = 0; i < 8; ++i) out[i] = __half2float(halves.half[i]);
    }
  }

  // Writes them to `data`, rows of d numbers of this type.
  __device__ void store8(void* data, int64_t row, int64_t k, const float (&values)[8]) const {
    const int64_t at = row * d + k;
    if (!aligned || k + 8 > d) {
      for (int i = 0; i < 8; ++i) {
        if (k + i < d) store(data, numbers.type, at + i, values[i]);
      }
      return;
    }
    if (numbers.type == Dtype::float32) {
      auto* const to = reinterpret_cast<float4*>(static_cast<float*>(data) + at);
      to[0] = float4{values[0], values[1], values[2], values[3]};
      to[1] = float4{values[4], values[5], values[6], values[7]};
      return;
    }
    Halves halves;
    if (numbers.type == Dtype::bfloat16) {
      for (int i = 0; i < 8; ++i) halves.bfloat[i] = __float2bfloat16_rn(values[i]);
    } else {
      for (int i = 0; i < 8; ++i) halves.half[i] = __float2half_rn(values[i]);
    }
    *reinterpret_cast<uint4*>(static_cast<__half*>(data) + at) = halves.words;
  }
};

// Whether rows at `data` are aligned; called on the host.
inline Rows make_rows(const Numbers& numbers, int64_t d, const void* data) {
  const int64_t bytes = d * bytes_of(numbers.type);
  const auto address = reinterpret_cast<uintptr_t>(numbers.data) | reinterpret_cast<uintptr_t>(data);
  return {numbers, d, bytes % 16 == 0 && address % 16 == 0};
}

// ------------------------------------------------------------------ a warp

__device__ inline float warp_sum(float value) {
  for (int by = 16; by > 0; by >>= 1) value += __shfl_xor_sync(kAll, value, by);
  return value;
}

__device__ inline float warp_max(float value) {
  for (int by = 16; by > 0; by >>= 1) value = fmaxf(value, __shfl_xor_sync(kAll, value, by));
  return value;
}

// ------------------------------------------------------------------ rows

struct Softmax {
  float largest, sum;
};

__device__ inline int64_t pack(Softmax softmax) {
  const auto high = static_cast<uint64_t>(__float_as_uint(softmax.sum));
  return static_cast<int64_t>(high << 32 | __float_as_uint(softmax.largest));
}

// A row as the walk saved it. `target` < 0: no gradient comes from it.
struct Row {
  int64_t t, level, slopes;
  int children, target;
  ChildTokens tokens;

  __device__ bool chooses() const { return children > 1; }
  __device__ bool live() const { return children > 1 && target >= 0; }
};

__device__ inline Row read_row(const ChildrenCall& call, int64_t t) {
  const int64_t* const words = call.plan + kPlanWords * t;
  Row row{};
  row.t = t;
  row.level = t % call.L;
  row.slopes = words[kSlopes];
  row.children = static_cast<int>(words[kChildren] >> 32);
  row.target = static_cast<int>(words[kChildren] & 0xffffffff) - 1;
  if (row.children > 0) row.tokens = child_tokens(call.tree, row.level, words[kFirstChild]);
  return row;
}

__device__ inline int64_t pack_children(int64_t children, int64_t target) { return children << 32 | (target + 1); }

// Logit of a child; every lane gets it.
__device__ inline float warp_logit(const ChildrenCall& call, const Rows& hidden, const Rows& weight, const Row& row,
                                   int64_t child) {
  const int64_t token = row.tokens[child];
  float sum = 0;
  for (int64_t k = threadIdx.x % 32 * 8; k < call.d; k += 256) {
    float h[8], w[8];
    hidden.load8(row.t, k, h);
    weight.load8(token, k, w);
    for (int i = 0; i < 8; ++i) sum += h[i] * w[i];
  }
  sum = warp_sum(sum);
  if (call.bias.data != nullptr) sum += load(call.bias, token);
  return sum / call.temperature;
}

// d log_pf / d logit of a child of a live row, recomputed where slopes were not kept; every lane gets it.
__device__ inline float warp_slope(const ChildrenCall& call, const Rows& hidden, const Rows& weight, const Row& row,
                                   int64_t child) {
  if (call.slopes != nullptr) return __ldg(call.slopes + row.slopes + child);
  if (child == row.target) return -expm1f(call.log_pf[row.t]);
  const auto bits = static_cast<uint64_t>(call.plan[kPlanWords * row.t + kSoftmax]);
  const float largest = __uint_as_float(static_cast<unsigned>(bits)), sum = __uint_as_float(static_cast<unsigned>(bits >> 32));
  return -expf(warp_logit(call, hidden, weight, row, child) - largest) / sum;
}

// ------------------------------------------------------------------ a product

constexpr int kTile = 64, kDepth = 32, kPitch = kTile + 4;

// kDepth x kTile numbers in shared memory. Rows are kPitch apart, and the eight rows that a thread of tile_product()
// fills are turned by eight columns to those of the next: so the 32 threads of a warp write to different banks.
struct Panel {
  alignas(16) float values[kDepth * kPitch];

  __device__ static int place(int k, int column) { return k * kPitch + (column + k / 8 * 8) % kTile; }
  __device__ float& at(int k, int column) { return values[place(k, column)]; }
  // Four columns from a multiple of four on.
  __device__ float4& four(int k, int column) { return *reinterpret_cast<float4*>(values + place(k, column)); }
  __device__ const float4& four(int k, int column) const {
    return *reinterpret_cast<const float4*>(values + place(k, column));
  }
  // Writes eight columns from a multiple of eight on.
  __device__ void put8(int k, int column, const float (&eight)[8]) {
    four(k, column) = float4{eight[0], eight[1], eight[2], eight[3]};
    four(k, column + 4) = float4{eight[4], eight[5], eight[6], eight[7]};
  }
};

// acc[i][j] += sum over k of a[k][4 * (thread / 16) + i] * b[k][4 * (thread % 16) + j].
__device__ inline void multiply(const Panel& a, const Panel& b, float (&acc)[4][4]) {
  const int first = threadIdx.x / 16 * 4, second = threadIdx.x % 16 * 4;
#pragma unroll 8
  for (int k = 0; k < kDepth; ++k) {
    const float4 x = a.four(k, first), y = b.four(k, second);
    const float left[4] = {x.x, x.y, x.z, x.w}, right[4] = {y.x, y.y, y.z, y.w};
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 4; ++j) acc[i][j] += left[i] * right[j];
    }
  }
}

// Product of 64 rows with 64 tokens' rows of the head, in the layout of `multiply`. A thread copies a quarter of
// the row `row` and of the head's row `token`, those of thread / 4; -1 stands for zeros. All threads of the
// block; the panels are free again afterwards.
__device__ inline void tile_product(Panel& a, Panel& b, const Rows& hidden, int64_t row, const Rows& weight,
                                    int64_t token, float (&acc)[4][4]) {
  const int copied = threadIdx.x / 4, copied_k = threadIdx.x % 4 * 8;
  for (int64_t k = 0; k < hidden.d; k += kDepth) {
    float values[8] = {};
    if (row >= 0) hidden.load8(row, k + copied_k, values);
    for (int i = 0; i < 8; ++i) a.at(copied_k + i, copied) = values[i];
    for (int i = 0; i < 8; ++i) values[i] = 0;
    if (token >= 0) weight.load8(token, k + copied_k, values);
    for (int i = 0; i < 8; ++i) b.at(copied_k + i, copied) = values[i];
    __syncthreads();
    multiply(a, b, acc);
    __syncthreads();
  }
}

// A lane's part of the products of one row with some tokens' rows of the head, 16 bytes at a time.
template <int kCount>
__device__ inline void lane_products(const Rows& hidden, int64_t row, const Rows& weight,
                                     const int64_t (&tokens)[kCount], float (&sums)[kCount]) {
  for (int64_t k = threadIdx.x % 32 * 8; k < weight.d; k += 256) {
    float h[8];
    hidden.load8(row, k, h);
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      float w[8];
      weight.load8(tokens[u], k, w);
      for (int i = 0; i < 8; ++i) sums[u] += h[i] * w[i];
    }
  }
}

}  // namespace gflowgr
