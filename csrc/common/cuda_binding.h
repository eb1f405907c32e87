// Helpers of the bindings of gflowgr/_C_cuda. They use the LibTorch stable ABI (torch 2.10 and later).
//
// Compiled with GFLOWGR_EMULATE the same bindings take CPU tensors and run the kernels in the emulator of
// tests/cuda.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(GFLOWGR_EMULATE)
#define GFLOWGR_CUDA_KEY CPU
#else
#define GFLOWGR_CUDA_KEY CUDA
#endif

namespace gflowgr::binding {
namespace {

#if defined(GFLOWGR_EMULATE)

inline bool on_device_of(const Tensor&, const Tensor&) { return true; }

struct Launch {
  explicit Launch(const Tensor&) {}
  void* stream() const { return nullptr; }
};

#else

inline bool on_device_of(const Tensor& tensor, const Tensor& like) {
  return tensor.is_cuda() && tensor.get_device_index() == like.get_device_index();
}

// While it lives the device of `tensor` is the current one.
class Launch {
 public:
  explicit Launch(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

#endif

inline void check_launch(const char* op, int error) {
  STD_TORCH_CHECK(error == 0, "gflowgr::", op, ": CUDA error ", error, " at the launch");
}

}  // namespace
}  // namespace gflowgr::binding
