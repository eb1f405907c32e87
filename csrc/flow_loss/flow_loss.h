// The flow-matching losses of one prompt and their gradients, for the CPU and for CUDA.
//
// The reference is gflowgr/ops/flow_loss/reference.py. No allocation, no torch, any N and L. The mask is
// a prefix of each row (one trajectory); what is under it takes no part in the arithmetic, so padding
// may hold anything. A row whose mask is no prefix counts as one of L tokens with the reward NaN, so that
// its loss is NaN and does not look valid. All arithmetic is in T. Rows of ragged length are common: where it is
// cheap, loops run to L with selections instead of branches, which the processor could not predict.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define GFLOWGR_HD __host__ __device__
#else
#define GFLOWGR_HD
#endif

namespace gflowgr {

enum class FlowKind : int { tb, db, subtb, vargrad };
enum class FlowReduction : int { none, sum, mean, prompt };

struct FlowParams {
  FlowKind kind;
  double lam, beta, floor;
  bool has_floor;
  double flow_scale, nll_scale;
  double clip;  // residual up to which the loss is quadratic, nats; INFINITY: everywhere. Not SubTB's.
};

template <typename T>
struct FlowArrays {  // contiguous; any output may be null = not wanted
  const T* log_pf;
  const T* log_reward;
  const T* target;
  const bool* mask;   // null = all true
  const T* upstream;  // [B, N], null = 1
  T* losses;          // [B, N]
  T* grad_log_pf;
  T* grad_log_reward;
  T* grad_target;
  int64_t N, L;
};

// The factors of a reduction, given how many prompts and trajectories are valid.
GFLOWGR_HD inline void flow_scales(FlowReduction reduction, int64_t valid_prompts, int64_t valid_trajectories,
                                   double sft_weight, FlowParams& params) {
  const double prompts = valid_prompts > 1 ? static_cast<double>(valid_prompts) : 1.0;
  const double trajectories = valid_trajectories > 1 ? static_cast<double>(valid_trajectories) : 1.0;
  const bool averaged = reduction == FlowReduction::mean || reduction == FlowReduction::prompt;
  params.flow_scale = reduction == FlowReduction::prompt ? 1.0 / prompts
                      : reduction == FlowReduction::mean ? 1.0 / trajectories
                                                         : 1.0;
  params.nll_scale = averaged ? sft_weight / prompts : sft_weight;
}

// Valid trajectories of prompt b: rows with a token, which is the first one where the mask is a prefix.
GFLOWGR_HD inline int64_t flow_valid_trajectories(const bool* mask, int64_t b, int64_t N, int64_t L) {
  if (L == 0) return 0;
  if (mask == nullptr) return N;
  int64_t count = 0;
  for (int64_t n = 0; n < N; ++n) {
    const bool* const row = mask + (b * N + n) * L;
    int64_t first = 0;
    while (first < L && !row[first]) ++first;
    count += first < L;
  }
  return count;
}

// ------------------------------------------------------------------ one trajectory

template <typename T>
struct FlowRow {
  const T* log_pf;  // [L]
  const T* flow;    // [L], DB and SubTB
  T* grad_log_pf;   // [L] or null
  T* grad_flow;     // [L] or null, DB and SubTB
  int64_t length;   // valid tokens, at least 1 for DB and SubTB
  int64_t L;
  T reward;         // shaped
  T scale;          // upstream * flow_scale
  T nll;            // upstream * nll_scale for the first trajectory, 0 for others
};

// The loss of a trajectory without its scale, and its gradients with it; anything for one without a
// token.
template <typename T>
struct FlowResult {
  T loss, grad_reward, grad_log_z;
};

template <typename T>
struct ShapedReward {
  T value, slope;
};

template <typename T>
GFLOWGR_HD inline ShapedReward<T> shape_reward(const FlowParams& params, T log_reward) {
  const T beta = static_cast<T>(params.beta);
  const T shaped = beta * log_reward;
  // A comparison with NaN is false, so NaN is floored too.
  if (params.has_floor && !(shaped > static_cast<T>(params.floor))) {
    return {static_cast<T>(params.floor), T(0)};
  }
  return {shaped, beta};
}

// The tokens of a trajectory and its shaped reward.
template <typename T>
struct FlowEnd {
  int64_t length;
  ShapedReward<T> reward;
};

template <typename T>
GFLOWGR_HD inline FlowEnd<T> flow_end(const FlowParams& params, const FlowArrays<T>& arrays, int64_t row) {
  const ShapedReward<T> reward = shape_reward(params, arrays.log_reward[row]);
  if (arrays.mask == nullptr) return {arrays.L, reward};
  const bool* const mask = arrays.mask + row * arrays.L;
  int64_t length = 0, end = 0;
  for (int64_t l = 0; l < arrays.L; ++l) {
    length += mask[l];
    end = mask[l] ? l + 1 : end;
  }
  if (length == end) return {length, reward};
  return {arrays.L, {static_cast<T>(NAN), T(1)}};
}

// The value, or 0 where it is not used, even if it is NaN; compiled without a branch.
GFLOWGR_HD inline float flow_keep(bool used, float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  bits &= 0u - static_cast<uint32_t>(used);
  memcpy(&value, &bits, sizeof(bits));
  return value;
}
GFLOWGR_HD inline double flow_keep(bool used, double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof(bits));
  bits &= uint64_t{0} - static_cast<uint64_t>(used);
  memcpy(&value, &bits, sizeof(bits));
  return value;
}

// The sum of the first `length` of L values.
template <typename T>
GFLOWGR_HD inline T flow_sum(const T* values, int64_t length, int64_t L) {
  T total = 0;
  for (int64_t l = 0; l < L; ++l) total += flow_keep(l < length, values[l]);
  return total;
}

// Huber's loss: r^2 up to the clip, and the tangent of that beyond. A NaN stays NaN.
template <typename T>
GFLOWGR_HD inline T flow_square(const FlowParams& params, T residual) {
  const T clip = static_cast<T>(params.clip), size = residual < 0 ? -residual : residual;
  return size <= clip ? residual * residual : clip * (2 * size - clip);
}

// Half of its derivative.
template <typename T>
GFLOWGR_HD inline T flow_clipped(const FlowParams& params, T residual) {
  const T clip = static_cast<T>(params.clip);
  const T below = residual > clip ? clip : residual;
  return below < -clip ? -clip : below;
}

// `shift` is taken from the gradient of the residual: VarGrad's log_z depends on the residual too.
template <typename T>
GFLOWGR_HD inline FlowResult<T> tb_row(const FlowParams& params, const FlowRow<T>& row, T log_z, T shift) {
  // In this order the residual of a VarGrad prompt's only trajectory is exactly 0.
  const T residual = log_z - (row.reward - flow_sum(row.log_pf, row.length, row.L));
  const T slope = 2 * row.scale * flow_clipped(params, residual);
  if (row.grad_log_pf != nullptr) {
    const T gradient = (slope - shift) - row.nll;
    for (int64_t l = 0; l < row.L; ++l) row.grad_log_pf[l] = flow_keep(l < row.length, gradient);
  }
  return {flow_square(params, residual), shift - slope, slope};
}

// Detailed-balance residual of token l; SubTB's residuals are sums of these.
template <typename T>
GFLOWGR_HD inline T flow_step(const FlowRow<T>& row, int64_t l) {
  return row.flow[l] + row.log_pf[l] - (l + 1 < row.length ? row.flow[l + 1] : row.reward);
}

template <typename T>
GFLOWGR_HD inline FlowResult<T> db_row(const FlowParams& params, const FlowRow<T>& row) {
  T loss = 0, before = 0;
  for (int64_t l = 0; l < row.length; ++l) {
    const T residual = flow_step(row, l);
    const T slope = 2 * row.scale * flow_clipped(params, residual);
    loss += flow_square(params, residual);
    if (row.grad_log_pf != nullptr) row.grad_log_pf[l] = slope - row.nll;
    if (row.grad_flow != nullptr) row.grad_flow[l] = slope - before;
    before = slope;
  }
  return {loss, -before, T(0)};
}

// SubTB(lambda) in O(L). The residual of (i, j) is the sum of the steps i..j-1; its weight is
// lambda^(j-i) over the sum of all, here divided by the largest power that occurs, so that nothing
// overflows and only what is negligible underflows:
//
//     lambda <= 1: lambda^(j-i-1), a decay from step to step;
//     lambda > 1:  mu^i mu^(K-j) with mu = 1 / lambda, a weight of the start times one of the end.
//
// For each j the residuals over i < j are kept as their weight, mean and squared deviations: all
// sums of squares are of non-negative terms, nothing cancels. With g_k the log-flow minus the
// log-probability up to state k, the residual is g_i - g_j, and the gradient to g_k is what k starts
// minus what it ends. The latter waits in a gradient array, one place to the left, for the way back.
template <typename T>
GFLOWGR_HD inline FlowResult<T> subtb_row(const FlowRow<T>& row, double lam) {
  const bool grows = lam > 1;
  const T decay = grows ? T(1) : static_cast<T>(lam);
  const T fade = grows ? static_cast<T>(1 / lam) : T(1);
  T* const ends = row.grad_log_pf != nullptr ? row.grad_log_pf : row.grad_flow;

  T weight = 0, mean = 0, spread = 0, start = 1, total = 0, norm = 0;
  for (int64_t l = 0; l < row.length; ++l) {
    const T kept = decay * weight;
    weight = kept + start;
    spread = decay * spread + mean * mean * (kept * start / weight);
    mean = mean * (kept / weight) + flow_step(row, l);
    start *= fade;
    total = fade * total + weight * mean * mean + spread;
    norm = fade * norm + weight;
    if (ends != nullptr) ends[l] = weight * mean;
  }

  const T slope = 2 * row.scale / norm;
  T along = slope * (weight * mean);  // to the log-probability of the token at hand
  const FlowResult<T> result{total / norm, -along, T(0)};
  if (ends == nullptr) return result;
  const double log_fade = grows ? -std::log(lam) : 0.0;
  T weights = 0, sum = 0, end = 1;
  for (int64_t k = row.length - 1; k >= 0; --k) {
    weights = decay * weights + end;
    sum = decay * sum + weights * flow_step(row, k);
    end *= fade;
    const T starts = grows ? static_cast<T>(std::exp(static_cast<double>(k) * log_fade)) * sum : sum;
    const T state = slope * (k > 0 ? starts - end * ends[k - 1] : starts);
    if (row.grad_log_pf != nullptr) row.grad_log_pf[k] = along - row.nll;
    if (row.grad_flow != nullptr) row.grad_flow[k] = state;
    along -= state;
  }
  return result;
}

// ------------------------------------------------------------------ one prompt

template <typename T>
GFLOWGR_HD inline FlowRow<T> flow_row(const FlowParams& params, const FlowArrays<T>& arrays, int64_t b,
                                      int64_t n, int64_t length) {
  const int64_t index = b * arrays.N + n, first = index * arrays.L;
  const bool states = params.kind == FlowKind::db || params.kind == FlowKind::subtb;
  const T upstream = arrays.upstream != nullptr ? arrays.upstream[index] : T(1);
  FlowRow<T> row;
  row.log_pf = arrays.log_pf + first;
  row.flow = states ? arrays.target + first : nullptr;
  row.grad_log_pf = arrays.grad_log_pf != nullptr ? arrays.grad_log_pf + first : nullptr;
  row.grad_flow = states && arrays.grad_target != nullptr ? arrays.grad_target + first : nullptr;
  row.length = length;
  row.L = arrays.L;
  row.reward = 0;
  row.scale = upstream * static_cast<T>(params.flow_scale);
  row.nll = n == 0 && params.nll_scale != 0 ? upstream * static_cast<T>(params.nll_scale) : T(0);
  return row;
}

// VarGrad's estimate of log Z, and the gradient of the losses to it shared among the
// trajectories it is the mean of.
template <typename T>
struct VarGradPrompt {
  T log_z, shift;
};

template <typename T>
GFLOWGR_HD inline VarGradPrompt<T> vargrad_prompt(const FlowParams& params, const FlowArrays<T>& arrays,
                                                  int64_t b) {
  const auto gap = [&](int64_t index, const FlowEnd<T>& end) {
    return end.reward.value - flow_sum(arrays.log_pf + index * arrays.L, end.length, arrays.L);
  };
  T total = 0, slopes = 0;
  int64_t count = 0;
  for (int64_t n = 0; n < arrays.N; ++n) {
    const int64_t index = b * arrays.N + n;
    const FlowEnd<T> end = flow_end(params, arrays, index);
    total += flow_keep(end.length > 0, gap(index, end));
    count += end.length > 0;
  }
  if (count == 0) return {T(0), T(0)};
  const T log_z = total / static_cast<T>(count);
  // Residuals sum to zero, and so do their gradients where all losses weigh the same and none is clipped.
  if (arrays.upstream == nullptr && params.clip == static_cast<double>(INFINITY)) return {log_z, T(0)};
  for (int64_t n = 0; n < arrays.N; ++n) {
    const int64_t index = b * arrays.N + n;
    const FlowEnd<T> end = flow_end(params, arrays, index);
    const T upstream = arrays.upstream != nullptr ? arrays.upstream[index] : T(1);
    const T scale = upstream * static_cast<T>(params.flow_scale);
    const T slope = 2 * scale * flow_clipped(params, log_z - gap(index, end));
    slopes += flow_keep(end.length > 0, slope);
  }
  return {log_z, slopes / static_cast<T>(count)};
}

// Losses of the trajectories of prompt b, flow_scale * flow loss + (n == 0 ? nll_scale * NLL : 0),
// and the gradients of sum_n upstream * losses; all zero at padding.
template <typename T>
GFLOWGR_HD inline void flow_prompt(const FlowParams& params, const FlowArrays<T>& arrays, int64_t b) {
  const int64_t L = arrays.L;
  const bool states = params.kind == FlowKind::db || params.kind == FlowKind::subtb;
  VarGradPrompt<T> group{T(0), T(0)};
  if (params.kind == FlowKind::vargrad) group = vargrad_prompt(params, arrays, b);
  T grad_log_z = 0;
  for (int64_t n = 0; n < arrays.N; ++n) {
    const int64_t index = b * arrays.N + n;
    const FlowEnd<T> end = flow_end(params, arrays, index);
    const int64_t length = end.length;
    FlowRow<T> row = flow_row(params, arrays, b, n, length);
    const bool valid = length > 0;
    T loss = 0, grad_reward = 0;
    if (valid || !states) {
      row.reward = end.reward.value;
      FlowResult<T> result;
      switch (params.kind) {
        case FlowKind::db:
          result = db_row(params, row);
          break;
        case FlowKind::subtb:
          result = subtb_row(row, params.lam);
          break;
        default:
          result = tb_row(params, row, params.kind == FlowKind::tb ? arrays.target[b] : group.log_z, group.shift);
      }
      loss = static_cast<T>(params.flow_scale) * result.loss;
      if (n == 0 && params.nll_scale != 0) {
        loss -= static_cast<T>(params.nll_scale) * flow_sum(row.log_pf, length, L);
      }
      loss = flow_keep(valid, loss);
      // A floored reward has no gradient, whatever the residual.
      grad_reward = flow_keep(valid && end.reward.slope != 0, end.reward.slope * result.grad_reward);
      grad_log_z += flow_keep(valid, result.grad_log_z);
    }
    if (arrays.losses != nullptr) arrays.losses[index] = loss;
    if (arrays.grad_log_reward != nullptr) arrays.grad_log_reward[index] = grad_reward;
    for (int64_t l = length; states && l < L; ++l) {
      if (row.grad_log_pf != nullptr) row.grad_log_pf[l] = 0;
      if (row.grad_flow != nullptr) row.grad_flow[l] = 0;
    }
  }
  if (!states && arrays.grad_target != nullptr) arrays.grad_target[b] = grad_log_z;
}

}  // namespace gflowgr
