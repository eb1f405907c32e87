// Checks that the arrays of a prefix tree agree with its header. Bare C++17: no torch, no Python.
#pragma once

#include <cstdint>
#include <vector>

namespace gflowgr {

// One pass over the arrays of a tree whose header was checked (decode_header in gflowgr/tree/layout.py), in
// the order of the file. Returns the largest token + 1 of each level. Throws std::invalid_argument with the
// first value that is wrong; gflowgr/tree/check.py lists the checks and has the same messages.
std::vector<int64_t> check_tree(const uint8_t* tree);

}  // namespace gflowgr
