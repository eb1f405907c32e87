// Launchers of csrc/beam_step/beam_step.cu and beam_logits.cu: a step of a beam search down a prefix tree.
// gflowgr/ops/beam_step/op.py documents the result. `stream` is a cudaStream_t; results are cudaError_t.
#pragma once

#include <cstdint>

#include "common/beam_logits.h"
#include "logprobs_children/children.h"

namespace gflowgr {

// Pointers to the device, contiguous; null: absent.
struct BeamStepCall {
  int64_t prompts, beams, width;
  const float* scores;   // [prompts, beams], -inf: empty
  const int64_t* nodes;  // [prompts, beams], -1: empty
  const uint8_t* tree;
  const int64_t* codebook_ends;  // [levels], largest token + 1; for Normalize::level

  Numbers logits;  // before the temperature
  LogitLayout layout;
  int64_t pitch;  // from the logits of a beam to the next one's
  Normalize normalize;
  float temperature;

  const bool* live;
  const bool* live_leaves;
  const int64_t* barred;
  int64_t barred_count;
  const int64_t* barred_leaves;
  int64_t barred_leaves_count;
  int64_t first_prompt;  // number of prompt 0 in the barred keys

  // Results, [prompts, width] each.
  float* best_scores;
  int64_t *best_parents, *best_tokens, *best_nodes;
  float* end_scores;
  int64_t *end_nodes, *end_parents;

  uint8_t* workspace;  // beam_step_workspace bytes at a multiple of 16, any contents
};

// Depends on prompts, beams, width and pitch alone.
int64_t beam_step_workspace(const BeamStepCall& call);

// Whether candidates can be numbered: some 4 billion of them are compared per prompt.
bool beam_step_fits(const BeamStepCall& call);

int beam_step_cuda(const BeamStepCall& call, void* stream);

// The head and the states that the logits are wanted of.
struct BeamHead {
  Numbers hidden, weight, bias;  // [prompts * beams, d], [V, d], [V] or absent
  int64_t d;
  float* logits;  // [prompts * beams, pitch]: the call's, layout codebook (level) or children
};

// Computes the logits that the call's beams need, at most `pitch` of each.
int beam_logits_cuda(const BeamStepCall& call, const BeamHead& head, void* stream);

}  // namespace gflowgr
