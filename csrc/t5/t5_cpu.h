// T5 on the CPU in float32: the encoder, and one token of all beams at a time.
//
// A thread takes up to 64 tokens through a layer, or through all of them, with the weights as the model
// keeps them: they are the left factors of all products, activations are transposed, [features, tokens].
#pragma once

#include <cstdint>
#include <vector>

#include "common/blocks_cpu.h"
#include "t5/t5_kernels_cpu.h"

namespace gflowgr {

struct T5Sizes {
  int64_t width, heads, size, hidden;  // d_model, num_heads, d_kv (multiple of 16), d_ff
  Activation activation;
  float epsilon;  // of the norms

  int64_t inner() const { return heads * size; }
};

// Weights [out, in]; norms [width].
struct T5Attention {
  const float *norm, *query, *key, *value, *out;  // of cross-attention no keys and values
};
struct T5FeedForward {
  const float *norm, *in, *gate, *out;  // gate: null where there is none
};
struct T5Layer {
  T5Attention own, cross;  // cross: of decoders
  T5FeedForward feed;
};

// Keys and values of S tokens to attend to, S16 = S rounded up to a multiple of 16; zeros beyond S.
struct T5Keys {
  const float* keys;    // [heads, S16, size]
  const float* values;  // [heads, size, S16]
};

struct T5Pass {
  T5Sizes sizes;
  std::vector<T5Layer> layers;
  const float* final_norm;
  int64_t prompts, tokens;  // B, S
  const float* mask;        // [B, S], added to the scores
  int64_t threads;
  Parallel parallel;

  int64_t padded() const { return (tokens + kT5Lanes - 1) / kT5Lanes * kT5Lanes; }
};

// embedded [B, S, width] -> encoded, likewise. bias [heads, S16 + S - 1]: of query i and key j at
// i - j + S - 1.
void t5_encode(const T5Pass& pass, const float* embedded, const float* bias, float* encoded);

// encoded [B, S, width] -> keys [layers, B, heads, S16, size] and values [layers, B, heads, size, S16];
// of each layer's `cross`, `key` and `value` are used.
void t5_prompt(const T5Pass& pass, const float* encoded, float* keys, float* values);

// One token of B * K rows.
struct T5Step {
  const float *keys, *values;  // from t5_prompt
  const float* bias;           // [steps, heads]
  int64_t rows;                // B * K
  const float* embedded;       // [rows, width]
  StepPast past;
  float* stored;  // keys and values of this step [layers, 2, rows, heads * size]
  float* hidden;  // [rows, width]
};
void t5_step(const T5Pass& pass, const T5Step& step);

}  // namespace gflowgr
