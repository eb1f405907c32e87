// gflowgr/_C: CPU ops for PyTorch through the LibTorch stable ABI (torch 2.10 and later).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "common/checks.h"
#include "tree/tree_walk_cpu.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// About 20 us of work; less is not worth a second thread.
constexpr int64_t kRowsPerThread = 1024;

Tensor tree_walk(const Tensor& tokens, const std::optional<Tensor>& mask, const Tensor& tree) {
  const uint8_t* const data = gflowgr::tree_of(tree);
  STD_TORCH_CHECK(tokens.dim() >= 1 && tokens.is_contiguous(), "tokens must be [..., L], contiguous");
  const bool wide = tokens.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || tokens.scalar_type() == ScalarType::Int, "tokens must be int32 or int64");
  const bool* masked = nullptr;
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() &&
                        mask->numel() == tokens.numel(),
                    "mask must be bool like tokens, contiguous");
    masked = static_cast<const bool*>(mask->data_ptr());
  }
  Tensor nodes = torch::stable::new_empty(tokens, tokens.sizes(), ScalarType::Long);
  const int64_t columns = tokens.size(tokens.dim() - 1);
  if (tokens.numel() == 0) return nodes;
  const int64_t rows = tokens.numel() / columns;
  const void* from = tokens.data_ptr();
  auto* to = static_cast<int64_t*>(nodes.data_ptr());
  torch::stable::parallel_for(0, rows, kRowsPerThread, [&](int64_t begin, int64_t end) {
    if (wide) {
      gflowgr::tree_walk_cpu(data, static_cast<const int64_t*>(from), masked, to, columns, begin, end);
    } else {
      gflowgr::tree_walk_cpu(data, static_cast<const int32_t*>(from), masked, to, columns, begin, end);
    }
  });
  return nodes;
}

}  // namespace

STABLE_TORCH_LIBRARY(gflowgr_cpp, m) {
  m.def("tree_walk(Tensor tokens, Tensor? mask, Tensor tree) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gflowgr_cpp, CPU, m) {
  m.impl("tree_walk", TORCH_BOX(&tree_walk));
}
