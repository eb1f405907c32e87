// The vector parts of T5 on the CPU: norms, softmaxes and activations between its matrix products.
//
// Tokens are lanes: matrices are transposed, [features, lanes], with a multiple of 16 lanes. Norms and
// softmaxes then need no horizontal reduction. Each function is compiled for AVX-512, AVX2 and the
// baseline; the fastest that the machine has is chosen at run time.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace gflowgr {

constexpr int64_t kT5Lanes = kGroup;

enum class Activation { relu, gelu };  // gelu: by tanh, as T5 v1.1 has it

// Scores of one head.
struct T5Softmax {
  float* scores;      // [padded, lanes], products alone; exp(score - maximum) afterwards, 0 beyond `keys`
  const float* mask;  // [keys], added
  // Of the first lane and key, or null; the one of lane i and key j is bias[i - j].
  const float* bias;
  int64_t keys, padded, lanes;
  float* sum;  // [lanes]
};

// Attention of one token to `steps` tokens, itself included.
struct T5Own {
  const float* query;           // [heads * size]
  const float* const* keys;     // steps times [heads * size]
  const float* const* values;   // likewise
  const float* bias;            // [steps, heads]
  int64_t steps, heads, size;   // size: multiple of 16
  float* weights;               // scratch, `steps` rounded up to a multiple of 16
  float* mixed;                 // [heads * size]
};

// Product of a weight [rows, depth] with one token.
struct T5One {
  const float* weight;
  int64_t rows, depth, stride;  // stride: distance of the weight's rows
  const float* x;               // [depth]
  bool add;
  float* to;  // row r goes to to[r * to_stride]
  int64_t to_stride;
};

struct T5Kernels {
  // to = weight * from / sqrt(mean square over the rows + epsilon)
  void (*norm)(const float* from, const float* weight, float epsilon, int64_t rows, int64_t lanes, float* to);
  // x = activation(x), times `gate` unless that is null; `count` is a multiple of 16.
  void (*activate)(Activation, float* x, const float* gate, int64_t count);
  void (*softmax)(const T5Softmax&);
  void (*own)(const T5Own&);
  void (*one)(const T5One&);
};

const T5Kernels& t5_kernels();

}  // namespace gflowgr
