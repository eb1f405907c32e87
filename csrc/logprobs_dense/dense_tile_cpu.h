// The vector parts of the dense head on the CPU: the work on a tile of logits between the products.
//
// A tile holds the logits transposed, [vocabulary rows, tokens]: every token is a lane, so maxima and sums
// over the vocabulary need no horizontal reduction. Logits are in units of log 2. Each function is
// compiled for AVX-512, AVX2 and the baseline; the fastest that the machine has is chosen at run time.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace gflowgr {

constexpr float kHeadroom = 60.0f;   // a logit may exceed its token's reference by 2^60 before that moves

struct TileScores {
  const float* logits;  // [rows, tokens], products alone
  const float* bias;    // [rows] in units of log 2, or null
  float scale;          // log2(e) / temperature
  int64_t rows;
  int64_t tokens;  // multiple of kGroup
  float* reference;     // [tokens], -inf at first; finite afterwards
  float* sum;           // [tokens], sum of 2^(x - reference); null: the reference is the log-sum-exp
};

// Kernels of one instruction set.
struct TileKernels {
  // Raises the references that the tile's maxima exceed by more than kHeadroom, rescales their sums and
  // writes by what everything accumulated so far is to be multiplied ([tokens]); true if any is not 1.
  bool (*raise)(const TileScores&, float* factor);
  // 2^(x - reference): into `exps` [rows, tokens], float32, and added to the sums.
  void (*exponentiate)(const TileScores&, float* exps);
  // to[j * to_stride + i] = from[i * from_stride + j], 32-bit elements, i < rows, j < columns.
  void (*transpose)(const uint32_t* from, int64_t from_stride, int64_t rows, int64_t columns,
                    uint32_t* to, int64_t to_stride);
  // to[2 * i] = first[i], to[2 * i + 1] = second[i]
  void (*interleave)(const uint16_t* first, const uint16_t* second, int64_t count, uint16_t* to);
  float (*dot)(const float* a, const float* b, int64_t count);
  void (*multiply)(const float* a, const float* b, int64_t count, float* to);  // element by element
};

const TileKernels& tile_kernels();

}  // namespace gflowgr
