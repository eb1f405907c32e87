// gflowgr/_C_cuda: CUDA ops for PyTorch through the LibTorch stable ABI (torch 2.10 and later).
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "tree_layout.h"
#include "tree_walk.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

Tensor tree_walk(const Tensor& tokens, const std::optional<Tensor>& mask, const Tensor& tree) {
  // The header is on the device; PrefixTree has checked it, and reading it here would wait for the GPU.
  STD_TORCH_CHECK(tree.scalar_type() == ScalarType::Byte && tree.dim() == 1 && tree.is_contiguous() &&
                      tree.numel() >= 8 * gflowgr::kTreeWords,
                  "tree: expected the buffer of a prefix tree (uint8, 1-D, contiguous)");
  STD_TORCH_CHECK(tree.is_cuda() && tree.get_device_index() == tokens.get_device_index(),
                  "tree: expected to be on the device of tokens");
  STD_TORCH_CHECK(tokens.dim() >= 1 && tokens.is_contiguous(), "tokens: expected [..., L], contiguous");
  const bool wide = tokens.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || tokens.scalar_type() == ScalarType::Int, "tokens: expected int32 or int64");
  const bool* masked = nullptr;
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() &&
                        mask->numel() == tokens.numel() && mask->is_cuda() &&
                        mask->get_device_index() == tokens.get_device_index(),
                    "mask: expected bool like tokens, contiguous, on the same device");
    masked = static_cast<const bool*>(mask->data_ptr());
  }
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  Tensor nodes = torch::stable::new_empty(tokens, tokens.sizes(), ScalarType::Long);
  const int64_t columns = tokens.size(tokens.dim() - 1);
  if (tokens.numel() == 0) return nodes;
  const int error = gflowgr_tree_walk_cuda(
      static_cast<const uint8_t*>(tree.data_ptr()), tokens.data_ptr(), wide, masked,
      static_cast<int64_t*>(nodes.data_ptr()), tokens.numel() / columns, columns, current_stream(tokens));
  STD_TORCH_CHECK(error == 0, "gflowgr::tree_walk: CUDA error ", error, " at the launch");
  return nodes;
}

}  // namespace

STABLE_TORCH_LIBRARY(gflowgr_cuda, m) {
  m.def("tree_walk(Tensor tokens, Tensor? mask, Tensor tree) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gflowgr_cuda, CUDA, m) {
  m.impl("tree_walk", TORCH_BOX(&tree_walk));
}
