// Inner loops of exact flows. One thread. Bare C++17: no torch.
//
// Of rewards in float32 they are written in the machine's vectors. There the exponential is the work: about one cycle
// a reward with 8 lanes, where reading it once takes a sixth of that. In float64 they are plain loops.
#pragma once

#include <cstdint>

namespace gflowgr {

// Gathered arrays have room for this many more numbers at the end; kernels read them and ignore their values.
constexpr int64_t kFlowPadding = 16;

// to[i] = from[ids[i]]
void gather(const float* from, const int32_t* ids, int64_t count, float* to);
void gather(const double* from, const int32_t* ids, int64_t count, double* to);

// The largest value, ignoring NaN; -inf if there is none.
float largest(const float* x, int64_t count);
double largest(const double* x, int64_t count);

// sums[c] = sum of exp(x[i] - top) over stops[c - 1] <= i < stops[c], from 0 on. `top` is not below any of x, which
// is overwritten; x is padded.
void sum_exp(float* x, float top, const int64_t* stops, int64_t children, double* sums);
void sum_exp(double* x, double top, const int64_t* stops, int64_t children, double* sums);

// out[c] = top + log(sums[c]) with an absolute error of about 1e-7 in float32, of normal floats; NaN of NaN.
void add_logs(const double* sums, int64_t count, double top, float* out);
void add_logs(const double* sums, int64_t count, double top, double* out);

// p[c] = sums[c] / total of sums; returns the sum of p log p. At least one of sums is positive.
double policy_of_sums(const double* sums, int64_t count, float* p);

// p holds logs, the largest of them at most 0 and finite, and then what is proportional to their exponentials and
// adds up to 1; returns the sum of p log p.
double policy_of_logs(float* p, int64_t count);

}  // namespace gflowgr
