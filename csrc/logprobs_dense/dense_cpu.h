// The dense output head on the CPU: token log-probabilities and their gradients without the logits.
#pragma once

#include <cstdint>
#include <functional>

#include "logprobs_dense/dense_tile_cpu.h"

namespace gflowgr {

// One pass over the head. Rows whose target is negative are masked: never read, outputs zero. The
// target `vocabulary` stands for a token that lies elsewhere (in a shard of the vocabulary); a larger one is
// no token, and what is made of its row is NaN.
struct DensePass {
  const void* hidden;  // [rows, width]
  Dtype hidden_type;
  const void* weight;  // [vocabulary, width]
  Dtype weight_type;
  const float* bias;  // [vocabulary] or null
  const int64_t* targets;  // [rows]
  int64_t rows, width, vocabulary;
  float temperature;

  float* log_pf;  // [rows]; written, or read if `known`
  float* lse;     // [rows]; likewise
  bool known = false;

  // Called for each block of whole prompts once the log_pf of its rows is there, with its first and last
  // row, to fill `upstream`; empty: `upstream` is there already.
  std::function<void(int64_t, int64_t)> on_block;
  int64_t rows_per_prompt = 1;
  const float* upstream = nullptr;  // [rows] d loss / d log_pf; null: ones

  // Gradients; null = not wanted. Each is written whole. Types: f32, or bf16 where the input is.
  void* grad_hidden = nullptr;
  Dtype grad_hidden_type = Dtype::float32;
  void* grad_weight = nullptr;
  Dtype grad_weight_type = Dtype::float32;
  float* grad_bias = nullptr;

  // parallel(n, body): body(begin, end) on threads over 0..n, as many as `threads`.
  std::function<void(int64_t, const std::function<void(int64_t, int64_t)>&)> parallel;
  int64_t threads = 1;
};

// Needs gemm_float_available().
void run_dense(const DensePass& pass);

}  // namespace gflowgr
