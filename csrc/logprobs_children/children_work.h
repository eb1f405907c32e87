// The two passes of the tree-restricted log-probabilities over blocks of work. Bare C++17: no torch.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "common/dtype.h"
#include "logprobs_children/children_kernels.h"
#include "logprobs_children/children_plan.h"
#include "tree/tree_flows_cpu.h"

namespace gflowgr {

// Runs body(0) .. body(count - 1), in any order and on any threads.
using Parallel = std::function<void(int64_t count, const std::function<void(int64_t)>& body)>;

struct ChildrenHead {
  const void* hidden;  // [T, d]
  const void* weight;  // [V, d]
  const void* bias;    // [V], or null
  Dtype hidden_type, weight_type, bias_type;
  int64_t width;       // d
  float temperature;
};

// Some rows of one group, against the children of its node.
struct ChildrenTask {
  int64_t group;
  int64_t first, rows;    // active rows
  int64_t child, children;  // where the children are in ChildrenWork::tokens
  int64_t offset;         // of the block [rows, children] among all products
};

struct ChildrenGradients {
  const float* upstream;  // [T]
  const float* log_pf;    // [T]
  void* hidden = nullptr;  // [T, d], or null
  float* weight = nullptr;  // rows of d float32, or null
  const int64_t* weight_row = nullptr;  // row in `weight` of each of ChildrenWork::tokens
  int64_t clear = 0;  // rows of `weight` to be set to zero before
  double* bias = nullptr;  // zeros, or null
  const int64_t* bias_row = nullptr;  // place in `bias` of each of ChildrenWork::tokens
};

// A divergence from exact flows beside the log-probabilities, row by row.
struct ChildrenDivergence {
  const FlowRewards* rewards;
  const float* weights;      // [trajectories] of the negative log-likelihood; null: -1 where there is a flow, else 0
  int64_t per_prompt;        // trajectories
  float* value;              // [T]
  bool* alive;               // [T] whether a child of the row's node has a flow
};

class ChildrenWork {
 public:
  ChildrenWork(const uint8_t* tree, int64_t steps, const ChildrenPlan& plan, const ChildrenHead& head,
               int threads, Parallel parallel);

  const std::vector<int64_t>& tokens() const { return tokens_; }

  // Writes log_pf of the active rows, and all slopes where `slopes` is not null: those of log_pf, or with a
  // `divergence`, which is written too, those of its value.
  void forward(float* log_pf, float* slopes, const ChildrenDivergence* divergence = nullptr) const;

  // `slopes` as forward() left them; null: they are computed again, kPanel of them at a time.
  // `gradients.hidden` is written at every row, zeros included; `weight` and `bias` are added to.
  void backward(const float* slopes, const ChildrenGradients& gradients) const;

 private:
  void run_forward(int64_t first_task, int64_t end_task, float* log_pf, float* slopes, int64_t base,
                   const ChildrenDivergence* divergence) const;
  void backward_slice(int64_t first_task, int64_t end_task, const float* slopes, int64_t base,
                      const ChildrenGradients& gradients, int64_t from, int64_t to) const;
  void backward_bias(int64_t first_task, int64_t end_task, const float* slopes, int64_t base,
                     const ChildrenGradients& gradients) const;
  void clear_other_rows(void* hidden) const;

  const ChildrenKernels& kernels_;
  ChildrenPlan plan_;
  ChildrenHead head_;
  int64_t steps_;
  const uint8_t* tree_;
  int64_t total_rows_;
  int threads_;
  Parallel parallel_;
  std::vector<int64_t> tokens_;  // children of all groups
  std::vector<ChildrenTask> tasks_;
  std::vector<int64_t> cost_;    // [tasks + 1] of the tasks before
};

}  // namespace gflowgr
