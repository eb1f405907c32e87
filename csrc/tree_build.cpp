#include "tree_build.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#include "tree_layout.h"

namespace gflowgr {

TreeBuffer::TreeBuffer(size_t bytes) : bytes_(bytes) {
  void* data = nullptr;
#ifdef _WIN32
  data = _aligned_malloc(bytes, kTreeAlign);
#else
  if (posix_memalign(&data, kTreeAlign, bytes) != 0) data = nullptr;
#endif
  if (data == nullptr) throw std::bad_alloc();
  std::memset(data, 0, bytes);
  data_.reset(static_cast<uint8_t*>(data));
}

void TreeBuffer::free(void* data) {
#ifdef _WIN32
  _aligned_free(data);
#else
  std::free(data);
#endif
}

namespace {

constexpr int64_t kMaxToken = (int64_t{1} << 31) - 1;

int bit_width(uint64_t value) {
  int bits = 0;
  for (; value != 0; value >>= 1) ++bits;
  return bits;
}

uint64_t key_of(uint64_t entry) { return entry; }

struct KeyRow {
  uint64_t key;
  uint32_t row;
};
uint64_t key_of(const KeyRow& entry) { return entry.key; }

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

// What the sorted rows are asked: for row after row, how many levels it shares with the one before, how
// long it is, its codes (token - base + 1; 0 where it has ended) and the item that it stands for.
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

template <typename Token>
TreeError measure(const Token* tokens, int64_t rows, int64_t columns, Levels& levels) {
  std::vector<int64_t> low(columns, kMaxToken), high(columns, -1);
  int longest = 0, shortest = static_cast<int>(columns);
  for (int64_t row = 0; row < rows; ++row) {
    const Token* const token = tokens + row * columns;
    int length = 0;
    while (length < columns && token[length] >= 0) {
      const int64_t value = token[length];
      low[length] = std::min(low[length], value);
      high[length] = std::max(high[length], value);
      ++length;
    }
    bool clean = length > 0;
    for (int64_t column = length; column < columns; ++column) clean &= token[column] == -1;
    if (!clean) {  // say what is wrong, a token out of range first
      for (int64_t column = 0; column < columns; ++column) {
        const int64_t value = token[column];
        if (value < -1 || value > kMaxToken) return {TreeFault::token, row, column};
      }
      bool none = true;
      for (int64_t column = 0; column < columns; ++column) none &= token[column] < 0;
      if (none) return {TreeFault::empty, row, 0};
      return {TreeFault::hole, row, length};
    }
    if (sizeof(Token) > 4) {
      for (int column = 0; column < length; ++column) {
        if (static_cast<int64_t>(token[column]) > kMaxToken) return {TreeFault::token, row, column};
      }
    }
    longest = std::max(longest, length);
    shortest = std::min(shortest, length);
  }
  levels.count = longest;
  levels.ragged = shortest < longest;
  levels.base.assign(low.begin(), low.begin() + longest);
  levels.high.assign(high.begin(), high.begin() + longest);
  for (int level = 0; level < longest; ++level) {
    levels.bits.push_back(bit_width(static_cast<uint64_t>(high[level] - low[level] + 1)));
  }
  return {};
}

// Rows in the order of their item ids (so that a stable sort leaves a leaf's items ascending).
std::vector<KeyRow> rows_by_item(const int64_t* items, int64_t rows) {
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

struct Counts {
  std::vector<int64_t> nodes, children, leaves, entries;  // by level; leaves and entries by length - 1
};

Counts count(SortedRows& rows, int levels) {
  Counts counts;
  std::vector<int64_t> siblings(levels, 0);
  for (auto* list : {&counts.nodes, &counts.children, &counts.leaves, &counts.entries}) {
    list->assign(levels, 0);
  }
  while (rows.next()) {
    for (int level = rows.shared; level < rows.length; ++level) {
      ++counts.nodes[level];
      counts.children[level] = std::max(counts.children[level], ++siblings[level]);
      if (level + 1 < levels) siblings[level + 1] = 0;  // a new node has no children yet
    }
    ++counts.entries[rows.length - 1];
    counts.leaves[rows.length - 1] += rows.shared < rows.length;
  }
  return counts;
}

int64_t sum(const std::vector<int64_t>& values) {
  int64_t total = 0;
  for (int64_t value : values) total += value;
  return total;
}

// The header: the same order of sections as plan_layout() in gflowgr/_tree_layout.py.
std::vector<int64_t> plan(const Levels& levels, const Counts& counts, int64_t num_items, int index_bytes) {
  const int length = levels.count;
  std::vector<int64_t> words(kTreeWords + kLevelWords * length, 0);
  words[kMagic] = kTreeMagic;
  words[kVersion] = kTreeVersion;
  words[kMaxLength] = length;
  words[kNumNodes] = 1 + sum(counts.nodes);
  words[kNumInner] = words[kNumNodes] - counts.nodes[length - 1];
  words[kNumLeaves] = sum(counts.leaves);
  words[kNumEntries] = sum(counts.entries);
  words[kNumItems] = num_items;
  if (index_bytes == 0) index_bytes = words[kNumNodes] < (int64_t{1} << 31) ? 4 : 8;
  words[kIndexBytes] = index_bytes;
  words[kChildBegin] = tree_align(8 * static_cast<int64_t>(words.size()));
  int64_t end = words[kChildBegin] + index_bytes * (words[kNumInner] + 1);
  if (levels.ragged) {
    words[kLeafRank] = tree_align(end);
    end = words[kLeafRank] + 4 * (words[kNumInner] + 1);
  }
  int64_t node = 1;
  for (int level = 0; level < length; ++level) {
    int64_t* const word = words.data() + kTreeWords + kLevelWords * level;
    const int64_t span = levels.high[level] - levels.base[level];
    word[kNodeBegin] = node;
    word[kTokenOffset] = tree_align(end);
    word[kTokenBase] = levels.base[level];
    word[kTokenBytes] = span < (1 << 8) ? 1 : span < (1 << 16) ? 2 : 4;
    word[kMaxChildren] = counts.children[level];
    node += counts.nodes[level];
    end = word[kTokenOffset] + word[kTokenBytes] * counts.nodes[level];
    words[kVocabSize] = std::max(words[kVocabSize], levels.high[level] + 1);
  }
  words[kItemIds] = words[kStructureBytes] = tree_align(end);
  end = words[kItemIds] + 4 * words[kNumEntries];
  if (words[kNumLeaves] < words[kNumEntries]) {
    words[kItemBegin] = tree_align(end);
    end = words[kItemBegin] + 4 * (words[kNumLeaves] + 1);
  }
  words[kTotalBytes] = tree_align(end);
  return words;
}

template <typename Index>
void fill(SortedRows& rows, const Counts& counts, const std::vector<int64_t>& words, uint8_t* buffer) {
  const int length = static_cast<int>(words[kMaxLength]);
  const int64_t num_inner = words[kNumInner];
  Index* const child_begin = reinterpret_cast<Index*>(buffer + words[kChildBegin]);
  int32_t* const leaf_rank =
      words[kLeafRank] ? reinterpret_cast<int32_t*>(buffer + words[kLeafRank]) : nullptr;
  int32_t* const item_ids = reinterpret_cast<int32_t*>(buffer + words[kItemIds]);
  int32_t* const item_begin =
      words[kItemBegin] ? reinterpret_cast<int32_t*>(buffer + words[kItemBegin]) : nullptr;

  // Next node of each level, and next leaf and entry of each length (leaves are in node order).
  std::vector<int64_t> node(length + 1), first(length), leaf(length, 0), entry(length, 0);
  for (int level = 0; level < length; ++level) {
    node[level] = first[level] = words[kTreeWords + kLevelWords * level + kNodeBegin];
    if (level > 0) {
      leaf[level] = leaf[level - 1] + counts.leaves[level - 1];
      entry[level] = entry[level - 1] + counts.entries[level - 1];
    }
  }
  child_begin[0] = 1;
  while (rows.next()) {
    const int last = rows.length - 1;
    for (int level = rows.shared; level < rows.length; ++level) {
      const int64_t* const word = words.data() + kTreeWords + kLevelWords * level;
      const uint64_t token = rows.codes[level] - 1;
      const int64_t at = node[level] - first[level];
      uint8_t* const tokens = buffer + word[kTokenOffset];
      if (word[kTokenBytes] == 1) {
        tokens[at] = static_cast<uint8_t>(token);
      } else if (word[kTokenBytes] == 2) {
        reinterpret_cast<uint16_t*>(tokens)[at] = static_cast<uint16_t>(token);
      } else {
        reinterpret_cast<uint32_t*>(tokens)[at] = static_cast<uint32_t>(token);
      }
      // Its first child, if any, is the next node that the level below gets.
      if (level + 1 < length) child_begin[node[level]] = static_cast<Index>(node[level + 1]);
      ++node[level];
    }
    if (rows.shared < rows.length) {
      if (leaf_rank && last + 1 < length) leaf_rank[node[last]] = 1;  // node[last] - 1 ends here
      if (item_begin) item_begin[leaf[last]++] = static_cast<int32_t>(entry[last]);
    }
    item_ids[entry[last]++] = static_cast<int32_t>(rows.item);
  }
  child_begin[num_inner] = static_cast<Index>(words[kNumNodes]);
  if (item_begin) item_begin[words[kNumLeaves]] = static_cast<int32_t>(words[kNumEntries]);
  if (leaf_rank) {
    for (int64_t i = 0; i < num_inner; ++i) leaf_rank[i + 1] += leaf_rank[i];
  }
}

template <typename Token>
TreeBuffer build(const TreeInput& input, TreeError* error) {
  const Token* const tokens = static_cast<const Token*>(input.tokens);
  Levels levels;
  *error = measure(tokens, input.rows, input.columns, levels);
  if (error->fault != TreeFault::none) return {};

  std::vector<KeyRow> order;
  if (input.items) order = rows_by_item(input.items, input.rows);
  const int64_t num_items = input.items ? static_cast<int64_t>(order.back().key) + 1 : input.rows;

  int bits = bit_width(static_cast<uint64_t>(input.rows - 1));
  const int row_bits = bits;
  for (int width : levels.bits) bits += width;
  std::unique_ptr<SortedRows> rows;
  if (bits <= 64) {
    rows = std::make_unique<PackedRows<Token>>(tokens, input.columns, levels, input.rows, order, row_bits);
  } else {
    rows = std::make_unique<WideRows<Token>>(tokens, input.columns, levels, input.rows, order);
  }
  const Counts counts = count(*rows, levels.count);
  rows->rewind();
  const std::vector<int64_t> words = plan(levels, counts, num_items, input.index_bytes);
  TreeBuffer buffer(static_cast<size_t>(words[kTotalBytes]));
  std::memcpy(buffer.data(), words.data(), words.size() * sizeof(int64_t));
  if (words[kIndexBytes] == 4) {
    fill<int32_t>(*rows, counts, words, buffer.data());
  } else {
    fill<int64_t>(*rows, counts, words, buffer.data());
  }
  return buffer;
}

}  // namespace

TreeBuffer build_tree(const TreeInput& input, TreeError* error) {
  return input.token_bytes == 4 ? build<int32_t>(input, error) : build<int64_t>(input, error);
}

}  // namespace gflowgr
