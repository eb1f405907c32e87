// Arrays of any type to and from float32. Bare C++17: no torch.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace gflowgr {

void widen(const void* from, Dtype type, int64_t count, float* to);

// To nearest, ties to even.
void narrow(const float* from, int64_t count, Dtype type, void* to);

}  // namespace gflowgr
