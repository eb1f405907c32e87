// The logits that a step needs, from hidden states: beams of all prompts at the same node (for a codebook:
// at the same depth) need the same rows of the head and share them. At the root that is one dense product,
// deeper down many small ones; where the children are many, a dense product with the part of the codebook
// that holds them all is faster. How the work is cut does not depend on the number of threads.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

#include "beam_step/beam_step_cpu.h"
#include "common/convert_cpu.h"
#include "common/gemm_cpu.h"
#include "logprobs_children/children_kernels.h"
#include "logprobs_dense/dense_pack_cpu.h"
#include "tree/tree_view_cpu.h"

namespace gflowgr {
namespace {

constexpr int64_t kTaskBeams = 32, kTaskTokens = 64;
constexpr int64_t kDenseBeams = 8;  // fewer are multiplied one by one: packing would cost more
constexpr int64_t kFewCost = 3;     // of such a product, in dense ones

// Beams that need the logits of the same tokens.
struct Group {
  int64_t begin, end;    // into the sorted beams
  int64_t depth, node;   // children of `node`, or the first of the codebook of `depth` where node is -1
  int64_t tokens;        // how many
  int64_t at;            // logits [end - begin, tokens]
};

// Part of a group.
struct Task {
  int64_t group, beam_begin, beam_end, token_begin, token_end;
};

class NeededLogits {
 public:
  NeededLogits(BeamStepPass& pass, const BeamHead& head)
      : p_(pass), head_(head), tree_(pass.tree), tiles_(tile_kernels()) {
    make_groups();
    make_tasks();
  }

  void run() {
    logits_ = allocate<float>(size_);
    p_.parallel(static_cast<int64_t>(tasks_.size()), [&](int64_t begin, int64_t end) {
      Scratch scratch;
      const int64_t padded = round_up(kTaskBeams, kGroup);
      scratch.head = allocate<float>(kTaskTokens * head_.width);
      scratch.states = allocate<float>(padded * head_.width);
      scratch.packed = allocate<float>(padded * head_.width);
      scratch.tile = allocate<float>(kTaskTokens * padded);
      for (int64_t i = begin; i < end; ++i) one_task(tasks_[i], scratch);
    });
    p_.logits = logits_.get();
    p_.logits_type = Dtype::float32;
    p_.offsets = offsets_.data();
    p_.layout = by_node_ ? LogitLayout::children : LogitLayout::codebook;
  }

 private:
  // Buffers of one thread.
  struct Scratch {
    Buffer<float> head, states, packed, tile;
    std::vector<int64_t> tokens;
    std::vector<const float*> head_rows, state_rows;
  };

  using Keyed = std::vector<std::pair<int64_t, int64_t>>;  // node or depth, beam

  void make_groups() {
    const int64_t count = p_.prompts * p_.beams;
    offsets_.assign(count, 0);
    Keyed keyed;
    for (int64_t row = 0; row < count; ++row) {
      const int64_t node = p_.nodes[row];
      const NodeRange range = tree_.children(node);
      if (p_.scores[row] == -std::numeric_limits<float>::infinity() || range.size() == 0) continue;
      // Tokens ascend: no row of the head is read because a header says that it is there.
      if (tree_.token(tree_.depth(node), range.end - 1) >= p_.vocabulary) {
        throw std::out_of_range("the tree holds tokens beyond the vocabulary");
      }
      keyed.emplace_back(p_.normalize == Normalize::children ? node : tree_.depth(node), row);
    }
    std::sort(keyed.begin(), keyed.end());
    std::vector<int64_t> codes(tree_.levels(), 0);  // of each codebook, how many from the first on
    by_node_ = p_.normalize == Normalize::children && !dense_is_faster(keyed, codes);
    if (p_.normalize == Normalize::level) {
      for (int64_t depth = 0; depth < tree_.levels(); ++depth) {
        codes[depth] = p_.codebook_ends[depth] - tree_.level(depth)[kTokenBase];
      }
    }
    const auto used = static_cast<int64_t>(keyed.size());
    beams_.resize(used);
    for (int64_t begin = 0, end = 0; begin < used; begin = end) {
      const int64_t node = by_node_ ? keyed[begin].first : -1;
      const int64_t depth = tree_.depth(p_.nodes[keyed[begin].second]);
      const int64_t tokens = by_node_ ? tree_.children(node).size() : codes[depth];
      Group group{begin, begin, depth, node, tokens, size_};
      for (; end < used && same_group(group, keyed[end]); ++end) {
        beams_[end] = keyed[end].second;
        offsets_[beams_[end]] = size_;
        size_ += tokens;
      }
      group.end = end;
      groups_.push_back(group);
    }
  }

  bool same_group(const Group& group, const std::pair<int64_t, int64_t>& beam) const {
    return by_node_ ? beam.first == group.node : tree_.depth(p_.nodes[beam.second]) == group.depth;
  }

  // Whether to multiply, instead of the children of each node, the codebooks up to the last one in use.
  bool dense_is_faster(const Keyed& keyed, std::vector<int64_t>& codes) const {
    int64_t sparse = 0, dense = 0;
    const auto used = static_cast<int64_t>(keyed.size());
    std::vector<int64_t> beams(codes.size(), 0);
    for (int64_t begin = 0, end = 0; begin < used; begin = end) {
      const int64_t node = keyed[begin].first, depth = tree_.depth(node);
      while (end < used && keyed[end].first == node) ++end;
      const NodeRange range = tree_.children(node);
      sparse += (end - begin) * range.size() * (end - begin < kDenseBeams ? kFewCost : 1);
      beams[depth] += end - begin;
      const int64_t last = tree_.token(depth, range.end - 1) - tree_.level(depth)[kTokenBase];
      codes[depth] = std::max(codes[depth], last + 1);
    }
    bool enough = true;
    for (size_t depth = 0; depth < codes.size(); ++depth) {
      dense += beams[depth] * codes[depth];
      enough = enough && (beams[depth] == 0 || beams[depth] >= kDenseBeams);
    }
    return enough && dense < sparse && gemm_float_available();
  }

  void make_tasks() {
    for (int64_t g = 0; g < static_cast<int64_t>(groups_.size()); ++g) {
      const Group& group = groups_[g];
      for (int64_t beam = group.begin; beam < group.end; beam += kTaskBeams) {
        for (int64_t token = 0; token < group.tokens; token += kTaskTokens) {
          tasks_.push_back({g, beam, std::min(beam + kTaskBeams, group.end), token,
                            std::min(token + kTaskTokens, group.tokens)});
        }
      }
    }
  }

  void one_task(const Task& task, Scratch& s) const {
    const Group& group = groups_[task.group];
    find_tokens(group, task.token_begin, task.token_end, s.tokens);
    const int64_t beams = task.beam_end - task.beam_begin, count = task.token_end - task.token_begin;
    float* const to = logits_.get() + group.at + (task.beam_begin - group.begin) * group.tokens + task.token_begin;
    if (beams >= kDenseBeams && gemm_float_available()) {
      dense(task, count, beams, s, to, group.tokens);
    } else {
      few(task, count, beams, s, to, group.tokens);
    }
    if (head_.bias == nullptr) return;
    for (int64_t i = 0; i < beams; ++i) {
      for (int64_t j = 0; j < count; ++j) to[i * group.tokens + j] += head_.bias[s.tokens[j]];
    }
  }

  void find_tokens(const Group& group, int64_t begin, int64_t end, std::vector<int64_t>& tokens) const {
    tokens.resize(end - begin);
    const int64_t first = group.node < 0 ? 0 : tree_.children(group.node).begin;
    const int64_t base = tree_.level(group.depth)[kTokenBase];
    for (int64_t i = begin; i < end; ++i) {
      tokens[i - begin] = group.node < 0 ? base + i : tree_.token(group.depth, first + i);
    }
  }

  const void* row(const void* matrix, Dtype type, int64_t index) const {
    return element(matrix, type, index * head_.width);
  }

  void few(const Task& task, int64_t count, int64_t beams, Scratch& s, float* to, int64_t stride) const {
    s.head_rows.resize(count);
    s.state_rows.resize(beams);
    for (int64_t j = 0; j < count; ++j) {
      const void* const from = row(head_.weight, head_.weight_type, s.tokens[j]);
      s.head_rows[j] = widened(from, head_.weight_type, s.head.get() + j * head_.width);
    }
    for (int64_t i = 0; i < beams; ++i) {
      const void* const from = row(head_.hidden, head_.hidden_type, beams_[task.beam_begin + i]);
      s.state_rows[i] = widened(from, head_.hidden_type, s.states.get() + i * head_.width);
    }
    children_kernels().dots(s.state_rows.data(), beams, s.head_rows.data(), count, head_.width, to, stride);
  }

  const float* widened(const void* from, Dtype type, float* copy) const {
    if (type == Dtype::float32) return static_cast<const float*>(from);
    widen(from, type, head_.width, copy);
    return copy;
  }

  void dense(const Task& task, int64_t count, int64_t beams, Scratch& s, float* to, int64_t stride) const {
    const int64_t width = head_.width, padded = round_up(beams, kGroup);
    pack_states<float>(tiles_, Rows{head_.hidden, head_.hidden_type, width}, beams_.data() + task.beam_begin,
                       beams, padded, s.states.get(), s.packed.get());
    const float* left;
    if (head_.weight_type == Dtype::float32 && s.tokens[count - 1] - s.tokens[0] == count - 1) {
      left = static_cast<const float*>(row(head_.weight, Dtype::float32, s.tokens[0]));
    } else {
      for (int64_t j = 0; j < count; ++j) {
        widen(row(head_.weight, head_.weight_type, s.tokens[j]), head_.weight_type, width,
                     s.head.get() + j * width);
      }
      left = s.head.get();
    }
    for (int64_t k = 0; k < width; k += kDepth) {
      gemm(count, padded, std::min(kDepth, width - k), width, padded, padded, k > 0, left + k,
           s.packed.get() + k * padded, s.tile.get());
    }
    tiles_.transpose(reinterpret_cast<const uint32_t*>(s.tile.get()), padded, count, beams,
                     reinterpret_cast<uint32_t*>(to), stride);
  }

  BeamStepPass& p_;
  const BeamHead& head_;
  const TreeView tree_;
  const TileKernels& tiles_;
  std::vector<int64_t> beams_;    // those that need logits, by what they need
  std::vector<int64_t> offsets_;  // of every beam's logits
  std::vector<Group> groups_;
  std::vector<Task> tasks_;
  int64_t size_ = 0;
  bool by_node_ = false;
  Buffer<float> logits_;
};

}  // namespace

void run_beam_step_hidden(BeamStepPass& pass, const BeamHead& head) {
  NeededLogits needed(pass, head);
  needed.run();
  run_beam_step(pass);
}

}  // namespace gflowgr
