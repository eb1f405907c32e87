// Logits of the children of the beams' nodes, or of the codebook of their depth, from hidden states: only these rows
// of the head are multiplied. Bare CUDA: no torch headers.
//
// Beams side by side are taken 64 at a time. Where at least 8 of them are live and all of these need the same tokens
// (at the root; for a codebook: at one depth) a dense product of 64 beams with 64 tokens reads the head's rows once
// for all. Otherwise a warp takes one beam and four tokens at a time. Only the device knows which case a beam is, so
// both kernels run over all beams and each skips the other's.
//
// Speed of light: d numbers per beam and per token that any of them needs, from memory; per (beam, token) where the
// tokens differ, from the L2 cache. 64 prompts x 20 beams with 40 children each, d 512 in bf16: 52 MB from the
// L2 cache (10 us at 5 TB/s), 52 MFLOP. At the root 64 x 256 x 512: nothing. A codebook of 8192 for 1280 beams:
// 10.7 GFLOP in float32 (200 us at 55 TFLOP/s): there the tensor cores would be faster, in bf16. Not measured.
#include "beam_step/beam_device.h"
#include "common/cuda_launch.h"

namespace gflowgr {
namespace {

constexpr int kFewest = 8;  // live beams of a dense product

// Tokens that a beam needs the logits of; count 0: none.
struct Needed {
  ChildTokens tokens;
  int64_t first, count;  // of a codebook; tokens.stored is null

  __device__ int64_t operator[](int64_t i) const { return tokens.stored == nullptr ? first + i : tokens[i]; }
};

__device__ Needed needed_by(const BeamStepCall& call, const Beam& beam) {
  const int64_t count = beam.children.size();
  if (count == 0) return {{nullptr, 0, 0}, 0, 0};
  const ChildTokens tokens = child_tokens(call.tree, beam.depth, beam.children.begin);
  if (call.normalize == Normalize::children) return {tokens, 0, count};
  return {{nullptr, 0, 0}, tokens.base, codebook_size(call, beam.depth)};
}

// What beams that need the same tokens have in common, -1 for a beam that needs none.
__device__ int64_t group_of(const BeamStepCall& call, int64_t row) {
  if (row >= call.prompts * call.beams) return -1;
  const Beam beam = read_beam(call, row);
  if (beam.children.size() == 0) return -1;
  return call.normalize == Normalize::children ? beam.children.begin : beam.depth;
}

// A beam that needs the tokens that all live ones of the tile need, -1 if a dense product does not fit. Whole warps
// call it; all lanes get the same answer.
__device__ int64_t dense_row(const BeamStepCall& call, int64_t tile) {
  const int64_t first = tile * kTile + threadIdx.x % 32;
  const int64_t low = group_of(call, first), high = group_of(call, first + 32);
  const unsigned low_live = __ballot_sync(kAll, low >= 0), high_live = __ballot_sync(kAll, high >= 0);
  if (__popc(low_live) + __popc(high_live) < kFewest) return -1;
  const unsigned live = low_live != 0 ? low_live : high_live;
  const int leader = __ffs(static_cast<int>(live)) - 1;
  const int64_t group = __shfl_sync(kAll, low_live != 0 ? low : high, leader);
  if (__any_sync(kAll, (low >= 0 && low != group) || (high >= 0 && high != group))) return -1;
  return tile * kTile + leader + (low_live != 0 ? 0 : 32);
}

struct DenseShared {
  Panel a, b;
  int64_t tokens[kTile];
};

__global__ void __launch_bounds__(kThreads) dense_kernel(BeamStepCall call, BeamHead head, Rows hidden, Rows weight) {
  GFLOWGR_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<DenseShared*>(memory);
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kTile, begin = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t like = dense_row(call, blockIdx.y);
  if (like < 0) return;
  const Needed needed = needed_by(call, read_beam(call, like));
  if (begin >= needed.count) return;
  const int width = static_cast<int>(min(needed.count - begin, int64_t{kTile}));
  const int thread = threadIdx.x, copied = thread / 4;
  if (thread < kTile) shared.tokens[thread] = thread < width ? needed[begin + thread] : -1;
  __syncthreads();
  float acc[4][4] = {};
  const bool copies = group_of(call, first + copied) >= 0;
  tile_product(shared.a, shared.b, hidden, copies ? first + copied : -1, weight, shared.tokens[copied], acc);
  float bias[4] = {};
  for (int j = 0; j < 4; ++j) {
    const int64_t token = shared.tokens[thread % 16 * 4 + j];
    if (head.bias.data != nullptr && token >= 0) bias[j] = load(head.bias, token);
  }
  for (int i = 0; i < 4; ++i) {
    const int64_t row = first + thread / 16 * 4 + i;
    if (group_of(call, row) < 0) continue;
    for (int j = 0; j < 4; ++j) {
      const int column = thread % 16 * 4 + j;
      if (column < width) head.logits[row * call.pitch + begin + column] = acc[i][j] + bias[j];
    }
  }
}

constexpr int kTogether = 4;  // tokens per pass over a hidden state

__global__ void __launch_bounds__(kThreads, 3) sparse_kernel(BeamStepCall call, BeamHead head, Rows hidden, Rows weight,
                                                          unsigned shares) {
  const unsigned index = blockIdx.x * kWarps + threadIdx.x / 32, row = index / shares, lane = threadIdx.x % 32;
  if (row >= call.prompts * call.beams) return;
  const Needed needed = needed_by(call, read_beam(call, row));
  const int64_t first = int64_t{index % shares} * kTogether;
  if (first >= needed.count || dense_row(call, row / kTile) >= 0) return;
  for (int64_t at = first; at < needed.count; at += int64_t{shares} * kTogether) {
    int64_t tokens[kTogether];
    float sums[kTogether] = {};
#pragma unroll
    for (int u = 0; u < kTogether; ++u) tokens[u] = needed[min(at + u, needed.count - 1)];
    lane_products(hidden, row, weight, tokens, sums);
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      sums[u] = warp_sum(sums[u]);
      if (lane != static_cast<unsigned>(u) || at + u >= needed.count) continue;
      const float bias = head.bias.data == nullptr ? 0.0f : load(head.bias, tokens[u]);
      head.logits[row * call.pitch + at + u] = sums[u] + bias;
    }
  }
}

}  // namespace

int beam_logits_cuda(const BeamStepCall& call, const BeamHead& head, void* stream) {
  constexpr int64_t kEnoughWarps = 4096;
  const auto queue = static_cast<cudaStream_t>(stream);
  const int64_t rows = call.prompts * call.beams, tiles = (rows + kTile - 1) / kTile;
  if (rows == 0) return cudaSuccess;
  const int64_t shares = max(int64_t{1}, min(kEnoughWarps / rows, (call.pitch + kTogether - 1) / kTogether));
  if (rows * shares > INT32_MAX) return cudaErrorInvalidConfiguration;
  const Rows hidden = make_rows(head.hidden, head.d, nullptr), weight = make_rows(head.weight, head.d, nullptr);
  const auto chunks = static_cast<unsigned>((call.pitch + kTile - 1) / kTile);
  constexpr int64_t kMostTiles = 65535;  // CUDA's limit of the grid's second side
  if (tiles > kMostTiles) return cudaErrorInvalidConfiguration;
  GFLOWGR_LAUNCH(dense_kernel, dim3(chunks, static_cast<unsigned>(tiles)), kThreads, sizeof(DenseShared), queue, call,
                 head, hidden, weight);
  GFLOWGR_LAUNCH(sparse_kernel, static_cast<unsigned>((rows * shares + kWarps - 1) / kWarps), kThreads, 0, queue, call,
                 head, hidden, weight, static_cast<unsigned>(shares));
  return cudaGetLastError();
}

}  // namespace gflowgr
