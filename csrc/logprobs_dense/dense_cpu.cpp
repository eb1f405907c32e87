// Blocks of rows; in each, first per chunk of rows (one thread each), tile after tile of the vocabulary:
//
//   logits^T [tile, chunk] = W_tile H^T                  product 1
//   E = 2^(logits - reference), its sums                 in cache
//   S [chunk, width] += E^T W_tile                       product 2: sum of exponentials times head rows
//
// then the block's log-probabilities and, from them, the upstream gradient g of each row; then per tile
//
//   dW_tile += E diag(-g / (temperature * sum)) H        product 3
//
// The reference of a row is a logit not more than 2^60 below its maximum, so that E is stored once and
// rescaled almost never; each tile remembers the one it used. The target's own entry is left out of E and
// enters exactly, as 1 - p = -expm1(log p): otherwise its rounding would drown the gradient of confident
// rows. Of the logits only E of one block exists; with a single block of at most `width` rows, it lies in
// the memory that the gradient of the head takes afterwards, tile by tile.
#include "logprobs_dense/dense_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "common/gemm_cpu.h"
#include "logprobs_dense/dense_pack_cpu.h"
#include "logprobs_dense/dense_plan_cpu.h"

namespace gflowgr {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <typename T>
class DenseRun {
 public:
  explicit DenseRun(const DensePass& pass)
      : p_(pass),
        plan_(pass, sizeof(T)),
        kernels_(tile_kernels()),
        d_(pass.width),
        scale_(static_cast<float>(kLog2E / pass.temperature)),
        states_{pass.hidden, pass.hidden_type, pass.width},
        head_{pass.weight, pass.weight_type, pass.width},
        reference_(plan_.columns),
        sum_(plan_.columns),
        coefficient_(plan_.columns) {
    if (plan_.holds && !plan_.in_place) held_ = allocate<T>(p_.vocabulary * plan_.columns);
    if (plan_.holds) {
      used_reference_ = allocate<float>(plan_.tiles * plan_.columns);
      scaled_states_ = allocate<T>(plan_.columns * d_);
    }
    const bool rounded = p_.grad_weight != nullptr && p_.grad_weight_type != Dtype::float32;
    if (rounded && plan_.blocks() > 1) weight_sum_ = allocate<float>(p_.vocabulary * d_);
  }

  void run() {
    clear_masked();
    for (int64_t i = 0; i < plan_.blocks(); ++i) block(i);
    finish();
  }

 private:
  // Buffers of one thread.
  struct Scratch {
    Buffer<T> states, exps_by_token, head;
    Buffer<float> logits, head_sums, bias, factor;
    Buffer<uint16_t> rounded;
  };

  Scratch make_scratch() const {
    Scratch s;
    s.states = allocate<T>(d_ * plan_.chunk);
    s.logits = allocate<float>(kTile * plan_.chunk);
    s.head_sums = allocate<float>(plan_.chunk * d_);
    s.bias = allocate<float>(kTile);
    s.factor = allocate<float>(plan_.chunk);
    s.exps_by_token = allocate<T>(kTile * plan_.chunk);
    s.head = allocate<T>(kTile * d_);
    if (kPairs<T>) s.rounded = allocate<uint16_t>(2 * kTile * plan_.chunk);
    return s;
  }

  bool wants_hidden() const { return p_.grad_hidden != nullptr; }

  int64_t row_of(int64_t at) const { return plan_.valid[first_ + at]; }  // of the current block

  // A target beyond the vocabulary is no token at all, neither here nor in another shard.
  bool no_token(int64_t row) const { return p_.targets[row] > p_.vocabulary; }

  float upstream(int64_t row) const {
    if (no_token(row)) return kNaN;
    return p_.upstream == nullptr ? 1.0f : p_.upstream[row];
  }

  // Exponentials of a tile, [rows of the tile, stride_].
  T* held(int64_t first_row) {
    if (!plan_.in_place) return held_.get() + first_row * stride_;
    const int64_t at = first_row * d_ * bytes_of(p_.grad_weight_type);
    return reinterpret_cast<T*>(static_cast<char*>(p_.grad_weight) + at);
  }

  void block(int64_t index) {
    first_ = plan_.block_begin[index];
    count_ = plan_.block_begin[index + 1] - first_;
    stride_ = round_up(count_, kGroup);
    by_target_.resize(count_);
    for (int64_t i = 0; i < count_; ++i) by_target_[i] = {p_.targets[row_of(i)], i};
    std::sort(by_target_.begin(), by_target_.end());
    if (p_.on_block && wants_hidden()) block_sums_ = allocate<float>(stride_ * d_);
    p_.parallel((count_ + plan_.chunk - 1) / plan_.chunk, [&](int64_t begin, int64_t end) {
      Scratch scratch = make_scratch();
      for (int64_t chunk = begin; chunk < end; ++chunk) scores(chunk, scratch);
      if (kPairs<T>) gemm_release();
    });
    if (p_.on_block) {
      const int64_t last = index + 1 < plan_.blocks() ? prompt_begin(plan_.block_begin[index + 1]) : p_.rows;
      p_.on_block(next_row_, last);
      next_row_ = last;
      p_.parallel(wants_hidden() ? count_ : 0, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) hidden_gradient(i, block_sums_.get() + i * d_);
      });
    }
    if (plan_.holds) weight_gradient(index);
  }

  int64_t prompt_begin(int64_t at) const {
    return plan_.valid[at] / p_.rows_per_prompt * p_.rows_per_prompt;
  }

  // Products 1 and 2 of one chunk, and its log-probabilities.
  void scores(int64_t chunk, Scratch& s) {
    const int64_t begin = chunk * plan_.chunk, count = std::min(plan_.chunk, count_ - begin);
    const int64_t tokens = round_up(count, kGroup);
    float* const reference = reference_.data() + begin;
    float* const sum = sum_.data() + begin;
    for (int64_t i = 0; i < tokens; ++i) {
      const double lse = p_.known && i < count ? p_.lse[row_of(begin + i)] : 0.0;
      reference[i] = p_.known ? static_cast<float>(lse * kLog2E) : -kInfinity;
      sum[i] = p_.known ? 1.0f : 0.0f;
    }
    std::vector<std::pair<int64_t, int64_t>> targets;  // (token, row of the chunk), ascending
    for (const auto& [token, i] : by_target_) {
      if (i >= begin && i < begin + count) targets.emplace_back(token, i - begin);
    }
    std::vector<float> target_logit(count, -kInfinity);
    pack_states(kernels_, states_, plan_.valid.data() + first_ + begin, count, tokens, s.head_sums.get(),
                s.states.get());
    auto next = targets.begin();
    for (int64_t tile = 0; tile < plan_.tiles; ++tile) {
      const int64_t first = tile * kTile, rows = std::min(kTile, p_.vocabulary - first);
      const T* const left = pack_head_left(head_, first, rows, s.head.get());
      for (int64_t k = 0; k < d_; k += kDepth) {
        gemm(rows, tokens, std::min(kDepth, d_ - k), d_, tokens, tokens, k > 0, left + k,
             s.states.get() + k * tokens, s.logits.get());
      }
      TileScores t{s.logits.get(), nullptr, scale_, rows, tokens, reference, p_.known ? nullptr : sum};
      if (p_.bias != nullptr) {
        for (int64_t v = 0; v < rows; ++v) s.bias[v] = p_.bias[first + v] * scale_;
        t.bias = s.bias.get();
      }
      if (!p_.known && kernels_.raise(t, s.factor.get()) && tile > 0 && wants_hidden()) {
        for (int64_t i = 0; i < count; ++i) {
          float* const row = s.head_sums.get() + i * d_;
          for (int64_t k = 0; s.factor[i] != 1.0f && k < d_; ++k) row[k] *= s.factor[i];
        }
      }
      const auto in_tile = next;
      for (; next != targets.end() && next->first < first + rows; ++next) {
        const float logit = s.logits[(next->first - first) * tokens + next->second] * scale_;
        target_logit[next->second] = t.bias == nullptr ? logit : logit + t.bias[next->first - first];
      }
      kernels_.exponentiate(t, s.logits.get());
      for (auto it = in_tile; it != next; ++it) s.logits[(it->first - first) * tokens + it->second] = 0.0f;
      if (plan_.holds) std::copy(reference, reference + tokens, used_reference_.get() + tile * stride_ + begin);
      if (!plan_.holds && !wants_hidden()) continue;
      pack_exponentials(kernels_, s.logits.get(), rows, tokens, wants_hidden() ? s.exps_by_token.get() : nullptr,
                        plan_.holds ? held(first) + begin : nullptr, stride_, s.rounded.get());
      if (!wants_hidden()) continue;
      const T* const right = pack_head_right(kernels_, left, rows, d_, s.head.get());
      for (int64_t k = 0; k < d_; k += kDepth) {
        gemm(tokens, std::min(kDepth, d_ - k), round_up(rows, 2), kTile, d_, d_, tile > 0,
             s.exps_by_token.get(), right + k * (kPairs<T> ? 2 : 1), s.head_sums.get() + k);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      if (!p_.known) log_probability(row_of(begin + i), reference[i], sum[i], target_logit[i]);
      if (!wants_hidden()) continue;
      const float* const head_sum = s.head_sums.get() + i * d_;
      if (p_.on_block) {
        std::copy(head_sum, head_sum + d_, block_sums_.get() + (begin + i) * d_);
      } else {
        hidden_gradient(begin + i, head_sum);
      }
    }
  }

  void log_probability(int64_t row, float reference, float sum, float target_logit) const {
    const double lse = static_cast<double>(reference) + std::log2(static_cast<double>(sum));
    p_.lse[row] = static_cast<float>(lse * kLn2);
    if (p_.targets[row] >= p_.vocabulary) {
      p_.log_pf[row] = no_token(row) ? kNaN : -p_.lse[row];
    } else if (target_logit == -kInfinity) {  // also where all are forbidden, and the difference NaN
      p_.log_pf[row] = -kInfinity;
    } else {
      const auto value = static_cast<float>((target_logit - lse) * kLn2);
      p_.log_pf[row] = value > 0.0f ? 0.0f : value;  // in this order NaN stays NaN
    }
  }

  // Row `at` of the block: g / temperature * ((1 - p) w_target - S / sum), S without the target.
  void hidden_gradient(int64_t at, const float* head_sum) const {
    const int64_t row = row_of(at), target = p_.targets[row];
    const float g = upstream(row) / p_.temperature;
    const float others = sum_[at] == 0.0f && !no_token(row) ? 0.0f : -g / sum_[at];
    std::vector<float> result(d_, 0.0f);
    float own = 0.0f;
    if (target < p_.vocabulary) {
      own = -std::expm1(p_.log_pf[row]) * g;
      widen(head_.at(target), head_.type, d_, result.data());
    }
    for (int64_t k = 0; k < d_; ++k) result[k] = own * result[k] + others * head_sum[k];
    narrow(result.data(), d_, p_.grad_hidden_type, element(p_.grad_hidden, p_.grad_hidden_type, row * d_));
  }

  // Product 3 of a block.
  void weight_gradient(int64_t index) {
    for (int64_t i = 0; i < stride_; ++i) {
      const bool real = i < count_ && (sum_[i] != 0.0f || no_token(row_of(i)));
      coefficient_[i] = real ? -upstream(row_of(i)) / (p_.temperature * sum_[i]) : 0.0f;
    }
    p_.parallel(stride_ / 2, [&](int64_t begin, int64_t end) {
      pack_scaled_states(kernels_, states_, plan_.valid.data() + first_, coefficient_.data(), 2 * begin, 2 * end,
                         scaled_states_.get());
    });
    p_.parallel(plan_.tiles, [&](int64_t begin, int64_t end) {
      Buffer<T> exps = allocate<T>(kTile * stride_);
      Buffer<float> row = allocate<float>(stride_), result = allocate<float>(kTile * d_);
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t first = tile * kTile, rows = std::min(kTile, p_.vocabulary - first);
        restore(tile, rows, exps.get(), row.get());
        if (p_.grad_bias != nullptr) bias_gradient(first, rows, exps.get(), row.get(), index == 0);
        if (p_.grad_weight == nullptr) continue;
        const bool rounds = p_.grad_weight_type != Dtype::float32;
        float* const to = !rounds ? static_cast<float*>(p_.grad_weight) + first * d_
                          : weight_sum_ != nullptr ? weight_sum_.get() + first * d_
                                                   : result.get();
        for (int64_t k = 0; k < d_; k += kDepth) {
          for (int64_t i = 0; i < stride_; i += kBlockRows) {
            gemm(rows, std::min(kDepth, d_ - k), std::min(kBlockRows, stride_ - i), stride_, d_, d_,
                 index > 0 || i > 0, exps.get() + i, scaled_states_.get() + i * d_ + k * (kPairs<T> ? 2 : 1),
                 to + k);
          }
        }
        if (to == result.get()) {
          narrow(to, rows * d_, p_.grad_weight_type, element(p_.grad_weight, p_.grad_weight_type, first * d_));
        }
      }
      if (kPairs<T>) gemm_release();
    });
  }

  // A tile's exponentials as product 3 takes them: relative to the final references, with the targets' own values.
  void restore(int64_t tile, int64_t rows, T* exps, float* row) {
    const int64_t first = tile * kTile;
    std::memcpy(exps, held(first), rows * stride_ * sizeof(T));
    const float* const used = used_reference_.get() + tile * stride_;
    if (std::memcmp(used, reference_.data(), stride_ * sizeof(float)) != 0) {
      std::vector<float> factor(stride_);
      for (int64_t i = 0; i < stride_; ++i) {
        factor[i] = used[i] == reference_[i] ? 1.0f : std::exp2(used[i] - reference_[i]);
      }
      for (int64_t v = 0; v < rows; ++v) {
        T* const at = exps + v * stride_;
        widen(at, kStored<T>, stride_, row);
        kernels_.multiply(row, factor.data(), stride_, row);
        narrow(row, stride_, kStored<T>, at);
      }
    }
    auto entry = std::lower_bound(by_target_.begin(), by_target_.end(), std::pair<int64_t, int64_t>{first, 0});
    for (; entry != by_target_.end() && entry->first < first + rows; ++entry) {
      const auto [token, i] = *entry;
      const float own = std::expm1(p_.log_pf[row_of(i)]) * sum_[i];
      narrow(&own, 1, kStored<T>, exps + (token - first) * stride_ + i);
    }
  }

  void bias_gradient(int64_t first, int64_t rows, const T* exps, float* row, bool first_block) const {
    for (int64_t v = 0; v < rows; ++v) {
      widen(exps + v * stride_, kStored<T>, stride_, row);
      const float part = kernels_.dot(row, coefficient_.data(), stride_);
      p_.grad_bias[first + v] = first_block ? part : p_.grad_bias[first + v] + part;
    }
  }

  // Zeros for masked rows, which are in no block.
  void clear_masked() const {
    const int64_t bytes = d_ * bytes_of(p_.grad_hidden_type);
    for (int64_t row = 0; row < p_.rows; ++row) {
      if (p_.targets[row] >= 0) continue;
      if (!p_.known) p_.log_pf[row] = p_.lse[row] = 0.0f;
      if (wants_hidden()) std::memset(static_cast<char*>(p_.grad_hidden) + row * bytes, 0, bytes);
    }
  }

  void finish() {
    if (plan_.blocks() == 0) {
      if (p_.on_block && p_.rows > 0) p_.on_block(0, p_.rows);
      if (p_.grad_weight != nullptr) {
        std::memset(p_.grad_weight, 0, p_.vocabulary * d_ * bytes_of(p_.grad_weight_type));
      }
      if (p_.grad_bias != nullptr) std::fill(p_.grad_bias, p_.grad_bias + p_.vocabulary, 0.0f);
    }
    p_.parallel(weight_sum_ == nullptr ? 0 : p_.vocabulary, [&](int64_t begin, int64_t end) {
      narrow(weight_sum_.get() + begin * d_, (end - begin) * d_, p_.grad_weight_type,
             element(p_.grad_weight, p_.grad_weight_type, begin * d_));
    });
  }

  const DensePass& p_;
  const DensePlan plan_;
  const TileKernels& kernels_;
  const int64_t d_;
  const float scale_;
  const Rows states_, head_;

  Buffer<T> held_, scaled_states_;
  Buffer<float> used_reference_, weight_sum_, block_sums_;
  int64_t next_row_ = 0;  // first that on_block has not seen

  // The current block: rows first_ .. first_ + count_ of the valid ones.
  int64_t first_ = 0, count_ = 0, stride_ = 0;
  std::vector<float> reference_, sum_, coefficient_;
  std::vector<std::pair<int64_t, int64_t>> by_target_;  // (target, row of the block), ascending
};

}  // namespace

void run_dense(const DensePass& pass) {
  const bool pairs = pass.hidden_type == Dtype::bfloat16 && pass.weight_type == Dtype::bfloat16 &&
                     pass.width % 2 == 0 && gemm_bfloat16_available();
  if (pairs) {
    DenseRun<uint16_t>(pass).run();
  } else {
    DenseRun<float>(pass).run();
  }
}

}  // namespace gflowgr
