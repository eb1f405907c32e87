// One step of a beam search down a prefix tree, on the CPU. gflowgr/ops/beam_step/op.py documents the result.
// Bare C++17: no torch, no Python.
#pragma once

#include <cstdint>
#include <functional>

#include "common/beam_logits.h"
#include "common/dtype.h"

namespace gflowgr {

using ParallelFor = std::function<void(int64_t count, const std::function<void(int64_t, int64_t)>& body)>;

struct BeamStepPass {
  // Beams.
  int64_t prompts, beams;
  const float* scores;   // [prompts, beams], -inf: empty
  const int64_t* nodes;  // [prompts, beams], -1: empty
  const uint8_t* tree;
  const int64_t* codebook_ends;  // [levels], largest token + 1; for Normalize::level

  // Logits, any that the beam's normaliser needs, before the temperature.
  const void* logits;
  Dtype logits_type;
  LogitLayout layout;
  int64_t vocabulary;      // distance of the beams' logits, unless `offsets` is given
  const int64_t* offsets;  // [prompts * beams], or null

  Normalize normalize;
  double temperature;

  // Masks, null: none. Keys are sorted.
  const bool* live;
  const bool* live_leaves;
  const int64_t* barred;
  int64_t barred_count;
  const int64_t* barred_leaves;
  int64_t barred_leaves_count;

  // Results, [prompts, width] each.
  int64_t width;
  float* best_scores;
  int64_t *best_parents, *best_tokens, *best_nodes;
  float* end_scores;
  int64_t *end_nodes, *end_parents;

  int64_t threads;
  ParallelFor parallel;
};

void run_beam_step(const BeamStepPass& pass);

// The output head and the states [prompts * beams, width] that its logits are wanted of.
struct BeamHead {
  const void* hidden;
  Dtype hidden_type;
  const void* weight;  // [V, width]
  Dtype weight_type;
  const float* bias;  // [V] or null
  int64_t width;
};

// Computes the logits that the pass needs (of the children, or of a codebook) and runs it. It sets the
// pass's `logits`, `logits_type`, `layout` and `offsets`; Normalize::vocab is not for it.
void run_beam_step_hidden(BeamStepPass& pass, const BeamHead& head);

}  // namespace gflowgr
