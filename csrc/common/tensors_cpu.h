// Tensors that the bindings of small models take, checked, through the LibTorch stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <vector>

#include "common/blocks_cpu.h"

namespace gflowgr {

using Shape = std::vector<int64_t>;

inline const void* checked(const torch::stable::Tensor& tensor, torch::headeronly::ScalarType type, const Shape& shape,
                           const char* name) {
  bool same = tensor.scalar_type() == type && tensor.is_contiguous() &&
              tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = tensor.size(static_cast<int64_t>(i)) == shape[i];
  STD_TORCH_CHECK(same, name, ": of another type or shape than the rest, or not contiguous");
  return tensor.data_ptr();
}

inline const float* floats(const torch::stable::Tensor& tensor, const Shape& shape, const char* name) {
  return static_cast<const float*>(checked(tensor, torch::headeronly::ScalarType::Float, shape, name));
}

inline torch::stable::Tensor empty_floats(const torch::stable::Tensor& like, const Shape& shape) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, torch::headeronly::ScalarType::Float);
}

inline StepPast step_past(const std::vector<torch::stable::Tensor>& past,
                          const std::vector<torch::stable::Tensor>& ancestors, int64_t layers, int64_t rows,
                          int64_t width) {
  STD_TORCH_CHECK(past.size() == ancestors.size(), "ancestors must be one for each step of the past");
  StepPast made;
  for (size_t t = 0; t < past.size(); ++t) {
    STD_TORCH_CHECK(past[t].dim() == 4, "past must be [layers, 2, rows, heads * d_head]");
    const int64_t there = past[t].size(2);
    const auto* from = static_cast<const int64_t*>(
        checked(ancestors[t], torch::headeronly::ScalarType::Long, {rows}, "ancestors"));
    for (int64_t i = 0; i < rows; ++i) STD_TORCH_CHECK(from[i] >= 0 && from[i] < there, "ancestors: out of range");
    made.stored.push_back(floats(past[t], {layers, 2, there, width}, "past"));
    made.rows.push_back(there);
    made.ancestors.push_back(from);
  }
  return made;
}

// What runs the blocks of a pass.
inline Parallel torch_parallel() {
  return [](int64_t items, const std::function<void(int64_t, int64_t)>& body) {
    torch::stable::parallel_for(0, items, 1, body);
  };
}

}  // namespace gflowgr
