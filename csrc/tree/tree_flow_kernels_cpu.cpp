#include "tree/tree_flow_kernels_cpu.h"

#include <algorithm>
#include <cmath>

#include "common/simd.h"

namespace gflowgr {
namespace {

constexpr int64_t kChunk = 1024;    // numbers added in float32 before they are added in float64
constexpr int64_t kShortRun = 16;   // of fewer rewards a child the exponentials are taken across children
constexpr float kNegligible = 1e-30f;  // a probability below it adds nothing to a sum of p log p

template <typename S>
GFLOWGR_INLINE float largest_of(const float* x, int64_t count) {
  typedef typename S::Floats Floats;
  Floats top[4];
  for (Floats& each : top) each = S::broadcast(-INFINITY);
  int64_t i = 0;
  for (; i + 4 * S::kLanes <= count; i += 4 * S::kLanes) {
    for (int j = 0; j < 4; ++j) top[j] = S::maximum(S::load(x + i + j * S::kLanes), top[j]);
  }
  for (; i + S::kLanes <= count; i += S::kLanes) top[0] = S::maximum(S::load(x + i), top[0]);
  if (i < count) top[1] = S::maximum(S::load_some(x + i, count - i, -INFINITY), top[1]);
  return S::largest(top);
}

template <typename S>
GFLOWGR_INLINE double sum_of_exp(const float* x, int64_t count, float top) {
  typedef typename S::Floats Floats;
  double sum = 0;
  for (; count > kChunk; x += kChunk, count -= kChunk) {
    Floats part{};
    for (int64_t i = 0; i < kChunk; i += S::kLanes) part += S::exp_not_positive(S::load(x + i) - top);
    sum += S::total_by_halves(part);
  }
  Floats part{};
  int64_t i = 0;
  for (; i + S::kLanes <= count; i += S::kLanes) part += S::exp_not_positive(S::load(x + i) - top);
  if (i < count) {  // the numbers after them belong to other children
    const Floats last = S::exp_not_positive(S::load(x + i) - top);
    part += S::first_lanes(count - i) ? last : Floats{};
  }
  return sum + S::total_by_halves(part);
}

template <typename S>
GFLOWGR_INLINE void sum_exp_of(float* x, float top, const int64_t* stops, int64_t children, double* sums) {
  int64_t begin = 0;
  const int64_t count = stops[children - 1];
  if (count >= kShortRun * children) {
    for (int64_t c = 0; c < children; ++c) {
      sums[c] = sum_of_exp<S>(x + begin, stops[c] - begin, top);
      begin = stops[c];
    }
    return;
  }
  for (int64_t i = 0; i < count; i += S::kLanes) S::store(x + i, S::exp_not_positive(S::load(x + i) - top));
  for (int64_t c = 0; c < children; ++c) {
    double sum = 0;
    for (; begin < stops[c]; ++begin) sum += x[begin];
    sums[c] = sum;
  }
}

// log(x) = n ln 2 + log m: the two apart, since n ln 2 may be large.
template <typename S>
GFLOWGR_INLINE void add_logs_of(const double* sums, int64_t count, double top, float* out) {
  typedef typename S::Floats Floats;
  for (int64_t c = 0; c < count; c += S::kLanes) {
    const int64_t some = std::min<int64_t>(count - c, S::kLanes);
    float value[S::kLanes], exponent[S::kLanes];
    for (int64_t i = 0; i < S::kLanes; ++i) value[i] = i < some ? static_cast<float>(sums[c + i]) : 1.0f;
    const auto above = (bit_cast<typename S::Words>(S::load(value)) - 0x3f3504f3u) & 0xff800000u;  // n << 23
    const Floats n = S::floats(bit_cast<typename S::Ints>(above) >> 23);
    S::store(exponent, n);
    S::store(value, S::log_positive(bit_cast<Floats>(bit_cast<typename S::Words>(S::load(value)) - above)));
    for (int64_t i = 0; i < some; ++i) {
      const double result = top + (exponent[i] * 0.69314718055994531 + value[i]);
      out[c + i] = static_cast<float>(sums[c + i] == sums[c + i] ? result : sums[c + i]);
    }
  }
}

template <typename S>
GFLOWGR_INLINE double policy_of_sums_of(const double* sums, int64_t count, float* p) {
  typedef typename S::Floats Floats;
  double total[4] = {0, 0, 0, 0};
  int64_t c = 0;
  for (; c + 4 <= count; c += 4) {
    for (int j = 0; j < 4; ++j) total[j] += sums[c + j];
  }
  for (; c < count; ++c) total[0] += sums[c];
  const double scale = 1.0 / ((total[0] + total[1]) + (total[2] + total[3]));
  for (c = 0; c < count; ++c) p[c] = static_cast<float>(sums[c] * scale);
  const Floats least = S::broadcast(kNegligible), ones = S::broadcast(1.0f);
  Floats part{};
  for (c = 0; c + S::kLanes <= count; c += S::kLanes) {
    const Floats value = S::load(p + c);
    part += value * S::log_positive(value > least ? value : ones);
  }
  if (c < count) {
    const Floats value = S::load_some(p + c, count - c, 1.0f);
    part += value * S::log_positive(value > least ? value : ones);
  }
  return S::total_by_halves(part);
}

template <typename S>
GFLOWGR_INLINE double policy_of_logs_of(float* p, int64_t count) {
  typedef typename S::Floats Floats;
  const int64_t whole = count / S::kLanes * S::kLanes;
  Floats sums{}, parts{};
  for (int64_t c = 0; c < whole; c += S::kLanes) {
    const Floats log = S::load(p + c), value = S::exp_not_positive(log);
    sums += value;
    parts += value > Floats{} ? value * log : Floats{};
    S::store(p + c, value);
  }
  if (whole < count) {
    const Floats log = S::load_some(p + whole, count - whole, -INFINITY), value = S::exp_not_positive(log);
    sums += value;
    parts += value > Floats{} ? value * log : Floats{};
    S::store_some(p + whole, value, count - whole);
  }
  const double total = S::total_by_halves(sums);
  const float scale = static_cast<float>(1.0 / total);
  for (int64_t c = 0; c < count; ++c) p[c] *= scale;
  return S::total_by_halves(parts) / total - std::log(total);
}

struct Kernels {
  void (*gather)(const float*, const int32_t*, int64_t, float*);
  float (*largest)(const float*, int64_t);
  void (*sum_exp)(float*, float, const int64_t*, int64_t, double*);
  void (*add_logs)(const double*, int64_t, double, float*);
  double (*policy_of_sums)(const double*, int64_t, float*);
  double (*policy_of_logs)(float*, int64_t);
};

#define GFLOWGR_DEFINE(name, bytes, attribute)                                                                  \
  attribute void gather_##name(const float* __restrict from, const int32_t* __restrict ids, int64_t count,       \
                               float* __restrict to) {                                                          \
    for (int64_t i = 0; i < count; ++i) to[i] = from[ids[i]];                                                   \
  }                                                                                                             \
  attribute float largest_##name(const float* x, int64_t count) { return largest_of<Simd<bytes>>(x, count); }   \
  attribute void sum_exp_##name(float* x, float top, const int64_t* stops, int64_t children, double* sums) {    \
    sum_exp_of<Simd<bytes>>(x, top, stops, children, sums);                                                     \
  }                                                                                                             \
  attribute void add_logs_##name(const double* sums, int64_t count, double top, float* out) {                   \
    add_logs_of<Simd<bytes>>(sums, count, top, out);                                                            \
  }                                                                                                             \
  attribute double policy_of_sums_##name(const double* sums, int64_t count, float* p) {                         \
    return policy_of_sums_of<Simd<bytes>>(sums, count, p);                                                      \
  }                                                                                                             \
  attribute double policy_of_logs_##name(float* p, int64_t count) {                                             \
    return policy_of_logs_of<Simd<bytes>>(p, count);                                                            \
  }                                                                                                             \
  constexpr Kernels name = {gather_##name,   largest_##name,        sum_exp_##name,                             \
                            add_logs_##name, policy_of_sums_##name, policy_of_logs_##name};
GFLOWGR_EACH_TARGET(GFLOWGR_DEFINE)
#undef GFLOWGR_DEFINE

const Kernels& kernels() { return GFLOWGR_BEST(portable, avx2, avx512); }

}  // namespace

void gather(const float* from, const int32_t* ids, int64_t count, float* to) { kernels().gather(from, ids, count, to); }
void gather(const double* from, const int32_t* ids, int64_t count, double* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[ids[i]];
}

float largest(const float* x, int64_t count) { return kernels().largest(x, count); }
double largest(const double* x, int64_t count) {
  double top = -INFINITY;
  for (int64_t i = 0; i < count; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

void sum_exp(float* x, float top, const int64_t* stops, int64_t children, double* sums) {
  kernels().sum_exp(x, top, stops, children, sums);
}
void sum_exp(double* x, double top, const int64_t* stops, int64_t children, double* sums) {
  int64_t i = 0;
  for (int64_t c = 0; c < children; ++c) {
    double sum = 0;
    for (; i < stops[c]; ++i) sum += std::exp(x[i] - top);
    sums[c] = sum;
  }
}

void add_logs(const double* sums, int64_t count, double top, float* out) { kernels().add_logs(sums, count, top, out); }
void add_logs(const double* sums, int64_t count, double top, double* out) {
  for (int64_t c = 0; c < count; ++c) out[c] = top + std::log(sums[c]);
}

double policy_of_sums(const double* sums, int64_t count, float* p) { return kernels().policy_of_sums(sums, count, p); }
double policy_of_logs(float* p, int64_t count) { return kernels().policy_of_logs(p, count); }

}  // namespace gflowgr
