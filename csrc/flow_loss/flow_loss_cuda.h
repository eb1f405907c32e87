// Launchers of csrc/flow_loss/flow_loss.cu. `stream` is a cudaStream_t; the result is a cudaError_t.
#pragma once

#include <cstddef>

#include "flow_loss/flow_loss.h"

namespace gflowgr {

struct FlowCall {
  FlowParams params;  // flow_scale and nll_scale are set on the device
  FlowReduction reduction;
  double sft_weight;
  int64_t B;
};

// Bytes of workspace for the launchers, on the device, 16-byte aligned; any contents.
size_t flow_loss_workspace(const FlowCall& call);

// Device pointers. The losses of `arrays` go to [B, N] (needed also for a scalar, as workspace), and their sum
// to `total`, one value, if that is not null.
template <typename T>
int flow_loss_cuda(const FlowCall& call, const FlowArrays<T>& arrays, T* total, void* workspace, void* stream);

// Gradients; `upstream`, one value, multiplies those of a scalar (null for [B, N], see FlowArrays).
template <typename T>
int flow_loss_backward_cuda(const FlowCall& call, const FlowArrays<T>& arrays, const T* upstream, void* workspace,
                            void* stream);

}  // namespace gflowgr
