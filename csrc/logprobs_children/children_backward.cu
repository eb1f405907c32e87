// Gradients of the tree-restricted log-probabilities. Bare CUDA: no torch headers.
//
// With g = grad / temperature and the slopes s of the forward pass, a row's logits have the gradient g s.
//
//   hidden     the root's rows: products of 64 rows with 64 columns of the head, the root's children in turn;
//              deeper rows: a warp each, 8 columns a lane, its children in turn.
//   weight     Used tokens (children of visited nodes) are marked and numbered by rank; per row a set of 64 bits
//              says which buckets of 64 ranks it has children in (bucket modulo 64, so a superset). Then blocks own
//              64 ranks x 64 columns x a share of the rows: they pick their rows in order with a ballot,
//              spread the rows' gradients over a panel [32 rows x 64 ranks] in shared memory and multiply it
//              with the hidden states. Root and deeper rows go together, and so do the levels that share a
//              token: a block is the only writer, nothing is sorted, nothing is added atomically. Shares are summed in
//              order by a last launch. The bias is one column more, against a hidden state of 1.
//
// Sizes are known on the device only: the blocks of the weight's gradient and of the last launch take work until
// there is none, and the number of shares follows from the workspace's capacity. Only a sparse gradient, whose
// number of rows is part of its shape, synchronises.
//
// Speed of light, in the terms of children_forward.cu: 2 x 2 d (C0 T/L + E) operations, hidden states read for
// the weight and their gradient written (2 x 33 MB), and in the deeper part of `hidden` again E d s bytes of the head
// from the L2 cache. Deeper rows in the weight's product cost 64 ranks each per bucket that they touch. At
// the size given there: 2 x 4.3 GFLOP at the root and about 4.3 deeper, 230 us in float32, 140 us of second
// cache; up to 32 MiB of shares, 15 us. Prediction, not measured: 450 us.
#include "logprobs_children/children_device.h"

namespace gflowgr {
namespace {

constexpr int kScanThreads = 1024;
constexpr int64_t kMostBlocks = 1056;  // 8 on each of 132 multiprocessors
constexpr int64_t kWantedItems = 2112;

// ------------------------------------------------------------------ which tokens, which rows

// Rows of one level follow each other.
__device__ int64_t warp_row(const ChildrenCall& call) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (index >= call.trajectories * call.L) return -1;
  return index % call.trajectories * call.L + index / call.trajectories;
}

__global__ void mark_kernel(ChildrenCall call, ChildrenWorkspace workspace) {
  const int64_t t = warp_row(call);
  if (t < 0) return;
  const Row row = read_row(call, t);
  if (!row.chooses()) return;
  for (int64_t child = threadIdx.x % 32; child < row.children; child += 32) {
    const int64_t token = row.tokens[child];
    // Read before writing, because at the root all rows have the same children. All writers write the same value.
    if (workspace.touched[token] == 0) workspace.touched[token] = 1;
  }
}

__device__ unsigned long long bucket_bit(int64_t rank) { return 1ull << (rank / kTile % 64); }

__device__ unsigned long long warp_or(unsigned long long bits) {
  for (int by = 16; by > 0; by >>= 1) bits |= __shfl_xor_sync(kAll, bits, by);
  return bits;
}

// Numbers the marked tokens, 16 a thread at a time, and finds the buckets of the root's children. One block.
__global__ void __launch_bounds__(kScanThreads) rank_kernel(ChildrenCall call, ChildrenWorkspace workspace) {
  GFLOWGR_DYNAMIC_SHARED(memory);
  auto* const counts = reinterpret_cast<unsigned long long*>(memory);  // one per warp
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t padded = (call.V + 15) / 16;
  int64_t total = 0;
  for (int64_t begin = 0; begin < padded; begin += kScanThreads) {
    uint4 flags{0, 0, 0, 0};
    if (begin + thread < padded) flags = reinterpret_cast<const uint4*>(workspace.touched)[begin + thread];
    const unsigned words[4] = {flags.x, flags.y, flags.z, flags.w};
    int mine = 0;
    for (int i = 0; i < 4; ++i) mine += __popc(words[i]);  // flags are 0 or 1
    int before = mine;
    for (int by = 1; by < 32; by <<= 1) {
      const int other = __shfl_up_sync(kAll, before, by);
      if (lane >= by) before += other;
    }
    if (lane == 31) counts[warp] = static_cast<unsigned long long>(before);
    __syncthreads();
    int64_t rank = total + before - mine;
    for (int i = 0; i < kScanThreads / 32; ++i) {
      const auto count = static_cast<int64_t>(counts[i]);
      total += count;
      if (i < warp) rank += count;
    }
    __syncthreads();
    for (int i = 0; i < 16; ++i) {
      if (!(words[i / 4] >> (i % 4 * 8) & 1)) continue;
      const int64_t token = (begin + thread) * 16 + i;
      workspace.rank[token] = static_cast<int32_t>(rank);
      workspace.used[rank++] = token;
    }
  }
  __syncthreads();
  const int64_t first = child_begin(call.tree, 0), children = child_begin(call.tree, 1) - first;
  const ChildTokens tokens = child_tokens(call.tree, 0, first);
  unsigned long long bits = 0;
  for (int64_t child = thread; child < children; child += kScanThreads) {
    const int64_t token = tokens[child];
    // A root that no row visits has marked nothing.
    if (workspace.touched[token] != 0) bits |= bucket_bit(workspace.rank[token]);
  }
  bits = warp_or(bits);
  if (lane == 0) counts[warp] = bits;
  __syncthreads();
  if (thread != 0) return;
  for (int i = 0; i < kScanThreads / 32; ++i) bits |= counts[i];
  workspace.counts[0] = total;
  workspace.counts[1] = static_cast<int64_t>(bits);
}

__global__ void bucket_kernel(ChildrenCall call, ChildrenWorkspace workspace) {
  const int64_t t = warp_row(call);
  if (t < 0) return;
  const Row row = read_row(call, t);
  unsigned long long bits = 0;
  if (row.live()) {
    if (row.level == 0) {
      bits = static_cast<unsigned long long>(workspace.counts[1]);
    } else {
      for (int64_t child = threadIdx.x % 32; child < row.children; child += 32) {
        bits |= bucket_bit(workspace.rank[row.tokens[child]]);
      }
      bits = warp_or(bits);
    }
  }
  if (threadIdx.x % 32 == 0) workspace.buckets[t] = static_cast<int64_t>(bits);
}

// ------------------------------------------------------------------ gradient to the hidden states

// All rows but the live ones of the root; those too if there are no slopes.
__global__ void __launch_bounds__(kThreads) hidden_kernel(ChildrenCall call, ChildrenGradients out, Rows hidden,
                                                          Rows weight) {
  const int64_t t = warp_row(call);
  if (t < 0) return;
  const Row row = read_row(call, t);
  const bool live = row.live();
  if (live && row.level == 0 && call.slopes != nullptr) return;
  const float factor = live ? out.grad[t] / call.temperature : 0.0f;
  for (int64_t k = 0; k < call.d; k += 256) {
    const int64_t mine = k + threadIdx.x % 32 * 8;
    float sum[8] = {};
    for (int64_t child = 0; live && child < row.children; ++child) {
      const float gradient = factor * warp_slope(call, hidden, weight, row, child);
      if (mine >= call.d) continue;
      float w[8];
      weight.load8(row.tokens[child], mine, w);
      for (int i = 0; i < 8; ++i) sum[i] += gradient * w[i];
    }
    if (mine < call.d) hidden.store8(out.hidden, t, mine, sum);
  }
}

struct Panels {
  Panel a, b;
};

// The live rows of the root: blocks of 64 trajectories (y) and 64 columns (x).
__global__ void __launch_bounds__(kThreads) root_hidden_kernel(ChildrenCall call, ChildrenGradients out,
                                                               Rows weight) {
  GFLOWGR_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<Panels*>(memory);
  const int64_t begin = child_begin(call.tree, 0), count = child_begin(call.tree, 1) - begin;
  if (count < 2) return;
  const ChildTokens tokens = child_tokens(call.tree, 0, begin);
  const int64_t columns = (call.d + kTile - 1) / kTile;
  const int64_t first = blockIdx.x / columns * kTile, column = blockIdx.x % columns * kTile;
  const int thread = threadIdx.x;

  // Gradients: 8 children of a row per thread. The head: 8 columns of a child.
  const int row_of = thread / 4, child_of = thread % 4 * 8;
  const float* slopes = nullptr;
  float factor = 0;
  if (first + row_of < call.trajectories) {
    const Row row = read_row(call, (first + row_of) * call.L);
    if (row.live()) {
      slopes = call.slopes + row.slopes;
      factor = out.grad[row.t] / call.temperature;
    }
  }
  float acc[4][4] = {};
  for (int64_t chunk = 0; chunk < count; chunk += kDepth) {
    for (int i = 0; i < 8; ++i) {
      const int64_t child = chunk + child_of + i;
      shared.a.at(child_of + i, row_of) = slopes != nullptr && child < count ? factor * __ldg(slopes + child) : 0.0f;
    }
    float w[8] = {};
    const int64_t child = chunk + thread / 8;
    if (child < count) weight.load8(tokens[child], column + thread % 8 * 8, w);
    shared.b.put8(thread / 8, thread % 8 * 8, w);
    __syncthreads();
    multiply(shared.a, shared.b, acc);
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i) {
    const int64_t trajectory = first + thread / 16 * 4 + i;
    if (trajectory >= call.trajectories) continue;
    const Row row = read_row(call, trajectory * call.L);
    if (!row.live()) continue;
    for (int j = 0; j < 4; ++j) {
      const int64_t at = column + thread % 16 * 4 + j;
      if (at < call.d) store(out.hidden, call.hidden.type, row.t * call.d + at, acc[i][j]);
    }
  }
}

// ------------------------------------------------------------------ gradient to the head

// A share has rows enough for a few panels.
__host__ __device__ int64_t most_shares(const ChildrenCall& call) { return call.trajectories * call.L / (8 * kDepth); }

// How the weight's gradient is cut up; the same on every block.
struct Cut {
  int64_t used, buckets, columns, column_tiles, shares;  // columns: d, and one for the bias
  int64_t row_pitch;
};

__device__ Cut make_cut(const ChildrenCall& call, const ChildrenGradients& out, const ChildrenWorkspace& workspace) {
  Cut cut{};
  cut.used = workspace.counts[0];
  cut.buckets = (cut.used + kTile - 1) / kTile;
  cut.columns = (out.weight != nullptr ? call.d : 0) + (out.bias != nullptr ? 1 : 0);
  cut.column_tiles = (cut.columns + kTile - 1) / kTile;
  cut.row_pitch = cut.column_tiles * kTile;
  const int64_t items = max(cut.buckets * cut.column_tiles, int64_t{1});
  const int64_t fit = workspace.capacity / (items * kTile * kTile);
  cut.shares = max(min(min((kWantedItems + items - 1) / items, fit), most_shares(call)), int64_t{1});
  return cut;
}

__device__ void write_weight(const ChildrenCall& call, const ChildrenGradients& out, int64_t rank, int64_t token,
                             int64_t column, float value) {
  const int64_t d = out.weight != nullptr ? call.d : 0;
  if (column < d) {
    store(out.weight, call.weight.type, (out.sparse ? rank : token) * call.d + column, value);
  } else if (column == d && out.bias != nullptr) {
    store(out.bias, call.bias.type, token, value);
  }
}

struct WeightShared {
  Panel a, b;
  int64_t list[kThreads + kDepth];  // rows to come, in order
  int found[kWarps];
};

// Adds `rows` of the list (at most kDepth, from its place `at` on) to the sums of ranks first.. and columns
// column...
__device__ __forceinline__ void add_rows(const ChildrenCall& call, const ChildrenGradients& out, const ChildrenWorkspace& workspace,
                         const Rows& hidden, const Rows& weight, WeightShared& shared, int at, int rows,
                         int64_t first, int64_t last, int64_t column, float (&acc)[4][4]) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int64_t* const list = shared.list + at;
  for (int i = thread; i < kDepth * kPitch; i += kThreads) shared.a.values[i] = 0;
  __syncthreads();
  const int64_t low = workspace.used[first], high = workspace.used[last - 1];
  for (int k = warp; k < rows; k += kWarps) {
    const Row row = read_row(call, list[k]);
    const float factor = out.grad[row.t] / call.temperature;
    const int64_t begin = row.tokens.count_below(row.children, low);
    const int64_t end = row.tokens.count_below(row.children, high + 1);
    if (call.slopes != nullptr) {
      for (int64_t child = begin + lane; child < end; child += 32) {
        const int64_t rank = workspace.rank[row.tokens[child]];
        shared.a.at(k, static_cast<int>(rank - first)) = factor * __ldg(call.slopes + row.slopes + child);
      }
    } else {
      for (int64_t child = begin; child < end; ++child) {
        const float gradient = factor * warp_slope(call, hidden, weight, row, child);
        const int64_t rank = workspace.rank[row.tokens[child]];
        if (lane == 0) shared.a.at(k, static_cast<int>(rank - first)) = gradient;
      }
    }
  }
  const int k = thread / 8, offset = thread % 8 * 8;
  const int64_t d = out.weight != nullptr ? call.d : 0, mine = column + offset;
  float h[8] = {};
  if (k < rows) {
    if (mine < d) hidden.load8(list[k], mine, h);
  }
  for (int i = 0; i < 8; ++i) {  // the bias has a column of ones
    if (out.bias != nullptr && k < rows && mine + i == d) h[i] = 1.0f;
  }
  shared.b.put8(k, offset, h);
  __syncthreads();
  multiply(shared.a, shared.b, acc);
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads, 2) weight_kernel(ChildrenCall call, ChildrenGradients out,
                                                             ChildrenWorkspace workspace, Rows hidden,
                                                             Rows weight) {
  GFLOWGR_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<WeightShared*>(memory);
  const Cut cut = make_cut(call, out, workspace);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int64_t rows = call.trajectories * call.L, items = cut.buckets * cut.column_tiles * cut.shares;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    // Neighbouring blocks: the same rows.
    const int64_t column = item % cut.column_tiles * kTile, rest = item / cut.column_tiles;
    const int64_t bucket = rest % cut.buckets, share = rest / cut.buckets;
    const int64_t first = bucket * kTile, last = min(first + kTile, cut.used);
    const int64_t row_end = rows * (share + 1) / cut.shares;
    const auto bit = bucket_bit(first);
    float acc[4][4] = {};
    int waiting = 0;
    for (int64_t base = rows * share / cut.shares; base < row_end; base += kThreads) {
      const int64_t t = base + thread;
      const bool mine = t < row_end && (static_cast<unsigned long long>(workspace.buckets[t]) & bit) != 0;
      const unsigned votes = __ballot_sync(kAll, mine);
      if (lane == 0) shared.found[warp] = __popc(votes);
      __syncthreads();
      int place = waiting + __popc(votes & ((1u << lane) - 1));
      for (int i = 0; i < kWarps; ++i) {
        if (i < warp) place += shared.found[i];
        waiting += shared.found[i];
      }
      if (mine) shared.list[place] = t;
      __syncthreads();
      const bool all = base + kThreads >= row_end;
      int done = 0;
      while (waiting - done >= kDepth || (all && waiting > done)) {
        const int now = min(kDepth, waiting - done);
        add_rows(call, out, workspace, hidden, weight, shared, done, now, first, last, column, acc);
        done += now;
      }
      if (done == 0) continue;
      waiting -= done;
      int64_t kept = 0;
      if (thread < waiting) kept = shared.list[done + thread];
      __syncthreads();
      if (thread < waiting) shared.list[thread] = kept;
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t rank = first + thread / 16 * 4 + i;
      if (rank >= last) continue;
      const int64_t at = column + thread % 16 * 4;
      if (cut.shares > 1) {
        auto* const to = reinterpret_cast<float4*>(workspace.partial + (share * cut.used + rank) * cut.row_pitch + at);
        *to = float4{acc[i][0], acc[i][1], acc[i][2], acc[i][3]};
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) write_weight(call, out, rank, workspace.used[rank], at + j, acc[i][j]);
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads) add_shares_kernel(ChildrenCall call, ChildrenGradients out,
                                                              ChildrenWorkspace workspace) {
  const Cut cut = make_cut(call, out, workspace);
  if (cut.shares == 1) return;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < cut.used * cut.columns; i += step) {
    const int64_t rank = i / cut.columns, column = i % cut.columns;
    float sum = 0;
    for (int64_t share = 0; share < cut.shares; ++share) {
      sum += workspace.partial[(share * cut.used + rank) * cut.row_pitch + column];
    }
    write_weight(call, out, rank, workspace.used[rank], column, sum);
  }
}

int64_t row_blocks(const ChildrenCall& call) { return (call.trajectories * call.L + kWarps - 1) / kWarps; }

}  // namespace

int children_find_used_cuda(const ChildrenCall& call, const ChildrenWorkspace& workspace, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  if (row_blocks(call) > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto blocks = static_cast<unsigned>(row_blocks(call));
  const int error = cudaMemsetAsync(workspace.touched, 0, (call.V + 15) / 16 * 16, queue);
  if (error != cudaSuccess) return error;
  GFLOWGR_LAUNCH(mark_kernel, blocks, kThreads, 0, queue, call, workspace);
  GFLOWGR_LAUNCH(rank_kernel, 1, kScanThreads, kScanThreads / 32 * sizeof(long long), queue, call, workspace);
  GFLOWGR_LAUNCH(bucket_kernel, blocks, kThreads, 0, queue, call, workspace);
  return cudaGetLastError();
}

int64_t children_workspace_capacity(const ChildrenCall& call) {
  const int64_t shares = most_shares(call);
  if (shares < 2) return 0;
  const int64_t rows = (call.V + kTile - 1) / kTile * kTile, columns = (call.d + kTile) / kTile * kTile;
  constexpr int64_t kMost = int64_t{1} << 23;
  return rows * columns < kMost / shares ? rows * columns * shares : kMost;
}

int children_read_used_cuda(const ChildrenWorkspace& workspace, int64_t* used, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const int error = cudaMemcpyAsync(used, workspace.counts, sizeof(*used), cudaMemcpyDeviceToHost, queue);
  return error != cudaSuccess ? error : static_cast<int>(cudaStreamSynchronize(queue));
}

int children_backward_hidden_cuda(const ChildrenCall& call, const ChildrenGradients& out, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const Rows hidden = make_rows(call.hidden, call.d, out.hidden), weight = make_rows(call.weight, call.d, nullptr);
  const int64_t tiles = (call.trajectories + kTile - 1) / kTile * ((call.d + kTile - 1) / kTile);
  if (row_blocks(call) > INT32_MAX || tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
  GFLOWGR_LAUNCH(hidden_kernel, static_cast<unsigned>(row_blocks(call)), kThreads, 0, queue, call, out, hidden, weight);
  if (call.slopes != nullptr && tiles > 0) {
    GFLOWGR_LAUNCH(root_hidden_kernel, static_cast<unsigned>(tiles), kThreads, sizeof(Panels), queue, call, out,
                   weight);
  }
  return cudaGetLastError();
}

int children_backward_weight_cuda(const ChildrenCall& call, const ChildrenGradients& out,
                                  const ChildrenWorkspace& workspace, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const Rows hidden = make_rows(call.hidden, call.d, nullptr), weight = make_rows(call.weight, call.d, nullptr);
  // No more blocks than there can be work for.
  const int64_t columns = (out.weight != nullptr ? call.d : 0) + (out.bias != nullptr ? 1 : 0);
  const int64_t items = (call.V + kTile - 1) / kTile * ((columns + kTile - 1) / kTile);
  const int64_t shares = most_shares(call);
  if (items == 0) return cudaSuccess;
  const auto blocks = [](int64_t work) { return static_cast<unsigned>(work < kMostBlocks ? work : kMostBlocks); };
  GFLOWGR_LAUNCH(weight_kernel, blocks(shares > 1 && items < kMostBlocks ? items * shares : items), kThreads,
                 sizeof(WeightShared), queue, call, out, workspace, hidden, weight);
  if (shares > 1) {
    GFLOWGR_LAUNCH(add_shares_kernel, blocks((call.V * columns + kThreads - 1) / kThreads), kThreads, 0, queue, call,
                   out, workspace);
  }
  return cudaGetLastError();
}

}  // namespace gflowgr
