// GPT-2 on the CPU in float32: the prompts, and one token of all beams at a time.
//
// A thread takes up to 64 tokens through a layer, or through all of them. Weights are as the model keeps them,
// [in, out]: they are the right factors of all products, activations are [tokens, features].
#pragma once

#include <cstdint>
#include <vector>

#include "common/blocks_cpu.h"
#include "t5/t5_kernels_cpu.h"

namespace gflowgr {

struct Gpt2Sizes {
  int64_t width, heads, size, hidden;  // d_model, heads, d_head (multiple of 16), features of the feed-forward layer
  Activation activation;
  float epsilon, scaling;  // of the norms; of the scores

  int64_t all() const { return 3 * width; }  // queries, keys and values
};

struct Gpt2Affine {
  const float *weight, *bias;  // of a norm [width] both
};
struct Gpt2Layer {
  Gpt2Affine attention_norm, all, out, feed_norm, in, back;
};

struct Gpt2Pass {
  Gpt2Sizes sizes;
  std::vector<Gpt2Layer> layers;
  Gpt2Affine last_norm;
  int64_t prompts, padded;  // B, and S16 = S rounded up to a multiple of 16
  const float* mask;        // [B, S16], added to the scores; -inf beyond S
  int64_t threads;
  Parallel parallel;

  // Places in keys [layers, B, heads, size, S16] and values [layers, B, S16, width].
  int64_t at(int64_t layer, int64_t prompt) const { return (layer * prompts + prompt) * sizes.width * padded; }
};

// embedded [B, S, width] -> keys, values (zeros beyond S), and hidden [B, width] of the token `last` [B] of each
// prompt. A token sees itself and what is before it and not masked.
void gpt2_prompt(const Gpt2Pass& pass, int64_t tokens, const float* embedded, const int64_t* last, float* keys,
                 float* values, float* hidden);

// One token of B * K rows.
struct Gpt2Step {
  const float *keys, *values;  // from gpt2_prompt
  int64_t beams;               // K
  const float* embedded;       // [B * K, width]
  StepPast past;
  float* stored;  // keys and values of this step [layers, 2, B * K, width]
  float* hidden;  // [B * K, width]
};
void gpt2_step(const Gpt2Pass& pass, const Gpt2Step& step);

}  // namespace gflowgr
