#include "common/convert_cpu.h"

#include <cstring>

#include "common/simd.h"

namespace gflowgr {
namespace {

struct Converters {
  void (*widen)(const void* from, bool half, int64_t count, float* to);
  void (*narrow)(const float* from, int64_t count, bool half, void* to);
};

#define GFLOWGR_DEFINE(name, bytes, attribute)                                                    \
  attribute void widen_##name(const void* from, bool half, int64_t count, float* to) {            \
    if (half) return Simd<bytes>::widen(static_cast<const Half*>(from), count, to);               \
    Simd<bytes>::widen(static_cast<const Bfloat*>(from), count, to);                              \
  }                                                                                               \
  attribute void narrow_##name(const float* from, int64_t count, bool half, void* to) {           \
    if (half) return Simd<bytes>::narrow(from, count, static_cast<Half*>(to));                    \
    Simd<bytes>::narrow(from, count, static_cast<Bfloat*>(to));                                   \
  }                                                                                               \
  constexpr Converters name = {widen_##name, narrow_##name};
GFLOWGR_EACH_TARGET(GFLOWGR_DEFINE)
#undef GFLOWGR_DEFINE

}  // namespace

void widen(const void* from, Dtype type, int64_t count, float* to) {
  if (type == Dtype::float32) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
  } else {
    GFLOWGR_BEST(portable, avx2, avx512).widen(from, type == Dtype::float16, count, to);
  }
}

void narrow(const float* from, int64_t count, Dtype type, void* to) {
  if (type == Dtype::float32) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
  } else {
    GFLOWGR_BEST(portable, avx2, avx512).narrow(from, count, type == Dtype::float16, to);
  }
}

}  // namespace gflowgr
