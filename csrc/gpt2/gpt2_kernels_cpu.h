// The vector parts of GPT-2 on the CPU, row by row: norms and the attention of a beam, between its matrix products.
//
// Each function is compiled for AVX-512, AVX2 and the baseline; the fastest that the machine has is chosen at run
// time. Widths are multiples of 16.
#pragma once

#include <cstdint>

namespace gflowgr {

// One head of one beam: its softmax over the prompt's keys and its own tokens.
struct Gpt2Attend {
  float* scores;               // [padded + `steps` rounded up to 16]: products with the prompt's keys; weights after
  const float* mask;           // [padded], added
  int64_t padded;
  float scaling;
  const float* query;          // [size]
  const float* const* keys;    // `steps` times [size], the newest last
  const float* const* values;  // likewise
  int64_t offset;              // of the head within them
  int64_t steps, size;
  float* mixed;                // [size]: what the own tokens add
};

struct Gpt2Kernels {
  // to = (from - mean) / sqrt(variance + epsilon) * weight + bias
  void (*norm)(const float* from, const float* weight, const float* bias, float epsilon, int64_t width, float* to);
  // x += y, `count` a multiple of 16
  void (*add)(float* x, const float* y, int64_t count);
  void (*attend)(const Gpt2Attend&);
};

const Gpt2Kernels& gpt2_kernels();

}  // namespace gflowgr
