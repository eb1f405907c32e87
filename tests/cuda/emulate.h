// Runs CUDA kernels on the CPU, to test them where there is no GPU. Not fast, not a simulator of timing.
//
// The kernel files of csrc are compiled by a host compiler with GFLOWGR_EMULATE defined and this file
// on the include path (csrc/common/cuda_launch.h takes it in the place of the CUDA headers). Blocks run one after
// the other; the threads of a block are fibers that run until they meet a barrier or a warp-wide operation.
//
// Found, and reported on stderr before abort():
//   - a barrier that not all threads of the block reach, or that they reach at different lines;
//   - a warp-wide operation that not all lanes of its mask reach at the same line;
//   - launches that CUDA would refuse.
// Found with their tools: accesses out of bounds and misaligned ones (compile with
// -fsanitize=address,undefined: dynamic shared memory is a heap block of just the size asked for).
// Found by comparing results: missing barriers and dependence on the order of blocks, since
// `gflowgr_emulate_schedule` sets the order of threads and blocks, and dynamic shared memory starts as NaN.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

// ------------------------------------------------------------------ runtime

using cudaStream_t = void*;
using cudaError_t = int;
constexpr int cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9;
constexpr int cudaMemcpyDeviceToHost = 2;

namespace emulate {
inline int last_error = cudaSuccess;
inline int schedule = 0;  // 0: ascending, 1: descending, others: shuffled with this seed
}  // namespace emulate

inline cudaError_t cudaGetLastError() { return std::exchange(emulate::last_error, cudaSuccess); }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  if (bytes > 0) std::memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

// ------------------------------------------------------------------ threads of a block

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulate {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 256 * 1024, kMostShared = 48 * 1024;

enum class State { ready, at_barrier, in_warp, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  uint3 index{};
  State state = State::done;
  int line = 0;           // of the barrier or warp-wide operation it waits at
  unsigned mask = 0;      // lanes of that operation
  uint64_t value = 0;     // what it gives to the others
  uint64_t seen[kWarp]{};  // what it got from them: per lane, or [0] the sum and [1] the OR at a barrier
  void* fake_stack = nullptr;
};

struct Block {
  ucontext_t scheduler;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::function<void()> body;
  const char* kernel = "";
  unsigned threads = 0, current = 0;
  const void* main_stack = nullptr;
  size_t main_size = 0;
  void* main_fake = nullptr;
  unsigned char* shared = nullptr;
  uint64_t random = 0;
};

inline Block block;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulate: %s, block (%u, %u, %u): %s\n", block.kernel, blockIdx.x, blockIdx.y,
               blockIdx.z, what);
  for (unsigned i = 0; i < block.threads; ++i) {
    const Fiber& fiber = *block.fibers[i];
    const char* const names[] = {"runs", "at the barrier of line", "in the warp operation of line", "returned"};
    if (i > 0 && fiber.state == block.fibers[i - 1]->state && fiber.line == block.fibers[i - 1]->line) continue;
    std::fprintf(stderr, "  from thread %u on: %s %d\n", i, names[static_cast<int>(fiber.state)], fiber.line);
  }
  std::fflush(stderr);
  std::abort();
}

inline void enter_scheduler(Fiber& fiber, bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, block.main_stack, block.main_size);
#endif
  if (for_good) {
    setcontext(&block.scheduler);
  } else {
    swapcontext(&fiber.context, &block.scheduler);
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &block.main_stack, &block.main_size);
#endif
}

inline void fiber_main() {
  Fiber& fiber = *block.fibers[block.current];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.main_stack, &block.main_size);
#endif
  block.body();
  fiber.state = State::done;
  fiber.line = 0;
  enter_scheduler(fiber, true);
}

inline void resume(unsigned i) {
  Fiber& fiber = *block.fibers[i];
  block.current = i;
  threadIdx = fiber.index;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block.main_fake, fiber.stack.get(), kStack);
#endif
  swapcontext(&block.scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block.main_fake, nullptr, nullptr);
#endif
}

inline Fiber& wait(State state, int line, unsigned mask, uint64_t value) {
  Fiber& fiber = *block.fibers[block.current];
  fiber.state = state;
  fiber.line = line;
  fiber.mask = mask;
  fiber.value = value;
  enter_scheduler(fiber, false);
  return fiber;
}

// The lanes that wait with lane `i` go on when all of its mask are there.
inline bool release_warp(unsigned i) {
  Fiber& first = *block.fibers[i];
  const unsigned warp = i / kWarp * kWarp;
  if (!(first.mask >> (i - warp) & 1)) fail("a lane that is not in the mask of its warp operation");
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(first.mask >> lane & 1)) continue;
    if (warp + lane >= block.threads) fail("the mask of a warp operation names lanes that do not exist");
    const Fiber& fiber = *block.fibers[warp + lane];
    if (fiber.state == State::done) fail("the mask of a warp operation names lanes that have returned");
    if (fiber.state == State::at_barrier) fail("some lanes of a warp operation are at a barrier");
    if (fiber.state != State::in_warp) return false;
    if (fiber.mask != first.mask || fiber.line != first.line) fail("lanes of one warp operation are at different ones");
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(first.mask >> lane & 1)) continue;
    Fiber& fiber = *block.fibers[warp + lane];
    for (unsigned other = 0; other < kWarp; ++other) {
      fiber.seen[other] = first.mask >> other & 1 ? block.fibers[warp + other]->value : 0xfff7fff7fff7fff7;
    }
    fiber.state = State::ready;
  }
  return true;
}

inline bool release_barrier() {
  uint64_t sum = 0, any = 0;
  for (unsigned i = 0; i < block.threads; ++i) {
    const Fiber& fiber = *block.fibers[i];
    if (fiber.state == State::ready || fiber.state == State::in_warp) return false;
    if (fiber.state == State::done) fail("a barrier that some threads never reach");
    if (fiber.line != block.fibers[0]->line) fail("threads wait at different barriers");
    sum += fiber.value != 0;
    any |= fiber.value;
  }
  for (unsigned i = 0; i < block.threads; ++i) {
    Fiber& fiber = *block.fibers[i];
    fiber.seen[0] = sum;
    fiber.seen[1] = any;
    fiber.state = State::ready;
  }
  return true;
}

inline void put_in_order(std::vector<uint64_t>& order) {
  std::iota(order.begin(), order.end(), uint64_t{0});
  if (schedule == 1) std::reverse(order.begin(), order.end());
  if (schedule < 2) return;
  for (size_t i = order.size(); i > 1; --i) {
    block.random = block.random * 6364136223846793005u + 1442695040888963407u + schedule;
    std::swap(order[i - 1], order[(block.random >> 33) % i]);
  }
}

// Runs the ready threads of a warp; in the ascending and descending orders as far as the warp gets without the
// others, else to the next warp-wide operation.
inline void run_warp(unsigned warp) {
  const unsigned first = warp * kWarp, count = std::min(kWarp, block.threads - first);
  std::vector<uint64_t> order(count);
  for (bool again = true; again;) {
    put_in_order(order);
    for (const uint64_t lane : order) {
      if (block.fibers[first + lane]->state == State::ready) resume(first + static_cast<unsigned>(lane));
    }
    again = false;
    for (unsigned i = first; i < first + count; ++i) {
      if (block.fibers[i]->state == State::in_warp && release_warp(i)) again = schedule < 2;
    }
  }
}

inline void start(unsigned i) {
  Fiber& fiber = *block.fibers[i];
  fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
  fiber.state = State::ready;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

inline void run_block() {
  for (unsigned i = 0; i < block.threads; ++i) start(i);
  std::vector<uint64_t> warps((block.threads + kWarp - 1) / kWarp);
  for (;;) {
    put_in_order(warps);
    for (const uint64_t warp : warps) run_warp(static_cast<unsigned>(warp));
    bool all_done = true, any_ready = false;
    for (unsigned i = 0; i < block.threads; ++i) {
      all_done = all_done && block.fibers[i]->state == State::done;
      any_ready = any_ready || block.fibers[i]->state == State::ready;
    }
    if (all_done) return;
    if (!any_ready && !release_barrier()) fail("threads wait for each other");
  }
}

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared, cudaStream_t,
            Arguments&&... arguments) {
  block.kernel = name;
  const uint64_t wanted = uint64_t{threads.x} * threads.y * threads.z;
  if (wanted == 0 || wanted > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX ||
      grid.y > 65535 || grid.z > 65535 || shared > kMostShared) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  block.threads = static_cast<unsigned>(wanted);
  while (block.fibers.size() < wanted) block.fibers.push_back(std::make_unique<Fiber>());
  blockDim = threads;
  gridDim = grid;
  block.body = [&] { kernel(arguments...); };
  const uint64_t layer = uint64_t{grid.x} * grid.y;
  std::vector<uint64_t> order(layer * grid.z);
  put_in_order(order);
  for (const uint64_t i : order) {
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i % layer / grid.x),
                static_cast<unsigned>(i / layer)};
    block.shared = static_cast<unsigned char*>(std::aligned_alloc(16, (shared + 15) / 16 * 16));
    std::memset(block.shared, 0xff, shared);
    run_block();
    std::free(block.shared);
  }
}

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline unsigned lane() { return block.current % kWarp; }

template <typename T>
T shuffle(int line, unsigned mask, T value, unsigned from) {
  const Fiber& fiber = wait(State::in_warp, line, mask, to_bits(value));
  if (from >= kWarp) return value;
  if (!(mask >> from & 1)) fail("a shuffle reads a lane that is not in its mask");
  return from_bits<T>(fiber.seen[from]);
}

inline unsigned ballot(int line, unsigned mask, bool flag) {
  const Fiber& fiber = wait(State::in_warp, line, mask, flag);
  unsigned votes = 0;
  for (unsigned i = 0; i < kWarp; ++i) votes |= (mask >> i & 1) && fiber.seen[i] == 1 ? 1u << i : 0u;
  return votes;
}

}  // namespace emulate

#define GFLOWGR_LAUNCH(kernel, grid, block, shared, stream, ...) \
  emulate::launch(#kernel, kernel, (grid), (block), (shared), (stream), __VA_ARGS__)
#define GFLOWGR_DYNAMIC_SHARED(name) unsigned char* const name = emulate::block.shared

#define __syncthreads() emulate::wait(emulate::State::at_barrier, __LINE__, 0, 0)
#define __syncthreads_or(flag) \
  static_cast<int>(emulate::wait(emulate::State::at_barrier, __LINE__, 0, (flag) != 0).seen[1])
#define __syncthreads_count(flag) \
  static_cast<int>(emulate::wait(emulate::State::at_barrier, __LINE__, 0, (flag) != 0).seen[0])
#define __syncwarp() emulate::wait(emulate::State::in_warp, __LINE__, 0xffffffffu, 0)
#define __shfl_sync(mask, value, from) emulate::shuffle(__LINE__, mask, value, (from) % 32)
#define __shfl_xor_sync(mask, value, bits) emulate::shuffle(__LINE__, mask, value, emulate::lane() ^ (bits))
#define __shfl_down_sync(mask, value, by) emulate::shuffle(__LINE__, mask, value, emulate::lane() + (by))
#define __shfl_up_sync(mask, value, by) \
  emulate::shuffle(__LINE__, mask, value, emulate::lane() >= unsigned(by) ? emulate::lane() - (by) : 32u)
#define __ballot_sync(mask, flag) emulate::ballot(__LINE__, mask, flag)
#define __any_sync(mask, flag) (emulate::ballot(__LINE__, mask, flag) != 0)

// ------------------------------------------------------------------ arithmetic

template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
// Threads of a block take turns, blocks run one after the other: every access is atomic.
inline unsigned atomicAdd(unsigned* address, unsigned value) { return std::exchange(*address, *address + value); }
template <typename T>
T __ldg(const T* address) {
  return *address;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline float __expf(float x) { return expf(x); }
inline float __uint_as_float(unsigned bits) { return emulate::from_bits<float>(bits); }
inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(emulate::to_bits(x)); }

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half x) { return static_cast<float>(emulate::from_bits<_Float16>(x.bits)); }
inline __half __float2half_rn(float x) {
  return {static_cast<uint16_t>(emulate::to_bits(static_cast<_Float16>(x)))};
}
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(unsigned{x.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

