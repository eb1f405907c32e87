// Log-probabilities among the children of each token's node in the prefix tree. Bare CUDA: no torch headers.
//
// One launch walks the tree (a thread per trajectory) and writes a plan of the rows. Then
//   the root   a dense product of 64 rows with 64 children at a time, softmax within the block, since all
//              trajectories choose there: the head's rows are read once per 64 rows;
//   deeper     a warp per row: its hidden state stays in the L1 cache while it meets four children at a
//              time, 16 bytes a lane. Rows at a node with one child have log-probability 0 and return at once.
// Slopes d log_pf / d logit are left for the backward pass where wanted, or the logits for children_flow_kl.cu.
//
// Speed of light, for T rows of d numbers of s bytes, T/L of them at the root with C0 children, and E products
// (row, child) deeper: memory T d s for the rows that choose; the head's rows come from the L2 cache:
// T/L/64 C0 d s at the root, E d s deeper; 4 (C0 T/L + E) bytes of slopes, written twice. Arithmetic: 2 d (C0 T/L
// + E) operations. T 65536, L 4, d 512 in bf16, C0 256, 40 children at level 1 and few below: 33 MB of hidden
// states (10 us at 3.3 TB/s), 34 MB + 700 MB from the L2 cache (140 us at 5 TB/s), 4.3 + 0.7 GFLOP in float32
// (90 us at 55 TFLOP/s). Prediction, not measured: about 250 us, bound by the L2 cache and the float32
// units, not by memory. To come nearer to it the root's product has to go to the tensor cores, and the rows
// of a level have to be grouped by node.
#include "logprobs_children/children_device.h"

namespace gflowgr {
namespace {

// ------------------------------------------------------------------ the walk

__device__ float single_child(const ChildrenCall& call, int64_t token) {
  return call.bias.data != nullptr && load(call.bias, token) == -INFINITY ? -INFINITY : 0.0f;
}

__global__ void plan_kernel(ChildrenCall call) {
  const int64_t trajectory = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (trajectory < kPlanSpare) call.plan[kPlanWords * call.trajectories * call.L + trajectory] = 0;
  if (trajectory >= call.trajectories) return;
  const uint8_t* const tree = call.tree;
  const int64_t depth = tree_word(tree, kMaxLength);
  int64_t pitch = 0;
  for (int64_t level = 0; level < min(depth, call.L); ++level) pitch += level_word(tree, level, kMaxChildren);
  int64_t node = 0, last = 0, slopes = trajectory * pitch;
  for (int64_t level = 0; level < call.L; ++level) {
    const int64_t t = trajectory * call.L + level;
    int64_t* const words = call.plan + kPlanWords * t;
    const bool masked = call.mask != nullptr && !call.mask[t];
    int64_t begin = 0, children = 0, target = -1;
    // A node at the last depth has no entry in child_begin.
    if (!masked && node >= 0 && level < depth) {
      begin = child_begin(tree, node);
      children = child_begin(tree, node + 1) - begin;
      target = children > 0 ? child_tokens(tree, level, begin).find(children, call.tokens[t]) : -1;
    }
    words[kFirstChild] = begin;
    words[kChildren] = pack_children(children, target);
    words[kSoftmax] = 0;
    words[kSlopes] = slopes;
    if (level < depth) slopes += level_word(tree, level, kMaxChildren);
    if (masked) {
      call.log_pf[t] = 0.0f;
      node = -1;
      continue;
    }
    if (children < 2 || target < 0) {
      call.log_pf[t] = target < 0 ? -INFINITY : single_child(call, call.tokens[t]);
    }
    node = target < 0 ? -1 : begin + target;
    last = node;
  }
  // `last` is where the unmasked part ended; 0, the root, if all of it is masked; -1 after a hole in the mask.
  const bool wrong = last < 0 || (last > 0 && node_leaf(tree, last) < 0);
  // All writers write the same value.
  if (wrong) *call.invalid = 1;
}

// ------------------------------------------------------------------ softmax, a few logits at a time

struct Running {
  float largest = -INFINITY, others = 0, target = -INFINITY;  // others: sum of exp(logit - largest) but for the target

  __device__ void rescale(float candidate) {
    if (!(candidate > largest)) return;
    others *= expf(largest - candidate);
    largest = candidate;
  }

  __device__ float term(float logit) const { return logit == -INFINITY ? 0.0f : expf(logit - largest); }
};

struct Finished {
  float log_pf, others;  // others: probability of all but the target
  Softmax softmax;
};

__device__ Finished finish(const Running& running) {
  const float own = running.term(running.target), sum = own + running.others;
  Finished done{-INFINITY, 0.0f, {running.largest, sum}};
  if (running.target == -INFINITY) return done;
  // Never above 0, and exact where the target has nearly all the probability.
  done.log_pf = running.target == running.largest ? -log1pf(running.others)
                                                  : (running.target - running.largest) - logf(sum);
  done.others = running.others / sum;
  return done;
}

__device__ float slope(const Finished& done, float logit, bool is_target) {
  if (is_target) return done.others;
  return logit == -INFINITY ? 0.0f : -expf(logit - done.softmax.largest) / done.softmax.sum;
}

// Called by one thread per row.
__device__ void write_row(const ChildrenCall& call, const Row& row, const Finished& done) {
  call.log_pf[row.t] = done.log_pf;
  call.plan[kPlanWords * row.t + kSoftmax] = pack(done.softmax);
  if (done.log_pf == -INFINITY) call.plan[kPlanWords * row.t + kChildren] = pack_children(row.children, -1);
}

// ------------------------------------------------------------------ the root

struct RootShared {
  union {
    struct {
      Panel a, b;
    };
    float logits[kTile * (kTile + 1)];
  };
  int64_t tokens[kTile];
  float others[kTile];
};

__global__ void __launch_bounds__(kThreads) root_kernel(ChildrenCall call, Rows hidden, Rows weight) {
  GFLOWGR_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<RootShared*>(memory);
  const int64_t begin = child_begin(call.tree, 0), count = child_begin(call.tree, 1) - begin;
  if (count < 2) return;
  const ChildTokens tokens = child_tokens(call.tree, 0, begin);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTile;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;

  // Copies: a quarter of a row per thread. Softmax: 8 rows per warp.
  const int copied = thread / 4;
  bool copies = false;
  if (first + copied < call.trajectories) copies = read_row(call, (first + copied) * call.L).live();
  Running running[kTile / kWarps];
  int target[kTile / kWarps];
  for (int i = 0; i < kTile / kWarps; ++i) {
    const int64_t trajectory = first + warp * (kTile / kWarps) + i;
    target[i] = -1;
    if (trajectory < call.trajectories) {
      const Row row = read_row(call, trajectory * call.L);
      if (row.live()) target[i] = row.target;
    }
  }

  for (int64_t chunk = 0; chunk < count; chunk += kTile) {
    const int width = static_cast<int>(min(count - chunk, int64_t{kTile}));
    if (thread < kTile) shared.tokens[thread] = thread < width ? tokens[chunk + thread] : -1;
    __syncthreads();
    float acc[4][4] = {};
    tile_product(shared.a, shared.b, hidden, copies ? (first + copied) * call.L : -1, weight,
                 copied < width ? shared.tokens[copied] : -1, acc);
    for (int j = 0; j < 4; ++j) {
      const int column = thread % 16 * 4 + j;
      float bias = 0;
      if (call.bias.data != nullptr && column < width) bias = load(call.bias, shared.tokens[column]);
      for (int i = 0; i < 4; ++i) {
        shared.logits[(thread / 16 * 4 + i) * (kTile + 1) + column] =
            column < width ? (acc[i][j] + bias) / call.temperature : -INFINITY;
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kTile / kWarps; ++i) {
      const int row = warp * (kTile / kWarps) + i;
      if (target[i] < 0) continue;  // the same for the whole warp
      const float low = shared.logits[row * (kTile + 1) + lane], high = shared.logits[row * (kTile + 1) + lane + 32];
      const int64_t at = target[i] - chunk;
      running[i].rescale(warp_max(fmaxf(low, high)));
      running[i].others += warp_sum((lane == at ? 0.0f : running[i].term(low)) +
                                    (lane + 32 == at ? 0.0f : running[i].term(high)));
      if (at >= 0 && at < kTile) running[i].target = shared.logits[row * (kTile + 1) + at];
      if (call.slopes == nullptr) continue;
      float* const out = call.slopes + read_row(call, (first + row) * call.L).slopes + chunk;
      if (lane < width) out[lane] = low;
      if (lane + 32 < width) out[lane + 32] = high;
    }
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < kTile / kWarps; ++i) {
    if (target[i] < 0) continue;
    const Row row = read_row(call, (first + warp * (kTile / kWarps) + i) * call.L);
    const Finished done = finish(running[i]);
    __syncwarp();  // all lanes have read the row
    if (lane == 0) write_row(call, row, done);
    if (call.slopes == nullptr || call.keeps_logits || done.log_pf == -INFINITY) continue;
    // Each lane replaces the logits that it wrote itself.
    float* const out = call.slopes + row.slopes;
    for (int64_t child = lane; child < count; child += 32) out[child] = slope(done, out[child], child == row.target);
  }
}

// ------------------------------------------------------------------ deeper rows

constexpr int kTogether = 4;  // children per pass over a hidden state

__global__ void __launch_bounds__(kThreads, 3) deeper_kernel(ChildrenCall call, Rows hidden, Rows weight) {
  const int lane = threadIdx.x % 32;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (index >= call.trajectories * (call.L - 1)) return;
  // Neighbouring warps: one level, neighbouring trajectories.
  const int64_t level = 1 + index / call.trajectories, trajectory = index % call.trajectories;
  const Row row = read_row(call, trajectory * call.L + level);
  if (!row.live()) return;
  Running running;
  for (int64_t child = 0; child < row.children; child += kTogether) {
    int64_t tokens[kTogether];
    float logits[kTogether] = {};
#pragma unroll
    for (int u = 0; u < kTogether; ++u) tokens[u] = row.tokens[min(child + u, int64_t{row.children} - 1)];
    lane_products(hidden, row.t, weight, tokens, logits);
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      logits[u] = warp_sum(logits[u]);
      if (call.bias.data != nullptr) logits[u] += load(call.bias, tokens[u]);
      logits[u] = child + u < row.children ? logits[u] / call.temperature : -INFINITY;
      running.rescale(logits[u]);
    }
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      if (child + u == row.target) {
        running.target = logits[u];
      } else {
        running.others += running.term(logits[u]);
      }
      // The lane that will replace this logit.
      if (call.slopes != nullptr && child + u < row.children && lane == (child + u) % 32) {
        call.slopes[row.slopes + child + u] = logits[u];
      }
    }
  }
  const Finished done = finish(running);
  __syncwarp();
  if (lane == 0) write_row(call, row, done);
  if (call.slopes == nullptr || call.keeps_logits || done.log_pf == -INFINITY) return;
  float* const out = call.slopes + row.slopes;
  for (int64_t child = lane; child < row.children; child += 32) {
    out[child] = slope(done, out[child], child == row.target);
  }
}

}  // namespace

int children_forward_cuda(const ChildrenCall& call, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const Rows hidden = make_rows(call.hidden, call.d, nullptr), weight = make_rows(call.weight, call.d, nullptr);
  const int64_t plan_blocks = (call.trajectories + kPlanSpare + kThreads - 1) / kThreads;
  const int64_t root_blocks = (call.trajectories + kTile - 1) / kTile;
  const int64_t deeper_blocks = (call.trajectories * (call.L - 1) + kWarps - 1) / kWarps;
  if (deeper_blocks > INT32_MAX || root_blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  GFLOWGR_LAUNCH(plan_kernel, static_cast<unsigned>(plan_blocks), kThreads, 0, queue, call);
  if (call.trajectories * call.L == 0) return cudaGetLastError();
  GFLOWGR_LAUNCH(root_kernel, static_cast<unsigned>(root_blocks), kThreads, sizeof(RootShared), queue, call, hidden,
                 weight);
  if (deeper_blocks > 0) {
    GFLOWGR_LAUNCH(deeper_kernel, static_cast<unsigned>(deeper_blocks), kThreads, 0, queue, call, hidden, weight);
  }
  return cudaGetLastError();
}

}  // namespace gflowgr
