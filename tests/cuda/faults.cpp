// Kernels with one fault each, that the emulator must find, and a right one. See test_emulated.py.
#include <map>
#include <string>

#include "emulate.h"

namespace {

__global__ void barrier_in_branch(int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    out[1] = 0;
    __syncthreads();
  }
}

__global__ void barrier_after_return(int* out) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  out[0] = 0;
}

__global__ void shuffle_in_branch(int* out) {
  if (threadIdx.x < 16) out[0] = __shfl_xor_sync(0xffffffffu, 1, 1);
  __syncthreads();
}

__global__ void shuffle_after_return(int* out) {
  if (threadIdx.x % 32 >= 20) return;
  out[0] = __shfl_xor_sync(0xffffffffu, 1, 1);
}

__global__ void shared_out_of_bounds(int* out) {
  GFLOWGR_DYNAMIC_SHARED(shared);
  out[0] = reinterpret_cast<int*>(shared)[64 + threadIdx.x / 63];
}

__global__ void global_out_of_bounds(int* out) { out[2 * threadIdx.x] = 0; }

__global__ void misaligned_load(int* out) {
  out[0] = static_cast<int>(reinterpret_cast<const uint4*>(out + 1)->x);
}

template <bool waits>
__global__ void sum(int* out) {
  GFLOWGR_DYNAMIC_SHARED(shared);
  auto* const numbers = reinterpret_cast<int*>(shared);
  numbers[threadIdx.x] = static_cast<int>(threadIdx.x) % 32;
  if (waits) __syncthreads();
  int total = 0;
  for (int i = 0; i < 32; ++i) total += numbers[i];
  if (threadIdx.x == 5) out[0] = total;
}

}  // namespace

int main(int, char** arguments) {
  const std::map<std::string, void (*)(int*)> kernels = {
      {"barrier_in_branch", barrier_in_branch},       {"barrier_after_return", barrier_after_return},
      {"shuffle_in_branch", shuffle_in_branch},       {"shuffle_after_return", shuffle_after_return},
      {"shared_out_of_bounds", shared_out_of_bounds}, {"global_out_of_bounds", global_out_of_bounds},
      {"misaligned_load", misaligned_load},           {"sum", sum<true>},
      {"sum_without_barrier", sum<false>},
  };
  if (arguments[2] != nullptr) emulate::schedule = std::atoi(arguments[2]);
  const std::unique_ptr<int[]> memory(new int[64]());
  const auto kernel = kernels.at(arguments[1]);
  GFLOWGR_LAUNCH(kernel, 1, 64, 64 * sizeof(int), nullptr, memory.get());
  std::printf("%d\n", memory[0]);
  return emulate::last_error;
}
