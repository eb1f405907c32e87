// gflowgr_cpp::flow_inputs_ok: whether a mask is a prefix of every row and all log-rewards are usable, in
// one pass. If not, gflowgr/ops/checks.py finds the first fault and raises.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <optional>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// About 20 us of work: less is not worth a second thread.
constexpr int64_t kTokensPerThread = 65536;

// Rewards that are not usable, in rows that have a token. No branch on data: the loops vectorise.
template <typename T>
int64_t bad_rewards(const T* reward, const bool* mask, bool has_floor, int64_t L, int64_t begin, int64_t end) {
  constexpr T inf = std::numeric_limits<T>::infinity();
  int64_t bad = 0;
  if (has_floor) {
    for (int64_t row = begin; row < end; ++row) bad += reward[row] == inf;
  } else {
    for (int64_t row = begin; row < end; ++row) bad += !(reward[row] < inf && reward[row] > -inf);
  }
  if (bad == 0 || mask == nullptr) return bad;
  bad = 0;  // rare: count again without padding
  for (int64_t row = begin; row < end; ++row) {
    const bool usable = has_floor ? reward[row] != inf : reward[row] < inf && reward[row] > -inf;
    bad += mask[row * L] && !usable;
  }
  return bad;
}

// Places where a row turns from false to true.
int64_t rises(const bool* mask, int64_t L, int64_t begin, int64_t end) {
  const auto* const bytes = reinterpret_cast<const uint8_t*>(mask);
  int64_t all = 0;
  for (int64_t from = begin * L + 1; from < end * L; from += 255) {
    const int64_t to = std::min(from + 255, end * L);
    uint8_t some = 0;  // of at most 255
    for (int64_t i = from; i < to; ++i) some += static_cast<uint8_t>(bytes[i] & (bytes[i - 1] ^ 1));
    all += some;
  }
  int64_t between = 0;  // from the end of one row to the start of the next
  for (int64_t i = (begin + 1) * L; i < end * L; i += L) between += bytes[i] & (bytes[i - 1] ^ 1);
  return all - between;
}

bool flow_inputs_ok(const Tensor& log_reward, const std::optional<Tensor>& mask, bool has_floor) {
  const bool wide = log_reward.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK((wide || log_reward.scalar_type() == ScalarType::Float) && log_reward.is_contiguous(),
                  "log_reward must be float32 or float64, contiguous");
  const int64_t rows = log_reward.numel();
  const bool* masked = nullptr;
  int64_t L = 1;
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->dim() == 3 && mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() &&
                        mask->size(0) * mask->size(1) == rows,
                    "mask must be bool [B, N, L], contiguous");
    masked = static_cast<const bool*>(mask->data_ptr());
    L = mask->size(2);
    if (L == 0) return true;
  }
  std::atomic<bool> ok{true};
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kTokensPerThread / L), [&](int64_t begin, int64_t end) {
    const void* const data = log_reward.data_ptr();
    const int64_t bad = wide ? bad_rewards(static_cast<const double*>(data), masked, has_floor, L, begin, end)
                             : bad_rewards(static_cast<const float*>(data), masked, has_floor, L, begin, end);
    if (bad > 0 || (masked != nullptr && rises(masked, L, begin, end) > 0)) ok = false;
  });
  return ok;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gflowgr_cpp, m) {
  m.def("flow_inputs_ok(Tensor log_reward, Tensor? mask, bool has_floor) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(gflowgr_cpp, CPU, m) { m.impl("flow_inputs_ok", TORCH_BOX(&flow_inputs_ok)); }
