#include "logprobs_children/children_kernels.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/simd.h"

namespace gflowgr {
namespace {

// Accumulators of a block of products, rows by columns, and of a block of weighted sums, rows by registers: as many
// as the instruction set has registers for.
template <typename S>
constexpr int kDotRows = S::kLanes == 16 ? 4 : 3;
template <typename S>
constexpr int kDotColumns = S::kLanes == 16 ? 6 : 4;
template <typename S>
constexpr int kSumVectors = S::kLanes == 16 ? 4 : 2;
constexpr int kSumRows = 6;

// ------------------------------------------------------------------ dots

// The last `count` of a row's d numbers, which no whole register holds; 0 in the other lanes.
template <typename S>
GFLOWGR_INLINE typename S::Floats load_end(const float* row, int64_t d, int64_t count) {
  return d < S::kLanes ? S::load_some(row, count, 0.0f) : S::load_last(row + d, count);
}

template <typename S, int M, int N>
GFLOWGR_INLINE void dot_block(const float* const* a, const float* const* b, int64_t d, float* out,
                              int64_t stride) {
  typedef typename S::Floats Floats;
  Floats sum[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) sum[i][j] = Floats{};
  }
  const float* left[M];
  const float* right[N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) left[i] = a[i];
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) right[j] = b[j];
  int64_t x = 0;
  for (; x + S::kLanes <= d; x += S::kLanes) {
    Floats u[M];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) u[i] = S::load(left[i] + x);
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      const Floats v = S::load(right[j] + x);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) sum[i][j] += u[i] * v;
    }
  }
  if (x < d) {
    Floats u[M];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) u[i] = load_end<S>(left[i], d, d - x);
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      const Floats v = load_end<S>(right[j], d, d - x);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) sum[i][j] += u[i] * v;
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) {
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) out[i * stride + j] = S::total_by_halves(sum[i][j]);
  }
}

template <typename S, int M>
GFLOWGR_INLINE void dot_rows(const float* const* a, const float* const* b, int64_t n, int64_t d, float* out,
                             int64_t stride) {
  if (n == 1) return dot_block<S, M, 1>(a, b, d, out, stride);
  if (n == 2) return dot_block<S, M, 2>(a, b, d, out, stride);
  if (n == 3) return dot_block<S, M, 3>(a, b, d, out, stride);
  if (n == 4) return dot_block<S, M, 4>(a, b, d, out, stride);
  if constexpr (kDotColumns<S> > 4) {
    if (n == 5) return dot_block<S, M, 5>(a, b, d, out, stride);
    if (n == 6) return dot_block<S, M, 6>(a, b, d, out, stride);
  }
}

// The size of the blocks when `count` is cut into as few as possible of nearly equal size.
GFLOWGR_INLINE int64_t even_block(int64_t count, int64_t most) {
  const int64_t blocks = (count + most - 1) / most;
  return (count + blocks - 1) / blocks;
}

template <typename S>
GFLOWGR_INLINE void dots(const float* const* a, int64_t m, const float* const* b, int64_t n, int64_t d,
                         float* out, int64_t stride) {
  const int64_t rows = even_block(m, kDotRows<S>), columns = even_block(n, kDotColumns<S>);
  // The rows of one block of columns stay in the L1 cache while the rows of `a` pass.
  for (int64_t j = 0; j < n; j += columns) {
    const int64_t wide = n - j < columns ? n - j : columns;
    for (int64_t i = 0; i < m; i += rows) {
      float* const to = out + i * stride + j;
      const int64_t high = m - i < rows ? m - i : rows;
      if (high == 1) dot_rows<S, 1>(a + i, b + j, wide, d, to, stride);
      if (high == 2) dot_rows<S, 2>(a + i, b + j, wide, d, to, stride);
      if (high == 3) dot_rows<S, 3>(a + i, b + j, wide, d, to, stride);
      if constexpr (kDotRows<S> > 3) {
        if (high == 4) dot_rows<S, 4>(a + i, b + j, wide, d, to, stride);
      }
    }
  }
}

// ------------------------------------------------------------------ accumulate

template <typename S, int M, int N, bool kSome>
GFLOWGR_INLINE void sum_block(float* const* out, const float* a, int64_t row_step, int64_t step,
                              const float* const* b, int64_t count, int64_t x, int64_t some, bool add) {
  typedef typename S::Floats Floats;
  Floats sum[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      if (!add) {
        sum[i][j] = Floats{};
      } else {
        sum[i][j] = kSome ? S::load_some(out[i] + x, some, 0.0f) : S::load(out[i] + x + j * S::kLanes);
      }
    }
  }
  for (int64_t p = 0; p < count; ++p) {
    Floats v[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) v[j] = kSome ? S::load_some(b[p] + x, some, 0.0f) : S::load(b[p] + x + j * S::kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const float factor = a[i * row_step + p * step];
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sum[i][j] += factor * v[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      if (kSome) {
        S::store_some(out[i] + x, sum[i][j], some);
      } else {
        S::store(out[i] + x + j * S::kLanes, sum[i][j]);
      }
    }
  }
}

template <typename S, int N, bool kSome>
GFLOWGR_INLINE void sum_rows(float* const* out, int64_t m, const float* a, int64_t row_step, int64_t step,
                             const float* const* b, int64_t count, int64_t x, int64_t some, bool add) {
  const int64_t rows = even_block(m, kSumRows);
  for (int64_t i = 0; i < m; i += rows) {
    const float* const from = a + i * row_step;
    switch (m - i < rows ? m - i : rows) {
      case 1: sum_block<S, 1, N, kSome>(out + i, from, row_step, step, b, count, x, some, add); break;
      case 2: sum_block<S, 2, N, kSome>(out + i, from, row_step, step, b, count, x, some, add); break;
      case 3: sum_block<S, 3, N, kSome>(out + i, from, row_step, step, b, count, x, some, add); break;
      case 4: sum_block<S, 4, N, kSome>(out + i, from, row_step, step, b, count, x, some, add); break;
      case 5: sum_block<S, 5, N, kSome>(out + i, from, row_step, step, b, count, x, some, add); break;
      case 6: sum_block<S, 6, N, kSome>(out + i, from, row_step, step, b, count, x, some, add); break;
    }
  }
}

template <typename S>
GFLOWGR_INLINE void accumulate(float* const* out, int64_t m, const float* a, int64_t row_step, int64_t step,
                               const float* const* b, int64_t count, int64_t width, bool add) {
  int64_t x = 0;
  for (; x + kSumVectors<S> * S::kLanes <= width; x += kSumVectors<S> * S::kLanes) {
    sum_rows<S, kSumVectors<S>, false>(out, m, a, row_step, step, b, count, x, 0, add);
  }
  for (; x + S::kLanes <= width; x += S::kLanes) {
    sum_rows<S, 1, false>(out, m, a, row_step, step, b, count, x, 0, add);
  }
  if (x < width) sum_rows<S, 1, true>(out, m, a, row_step, step, b, count, x, width - x, add);
}

// ------------------------------------------------------------------ softmax

// Products x [count] become logits; returns the largest. `last`: those that fill no register, -inf behind them.
template <typename S>
GFLOWGR_INLINE float logits(float* x, int64_t count, const float* bias, float temperature,
                            typename S::Floats& last) {
  typedef typename S::Floats Floats;
  const Floats lows = S::broadcast(-std::numeric_limits<float>::infinity());
  const int64_t whole = count / S::kLanes * S::kLanes, some = count - whole;
  Floats tops = lows;
  last = lows;
  for (int64_t j = 0; j < whole; j += S::kLanes) {
    Floats value = S::load(x + j);
    if (bias != nullptr) value += S::load(bias + j);
    if (temperature != 1.0f) value /= temperature;
    S::store(x + j, value);
    tops = S::maximum(value, tops);
  }
  if (some > 0) {
    last = S::load_some(x + whole, some, 0.0f);
    if (bias != nullptr) last += S::load_some(bias + whole, some, 0.0f);
    if (temperature != 1.0f) last /= temperature;
    S::store_some(x + whole, last, some);
    last = S::first_lanes(some) ? last : lows;
    tops = S::maximum(last, tops);
  }
  return S::largest(tops);
}

template <typename S>
GFLOWGR_INLINE float softmax(float* x, int64_t count, const float* bias, float temperature, int64_t target) {
  typedef typename S::Floats Floats;
  const float low = -std::numeric_limits<float>::infinity();
  const int64_t whole = count / S::kLanes * S::kLanes, some = count - whole;
  Floats last;
  const float top = logits<S>(x, count, bias, temperature, last);
  const float chosen = x[target];
  if (chosen == low) {
    for (int64_t j = 0; j < count; ++j) x[j] = 0.0f;
    return low;
  }
  x[target] = low;
  Floats sums = {};
  for (int64_t j = 0; j < whole; j += S::kLanes) {
    const Floats value = S::exp_not_positive(S::load(x + j) - top);
    sums += value;
    S::store(x + j, value);
  }
  if (some > 0) {
    last = S::load_some(x + whole, some, low);
    last = S::exp_not_positive(last - top);
    sums += last;
  }
  const float others = S::total_by_halves(sums);
  const float own = chosen == top ? 1.0f : std::exp(chosen - top);
  const float factor = 1.0f / (own + others);
  for (int64_t j = 0; j < whole; j += S::kLanes) S::store(x + j, S::load(x + j) * -factor);
  if (some > 0) S::store_some(x + whole, last * -factor, some);
  x[target] = others * factor;
  if (chosen == top) return -std::log1p(others);
  return (chosen - top) - std::log(own + others);
}

// ------------------------------------------------------------------ divergence

// p * logit where p is not 0; a logit of -inf is what the bias forbids.
template <typename S>
GFLOWGR_INLINE typename S::Floats weighted(const typename S::Floats& p, const typename S::Floats& logit) {
  typedef typename S::Floats Floats;
  return p > Floats{} ? p * logit : Floats{};
}

template <typename S>
GFLOWGR_INLINE float divergence(float* x, int64_t count, const float* bias, float temperature, int64_t target,
                                const float* p, float mass, double p_log_p, float weight, float* log_pf) {
  typedef typename S::Floats Floats;
  const float low = -std::numeric_limits<float>::infinity();
  const int64_t whole = count / S::kLanes * S::kLanes, some = count - whole;
  Floats last;
  const float top = logits<S>(x, count, bias, temperature, last);
  // Without a number above -inf there are no children but forbidden ones, unless some are NaN: then all becomes it.
  if (top == low && std::all_of(x, x + count, [low](float logit) { return logit == low; })) {
    for (int64_t j = 0; j < count; ++j) x[j] = 0.0f;
    *log_pf = low;
    return mass + weight == 0.0f ? 0.0f : -low;
  }
  const float chosen = x[target] - top;
  Floats sums = {}, parts = {};
  for (int64_t j = 0; j < whole; j += S::kLanes) {
    const Floats logit = S::load(x + j) - top, value = S::exp_not_positive(logit);
    parts += weighted<S>(S::load(p + j), logit);
    sums += value;
    S::store(x + j, value);
  }
  if (some > 0) {
    const Floats logit = last - top;
    parts += weighted<S>(S::load_some(p + whole, some, 0.0f), logit);
    last = S::exp_not_positive(logit);
    sums += last;
  }
  const float sum = S::total_by_halves(sums), log_sum = std::log(sum);
  const float factor = (mass + weight) / sum;
  for (int64_t j = 0; j < whole; j += S::kLanes) S::store(x + j, S::load(x + j) * factor - S::load(p + j));
  if (some > 0) S::store_some(x + whole, last * factor - S::load_some(p + whole, some, 0.0f), some);
  x[target] -= weight;
  *log_pf = chosen - log_sum;
  const float value =
      mass > 0.0f ? static_cast<float>((p_log_p - S::total_by_halves(parts)) + log_sum) : 0.0f;
  return weight == 0.0f ? value : value - weight * *log_pf;
}

#define GFLOWGR_DEFINE(name, bytes, attribute)                                                                    \
  attribute void dots_##name(const float* const* a, int64_t m, const float* const* b, int64_t n, int64_t d,       \
                             float* out, int64_t stride) {                                                        \
    dots<Simd<bytes>>(a, m, b, n, d, out, stride);                                                                \
  }                                                                                                               \
  attribute void accumulate_##name(float* const* out, int64_t m, const float* a, int64_t row_step, int64_t step,  \
                                   const float* const* b, int64_t count, int64_t width, bool add) {               \
    accumulate<Simd<bytes>>(out, m, a, row_step, step, b, count, width, add);                                     \
  }                                                                                                               \
  attribute float softmax_##name(float* x, int64_t count, const float* bias, float temperature, int64_t target) { \
    return softmax<Simd<bytes>>(x, count, bias, temperature, target);                                             \
  }                                                                                                               \
  attribute float divergence_##name(float* x, int64_t count, const float* bias, float temperature, int64_t target,\
                                    const float* p, float mass, double p_log_p, float weight, float* log_pf) {    \
    return divergence<Simd<bytes>>(x, count, bias, temperature, target, p, mass, p_log_p, weight, log_pf);        \
  }                                                                                                               \
  constexpr ChildrenKernels name = {dots_##name, accumulate_##name, softmax_##name, divergence_##name};
GFLOWGR_EACH_TARGET(GFLOWGR_DEFINE)
#undef GFLOWGR_DEFINE

}  // namespace

const ChildrenKernels& children_kernels() { return GFLOWGR_BEST(portable, avx2, avx512); }

}  // namespace gflowgr
