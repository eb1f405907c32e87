// gflowgr/_C_cuda: walking the prefix tree, for PyTorch.
#include "common/cuda_binding.h"
#include "tree/tree_layout.h"
#include "tree/tree_walk.h"

namespace {

using gflowgr::binding::on_device_of;

Tensor tree_walk(const Tensor& tokens, const std::optional<Tensor>& mask, const Tensor& tree) {
  // The header is on the device; PrefixTree has checked it, and reading it here would synchronise with the GPU.
  STD_TORCH_CHECK(tree.scalar_type() == ScalarType::Byte && tree.dim() == 1 && tree.is_contiguous() &&
                      tree.numel() >= 8 * gflowgr::kTreeWords,
                  "tree must be the buffer of a prefix tree (uint8, 1-D, contiguous)");
  STD_TORCH_CHECK(on_device_of(tree, tokens),
                  "tree must be on the device of tokens");
  STD_TORCH_CHECK(tokens.dim() >= 1 && tokens.is_contiguous(), "tokens must be [..., L], contiguous");
  const bool wide = tokens.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || tokens.scalar_type() == ScalarType::Int, "tokens must be int32 or int64");
  const bool* masked = nullptr;
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() &&
                        mask->numel() == tokens.numel() && on_device_of(*mask, tokens),
                    "mask must be bool like tokens, contiguous, on the same device");
    masked = static_cast<const bool*>(mask->data_ptr());
  }
  const gflowgr::binding::Launch launch(tokens);
  Tensor nodes = torch::stable::new_empty(tokens, tokens.sizes(), ScalarType::Long);
  const int64_t columns = tokens.size(tokens.dim() - 1);
  if (tokens.numel() == 0) return nodes;
  const int error = gflowgr_tree_walk_cuda(
      static_cast<const uint8_t*>(tree.data_ptr()), tokens.data_ptr(), wide, masked,
      static_cast<int64_t*>(nodes.data_ptr()), tokens.numel() / columns, columns, launch.stream());
  gflowgr::binding::check_launch("tree_walk", error);
  return nodes;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gflowgr_cuda, m) {
  m.def("tree_walk(Tensor tokens, Tensor? mask, Tensor tree) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gflowgr_cuda, GFLOWGR_CUDA_KEY, m) {
  m.impl("tree_walk", TORCH_BOX(&tree_walk));
}
