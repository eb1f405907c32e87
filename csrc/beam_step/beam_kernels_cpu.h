// The vector parts of a beam step on the CPU, compiled for AVX-512, AVX2 and the baseline.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace gflowgr {

struct BeamKernels {
  // log of the sum of exp(x / temperature) over `count` values; like PyTorch's logsumexp also where one is
  // infinite or NaN, or all are -inf.
  float (*log_sum_exp)(const void* values, Dtype type, int64_t count, double temperature);
  // to[i] = values[codes[i]], ascending distinct codes of 1, 2 or 4 bytes.
  void (*gather)(const void* values, Dtype type, const void* codes, int64_t code_bytes, int64_t count,
                 float* to);
  // to[i] = score + (logits[i] * scale - normaliser)
  void (*add_scores)(const float* logits, int64_t count, float scale, float normaliser, float score,
                     float* to);
  // First i >= from whose value is above `threshold` or NaN (any is, if that is NaN); `count` if none.
  int64_t (*find_above)(const float* values, int64_t from, int64_t count, float threshold);
};

const BeamKernels& beam_kernels();

}  // namespace gflowgr
