#include "tree/tree_build.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <vector>

#include "tree/tree_check.h"
#include "tree/tree_layout.h"
#include "tree/tree_merge.h"
#include "tree/tree_sort.h"

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
    if (!clean) {  // find the first fault; a token out of range comes first
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

// The header: the same order of sections as plan_layout() in gflowgr/tree/layout.py.
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

// Rows in sorted order, and the arrays they are read from.
struct Sorted {
  Levels levels;
  std::vector<KeyRow> order;  // by item; empty for items 0, 1, 2, ...
  std::unique_ptr<SortedRows> rows;
};

template <typename Token>
void sort_rows(const TreeInput& input, Sorted& sorted, TreeError* error) {
  const Token* const tokens = static_cast<const Token*>(input.tokens);
  *error = measure(tokens, input.rows, input.columns, sorted.levels);
  if (error->fault != TreeFault::none) return;
  if (input.items) sorted.order = rows_by_item(input.items, input.rows);
  int bits = bit_width(static_cast<uint64_t>(input.rows - 1));
  const int row_bits = bits;
  for (int width : sorted.levels.bits) bits += width;
  if (bits <= 64) {
    sorted.rows = std::make_unique<PackedRows<Token>>(tokens, input.columns, sorted.levels, input.rows,
                                                      sorted.order, row_bits);
  } else {
    sorted.rows = std::make_unique<WideRows<Token>>(tokens, input.columns, sorted.levels, input.rows,
                                                    sorted.order);
  }
}

void sort_rows(const TreeInput& input, Sorted& sorted, TreeError* error) {
  if (input.token_bytes == 4) {
    sort_rows<int32_t>(input, sorted, error);
  } else {
    sort_rows<int64_t>(input, sorted, error);
  }
}

TreeBuffer emit(SortedRows& rows, const Levels& levels, const Counts& counts, int64_t num_items,
                int index_bytes) {
  const std::vector<int64_t> words = plan(levels, counts, num_items, index_bytes);
  TreeBuffer buffer(static_cast<size_t>(words[kTotalBytes]));
  std::memcpy(buffer.data(), words.data(), words.size() * sizeof(int64_t));
  rows.rewind();
  if (words[kIndexBytes] == 4) {
    fill<int32_t>(rows, counts, words, buffer.data());
  } else {
    fill<int64_t>(rows, counts, words, buffer.data());
  }
  return buffer;
}

}  // namespace

TreeBuffer build_tree(const TreeInput& input, TreeError* error) {
  Sorted sorted;
  sort_rows(input, sorted, error);
  if (error->fault != TreeFault::none) return {};
  const int64_t num_items =
      input.items ? static_cast<int64_t>(sorted.order.back().key) + 1 : input.rows;
  const Counts counts = count(*sorted.rows, sorted.levels.count);
  return emit(*sorted.rows, sorted.levels, counts, num_items, input.index_bytes);
}

TreeBuffer update_tree(const uint8_t* tree, const TreeInput& added, const int64_t* removed,
                       int64_t num_removed, TreeError* error) {
  check_tree(tree);  // a walk of a damaged one would leave the buffer
  const int64_t* const header = reinterpret_cast<const int64_t*>(tree);
  const int32_t* const items = reinterpret_cast<const int32_t*>(tree + header[kItemIds]);
  const int64_t entries = header[kNumEntries];
  const ItemSet gone(removed, num_removed), come(added.items, added.rows);
  int64_t removals = 0, present = -1;
  for (int64_t entry = 0; entry < entries; ++entry) {
    const int64_t item = items[entry];
    if (gone.has(item)) {
      ++removals;
    } else if (come.has(item)) {
      present = present < 0 ? item : std::min(present, item);
    }
  }
  if (removals < num_removed) {
    const ItemSet here(items, entries);
    int64_t absent = kMaxToken;
    for (int64_t i = 0; i < num_removed; ++i) {
      if (!here.has(removed[i])) absent = std::min(absent, removed[i]);
    }
    *error = {TreeFault::absent, absent, 0};
    return {};
  }
  if (present >= 0) {
    *error = {TreeFault::present, present, 0};
    return {};
  }
  Sorted sorted;
  if (added.rows > 0) sort_rows(added, sorted, error);
  if (entries - removals + added.rows == 0) *error = {TreeFault::nothing, 0, 0};
  if (error->fault != TreeFault::none) return {};

  const int most = std::max(static_cast<int>(header[kMaxLength]), sorted.levels.count);
  MergedRows rows(tree, gone, sorted.rows.get(), sorted.levels.base, most);
  Counts counts = count(rows, most);
  Levels levels;
  levels.count = rows.longest;
  levels.ragged = rows.shortest < rows.longest;
  levels.base.assign(rows.low.begin(), rows.low.begin() + levels.count);
  levels.high.assign(rows.high.begin(), rows.high.begin() + levels.count);
  for (auto* list : {&counts.nodes, &counts.children, &counts.leaves, &counts.entries}) {
    list->resize(levels.count);
  }
  const int64_t num_items = rows.top_item + 1;
  rows.base = levels.base;
  rows.base.resize(most, 0);
  return emit(rows, levels, counts, num_items, 0);
}

}  // namespace gflowgr
