// Sorts identifiers: packed keys and a radix sort (which children_*_cpu.cpp use too).
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace gflowgr {

inline int bit_width(uint64_t value) {
  int bits = 0;
  for (; value != 0; value >>= 1) ++bits;
  return bits;
}

inline uint64_t key_of(uint64_t entry) { return entry; }

struct KeyRow {
  uint64_t key;
  uint32_t row;
};
inline uint64_t key_of(const KeyRow& entry) { return entry.key; }

// Stable LSD radix sort by bits [low, high) of the key. A digit that all keys share is skipped.
template <typename Entry>
void radix_sort(std::vector<Entry>& entries, int low, int high) {
  constexpr int kBits = 8;
  const int passes = (high - low + kBits - 1) / kBits;
  if (passes <= 0 || entries.size() < 2) return;
  std::vector<std::array<size_t, 1 << kBits>> counts(passes);
  for (auto& count : counts) count.fill(0);
  for (const Entry& entry : entries) {
    uint64_t key = key_of(entry) >> low;
    for (int pass = 0; pass < passes; ++pass, key >>= kBits) ++counts[pass][key & 0xFF];
  }
  // The last digit may be cut short by `high`: bits above it must not take part.
  const int last_bits = (high - low) - (passes - 1) * kBits;
  const uint64_t last_mask = (uint64_t{1} << last_bits) - 1;
  if (last_bits < kBits) {
    auto& count = counts[passes - 1];
    for (size_t digit = last_mask + 1; digit < count.size(); ++digit) {
      count[digit & last_mask] += count[digit];
      count[digit] = 0;
    }
  }
  std::vector<Entry> other(entries.size());
  for (int pass = 0; pass < passes; ++pass) {
    auto& count = counts[pass];
    if (std::find(count.begin(), count.end(), entries.size()) != count.end()) continue;
    size_t total = 0;
    for (size_t& slot : count) total += std::exchange(slot, total);
    const int shift = low + pass * kBits;
    const uint64_t mask = pass == passes - 1 ? last_mask : 0xFF;
    for (const Entry& entry : entries) other[count[(key_of(entry) >> shift) & mask]++] = entry;
    entries.swap(other);
  }
}

// Interface of sorted rows. For one row after another: how many levels it shares with the row before, its
// length, its codes (token - base + 1; 0 beyond its end) and its item.
class SortedRows {
 public:
  virtual ~SortedRows() = default;
  // Moves to the next row; false after the last.
  virtual bool next() = 0;
  virtual void rewind() = 0;
  int shared = 0;
  int length = 0;
  int64_t item = 0;
  std::vector<uint64_t> codes;
};

struct Levels {
  int count = 0;
  bool ragged = false;
  std::vector<int64_t> base, high;
  std::vector<int> bits;  // of a code
};

// Rows in the order of their item ids (so that a stable sort leaves a leaf's items ascending).
inline std::vector<KeyRow> rows_by_item(const int64_t* items, int64_t rows) {
  std::vector<KeyRow> order(rows);
  uint64_t all = 0;
  for (int64_t row = 0; row < rows; ++row) {
    order[row] = {static_cast<uint64_t>(items[row]), static_cast<uint32_t>(row)};
    all |= order[row].key;
  }
  radix_sort(order, 0, bit_width(all));
  return order;
}

// Codes and row number packed into one word: the common case.
template <typename Token>
class PackedRows final : public SortedRows {
 public:
  PackedRows(const Token* tokens, int64_t columns, const Levels& levels, int64_t rows,
             const std::vector<KeyRow>& order, int row_bits)
      : levels_(levels), order_(order), row_bits_(row_bits), keys_(rows) {
    codes.assign(levels.count, 0);
    shifts_.assign(levels.count, row_bits);
    for (int level = levels.count - 2; level >= 0; --level) {
      shifts_[level] = shifts_[level + 1] + levels.bits[level + 1];
    }
    const int top = shifts_[0] + levels.bits[0];
    level_of_bit_.fill(0);
    for (int level = 0; level < levels.count; ++level) {
      for (int bit = shifts_[level]; bit < shifts_[level] + levels.bits[level]; ++bit) {
        level_of_bit_[bit] = level;
      }
    }
    for (int64_t rank = 0; rank < rows; ++rank) {
      const Token* token = tokens + (order.empty() ? rank : order[rank].row) * columns;
      uint64_t key = 0;
      for (int level = 0; level < levels.count; ++level) {
        const uint64_t code = token[level] < 0 ? 0 : token[level] - levels.base[level] + 1;
        key = (key << levels.bits[level]) | code;
      }
      keys_[rank] = (key << row_bits) | static_cast<uint64_t>(rank);
    }
    radix_sort(keys_, row_bits, top);
  }

  bool next() override {
    if (at_ == keys_.size()) return false;
    const uint64_t key = keys_[at_];
    const uint64_t differs = (key ^ (at_ == 0 ? ~key : keys_[at_ - 1])) >> row_bits_ << row_bits_;
    shared = at_ == 0 ? 0 : levels_.count;
    if (at_ > 0 && differs != 0) shared = level_of_bit_[bit_width_fast(differs) - 1];
    length = levels_.count;
    for (int level = 0; level < levels_.count; ++level) {
      codes[level] = (key >> shifts_[level]) & ((uint64_t{1} << levels_.bits[level]) - 1);
    }
    if (levels_.ragged) {
      while (codes[length - 1] == 0) --length;
    }
    shared = std::min(shared, length);
    const uint64_t rank = key & ((uint64_t{1} << row_bits_) - 1);
    item = order_.empty() ? static_cast<int64_t>(rank) : static_cast<int64_t>(order_[rank].key);
    ++at_;
    return true;
  }

  void rewind() override { at_ = 0; }

 private:
  static int bit_width_fast(uint64_t value) {
#if defined(__GNUC__) || defined(__clang__)
    return 64 - __builtin_clzll(value);
#else
    return bit_width(value);
#endif
  }

  const Levels& levels_;
  const std::vector<KeyRow>& order_;
  int row_bits_;
  std::vector<uint64_t> keys_;
  std::vector<int> shifts_;
  std::array<int, 64> level_of_bit_;
  size_t at_ = 0;
};

// Long identifiers: as many 64-bit keys as it takes, sorted from the last to the first.
template <typename Token>
class WideRows final : public SortedRows {
 public:
  WideRows(const Token* tokens, int64_t columns, const Levels& levels, int64_t rows,
           const std::vector<KeyRow>& order)
      : tokens_(tokens), columns_(columns), levels_(levels), order_(order), sorted_(rows) {
    codes.assign(levels.count, 0);
    for (int64_t rank = 0; rank < rows; ++rank) sorted_[rank].row = static_cast<uint32_t>(rank);
    int end = levels.count;
    while (end > 0) {
      int begin = end, bits = 0;
      while (begin > 0 && bits + levels.bits[begin - 1] <= 64) bits += levels.bits[--begin];
      for (KeyRow& entry : sorted_) {
        uint64_t key = 0;
        for (int level = begin; level < end; ++level) {
          key = (key << levels.bits[level]) | code(entry.row, level);
        }
        entry.key = key;
      }
      radix_sort(sorted_, 0, bits);
      end = begin;
    }
  }

  bool next() override {
    if (at_ == sorted_.size()) return false;
    const uint32_t rank = sorted_[at_].row;
    length = 0;
    shared = 0;
    bool same = at_ > 0;
    for (int level = 0; level < levels_.count; ++level) {
      const uint64_t value = code(rank, level);
      same = same && value == codes[level];
      shared += same;
      length += value != 0;
      codes[level] = value;
    }
    shared = std::min(shared, length);
    item = order_.empty() ? static_cast<int64_t>(rank) : static_cast<int64_t>(order_[rank].key);
    ++at_;
    return true;
  }

  void rewind() override { at_ = 0; }

 private:
  uint64_t code(uint32_t rank, int level) const {
    const Token* token = tokens_ + (order_.empty() ? rank : order_[rank].row) * columns_;
    return token[level] < 0 ? 0 : token[level] - levels_.base[level] + 1;
  }

  const Token* tokens_;
  int64_t columns_;
  const Levels& levels_;
  const std::vector<KeyRow>& order_;
  std::vector<KeyRow> sorted_;
  size_t at_ = 0;
};

}  // namespace gflowgr
