// The flow-matching losses and their gradients: one thread per prompt, which runs csrc/flow_loss/flow_loss.h.
// Bare CUDA: no torch headers.
//
// Speed of light: forward and backward read log_pf, log_reward and the target once and write what is asked for
// once; at B 4096, N 8, L 4 that is 0.6 MB, 0.2 us of an H100's bandwidth, so launches (about 2 us each) and a
// chain of dependent additions bound the time. A block's prompts are copied to shared memory by neighbouring
// threads, so that nothing is read in strides; where a prompt is too large for that, threads read memory
// directly. Prediction at that size, not measured: 3 us for the backward pass, 5 us for the forward pass.
//
// Launches: gradients and losses [B, N] one; a scalar one if a block holds all prompts, else two, the second
// adding the sums of blocks in order. With a mask and a mean over what is valid, the count needs a launch before
// that unless the mask is so small that every block counts for itself. Nothing is read back to the host, and
// no atomics are used: the sums depend on the shapes alone.
#include "flow_loss/flow_loss_cuda.h"

#include "common/cuda_launch.h"

namespace gflowgr {
namespace {

constexpr int kCountBlocks = 64, kCountThreads = 256, kFinalThreads = 256;
constexpr int64_t kCountInBlock = 4096;  // rows of a mask that every block counts for itself
constexpr size_t kMostShared = 48 * 1024;
constexpr unsigned kAll = 0xffffffffu;

struct Counts {
  long long prompts, trajectories;
};

__device__ Counts warp_sum(Counts counts) {
  for (int by = 16; by > 0; by >>= 1) {
    counts.prompts += __shfl_xor_sync(kAll, counts.prompts, by);
    counts.trajectories += __shfl_xor_sync(kAll, counts.trajectories, by);
  }
  return counts;
}

__device__ double warp_sum(double value) {
  for (int by = 16; by > 0; by >>= 1) value += __shfl_xor_sync(kAll, value, by);
  return value;
}

// The prompts that thread `first` of every `step` threads counts. Integers: in any order the same.
__device__ Counts count_prompts(const bool* __restrict__ mask, int64_t B, int64_t N, int64_t L, int64_t first,
                                int64_t step) {
  Counts counts{0, 0};
  for (int64_t b = first; b < B; b += step) {
    const int64_t valid = flow_valid_trajectories(mask, b, N, L);
    counts.prompts += valid > 0;
    counts.trajectories += valid;
  }
  return counts;
}

// Sum over the warps of the block, in order; every thread gets it. `scratch`: one value per warp.
template <typename Value>
__device__ double block_sum(Value value, double* scratch) {
  const double sum = warp_sum(static_cast<double>(value));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = sum;
  __syncthreads();
  double total = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += scratch[warp];
  __syncthreads();
  return total;
}

__global__ void count_kernel(const bool* __restrict__ mask, Counts* __restrict__ out, int64_t B, int64_t N,
                             int64_t L) {
  GFLOWGR_DYNAMIC_SHARED(shared);
  auto* const scratch = reinterpret_cast<Counts*>(shared);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const Counts counts = warp_sum(count_prompts(mask, B, N, L, first, int64_t{1} * gridDim.x * blockDim.x));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = counts;
  __syncthreads();
  if (threadIdx.x != 0) return;
  Counts total{0, 0};
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) {
    total.prompts += scratch[warp].prompts;
    total.trajectories += scratch[warp].trajectories;
  }
  out[blockIdx.x] = total;
}

__global__ void sum_kernel(const double* __restrict__ partial, int64_t count, double* __restrict__ wide,
                           float* __restrict__ narrow) {
  GFLOWGR_DYNAMIC_SHARED(shared);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += partial[i];
  const double total = block_sum(sum, reinterpret_cast<double*>(shared));
  if (threadIdx.x != 0) return;
  if (wide != nullptr) *wide = total;
  if (narrow != nullptr) *narrow = static_cast<float>(total);
}

// One array's share of a block's shared memory: `values` per thread, kept `pitch` apart so that neighbouring
// threads are on different banks. Copies are by neighbouring threads from neighbouring addresses.
template <typename Value>
struct Staged {
  Value* memory;
  int64_t values, pitch;

  __device__ Value* mine() const { return memory + threadIdx.x * pitch; }

  __device__ void load(const Value* __restrict__ from, int64_t prompts) const {
    const int64_t count = prompts * values;
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
      const auto prompt = static_cast<unsigned>(i) / static_cast<unsigned>(values);
      memory[prompt * pitch + (i - prompt * values)] = from[i];
    }
  }

  __device__ void store(Value* __restrict__ to, int64_t prompts) const {
    const int64_t count = prompts * values;
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
      const auto prompt = static_cast<unsigned>(i) / static_cast<unsigned>(values);
      to[i] = memory[prompt * pitch + (i - prompt * values)];
    }
  }
};

// An odd number of 4-byte words.
__host__ __device__ inline int64_t staged_pitch(int64_t values, int64_t bytes) {
  const int64_t words = (values * bytes + 3) / 4 | 1;
  return bytes == 8 ? words / 2 + 1 : words * 4 / bytes;
}

template <typename T>
struct Plan {
  bool staged;
  int threads;
  int64_t blocks;
  size_t shared;
};

template <typename T>
Plan<T> make_plan(const FlowCall& call, const FlowArrays<T>& arrays) {
  const int64_t values = arrays.N * arrays.L;
  const bool states = call.params.kind == FlowKind::db || call.params.kind == FlowKind::subtb;
  const int64_t copies = 1 + (arrays.grad_log_pf != nullptr) +
                         (states ? 1 + (arrays.grad_target != nullptr) : 0);
  int64_t bytes = copies * staged_pitch(values, sizeof(T)) * static_cast<int64_t>(sizeof(T));
  if (arrays.mask != nullptr) bytes += staged_pitch(values, 1);
  Plan<T> plan{};
  // Few prompts: small blocks, so that all multiprocessors get some.
  plan.threads = call.B <= 16384 ? 32 : 128;
  const int64_t room = kMostShared - 1024;
  while (plan.threads > 32 && plan.threads * bytes > room) plan.threads /= 2;
  plan.staged = values > 0 && plan.threads * bytes <= room;
  plan.shared = 512 + (plan.staged ? (plan.threads * bytes + 15) / 16 * 16 : 0);
  plan.blocks = (call.B + plan.threads - 1) / plan.threads;
  return plan;
}

// Shared memory: 512 bytes for sums, then the staged arrays.
template <typename T>
__global__ void flow_kernel(FlowParams params, FlowReduction reduction, double sft_weight, FlowArrays<T> arrays,
                            const T* __restrict__ upstream, const Counts* __restrict__ counts, int count_blocks,
                            int64_t B, bool staged, double* __restrict__ partial, T* __restrict__ total) {
  GFLOWGR_DYNAMIC_SHARED(shared);
  auto* const scratch = reinterpret_cast<double*>(shared);
  const int64_t N = arrays.N, L = arrays.L, values = N * L;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x, b = first + threadIdx.x;
  const int64_t prompts = min(static_cast<int64_t>(blockDim.x), B - first);

  Counts valid{L > 0 && N > 0 ? B : 0, L > 0 ? B * N : 0};
  const bool averaged = reduction == FlowReduction::mean || reduction == FlowReduction::prompt;
  if (averaged && arrays.mask != nullptr) {
    Counts mine{0, 0};
    if (counts == nullptr) {
      mine = count_prompts(arrays.mask, B, N, L, threadIdx.x, blockDim.x);
    } else {
      for (int i = threadIdx.x; i < count_blocks; i += blockDim.x) {
        mine.prompts += counts[i].prompts;
        mine.trajectories += counts[i].trajectories;
      }
    }
    // Sums of whole numbers below 2^53 are exact in double.
    valid.prompts = static_cast<long long>(block_sum(mine.prompts, scratch));
    valid.trajectories = static_cast<long long>(block_sum(mine.trajectories, scratch));
  }
  flow_scales(reduction, valid.prompts, valid.trajectories, sft_weight, params);
  if (upstream != nullptr) {
    params.flow_scale *= static_cast<double>(*upstream);
    params.nll_scale *= static_cast<double>(*upstream);
  }

  const bool states = params.kind == FlowKind::db || params.kind == FlowKind::subtb;
  const int64_t pitch = staged_pitch(values, sizeof(T));
  unsigned char* room = shared + 512;
  const auto stage = [&](bool wanted) {
    Staged<T> array{reinterpret_cast<T*>(room), values, pitch};
    if (wanted) room += blockDim.x * pitch * static_cast<int64_t>(sizeof(T));
    return array;
  };
  const Staged<T> log_pf = stage(true), target = stage(states);
  const Staged<T> grad_log_pf = stage(arrays.grad_log_pf != nullptr);
  const Staged<T> grad_target = stage(states && arrays.grad_target != nullptr);
  const Staged<bool> mask{reinterpret_cast<bool*>(room), values, staged_pitch(values, 1)};
  if (staged) {
    log_pf.load(arrays.log_pf + first * values, prompts);
    if (states) target.load(arrays.target + first * values, prompts);
    if (arrays.mask != nullptr) mask.load(arrays.mask + first * values, prompts);
    __syncthreads();
  }

  double sum = 0;
  if (b < B) {
    FlowArrays<T> mine = arrays;
    const auto shift = [](auto* pointer, int64_t by) { return pointer == nullptr ? nullptr : pointer + by; };
    mine.log_reward = shift(arrays.log_reward, b * N);
    mine.upstream = shift(arrays.upstream, b * N);
    mine.losses = shift(arrays.losses, b * N);
    mine.grad_log_reward = shift(arrays.grad_log_reward, b * N);
    mine.target = shift(arrays.target, states ? b * values : b);
    mine.grad_target = shift(arrays.grad_target, states ? b * values : b);
    mine.log_pf = shift(arrays.log_pf, b * values);
    mine.mask = shift(arrays.mask, b * values);
    mine.grad_log_pf = shift(arrays.grad_log_pf, b * values);
    if (staged) {
      mine.log_pf = log_pf.mine();
      if (arrays.mask != nullptr) mine.mask = mask.mine();
      if (arrays.grad_log_pf != nullptr) mine.grad_log_pf = grad_log_pf.mine();
      if (states) mine.target = target.mine();
      if (states && arrays.grad_target != nullptr) mine.grad_target = grad_target.mine();
    }
    flow_prompt(params, mine, 0);
    if (partial != nullptr) {
      for (int64_t n = 0; n < N; ++n) sum += static_cast<double>(mine.losses[n]);
    }
  }
  if (staged) {
    __syncthreads();
    if (arrays.grad_log_pf != nullptr) grad_log_pf.store(arrays.grad_log_pf + first * values, prompts);
    if (states && arrays.grad_target != nullptr) {
      grad_target.store(arrays.grad_target + first * values, prompts);
    }
  }
  if (partial == nullptr) return;
  sum = block_sum(sum, scratch);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    *total = static_cast<T>(sum);
  } else {
    partial[blockIdx.x] = sum;
  }
}

template <typename T>
int run(const FlowCall& call, const FlowArrays<T>& arrays, const T* upstream, T* total, void* workspace,
        void* stream) {
  const Plan<T> plan = make_plan(call, arrays);
  if (plan.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto queue = static_cast<cudaStream_t>(stream);
  const auto grid = static_cast<unsigned>(plan.blocks);
  auto* counts = static_cast<Counts*>(workspace);
  auto* const partial = reinterpret_cast<double*>(counts + kCountBlocks);
  const bool averaged = call.reduction == FlowReduction::mean || call.reduction == FlowReduction::prompt;
  int count_blocks = 0;
  if (averaged && arrays.mask != nullptr && (call.B * arrays.N > kCountInBlock)) {
    const int64_t wanted = (call.B + kCountThreads - 1) / kCountThreads;
    count_blocks = static_cast<int>(wanted < kCountBlocks ? wanted : kCountBlocks);
    GFLOWGR_LAUNCH(count_kernel, count_blocks, kCountThreads, kCountThreads / 32 * sizeof(Counts), queue,
                   arrays.mask, counts, call.B, arrays.N, arrays.L);
  } else {
    counts = nullptr;
  }
  GFLOWGR_LAUNCH(flow_kernel<T>, grid, plan.threads, plan.shared, queue, call.params, call.reduction,
                 call.sft_weight, arrays, upstream, counts, count_blocks, call.B, plan.staged,
                 total != nullptr ? partial : nullptr, total);
  if (total != nullptr && grid > 1) {
    double* wide = nullptr;
    float* narrow = nullptr;
    if constexpr (sizeof(T) == sizeof(double)) {
      wide = total;
    } else {
      narrow = total;
    }
    GFLOWGR_LAUNCH(sum_kernel, 1, kFinalThreads, kFinalThreads / 32 * sizeof(double), queue, partial,
                   plan.blocks, wide, narrow);
  }
  return cudaGetLastError();
}

}  // namespace

size_t flow_loss_workspace(const FlowCall& call) {
  return kCountBlocks * sizeof(Counts) + static_cast<size_t>(call.B / 32 + 1) * sizeof(double);
}

template <typename T>
int flow_loss_cuda(const FlowCall& call, const FlowArrays<T>& arrays, T* total, void* workspace, void* stream) {
  return run<T>(call, arrays, nullptr, total, workspace, stream);
}

template <typename T>
int flow_loss_backward_cuda(const FlowCall& call, const FlowArrays<T>& arrays, const T* upstream, void* workspace,
                            void* stream) {
  return run<T>(call, arrays, upstream, nullptr, workspace, stream);
}

template int flow_loss_cuda(const FlowCall&, const FlowArrays<float>&, float*, void*, void*);
template int flow_loss_cuda(const FlowCall&, const FlowArrays<double>&, double*, void*, void*);
template int flow_loss_backward_cuda(const FlowCall&, const FlowArrays<float>&, const float*, void*, void*);
template int flow_loss_backward_cuda(const FlowCall&, const FlowArrays<double>&, const double*, void*, void*);

}  // namespace gflowgr
