// Flow KL among the children of each token's node, behind children_forward.cu. Bare CUDA: no torch headers.
//
// The forward pass leaves the logits of a row's children where its slopes will be. A warp per row then takes the
// flows of the children, a lane for each child: at the root they are read, deeper they are summed from the rewards
// of the items under the child. With p the flows' policy and P the model's, the row's value is
//   KL(p || P) - w log P(token),    its slopes (1 + w) P - p - w [token].
// The backward pass is that of the log-probabilities, children_backward.cu.
//
// Speed of light beside theirs, for E products: 8 E bytes of logits and slopes, 4 bytes for every reward under a row's
// node but the root's; a prompt's rewards are read again by each of its rows, from the L2 cache. T 65536, L 4, 60
// items under a node at level 1: 4 MB, and 34 MB at the root (20 us at 3.3 TB/s). Prediction, not measured: 60 us,
// bound by the lane with the most items.
#include "logprobs_children/children_device.h"
#include "logprobs_children/children_flow_kl.h"
#include "tree/tree_flows_device.h"

namespace gflowgr {
namespace {

// p * value; 0 where p is 0, whatever the value is, as in p log p.
__device__ float weighted(float p, float value) { return p > 0.0f ? p * value : 0.0f; }

__global__ void __launch_bounds__(kThreads) flow_kl_kernel(ChildrenCall call, DivergenceCall flow) {
  const int lane = threadIdx.x % 32;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (t >= call.trajectories * call.L) return;
  Row row = read_row(call, t);
  const int64_t trajectory = t / call.L, prompt = trajectory / flow.per_prompt;
  const int64_t begin = call.plan[kPlanWords * t + kFirstChild];
  // A forbidden token has no position in the plan.
  if (row.children > 0) row.target = static_cast<int>(row.tokens.find(row.children, call.tokens[t]));
  const bool on_tree = row.children > 0 && row.target >= 0;
  const float log_pf = call.log_pf[t];
  float weight = flow.weights == nullptr ? 0.0f : flow.weights[trajectory];
  if (!on_tree || row.children == 1) {
    bool alive = on_tree;
    if (on_tree && flow.weights == nullptr) {
      alive = device_log_flow(call.tree, flow.rewards, prompt, begin) > -INFINITY;
    }
    if (lane == 0) {
      flow.alive[t] = alive;
      flow.value[t] = weight == 0.0f ? 0.0f : -weight * log_pf;
    }
    return;
  }

  float* const out = call.slopes + row.slopes;
  float* const p = flow.policy + row.slopes;
  const int64_t root_width = 1 + child_begin(call.tree, 1) - child_begin(call.tree, 0);
  // Relative to log Z the numbers are small, so float32 is precise enough.
  const double log_z = load_reward(flow.rewards, flow.rewards.root, prompt * root_width);
  float top = -INFINITY;
  for (int child = lane; child < row.children; child += 32) {
    const double value = row.level == 0
                             ? load_reward(flow.rewards, flow.rewards.root, prompt * root_width + 1 + child)
                             : device_log_flow(call.tree, flow.rewards, prompt, begin + child);
    p[child] = value == -INFINITY ? -INFINITY : static_cast<float>(value - log_z);
    top = fmaxf(top, p[child]);
  }
  top = warp_max(top);
  const bool alive = top > -INFINITY;
  float mass = 0, p_log_p = 0;  // of p before it is divided by its sum
  for (int child = lane; child < row.children; child += 32) {
    const float log_p = p[child] - top, value = alive ? expf(log_p) : 0.0f;
    mass += value;
    p_log_p += weighted(value, log_p);
    p[child] = value;
  }
  mass = warp_sum(mass);
  p_log_p = alive ? warp_sum(p_log_p) / mass - logf(mass) : 0.0f;
  if (flow.weights == nullptr) weight = alive ? -1.0f : 0.0f;

  const auto bits = static_cast<uint64_t>(call.plan[kPlanWords * t + kSoftmax]);
  const float largest = __uint_as_float(static_cast<unsigned>(bits));
  const float sum = __uint_as_float(static_cast<unsigned>(bits >> 32));
  const bool forbidden = largest == -INFINITY && sum == 0.0f;  // all children; with NaN among them the sum is NaN
  const float scale = alive ? 1.0f / mass : 0.0f, factor = ((alive ? 1.0f : 0.0f) + weight) / sum;
  float cross = 0;
  for (int child = lane; child < row.children; child += 32) {
    const float logit = out[child] - largest, own = p[child] * scale;
    cross += forbidden ? 0.0f : weighted(own, logit);
    const float slope = expf(logit) * factor - own - (child == row.target ? weight : 0.0f);
    out[child] = forbidden ? 0.0f : slope;
  }
  cross = warp_sum(cross);
  if (lane != 0) return;
  float value = alive ? (p_log_p - cross) + logf(sum) : 0.0f;
  if (weight != 0.0f) value -= weight * log_pf;
  if (forbidden) value = (alive ? 1.0f : 0.0f) + weight == 0.0f ? 0.0f : INFINITY;
  flow.alive[t] = alive;
  flow.value[t] = value;
}

}  // namespace

int children_flow_kl_cuda(const ChildrenCall& call, const DivergenceCall& flow, void* stream) {
  const int error = children_forward_cuda(call, stream);
  const int64_t rows = call.trajectories * call.L, blocks = (rows + kWarps - 1) / kWarps;
  if (error != cudaSuccess || rows == 0) return error;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  GFLOWGR_LAUNCH(flow_kl_kernel, static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream), call, flow);
  return cudaGetLastError();
}

}  // namespace gflowgr
