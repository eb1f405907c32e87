// One step of a beam search down a prefix tree. Bare CUDA: no torch headers.
//
//   select   a block per beam: log-sum-exp of what the normaliser sums over, 16 bytes a load; then the scores
//            of the children of its node, and the best `width` of them, in order;
//   merge    a block per prompt and kind of result: the best `width` of the beams' lists.
//
// Where there are too few beams to fill a GPU and the rows are long, each is cut into up to 256 shares, a block
// per share, and one more launch before the two, `sum`, leaves the shares' log-sum-exp. The host reads
// nothing, the order of additions is fixed, and all sizes follow from the shapes.
//
// The best of a block: keys (score, number of the candidate) that beat the worst of the best so far are put in a
// buffer, which is sorted and cut to `width` when it might not hold another round. In random order, about
// width * ln(n / width) of the n children are put there: a sort or two. The worst case, scores that ascend,
// sorts once per 512 children. Up to a width of 3584 the buffer is in shared memory, beyond it in the workspace.
//
// Speed of light: the logits that the normaliser sums over, once, and one sector per child that is not among them.
// 64 prompts x 20 beams x V 33124 in float32: 170 MB, 51 us at 3.3 TB/s; 1280 blocks, 3 at a time on each of 132
// multiprocessors. Exponentials: 42 M, 15 us at 16 a clock. The merge reads 64 x 20 x 20 keys: its time is that of
// the launch and of sorting 400 keys. Prediction, not measured: about 65 us.
#include "beam_step/beam_step.h"

#include "beam_step/beam_device.h"
#include "common/cuda_launch.h"

namespace gflowgr {
namespace {

enum Kind : int { kOpen, kEnded, kKinds };

constexpr int64_t kBlocks = 1024, kLeastShare = 2048, kMostShared = 32 * 1024;

// Parts of the workspace.
struct Spaces {
  unsigned parts;    // shares of a row
  int64_t capacity;  // of the buffer of a block
  bool shared;       // that buffer is in shared memory
  LogSum* sums;      // [rows, parts]; parts > 1
  uint64_t* lists;   // [rows, parts, kinds, width]: keys, numbered by child
  uint64_t* buffers;  // [blocks, capacity]; not shared
  unsigned* counts;  // [rows, parts, kinds]: keys in the list
};

// ------------------------------------------------------------------ logits

template <typename T>
struct Stored;
template <>
struct Stored<float> {
  static constexpr int kPerLoad = 4;
  static __device__ float widen(float value) { return value; }
  static __device__ void widen(uint4 words, float* to) {
    to[0] = __uint_as_float(words.x), to[1] = __uint_as_float(words.y);
    to[2] = __uint_as_float(words.z), to[3] = __uint_as_float(words.w);
  }
};
template <>
struct Stored<__half> {
  static constexpr int kPerLoad = 8;
  static __device__ float widen(__half value) { return __half2float(value); }
  static __device__ void widen(uint4 words, float* to) {
    Halves halves;
    halves.words = words;
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = __half2float(halves.half[i]);
  }
};
template <>
struct Stored<__nv_bfloat16> {
  static constexpr int kPerLoad = 8;
  static __device__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
  static __device__ void widen(uint4 words, float* to) {
    Halves halves;
    halves.words = words;
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = __bfloat162float(halves.bfloat[i]);
  }
};

// kLoads vectors, the block's threads side by side.
template <int kLoads, typename T>
__device__ void add_loads(LogSum& total, const uint4* from, float rate) {
  constexpr int kPer = Stored<T>::kPerLoad;
  uint4 words[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) words[i] = __ldg(from + i * kThreads);
  float values[kLoads * kPer];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) Stored<T>::widen(words[i], values + i * kPer);
  add(total, values, rate);
}

template <typename T>
__device__ void add_one(LogSum& total, const T* from, float rate) {
  const float values[1] = {Stored<T>::widen(*from)};
  add(total, values, rate);
}

// This thread's part of n values in a row, which may start anywhere.
template <typename T>
__device__ LogSum sum_row(const T* x, int64_t n, float rate) {
  constexpr int64_t kPer = Stored<T>::kPerLoad;
  const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T));
  const int64_t head = min(n, past == 0 ? int64_t{0} : kPer - past), loads = (n - head) / kPer;
  const int64_t thread = threadIdx.x, tail = head + loads * kPer;
  const auto* const from = reinterpret_cast<const uint4*>(x + head);
  LogSum total = nothing_summed();
  if (thread < head) add_one(total, x + thread, rate);
  int64_t at = thread;
  constexpr int kLoads = 16 / kPer;
  for (; at + (kLoads - 1) * kThreads < loads; at += kLoads * kThreads) add_loads<kLoads, T>(total, from + at, rate);
  for (; at < loads; at += kThreads) add_loads<1, T>(total, from + at, rate);
  if (thread < n - tail) add_one(total, x + tail + thread, rate);
  return total;
}

// The logits of a beam's children, and what its normaliser sums over.
template <typename T>
struct Row {
  const T* logits;
  ChildTokens tokens;
  bool by_child;        // logits[t] is child t's, else that of token t + shift
  int64_t shift;
  bool sums_children;   // over the children, scattered; else over sum_begin ... sum_begin + sum_count - 1
  int64_t sum_begin, sum_count;

  __device__ Row(const BeamStepCall& call, const Beam& beam, int64_t row)
      : logits(static_cast<const T*>(call.logits.data) + row * call.pitch),
        tokens(child_tokens(call.tree, beam.depth, beam.children.begin)),
        by_child(call.layout == LogitLayout::children),
        shift(call.layout == LogitLayout::codebook ? tokens.base : 0),
        sums_children(call.normalize == Normalize::children && !by_child),
        sum_begin(0),
        sum_count(call.pitch) {
    if (call.normalize == Normalize::children) sum_count = beam.children.size();
    if (call.normalize == Normalize::level) {
      sum_begin = tokens.base - shift;
      sum_count = codebook_size(call, beam.depth);
    }
  }

  __device__ float operator[](int64_t child) const {
    return Stored<T>::widen(logits[by_child ? child : tokens[child] - shift]);
  }

  // This thread's part of the values begin ... end - 1 of those summed over.
  __device__ LogSum sum(int64_t begin, int64_t end, float rate) const {
    if (!sums_children) return sum_row(logits + sum_begin + begin, end - begin, rate);
    LogSum total = nothing_summed();
    for (int64_t child = begin + threadIdx.x; child < end; child += kThreads) {
      const float values[1] = {(*this)[child]};
      add(total, values, rate);
    }
    return total;
  }
};

// The range that block `part` of a row takes of n elements.
__device__ NodeSpan share_of(int64_t n, unsigned parts, unsigned part) {
  if (parts == 1) return {0, n};
  const int64_t size = max(int64_t{(static_cast<unsigned>(n) + parts - 1) / parts}, kLeastShare);
  return {min(n, part * size), min(n, (part + 1) * size)};
}

__device__ float rate_of(const BeamStepCall& call) { return 1.4426950408889634f / call.temperature; }

template <typename T>
__global__ void __launch_bounds__(kThreads, 4) sum_kernel(BeamStepCall call, Spaces spaces) {
  __shared__ LogSum warps[kWarps];
  const unsigned row = blockIdx.x / spaces.parts, part = blockIdx.x % spaces.parts;
  const Beam beam = read_beam(call, row);
  if (beam.children.size() == 0) return;
  const Row<T> logits(call, beam, row);
  const NodeSpan share = share_of(logits.sum_count, spaces.parts, part);
  LogSum total = nothing_summed();
  if (share.size() > 0) {
    total = block_combine(logits.sum(share.begin, share.end, rate_of(call)), warps, rate_of(call));
  }
  if (threadIdx.x == 0) spaces.sums[blockIdx.x] = total;
}

// ------------------------------------------------------------------ the best of each beam

__device__ uint64_t* buffer_of(const Spaces& spaces, unsigned char* memory) {
  return spaces.shared ? reinterpret_cast<uint64_t*>(memory) : spaces.buffers + blockIdx.x * spaces.capacity;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 3) select_kernel(BeamStepCall call, Spaces spaces) {
  GFLOWGR_DYNAMIC_SHARED(memory);
  __shared__ LogSum warps[kWarps];
  __shared__ unsigned count;
  const unsigned row = blockIdx.x / spaces.parts, part = blockIdx.x % spaces.parts, thread = threadIdx.x;
  unsigned* const counts = spaces.counts + kKinds * blockIdx.x;
  if (thread < kKinds) counts[thread] = 0;
  const Beam beam = read_beam(call, row);
  const NodeSpan share = share_of(beam.children.size(), spaces.parts, part);
  if (share.size() == 0) return;

  const Row<T> logits(call, beam, row);
  const float rate = rate_of(call), scale = 1.0f / call.temperature;
  LogSum total = nothing_summed();
  if (spaces.parts == 1) {
    total = logits.sum(0, logits.sum_count, rate);
  } else if (thread < spaces.parts) {
    total = spaces.sums[blockIdx.x - part + thread];
  }
  const float normaliser = finish(block_combine(total, warps, rate), scale);
  if (normaliser == -INFINITY) return;  // every logit is: no child may be taken

  const int64_t prompt = call.first_prompt + row / static_cast<unsigned>(call.beams);
  const Masks masks(call, beam, prompt);
  const bool deepest = beam.depth + 1 == tree_word(call.tree, kMaxLength);
  const bool ragged = tree_word(call.tree, kLeafRank) != 0;
  for (int kind = kOpen; kind < kKinds; ++kind) {
    if (kind == kOpen ? deepest : !deepest && !ragged) continue;
    Best best(buffer_of(spaces, memory), &count, static_cast<unsigned>(call.width),
              static_cast<unsigned>(spaces.capacity));
    for (int64_t at = share.begin; at < share.end; at += kRound) {
      uint64_t keys[kTurn] = {};
#pragma unroll
      for (int i = 0; i < kTurn; ++i) {
        const int64_t child = at + i * kThreads + thread;
        if (child >= share.end) continue;
        const float logit = logits[child] * scale;
        // A forbidden token stays forbidden where the beam's score or the normaliser makes NaN of it.
        if (logit == -INFINITY && normaliser == normaliser) continue;
        const float score = beam.score + (logit - normaliser);
        if (score != -INFINITY) keys[i] = make_key(rank_of(score), static_cast<unsigned>(child));
      }
      bool any = false;
#pragma unroll
      for (int i = 0; i < kTurn; ++i) {
        bool taken = keys[i] > best.threshold();
        if (taken) {
          const int64_t node = beam.children.begin + number_in(keys[i]);
          taken = masks.admits(node) && (kind == kOpen ? masks.goes_on(node) : masks.may_end(node, prompt));
        }
        best.offer(taken, keys[i]);
        any = any || taken;
      }
      best.settle(any);
    }
    const unsigned kept = best.sorted();
    uint64_t* const list = spaces.lists + (kKinds * static_cast<int64_t>(blockIdx.x) + kind) * call.width;
    for (unsigned i = threadIdx.x; i < kept; i += kThreads) list[i] = best[i];
    if (thread == 0) counts[kind] = kept;
    __syncthreads();  // the buffer is used again
  }
}

// ------------------------------------------------------------------ the best of each prompt

__global__ void __launch_bounds__(kThreads, 4) merge_kernel(BeamStepCall call, Spaces spaces) {
  GFLOWGR_DYNAMIC_SHARED(memory);
  __shared__ unsigned count;
  const int64_t prompt = blockIdx.x / kKinds;
  const int kind = static_cast<int>(blockIdx.x % kKinds);
  const auto width = static_cast<unsigned>(call.width);
  const int64_t first = prompt * call.beams * spaces.parts;  // of the prompt's lists
  const auto slots = static_cast<unsigned>(call.beams * spaces.parts * call.width);
  const auto list_of = [&](unsigned slot) { return (first + slot / width) * kKinds + kind; };
  // Slots are numbered by beam, share, place: candidates of equal score keep the order of beams and children.
  Best best(buffer_of(spaces, memory), &count, width, static_cast<unsigned>(spaces.capacity));
  for (unsigned at = 0; at < slots; at += kRound) {
    bool any = false;
#pragma unroll
    for (int i = 0; i < kTurn; ++i) {
      const unsigned slot = at + i * kThreads + threadIdx.x;
      uint64_t key = 0;
      if (slot < slots && slot % width < spaces.counts[list_of(slot)]) {
        key = make_key(rank_in(spaces.lists[list_of(slot) * width + slot % width]), slot);
      }
      const bool taken = key > best.threshold();
      best.offer(taken, key);
      any = any || taken;
    }
    best.settle(any);
  }
  const unsigned kept = best.sorted();

  float* const scores = (kind == kOpen ? call.best_scores : call.end_scores) + prompt * call.width;
  int64_t* const parents = (kind == kOpen ? call.best_parents : call.end_parents) + prompt * call.width;
  int64_t* const nodes = (kind == kOpen ? call.best_nodes : call.end_nodes) + prompt * call.width;
  int64_t* const tokens = kind == kOpen ? call.best_tokens + prompt * call.width : nullptr;
  for (unsigned i = threadIdx.x; i < width; i += kThreads) {
    float score = -INFINITY;
    int64_t parent = -1, node = -1, token = -1;
    if (i < kept) {
      const unsigned slot = number_in(best[i]);
      score = score_of(rank_in(best[i]));
      parent = slot / width / spaces.parts;
      const unsigned child = number_in(spaces.lists[list_of(slot) * width + slot % width]);
      const Beam beam = read_beam(call, prompt * call.beams + parent);
      node = beam.children.begin + child;
      if (tokens != nullptr) token = child_tokens(call.tree, beam.depth, beam.children.begin)[child];
    }
    scores[i] = score;
    parents[i] = parent;
    nodes[i] = node;
    if (tokens != nullptr) tokens[i] = token;
  }
}

// ------------------------------------------------------------------ the host's side

constexpr int64_t padded(int64_t bytes) { return (bytes + 15) / 16 * 16; }

// With the bytes of all parts; pointers where there is a workspace.
Spaces divide(const BeamStepCall& call, int64_t& bytes) {
  Spaces spaces{};
  const int64_t rows = call.prompts * call.beams;
  const int64_t most = min(call.pitch / (2 * kLeastShare), int64_t{kThreads});
  spaces.parts = rows == 0 ? 1 : static_cast<unsigned>(max(int64_t{1}, min(kBlocks / rows, most)));
  spaces.capacity = best_capacity(call.width);
  spaces.shared = spaces.capacity * 8 <= kMostShared;
  const int64_t blocks = rows * spaces.parts, lists = blocks * kKinds;
  bytes = 0;
  const auto take = [&](int64_t size) {
    uint8_t* const at = call.workspace == nullptr ? nullptr : call.workspace + bytes;
    bytes += padded(size);
    return at;
  };
  spaces.lists = reinterpret_cast<uint64_t*>(take(8 * lists * call.width));
  spaces.buffers = reinterpret_cast<uint64_t*>(
      take(spaces.shared ? 0 : 8 * spaces.capacity * max(blocks, kKinds * call.prompts)));
  spaces.sums = reinterpret_cast<LogSum*>(take(spaces.parts > 1 ? blocks * int64_t{sizeof(LogSum)} : 0));
  spaces.counts = reinterpret_cast<unsigned*>(take(lists * int64_t{sizeof(unsigned)}));
  return spaces;
}

template <typename T>
void launch_rows(const BeamStepCall& call, const Spaces& spaces, size_t shared, cudaStream_t queue) {
  const auto blocks = static_cast<unsigned>(call.prompts * call.beams * spaces.parts);
  if (spaces.parts > 1) GFLOWGR_LAUNCH(sum_kernel<T>, blocks, kThreads, 0, queue, call, spaces);
  GFLOWGR_LAUNCH(select_kernel<T>, blocks, kThreads, shared, queue, call, spaces);
}

}  // namespace

int64_t beam_step_workspace(const BeamStepCall& call) {
  int64_t bytes = 0;
  divide(call, bytes);
  return bytes;
}

bool beam_step_fits(const BeamStepCall& call) {
  int64_t bytes = 0;
  const Spaces spaces = divide(call, bytes);
  constexpr int64_t kMost = UINT32_MAX - kRound;
  return call.pitch <= INT32_MAX && call.width <= kMost / 4 && call.beams <= kMost / call.width / spaces.parts &&
         call.prompts <= INT32_MAX / kKinds && call.prompts * call.beams * spaces.parts <= INT32_MAX;
}

int beam_step_cuda(const BeamStepCall& call, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  if (call.prompts == 0) return cudaSuccess;
  int64_t bytes = 0;
  const Spaces spaces = divide(call, bytes);
  const size_t shared = spaces.shared ? static_cast<size_t>(8 * spaces.capacity) : 0;
  if (call.beams > 0) {
    if (call.logits.type == Dtype::float32) {
      launch_rows<float>(call, spaces, shared, queue);
    } else if (call.logits.type == Dtype::bfloat16) {
      launch_rows<__nv_bfloat16>(call, spaces, shared, queue);
    } else {
      launch_rows<__half>(call, spaces, shared, queue);
    }
  }
  GFLOWGR_LAUNCH(merge_kernel, static_cast<unsigned>(kKinds * call.prompts), kThreads, shared, queue, call, spaces);
  return cudaGetLastError();
}

}  // namespace gflowgr
