// Layout of a prefix tree in one buffer, for C++ and CUDA; gflowgr/tree/layout.py describes the same layout.
// All offsets are in bytes from the start of the buffer, all header words are int64.
#pragma once

#include <cstdint>

namespace gflowgr {

constexpr int64_t kTreeMagic = 0x31525447574F4C46;
constexpr int64_t kTreeVersion = 1;
constexpr int64_t kTreeAlign = 64;

// Words of the header.
enum TreeWord : int {
  kMagic = 0,
  kVersion,
  kMaxLength,
  kNumNodes,
  kNumInner,
  kNumLeaves,
  kNumEntries,
  kNumItems,
  kIndexBytes,
  kChildBegin,
  kLeafRank,
  kItemIds,
  kItemBegin,
  kStructureBytes,
  kTotalBytes,
  kVocabSize,
  kTreeWords,
};

// Words of each level, after the header: level l holds the nodes at depth l + 1.
enum LevelWord : int {
  kNodeBegin = 0,   // first node of the level
  kTokenOffset,     // where its tokens are
  kTokenBase,       // smallest token of the level; stored tokens are less this
  kTokenBytes,      // 1, 2 or 4
  kMaxChildren,     // most children of a node at depth l
  kLevelWords,
};

constexpr int64_t tree_align(int64_t offset) {
  return (offset + kTreeAlign - 1) / kTreeAlign * kTreeAlign;
}

// Bytes that a buffer with this header must have, or -1 when it is no tree (bytes: its actual size).
inline int64_t tree_total_bytes(const uint8_t* tree, int64_t bytes) {
  if (bytes < 8 * kTreeWords) return -1;
  const int64_t* const header = reinterpret_cast<const int64_t*>(tree);
  if (header[kMagic] != kTreeMagic || header[kVersion] != kTreeVersion) return -1;
  return header[kTotalBytes];
}

}  // namespace gflowgr
