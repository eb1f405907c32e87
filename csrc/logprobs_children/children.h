// Launchers of csrc/logprobs_children/children_*.cu. `stream` is a cudaStream_t; results are cudaError_t.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

namespace gflowgr {

// Contiguous numbers on the device; null = absent.
struct Numbers {
  const void* data;
  Dtype type;
};

// What the forward pass saves for a row, 4 words of int64, written by the walk and by the softmax.
enum PlanWord : int {
  kFirstChild = 0,  // of the row's node
  kChildren,        // children of the row's node (0: no node or masked) << 32 | position of the row's token among
                    // them + 1 (0: none, or its probability is zero: no gradient)
  kSoftmax,         // bits of two float32: low the largest logit, high the sum of exp(logit - largest)
  kSlopes,          // first of the row's slopes
  kPlanWords,
};
constexpr int64_t kPlanSpare = 8;

struct ChildrenCall {
  Numbers hidden, weight, bias;  // [trajectories, L, d], [V, d], [V] or absent
  const int64_t* tokens;         // [trajectories, L]
  const bool* mask;              // like tokens, or null
  const uint8_t* tree;
  float temperature;
  int64_t trajectories, L, d, V;
  float* log_pf;    // [trajectories, L]
  float* slopes;    // d log_pf / d logit of every child, row after row; null: not kept
  bool keeps_logits;  // the forward pass leaves the logits where the slopes would be
  int64_t* plan;    // [4 * rows + 8]
  int64_t* invalid;  // [1], zero; becomes 1 if a trajectory is no identifier of the tree
};

int children_forward_cuda(const ChildrenCall& call, void* stream);

struct ChildrenGradients {
  const float* grad;       // [trajectories, L]
  void* hidden;            // like hidden, or null
  void* weight;            // rows of the weight's gradient, [V, d] (dense) or [used, d], or null
  void* bias;              // [V], zero, or null
  bool sparse;             // weight is [used, d]
};

// Workspace of the backward pass, on the device, any contents.
struct ChildrenWorkspace {
  uint8_t* touched;     // [V rounded up to 16]
  int32_t* rank;        // [V]
  int64_t* used;        // [V], the tokens that are children of visited nodes, ascending
  int64_t* counts;      // [2]: how many, and the buckets of the root's children
  int64_t* buckets;     // [rows]
  float* partial;       // [capacity]
  int64_t capacity;
};

// Numbers wanted for `partial`: at most 2^23 (32 MiB).
int64_t children_workspace_capacity(const ChildrenCall& call);

// Fills touched, rank, used, counts and buckets; needed before children_backward_weight_cuda.
int children_find_used_cuda(const ChildrenCall& call, const ChildrenWorkspace& workspace, void* stream);

// counts[0] on the host; synchronises the stream.
int children_read_used_cuda(const ChildrenWorkspace& workspace, int64_t* used, void* stream);

int children_backward_hidden_cuda(const ChildrenCall& call, const ChildrenGradients& out, void* stream);
int children_backward_weight_cuda(const ChildrenCall& call, const ChildrenGradients& out,
                                  const ChildrenWorkspace& workspace, void* stream);

}  // namespace gflowgr
