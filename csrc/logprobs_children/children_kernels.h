// Inner loops of the tree-restricted log-probabilities, on one thread. Bare C++17: no torch.
//
// Rows are given by pointers, so that the rows of the head and of the states are used where they are.
// Every sum is taken in the same order however a caller cuts rows and columns: results do not depend on
// the number of threads (they do on the instruction set).
#pragma once

#include <cstdint>

namespace gflowgr {

struct ChildrenKernels {
  // out[i * stride + j] = sum over x < d of a[i][x] * b[j][x].
  void (*dots)(const float* const* a, int64_t m, const float* const* b, int64_t n, int64_t d, float* out,
               int64_t stride);
  // out[i][x] (+)= sum over p < count of a[i * row_step + p * step] * b[p][x], for x < width.
  void (*accumulate)(float* const* out, int64_t m, const float* a, int64_t row_step, int64_t step,
                     const float* const* b, int64_t count, int64_t width, bool add);
  // On entry x [count] holds products; they become logits (x + bias) / temperature, and then the slopes
  // d log p / d x: minus the probability of each, and at `target` the sum of the other probabilities
  // (which is 1 - p without the cancellation). Returns log p; where it is -inf all slopes are 0.
  float (*softmax)(float* x, int64_t count, const float* bias, float temperature, int64_t target);
  // As softmax, of mass * KL(p || P) - weight * log P(target) with p [count] of the sum `mass`, 1 or 0, and p_log_p
  // the sum of its p log p: the logits become the slopes (mass + weight) P - p - weight [target]. Returns the value,
  // and writes log P(target).
  float (*divergence)(float* x, int64_t count, const float* bias, float temperature, int64_t target, const float* p,
                      float mass, double p_log_p, float weight, float* log_pf);
};

// Those for this machine: AVX-512, AVX2 with FMA, or whatever the compiler's baseline has.
const ChildrenKernels& children_kernels();

}  // namespace gflowgr
