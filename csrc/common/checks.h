// Checks of the tensors that the bindings take, for the CPU and for CUDA, through the LibTorch stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <string>

#include "common/beam_logits.h"
#include "common/dtype.h"
#include "tree/tree_layout.h"

namespace gflowgr {

// Type of a contiguous tensor.
inline Dtype dtype_of(const torch::stable::Tensor& tensor, const char* name) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous; got other strides");
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::BFloat16) return Dtype::bfloat16;
  if (type == ScalarType::Half) return Dtype::float16;
  STD_TORCH_CHECK(type == ScalarType::Float, name, " must be float32, bfloat16 or float16; got ",
                  torch::headeronly::toString(type));
  return Dtype::float32;
}

inline Normalize normalize_named(const std::string& name) {
  if (name == "vocab") return Normalize::vocab;
  if (name == "level") return Normalize::level;
  STD_TORCH_CHECK(name == "children", "normalize must be vocab, level or children; got ", name);
  return Normalize::children;
}

// The buffer of a prefix tree in this machine's memory, whose size is the one that its header states.
inline const uint8_t* tree_of(const torch::stable::Tensor& tree) {
  STD_TORCH_CHECK(tree.scalar_type() == torch::headeronly::ScalarType::Byte && tree.dim() == 1 && tree.is_contiguous(),
                  "tree must be the buffer of a prefix tree (uint8, 1-D, contiguous); got ",
                  torch::headeronly::toString(tree.scalar_type()), " with ", tree.dim(), " dimensions");
  const auto* const data = static_cast<const uint8_t*>(tree.data_ptr());
  const int64_t bytes = tree_total_bytes(data, tree.numel());
  STD_TORCH_CHECK(bytes == tree.numel(), "tree must be the buffer of a prefix tree of this format; got ", tree.numel(),
                  " bytes with the header of another format or size");
  return data;
}

}  // namespace gflowgr
