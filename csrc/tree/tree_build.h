// Builds a prefix tree by sorting, or from another by merging. Bare C++17: no torch, no Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace gflowgr {

// 64-byte aligned, zeroed memory.
class TreeBuffer {
 public:
  TreeBuffer() = default;
  explicit TreeBuffer(size_t bytes);
  uint8_t* data() const { return data_.get(); }
  size_t size() const { return bytes_; }
  uint8_t* release() { return data_.release(); }
  static void free(void* data);

 private:
  struct Free {
    void operator()(uint8_t* data) const { TreeBuffer::free(data); }
  };
  std::unique_ptr<uint8_t, Free> data_;
  size_t bytes_ = 0;
};

struct TreeInput {
  const void* tokens = nullptr;  // [rows, columns] row-major, padded on the right with -1
  int token_bytes = 8;           // 4: int32, 8: int64
  int64_t rows = 0;              // 1 .. 2^31 - 1
  int64_t columns = 0;           // >= 1
  const int64_t* items = nullptr;  // [rows] distinct ids in 0 .. 2^31 - 2, or null for 0, 1, 2, ...
  int index_bytes = 0;           // of child_begin: 4, 8, or 0 to choose by the number of nodes
};

// Faults of an identifier, then those of an update: an added item exists already, a removed one does not, none is left.
enum class TreeFault { none, empty, hole, token, present, absent, nothing };

struct TreeError {
  TreeFault fault = TreeFault::none;
  int64_t row = 0;  // for present and absent: the item
  int64_t column = 0;
};

// The tree's buffer. On a bad identifier, fills `error` with the first one and returns an empty buffer.
// Time: one radix sort of packed keys, O(rows * L). Memory beside the result: 16 bytes a row when the
// packed codes and the row number fit 64 bits, 32 otherwise; with `items`, 16 more.
TreeBuffer build_tree(const TreeInput& input, TreeError* error);

// The buffer of the tree without `removed` (distinct ids), with the rows of `added` (`items` given; rows
// may be 0) merged in: the same bits as a build of those rows, in one pass over the old tree to count and
// one to write, O(nodes) beside sorting what is added. The old buffer, whose
// header was checked, is only read. One call may remove and add the same item. Throws std::invalid_argument
// for a damaged tree (check_tree).
TreeBuffer update_tree(const uint8_t* tree, const TreeInput& added, const int64_t* removed,
                       int64_t num_removed, TreeError* error);

}  // namespace gflowgr
