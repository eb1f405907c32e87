#include "t5/t5_cpu.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/blocks_cpu.h"
#include "common/gemm_cpu.h"
#include "logprobs_dense/dense_tile_cpu.h"

namespace gflowgr {
namespace {

// Tokens of a block when `count` are shared among threads.
int64_t block_size(int64_t count, int64_t threads) {
  const int64_t blocks = round_up(ceil_div(count, kBlockTokens), std::max<int64_t>(1, threads));
  return std::max<int64_t>(1, (count + blocks - 1) / blocks);
}

// to[j * to_stride + i] = from[i * from_stride + j]
void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
               int64_t to_stride) {
  tile_kernels().transpose(reinterpret_cast<const uint32_t*>(from), from_stride, rows, columns,
                           reinterpret_cast<uint32_t*>(to), to_stride);
}

// Where a prompt's queries lie in a block, and what they attend to.
struct Queries {
  int64_t first, count;
  T5Keys prompt;
  const float* mask;  // [S]
  const float* bias;  // null, or [heads, bias_stride]: of the first query and key
  int64_t bias_stride;
};

// The activations of some tokens, taken through the layers on one thread.
class Block {
 public:
  Block(const T5Pass& pass, int64_t count)
      : p_(pass), s_(pass.sizes), count_(count), lanes_(round_up(count, kT5Lanes)) {
    const int64_t tile = std::min(s_.hidden, kHiddenTile), keys = p_.padded();
    const int64_t depth = std::max({s_.width, s_.inner(), tile});
    // Kept per thread: fresh pages on every call would cost as much as a layer.
    thread_local Floats memory;
    float* at = memory.reserve((2 * s_.width + 4 * s_.inner() + 2 * tile + keys + 2 * s_.size + 1) * lanes_ +
                               round_up(depth, kT5Lanes) * lanes_ / kT5Lanes);
    const auto take = [&](int64_t rows) { return std::exchange(at, at + rows * lanes_); };
    x_ = take(s_.width);
    normed_ = take(s_.width);
    query_ = take(s_.inner());
    mixed_ = take(s_.inner());
    rows_ = take(2 * s_.inner());
    hidden_ = take(tile);
    gate_ = take(tile);
    scores_ = take(keys);
    piece_ = take(s_.size);
    part_ = take(s_.size);
    sum_ = take(1);
    alone_ = take(round_up(depth, kT5Lanes) / kT5Lanes);
  }

  int64_t lanes() const { return lanes_; }

  void load(const float* rows) {
    if (count_ < lanes_) std::memset(x_, 0, static_cast<size_t>(s_.width * lanes_) * sizeof(float));
    transpose(rows, s_.width, count_, s_.width, x_, lanes_);
  }
  // Between the layers of an encoder, as it is.
  void resume(const float* x) { std::memcpy(x_, x, static_cast<size_t>(s_.width * lanes_) * sizeof(float)); }
  void suspend(float* x) const { std::memcpy(x, x_, static_cast<size_t>(s_.width * lanes_) * sizeof(float)); }

  void norm(const float* weight) { t5_kernels().norm(x_, weight, s_.epsilon, s_.width, lanes_, normed_); }
  void finish(const float* weight, float* rows) {
    norm(weight);
    transpose(normed_, lanes_, s_.width, count_, rows, s_.width);
  }

  // Keys and values of the block's tokens, normalised, at position `first` of a prompt.
  void write_keys(const float* key, const float* value, const float* states, int64_t first, float* keys,
                  float* values) {
    const int64_t padded = p_.padded();
    product(key, s_.inner(), s_.width, states, mixed_);
    for (int64_t head = 0; head < s_.heads; ++head) {
      transpose(mixed_ + head * s_.size * lanes_, lanes_, s_.size, lanes_,
                keys + (head * padded + first) * s_.size, s_.size);
    }
    gemm(s_.inner(), lanes_, s_.width, s_.width, lanes_, padded, false, value, states, values + first);
  }
  const float* normed() const { return normed_; }
  const float* states() const { return x_; }

  // Adds the attention of `queries` to x.
  void attend(const T5Attention& weights, const std::vector<Queries>& queries) {
    norm(weights.norm);
    product(weights.query, s_.inner(), s_.width, normed_, query_);
    clear_rest(mixed_);
    for (const Queries& some : queries) attend(some);
    add_product(weights.out, s_.inner(), mixed_);
  }

  // Adds the attention of each token to its own beam; `keys` and `values` [count] take its own.
  void attend_own(const T5Attention& weights, const T5Step& step, int64_t layer, int64_t first) {
    const int64_t inner = s_.inner(), steps = static_cast<int64_t>(step.past.stored.size()) + 1;
    float* const keys = step.stored + (2 * layer * step.rows + first) * inner;
    float* const values = keys + step.rows * inner;
    float* const queries = rows_;
    float* const mixed = rows_ + lanes_ * inner;
    norm(weights.norm);
    const float* const factors[] = {weights.query, weights.key, weights.value};
    float* const rows[] = {queries, keys, values};
    for (int i = 0; i < 3; ++i) {
      product(factors[i], inner, s_.width, normed_, query_);
      transpose(query_, lanes_, inner, count_, rows[i], inner);
    }
    scratch_.resize(static_cast<size_t>(round_up(steps, kT5Lanes)));
    own_keys_.resize(static_cast<size_t>(steps));
    own_values_.resize(static_cast<size_t>(steps));
    for (int64_t row = 0; row < count_; ++row) {
      for (int64_t t = 0; t + 1 < steps; ++t) {
        const int64_t place = 2 * layer * step.past.rows[t] + step.past.ancestors[t][first + row];
        own_keys_[t] = step.past.stored[t] + place * inner;
        own_values_[t] = own_keys_[t] + step.past.rows[t] * inner;
      }
      own_keys_[steps - 1] = keys + row * inner;
      own_values_[steps - 1] = values + row * inner;
      t5_kernels().own({queries + row * inner, own_keys_.data(), own_values_.data(), step.bias, steps, s_.heads,
                        s_.size, scratch_.data(), mixed + row * inner});
    }
    clear_rest(mixed_);
    transpose(mixed, inner, count_, inner, mixed_, lanes_);
    add_product(weights.out, inner, mixed_);
  }

  void feed_forward(const T5FeedForward& weights) {
    norm(weights.norm);
    for (int64_t first = 0; first < s_.hidden; first += kHiddenTile) {
      const int64_t tile = std::min(kHiddenTile, s_.hidden - first);
      product(weights.in + first * s_.width, tile, s_.width, normed_, hidden_);
      if (weights.gate != nullptr) product(weights.gate + first * s_.width, tile, s_.width, normed_, gate_);
      t5_kernels().activate(s_.activation, hidden_, weights.gate == nullptr ? nullptr : gate_, tile * lanes_);
      multiply(s_.width, tile, s_.hidden, true, weights.out + first, hidden_, x_);
    }
  }

 private:
  // to [rows, lanes] = weight [rows, depth] from [depth, lanes]
  void product(const float* weight, int64_t rows, int64_t depth, const float* from, float* to) {
    multiply(rows, depth, depth, false, weight, from, to);
  }
  void add_product(const float* weight, int64_t depth, const float* from) {
    multiply(s_.width, depth, depth, true, weight, from, x_);
  }
  void multiply(int64_t rows, int64_t depth, int64_t stride, bool add, const float* weight, const float* from,
                float* to) {
    if (count_ > 1) {
      gemm(rows, lanes_, depth, stride, lanes_, lanes_, add, weight, from, to);
      return;
    }
    // One token alone (the first step of one prompt): 15 of 16 lanes would be unused.
    for (int64_t i = 0; i < depth; ++i) alone_[i] = from[i * lanes_];
    t5_kernels().one({weight, rows, depth, stride, alone_, add, to, lanes_});
  }
  // Zeroes the matrix where some lanes have no token, so that these lanes hold finite numbers.
  void clear_rest(float* matrix) const {
    if (count_ < lanes_) std::memset(matrix, 0, static_cast<size_t>(s_.inner() * lanes_) * sizeof(float));
  }

  void attend(const Queries& some) {
    const int64_t lanes = round_up(some.count, kT5Lanes), padded = p_.padded(), size = s_.size;
    std::memset(piece_, 0, static_cast<size_t>(size * lanes) * sizeof(float));
    for (int64_t head = 0; head < s_.heads; ++head) {
      const int64_t first = head * size * lanes_ + some.first;
      for (int64_t c = 0; c < size; ++c) {
        std::memcpy(piece_ + c * lanes, query_ + first + c * lanes_, static_cast<size_t>(some.count) * sizeof(float));
      }
      gemm(padded, lanes, size, size, lanes, lanes, false, some.prompt.keys + head * padded * size, piece_, scores_);
      t5_kernels().softmax({scores_, some.mask, some.bias == nullptr ? nullptr : some.bias + head * some.bias_stride,
                            p_.tokens, padded, lanes, sum_});
      gemm(size, lanes, padded, padded, lanes, lanes, false, some.prompt.values + head * padded * size, scores_,
           part_);
      for (int64_t c = 0; c < size; ++c) {
        for (int64_t i = 0; i < some.count; ++i) mixed_[first + c * lanes_ + i] = part_[c * lanes + i] / sum_[i];
      }
    }
  }

  const T5Pass& p_;
  const T5Sizes& s_;
  const int64_t count_, lanes_;
  float *x_, *normed_, *query_, *mixed_, *rows_, *hidden_, *gate_, *scores_, *piece_, *part_, *sum_, *alone_;
  std::vector<float> scratch_;
  std::vector<const float*> own_keys_, own_values_;
};

// Encodes prompts one after the other, in memory for one.
class Encoder {
 public:
  Encoder(const T5Pass& pass, const float* embedded, const float* bias, float* encoded, int64_t threads)
      : p_(pass), s_(pass.sizes), embedded_(embedded), bias_(bias), encoded_(encoded), padded_(pass.padded()),
        size_(round_up(block_size(pass.tokens, threads), kT5Lanes)),
        blocks_((pass.tokens + size_ - 1) / size_) {
    const int64_t cache = s_.inner() * padded_;
    states_ = memory_.reserve(s_.width * padded_ + 4 * cache);
    for (int i = 0; i < 2; ++i) {
      keys_[i] = states_ + s_.width * padded_ + 2 * i * cache;
      values_[i] = keys_[i] + cache;
    }
  }

  // `parallel` runs the blocks of one layer.
  void run(int64_t prompt, const Parallel& parallel) {
    const int64_t first_row = prompt * p_.tokens, count = static_cast<int64_t>(p_.layers.size());
    for (int64_t layer = -1; layer < count; ++layer) {  // -1: keys and values of the first
      parallel(blocks_, [&](int64_t begin, int64_t end) {
        for (int64_t number = begin; number < end; ++number) {
          const int64_t first = number * size_;
          Block block(p_, std::min(size_, p_.tokens - first));
          const int64_t row = (first_row + first) * s_.width;
          float* const states = states_ + s_.width * first;
          if (layer < 0) {
            block.load(embedded_ + row);
          } else {
            block.resume(states);
            const T5Keys keys{keys_[layer % 2], values_[layer % 2]};
            const int64_t stride = padded_ + p_.tokens - 1;
            block.attend(p_.layers[layer].own, {{0, std::min(size_, p_.tokens - first), keys,
                                                 p_.mask + first_row, bias_ + first + p_.tokens - 1, stride}});
            block.feed_forward(p_.layers[layer].feed);
          }
          if (layer + 1 == count) {
            block.finish(p_.final_norm, encoded_ + row);
            continue;
          }
          const T5Attention& next = p_.layers[layer + 1].own;
          block.norm(next.norm);
          block.write_keys(next.key, next.value, block.normed(), first, keys_[(layer + 1) % 2],
                           values_[(layer + 1) % 2]);
          block.suspend(states);
        }
      });
    }
  }

 private:
  const T5Pass& p_;
  const T5Sizes& s_;
  const float *embedded_, *bias_;
  float* encoded_;
  const int64_t padded_, size_, blocks_;
  Floats memory_;
  float *states_, *keys_[2], *values_[2];
};

}  // namespace

void t5_encode(const T5Pass& pass, const float* embedded, const float* bias, float* encoded) {
  const Parallel alone = [](int64_t items, const std::function<void(int64_t, int64_t)>& body) { body(0, items); };
  // Whole prompts per thread as far as they divide evenly; all threads share the rest, layer by layer.
  const int64_t shared = pass.prompts % pass.threads, apart = pass.prompts - shared;
  pass.parallel(apart, [&](int64_t begin, int64_t end) {
    Encoder encoder(pass, embedded, bias, encoded, 1);
    for (int64_t prompt = begin; prompt < end; ++prompt) encoder.run(prompt, alone);
  });
  if (shared == 0) return;
  Encoder encoder(pass, embedded, bias, encoded, pass.threads);
  for (int64_t prompt = apart; prompt < pass.prompts; ++prompt) encoder.run(prompt, pass.parallel);
}

void t5_prompt(const T5Pass& pass, const float* encoded, float* keys, float* values) {
  const T5Sizes& s = pass.sizes;
  const int64_t threads = pass.prompts < pass.threads ? pass.threads : 1;
  const int64_t size = round_up(block_size(pass.tokens, threads), kT5Lanes);
  const int64_t blocks = (pass.tokens + size - 1) / size, cache = s.inner() * pass.padded();
  pass.parallel(pass.prompts * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      const int64_t prompt = number / blocks, first = number % blocks * size;
      Block block(pass, std::min(size, pass.tokens - first));
      block.load(encoded + (prompt * pass.tokens + first) * s.width);
      for (size_t layer = 0; layer < pass.layers.size(); ++layer) {
        const T5Attention& cross = pass.layers[layer].cross;
        const int64_t at = (static_cast<int64_t>(layer) * pass.prompts + prompt) * cache;
        block.write_keys(cross.key, cross.value, block.states(), first, keys + at, values + at);
      }
    }
  });
}

void t5_step(const T5Pass& pass, const T5Step& step) {
  const T5Sizes& s = pass.sizes;
  const int64_t size = block_size(step.rows, pass.threads), blocks = (step.rows + size - 1) / size;
  const int64_t beams = step.rows / pass.prompts, cache = s.inner() * pass.padded();
  pass.parallel(blocks, [&](int64_t begin, int64_t end) {
    std::vector<Queries> queries;
    for (int64_t number = begin; number < end; ++number) {
      const int64_t first = number * size, last = std::min(first + size, step.rows);
      Block block(pass, last - first);
      block.load(step.embedded + first * s.width);
      for (int64_t layer = 0; layer < static_cast<int64_t>(pass.layers.size()); ++layer) {
        const T5Layer& weights = pass.layers[layer];
        block.attend_own(weights.own, step, layer, first);
        queries.clear();
        for (int64_t row = first; row < last;) {
          const int64_t prompt = row / beams, end_row = std::min(last, (prompt + 1) * beams);
          const int64_t at = (layer * pass.prompts + prompt) * cache;
          queries.push_back({row - first, end_row - row, {step.keys + at, step.values + at},
                             pass.mask + prompt * pass.tokens, nullptr, 0});
          row = end_row;
        }
        block.attend(weights.cross, queries);
        block.feed_forward(weights.feed);
      }
      block.finish(pass.final_norm, step.hidden + first * s.width);
    }
  });
}

}  // namespace gflowgr
