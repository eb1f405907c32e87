#include "gpt2/gpt2_cpu.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "common/gemm_cpu.h"
#include "gpt2/gpt2_kernels_cpu.h"

namespace gflowgr {
namespace {

size_t bytes(int64_t floats) { return static_cast<size_t>(floats) * sizeof(float); }

// Rows of a block that attend to the same prompt.
struct Queries {
  int64_t begin, count;
  const float *keys, *values;  // of the prompt [heads, size, S16] and [S16, width]
  int64_t seen;                // keys of it, a multiple of 16
  const float* mask;           // [seen], or [count, seen] with stride `seen`
  int64_t mask_stride;
};

// The activations of some tokens, taken through the layers on one thread.
class Block {
 public:
  // `most`: queries of one prompt; `steps`: tokens of its own that a row attends to.
  Block(const Gpt2Pass& pass, int64_t count, int64_t most, int64_t steps)
      : s_(pass.sizes), padded_(pass.padded), count_(count), steps_(steps),
        stride_(pass.padded + round_up(steps, kGroup)) {
    const int64_t tile = std::min(s_.hidden, kHiddenTile);
    // Kept per thread: fresh pages on every call would cost as much as a layer.
    thread_local Floats memory;
    float* at = memory.reserve((3 * s_.width + s_.all() + tile) * count_ + (stride_ + padded_) * most);
    const auto take = [&](int64_t floats) { return std::exchange(at, at + floats); };
    x_ = take(s_.width * count_);
    normed_ = take(s_.width * count_);
    mixed_ = take(s_.width * count_);
    all_ = take(s_.all() * count_);
    hidden_ = take(tile * count_);
    scores_ = take(stride_ * most);
    masks_ = take(padded_ * most);
    keys_.resize(static_cast<size_t>(steps_));
    values_.resize(static_cast<size_t>(steps_));
  }

  void load(const float* x) { std::memcpy(x_, x, bytes(s_.width * count_)); }
  // Between the layers of a prompt: the states, and the next layer's queries, keys and values.
  void resume(const float* x, const float* all) {
    load(x);
    std::memcpy(all_, all, bytes(s_.all() * count_));
  }
  void suspend(float* x, float* all) const {
    std::memcpy(x, x_, bytes(s_.width * count_));
    std::memcpy(all, all_, bytes(s_.all() * count_));
  }

  void project(const Gpt2Layer& weights) {
    norm(weights.attention_norm, normed_);
    affine(weights.all, normed_, s_.all(), s_.all(), all_);
  }
  void finish(const Gpt2Affine& weights, float* to) const { norm(weights, to); }

  const float* key(int64_t row) const { return all_ + row * s_.all() + s_.width; }
  const float* value(int64_t row) const { return all_ + row * s_.all() + 2 * s_.width; }

  // Masks for rows of one prompt, of which row i sees, besides itself, what is before token `first + i`.
  const float* causal(const float* mask, int64_t first, int64_t seen) {
    for (int64_t row = 0; row < count_; ++row) {
      float* const to = masks_ + row * seen;
      std::memcpy(to, mask, bytes(first + row));
      std::fill(to + first + row, to + seen, -std::numeric_limits<float>::infinity());
    }
    return masks_;
  }

  // What is left of a layer after its projection. gather(row, keys, values) finds a row's own earlier tokens.
  template <typename Gather>
  void complete(const Gpt2Layer& weights, const std::vector<Queries>& queries, const Gather& gather) {
    for (const Queries& some : queries) attend(some, gather);
    add_bias(weights.out.bias);
    gemm(count_, s_.width, s_.width, s_.width, s_.width, s_.width, true, mixed_, weights.out.weight, x_);
    norm(weights.feed_norm, normed_);
    add_bias(weights.back.bias);
    for (int64_t first = 0; first < s_.hidden; first += kHiddenTile) {
      const int64_t tile = std::min(kHiddenTile, s_.hidden - first);
      affine({weights.in.weight + first, weights.in.bias + first}, normed_, tile, s_.hidden, hidden_);
      t5_kernels().activate(s_.activation, hidden_, nullptr, tile * count_);
      gemm(count_, s_.width, tile, tile, s_.width, s_.width, true, hidden_, weights.back.weight + first * s_.width, x_);
    }
  }

 private:
  void norm(const Gpt2Affine& weights, float* to) const {
    for (int64_t row = 0; row < count_; ++row) {
      gpt2_kernels().norm(x_ + row * s_.width, weights.weight, weights.bias, s_.epsilon, s_.width, to + row * s_.width);
    }
  }

  // to [count, columns] = from [count, width] weight + bias; `stride`: of the weight's rows.
  void affine(const Gpt2Affine& weights, const float* from, int64_t columns, int64_t stride, float* to) const {
    for (int64_t row = 0; row < count_; ++row) std::memcpy(to + row * columns, weights.bias, bytes(columns));
    gemm(count_, columns, s_.width, s_.width, stride, columns, true, from, weights.weight, to);
  }

  void add_bias(const float* bias) const {
    for (int64_t row = 0; row < count_; ++row) gpt2_kernels().add(x_ + row * s_.width, bias, s_.width);
  }

  // mixed = attention of the queries to their prompt and their own tokens, the newest being themselves.
  template <typename Gather>
  void attend(const Queries& some, const Gather& gather) {
    for (int64_t head = 0; head < s_.heads; ++head) {
      const int64_t offset = head * s_.size;
      const float* const query = all_ + some.begin * s_.all() + offset;
      float* const mixed = mixed_ + some.begin * s_.width + offset;
      gemm(some.count, some.seen, s_.size, s_.all(), padded_, stride_, false, query, some.keys + offset * padded_,
           scores_);
      for (int64_t i = 0; i < some.count; ++i) {
        const int64_t row = some.begin + i;
        gather(row, keys_.data(), values_.data());
        keys_[steps_ - 1] = key(row);
        values_[steps_ - 1] = value(row);
        gpt2_kernels().attend({scores_ + i * stride_, some.mask + i * some.mask_stride, some.seen, s_.scaling,
                               query + i * s_.all(), keys_.data(), values_.data(), offset, steps_, s_.size,
                               mixed + i * s_.width});
      }
      gemm(some.count, s_.size, some.seen, stride_, s_.width, s_.width, true, scores_, some.values + offset, mixed);
    }
  }

  const Gpt2Sizes& s_;
  const int64_t padded_, count_, steps_, stride_;
  float *x_, *normed_, *mixed_, *all_, *hidden_, *scores_, *masks_;
  std::vector<const float*> keys_, values_;
};

// Takes prompts through the layers, one after the other, in memory for one.
class Prompts {
 public:
  Prompts(const Gpt2Pass& pass, int64_t tokens, const float* embedded, const int64_t* last, float* keys, float* values,
          float* hidden, int64_t threads)
      : p_(pass), s_(pass.sizes), tokens_(tokens), embedded_(embedded), last_(last), keys_(keys), values_(values),
        hidden_(hidden), size_(ceil_div(tokens, std::max(threads, ceil_div(tokens, kBlockTokens)))),
        blocks_(ceil_div(tokens, size_)) {
    states_ = memory_.reserve((s_.width + s_.all()) * tokens);
    all_ = states_ + s_.width * tokens;
  }

  // `parallel` runs the blocks of one layer.
  void run(int64_t prompt, const Parallel& parallel) {
    const auto layers = static_cast<int64_t>(p_.layers.size());
    for (int64_t layer = -1; layer + 1 < layers; ++layer) {  // -1: keys and values of the first
      parallel(blocks_, [&](int64_t begin, int64_t end) {
        for (int64_t number = begin; number < end; ++number) advance(prompt, layer, number * size_);
      });
    }
    // Of the last layer no more than one token's state is wanted.
    const int64_t row = last_[prompt], seen = round_up(row + 1, kGroup);
    Block block(p_, 1, 1, 1);
    block.resume(states_ + row * s_.width, all_ + row * s_.all());
    block.complete(p_.layers.back(), {queries(block, prompt, layers - 1, row, 1, seen)}, none);
    block.finish(p_.last_norm, hidden_ + prompt * s_.width);
  }

 private:
  // A row of a prompt has no earlier tokens beside the prompt's.
  static void none(int64_t, const float**, const float**) {}

  Queries queries(Block& block, int64_t prompt, int64_t layer, int64_t first, int64_t count, int64_t seen) const {
    const int64_t at = p_.at(layer, prompt);
    return {0, count, keys_ + at, values_ + at, seen, block.causal(p_.mask + prompt * p_.padded, first, seen), seen};
  }

  // Some tokens through a layer, and their keys and values of the next.
  void advance(int64_t prompt, int64_t layer, int64_t first) {
    const int64_t count = std::min(size_, tokens_ - first);
    float* const states = states_ + first * s_.width;
    float* const all = all_ + first * s_.all();
    Block block(p_, count, count, 1);
    if (layer < 0) {
      block.load(embedded_ + (prompt * tokens_ + first) * s_.width);
    } else {
      block.resume(states, all);
      const int64_t seen = round_up(first + count, kGroup);
      block.complete(p_.layers[layer], {queries(block, prompt, layer, first, count, seen)}, none);
    }
    block.project(p_.layers[layer + 1]);
    const int64_t at = p_.at(layer + 1, prompt);
    for (int64_t row = 0; row < count; ++row) {
      const float* const key = block.key(row);
      for (int64_t c = 0; c < s_.width; ++c) keys_[at + c * p_.padded + first + row] = key[c];
      std::memcpy(values_ + at + (first + row) * s_.width, block.value(row), bytes(s_.width));
    }
    block.suspend(states, all);
  }

  const Gpt2Pass& p_;
  const Gpt2Sizes& s_;
  const int64_t tokens_;
  const float* embedded_;
  const int64_t* last_;
  float *keys_, *values_, *hidden_;
  const int64_t size_, blocks_;
  Floats memory_;
  float *states_, *all_;
};

// Which beams a block has: those of whole prompts, or a part of one prompt's. So all blocks but the last ask for
// products of the same sizes: the library makes code for each size.
struct Blocks {
  int64_t count, prompts, parts, part;  // prompts of a block, or 1 and parts of a prompt of so many beams

  static Blocks of(const Gpt2Pass& pass, int64_t beams) {
    const int64_t whole = kBlockTokens / beams;
    if (whole > 0 && pass.prompts >= pass.threads) {
      const int64_t prompts = std::min(whole, ceil_div(pass.prompts, pass.threads));
      return {ceil_div(pass.prompts, prompts), prompts, 1, beams};
    }
    const int64_t wanted = std::max(ceil_div(beams, kBlockTokens), ceil_div(pass.threads, pass.prompts));
    const int64_t part = ceil_div(beams, wanted), parts = ceil_div(beams, part);
    return {pass.prompts * parts, 1, parts, part};
  }
};

}  // namespace

void gpt2_prompt(const Gpt2Pass& pass, int64_t tokens, const float* embedded, const int64_t* last, float* keys,
                 float* values, float* hidden) {
  const Gpt2Sizes& s = pass.sizes;
  const auto layers = static_cast<int64_t>(pass.layers.size());
  if (tokens < pass.padded) {  // what is beyond the prompts is multiplied by 0, and so must be finite
    for (int64_t layer = 0; layer < layers; ++layer) {
      for (int64_t prompt = 0; prompt < pass.prompts; ++prompt) {
        const int64_t at = pass.at(layer, prompt);
        std::fill(values + at + tokens * s.width, values + at + pass.padded * s.width, 0.0f);
        for (int64_t c = 0; c < s.width; ++c) {
          std::fill(keys + at + c * pass.padded + tokens, keys + at + (c + 1) * pass.padded, 0.0f);
        }
      }
    }
  }
  if (pass.prompts < pass.threads) {  // all threads share each prompt, layer by layer
    Prompts prompts(pass, tokens, embedded, last, keys, values, hidden, pass.threads);
    for (int64_t prompt = 0; prompt < pass.prompts; ++prompt) prompts.run(prompt, pass.parallel);
    return;
  }
  const Parallel alone = [](int64_t items, const std::function<void(int64_t, int64_t)>& body) { body(0, items); };
  pass.parallel(pass.prompts, [&](int64_t begin, int64_t end) {
    Prompts prompts(pass, tokens, embedded, last, keys, values, hidden, 1);
    for (int64_t prompt = begin; prompt < end; ++prompt) prompts.run(prompt, alone);
  });
}

void gpt2_step(const Gpt2Pass& pass, const Gpt2Step& step) {
  const Gpt2Sizes& s = pass.sizes;
  const Blocks blocks = Blocks::of(pass, step.beams);
  const int64_t rows = pass.prompts * step.beams, steps = static_cast<int64_t>(step.past.stored.size()) + 1;
  pass.parallel(blocks.count, [&](int64_t begin, int64_t end) {
    std::vector<Queries> queries;
    for (int64_t number = begin; number < end; ++number) {
      const int64_t prompt = number / blocks.parts * blocks.prompts, beam = number % blocks.parts * blocks.part;
      const int64_t prompts = std::min(blocks.prompts, pass.prompts - prompt);
      const int64_t beams = std::min(blocks.part, step.beams - beam), count = prompts * beams;
      const int64_t first = prompt * step.beams + beam;
      Block block(pass, count, beams, steps);
      block.load(step.embedded + first * s.width);
      for (int64_t layer = 0; layer < static_cast<int64_t>(pass.layers.size()); ++layer) {
        block.project(pass.layers[layer]);
        float* const keys = step.stored + 2 * layer * rows * s.width;
        for (int64_t row = 0; row < count; ++row) {
          float* const key = keys + (first + row) * s.width;
          std::memcpy(key, block.key(row), bytes(s.width));
          std::memcpy(key + rows * s.width, block.value(row), bytes(s.width));
        }
        queries.clear();
        for (int64_t i = 0; i < prompts; ++i) {
          const int64_t at = pass.at(layer, prompt + i);
          queries.push_back({i * beams, beams, step.keys + at, step.values + at, pass.padded,
                             pass.mask + (prompt + i) * pass.padded, 0});
        }
        block.complete(pass.layers[layer], queries, [&](int64_t row, const float** own_keys, const float** own_values) {
          for (int64_t t = 0; t + 1 < steps; ++t) {
            const int64_t there = step.past.rows[t];
            own_keys[t] = step.past.stored[t] + (2 * layer * there + step.past.ancestors[t][first + row]) * s.width;
            own_values[t] = own_keys[t] + there * s.width;
          }
        });
      }
      block.finish(pass.last_norm, step.hidden + first * s.width);
    }
  });
}

}  // namespace gflowgr
