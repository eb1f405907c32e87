// Shared by the kernels of a beam step: beams and masks, a log-sum-exp, and the best keys of a block. Whole blocks
// of kThreads must call the functions that hold a barrier.
#pragma once

#include "beam_step/beam_step.h"
#include "logprobs_children/children_device.h"

namespace gflowgr {

// ------------------------------------------------------------------ beams

// A beam that can be continued; children.size() == 0 where it cannot.
struct Beam {
  NodeSpan children;
  int64_t depth;
  float score;
};

__device__ inline Beam read_beam(const BeamStepCall& call, int64_t row) {
  Beam beam{{0, 0}, 0, __ldg(call.scores + row)};
  if (beam.score == -INFINITY) return beam;
  const int64_t node = __ldg(call.nodes + row);
  beam.children = child_span(call.tree, node);
  if (beam.children.size() > 0) beam.depth = node_depth(call.tree, node);
  return beam;
}

__device__ inline int64_t codebook_size(const BeamStepCall& call, int64_t depth) {
  return __ldg(call.codebook_ends + depth) - level_word(call.tree, depth, kTokenBase);
}

// ------------------------------------------------------------------ masks

// Sorted keys.
struct Keys {
  const int64_t* first;
  int64_t count;

  // Number of keys less than `key`.
  __device__ int64_t below(int64_t key) const {
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) >> 1;
      if (__ldg(first + middle) < key) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
  __device__ bool has(int64_t key) const {
    const int64_t at = below(key);
    return at < count && __ldg(first + at) == key;
  }
  __device__ Keys within(int64_t begin, int64_t end) const {
    if (count == 0) return *this;
    const int64_t low = below(begin);
    return {first + low, below(end) - low};
  }
};

// The children that a prompt's masks allow.
struct Masks {
  const BeamStepCall& call;
  Keys barred;   // those of the beam's children
  int64_t keys;  // the key of node 0

  __device__ Masks(const BeamStepCall& step, const Beam& beam, int64_t prompt)
      : call(step), barred{step.barred, step.barred_count}, keys(prompt * tree_word(step.tree, kNumNodes)) {
    barred = barred.within(keys + beam.children.begin, keys + beam.children.end);
  }

  __device__ bool admits(int64_t node) const {
    return (call.live == nullptr || call.live[node]) && !barred.has(keys + node);
  }

  __device__ bool goes_on(int64_t node) const {
    const NodeSpan below = child_span(call.tree, node);
    if (below.size() == 0) return false;
    if (call.live == nullptr && call.barred_count == 0) return true;
    if (node_leaf(call.tree, node) < 0) return true;
    // An identifier ends here as well, and may be all that is left of the node.
    const Keys gone = Keys{call.barred, call.barred_count}.within(keys + below.begin, keys + below.end);
    for (int64_t child = below.begin; child < below.end; ++child) {
      if ((call.live == nullptr || call.live[child]) && !gone.has(keys + child)) return true;
    }
    return false;
  }

  __device__ bool may_end(int64_t node, int64_t prompt) const {
    const int64_t leaf = node_leaf(call.tree, node);
    if (leaf < 0 || (call.live_leaves != nullptr && !call.live_leaves[leaf])) return false;
    const Keys gone{call.barred_leaves, call.barred_leaves_count};
    return !gone.has(prompt * tree_word(call.tree, kNumLeaves) + leaf);
  }
};

// ------------------------------------------------------------------ log-sum-exp

// `sum` of exp((x - reference) / temperature); the reference is the largest, or 0 where that is infinite.
struct LogSum {
  float largest, sum;
};

__device__ inline LogSum nothing_summed() { return {-INFINITY, 0.0f}; }

__device__ inline float reference_of(float largest) { return fabsf(largest) == INFINITY ? 0.0f : largest; }

// `rate` is log2(e) / temperature, here and below.
__device__ inline LogSum combine(LogSum a, LogSum b, float rate) {
  const float largest = fmaxf(a.largest, b.largest);
  // With +inf the sum is infinite or NaN, whatever the references were.
  const auto scaled = [&](LogSum part) {
    const bool same = part.largest == largest || largest == INFINITY;
    return same ? part.sum : part.sum * exp2f((part.largest - largest) * rate);
  };
  return {largest, scaled(a) + scaled(b)};
}

// Adds values; a NaN among them makes the result NaN.
template <int kCount>
__device__ inline void add(LogSum& total, const float (&values)[kCount], float rate) {
  float top = values[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) top = fmaxf(top, values[i]);
  if (top > total.largest) {
    total.sum = combine(total, {top, 0.0f}, rate).sum;
    total.largest = top;
  }
  const float reference = reference_of(total.largest);
  float part = 0.0f;  // summed apart: rounding errors grow with the number of parts
#pragma unroll
  for (int i = 0; i < kCount; ++i) part += exp2f((values[i] - reference) * rate);
  total.sum += part;
}

// `scale` is 1 / temperature.
__device__ inline float finish(LogSum total, float scale) {
  if (total.sum != total.sum) return NAN;
  return fabsf(total.largest) == INFINITY ? total.largest : total.largest * scale + logf(total.sum);
}

// The same sum for all threads; `warps` is shared memory for one LogSum per warp.
__device__ inline LogSum block_combine(LogSum total, LogSum* warps, float rate) {
  for (int by = 16; by > 0; by >>= 1) {
    const float largest = __shfl_xor_sync(kAll, total.largest, by);
    const float sum = __shfl_xor_sync(kAll, total.sum, by);
    total = combine(total, {largest, sum}, rate);
  }
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = total;
  __syncthreads();
  total = warps[0];
  for (int i = 1; i < kWarps; ++i) total = combine(total, warps[i], rate);
  __syncthreads();
  return total;
}

// ------------------------------------------------------------------ keys

// Order of floats as unsigned integers, NaN above all; -0 equals 0.
__device__ inline unsigned rank_of(float score) {
  if (score != score) return 0xffffffffu;
  const unsigned bits = __float_as_uint(score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float score_of(unsigned rank) {
  if (rank == 0xffffffffu) return NAN;
  return __uint_as_float(rank & 0x80000000u ? rank & 0x7fffffffu : ~rank);
}

// No two candidates have the same key, and the better one has the larger: by score, then by number, ascending.
// A score of -inf is no candidate: no key is 0.
__device__ inline uint64_t make_key(unsigned rank, unsigned number) {
  return static_cast<uint64_t>(rank) << 32 | static_cast<uint32_t>(~number);
}

__device__ inline unsigned rank_in(uint64_t key) { return static_cast<unsigned>(key >> 32); }

__device__ inline unsigned number_in(uint64_t key) { return ~static_cast<unsigned>(key); }

// Sorts n keys, largest first, in a network of exchanges; there is room up to the next power of two from 64 on.
// Exchanges over at most 32 places stay within 64 keys that one warp has for itself.
__device__ inline void sort_keys(uint64_t* keys, unsigned n) {
  unsigned size = 64;
  while (size < n) size <<= 1;
  for (unsigned i = n + threadIdx.x; i < size; i += kThreads) keys[i] = 0;
  __syncthreads();
  for (unsigned run = 2; run <= size; run <<= 1) {
    for (unsigned by = run >> 1; by > 0; by >>= 1) {
      for (unsigned pair = threadIdx.x; pair < size / 2; pair += kThreads) {
        const unsigned at = 2 * pair - (pair & (by - 1));
        const uint64_t a = keys[at], b = keys[at + by];
        if ((a < b) == ((at & run) == 0)) {
          keys[at] = b;
          keys[at + by] = a;
        }
      }
      const unsigned next = by > 1 ? by >> 1 : run;
      if (by > 32 || next > 32) {
        __syncthreads();
      } else {
        __syncwarp();
      }
    }
  }
}

constexpr int kTurn = 2, kRound = kTurn * kThreads;  // candidates per thread and per block between two barriers

// Keys that are kept between two cuts; a round always fits.
inline int64_t best_capacity(int64_t width) {
  int64_t capacity = 1024;
  while (capacity < width + kRound) capacity *= 2;
  return capacity;
}

// The `width` largest of the keys that a block meets. Which are kept does not depend on the order they come in.
class Best {
 public:
  // `keys`: best_capacity(width) of them; `count` is in shared memory.
  __device__ Best(uint64_t* keys, unsigned* count, unsigned width, unsigned capacity)
      : keys_(keys), count_(count), width_(width), capacity_(capacity) {
    if (threadIdx.x == 0) *count_ = 0;
    __syncthreads();
  }

  // Keys below this are not among the best.
  __device__ uint64_t threshold() const { return threshold_; }

  // Each thread calls it at most kTurn times before `settle`. Whole warps call it together.
  __device__ void offer(bool taken, uint64_t key) {
    const unsigned votes = __ballot_sync(kAll, taken);
    if (votes == 0) return;
    const unsigned lane = threadIdx.x % 32, leader = static_cast<unsigned>(__ffs(static_cast<int>(votes))) - 1;
    unsigned first = 0;
    if (lane == leader) first = atomicAdd(count_, static_cast<unsigned>(__popc(votes)));
    first = __shfl_sync(kAll, first, leader);
    if (taken) keys_[first + static_cast<unsigned>(__popc(votes & ((1u << lane) - 1)))] = key;
  }

  // `any`: whether this thread offered one.
  __device__ void settle(bool any) {
    if (!__syncthreads_or(any)) return;
    const unsigned n = *count_;
    __syncthreads();  // all threads have read it
    if (n + kRound > capacity_) cut(n);
  }

  // Sorts them and returns how many there are.
  __device__ unsigned sorted() {
    const unsigned n = *count_;
    sort_keys(keys_, n);
    return min(n, width_);
  }

  __device__ uint64_t operator[](unsigned i) const { return keys_[i]; }

 private:
  __device__ void cut(unsigned n) {
    sort_keys(keys_, n);
    if (threadIdx.x == 0) *count_ = min(n, width_);
    if (n >= width_) threshold_ = keys_[width_ - 1];
    __syncthreads();
  }

  uint64_t* const keys_;
  unsigned* const count_;
  const unsigned width_, capacity_;
  uint64_t threshold_ = 0;
};

}  // namespace gflowgr
