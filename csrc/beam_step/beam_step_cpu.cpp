// Per prompt, beam after beam: the normaliser (a log-sum-exp over a row of logits), the children's scores,
// and a comparison of them, a register at a time, with the worst score that is still kept. Better ones pass the
// masks and enter a list, which is cut to the best `width` whenever it is full. A key is score and number of the
// candidate in one integer; candidates are numbered by beam, then by child, so equal scores keep that order.
#include "beam_step/beam_step_cpu.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "beam_step/beam_kernels_cpu.h"
#include "tree/tree_view_cpu.h"

#if defined(__GNUC__) || defined(__clang__)
#define GFLOWGR_PREFETCH(address) __builtin_prefetch(address)
#else
#define GFLOWGR_PREFETCH(address) (void)(address)
#endif

namespace gflowgr {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr uint32_t kNaNRank = 0xFFFFFFFFu;  // NaN comes first

// Order of floats as unsigned integers; -0 equals 0.
uint32_t rank_of(float score) {
  if (std::isnan(score)) return kNaNRank;
  score += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

float score_of(uint32_t rank) {
  if (rank == kNaNRank) return std::numeric_limits<float>::quiet_NaN();
  const uint32_t bits = rank & 0x80000000u ? rank & 0x7FFFFFFFu : ~rank;
  float score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}

// The best candidates so far: some more are kept than wanted, and cut when there is no room left.
class Best {
 public:
  explicit Best(int64_t width) : width_(static_cast<size_t>(width)), room_(std::max<size_t>(64, 4 * width_)) {
    keys_.reserve(room_);
  }

  void clear() {
    keys_.clear();
    threshold_ = -kInfinity;
  }

  // What is not above it cannot enter: a candidate with the same score comes later.
  float threshold() const { return threshold_; }

  void offer(float score, uint32_t number) {
    if (score <= threshold_) return;
    keys_.push_back(static_cast<uint64_t>(rank_of(score)) << 32 | ~number);
    if (keys_.size() == room_) cut();
  }

  const std::vector<uint64_t>& sorted() {
    if (keys_.size() > width_) cut();
    std::sort(keys_.begin(), keys_.end(), std::greater<uint64_t>());
    return keys_;
  }

 private:
  void cut() {
    const auto last = keys_.begin() + static_cast<ptrdiff_t>(width_) - 1;
    std::nth_element(keys_.begin(), last, keys_.end(), std::greater<uint64_t>());
    threshold_ = score_of(static_cast<uint32_t>(*last >> 32));
    keys_.resize(width_);
  }

  size_t width_, room_;
  std::vector<uint64_t> keys_;
  float threshold_ = -kInfinity;
};

// The sorted keys of one set that are in first..last - 1.
struct Keys {
  const int64_t* begin;
  const int64_t* end;

  Keys within(int64_t first, int64_t last) const {
    if (begin == end) return *this;
    const int64_t* const low = std::lower_bound(begin, end, first);
    return {low, std::lower_bound(low, end, last)};
  }
  bool has(int64_t key) const { return begin != end && std::binary_search(begin, end, key); }
};

class Step {
 public:
  explicit Step(const BeamStepPass& pass)
      : p_(pass),
        tree_(pass.tree),
        kernels_(beam_kernels()),
        scale_(static_cast<float>(1.0 / pass.temperature)),
        restricted_(pass.live != nullptr || pass.barred != nullptr) {
    int64_t most = 0;
    for (int64_t depth = 0; depth < tree_.levels(); ++depth) {
      most = std::max(most, tree_.level(depth)[kMaxChildren]);
    }
    if (p_.beams > 0 && most > static_cast<int64_t>(UINT32_MAX) / p_.beams) {
      throw std::length_error("too many beams for nodes with so many children");
    }
  }

  void run() {
    const int64_t rows = p_.prompts * p_.beams;
    // Few prompts per thread: divide the beams of each prompt.
    if (p_.normalize != Normalize::children && p_.threads > 1 && p_.prompts < 2 * p_.threads &&
        rows * p_.vocabulary > kSharedWork) {
      normalisers_.resize(rows);
      p_.parallel(rows, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          if (!empty(row)) normalisers_[row] = normaliser(row, tree_.depth(p_.nodes[row]), nullptr, 0);
        }
      });
    }
    p_.parallel(p_.prompts, [&](int64_t begin, int64_t end) {
      Scratch scratch(p_);
      for (int64_t prompt = begin; prompt < end; ++prompt) one_prompt(prompt, scratch);
    });
    if (beyond_) throw std::out_of_range("the tree holds tokens beyond the vocabulary");
  }

 private:
  static constexpr int64_t kSharedWork = 1 << 16;  // logits; about 20 us
  static constexpr int64_t kPrefetched = 8;        // children of a beam
  static constexpr int64_t kLine = 64;             // bytes

  // Buffers of one thread.
  struct Scratch {
    explicit Scratch(const BeamStepPass& pass)
        : open(pass.width), ended(pass.width), ranges(pass.beams), first(pass.beams + 1), depth(pass.beams) {}

    Best open, ended;
    std::vector<NodeRange> ranges;
    std::vector<uint32_t> first;  // number of each beam's first candidate, and of all
    std::vector<int64_t> depth;
    std::vector<float> logits, scores;
  };

  bool empty(int64_t row) const {
    return p_.nodes[row] < 0 || p_.nodes[row] >= tree_.nodes() || p_.scores[row] == -kInfinity;
  }

  const void* logits(int64_t row, int64_t first) const {
    const int64_t at = (p_.offsets != nullptr ? p_.offsets[row] : row * p_.vocabulary) + first;
    return element(p_.logits, p_.logits_type, at);
  }

  // Where the logit of the level's smallest token is.
  int64_t base(int64_t depth) const {
    return p_.layout == LogitLayout::vocabulary ? tree_.level(depth)[kTokenBase] : 0;
  }

  float normaliser(int64_t row, int64_t depth, const float* children, int64_t count) const {
    if (p_.normalize == Normalize::vocab) {
      return kernels_.log_sum_exp(logits(row, 0), p_.logits_type, p_.vocabulary, p_.temperature);
    }
    if (p_.normalize == Normalize::children) {
      return kernels_.log_sum_exp(children, Dtype::float32, count, p_.temperature);
    }
    if (depth >= tree_.levels()) return 0.0f;  // a node without children
    const int64_t size = p_.codebook_ends[depth] - tree_.level(depth)[kTokenBase];
    return kernels_.log_sum_exp(logits(row, base(depth)), p_.logits_type, size, p_.temperature);
  }

  void one_prompt(int64_t prompt, Scratch& s) const {
    s.open.clear();
    s.ended.clear();
    find_children(prompt, s);
    const int64_t nodes = tree_.nodes();
    const Keys barred = Keys{p_.barred, p_.barred + p_.barred_count}.within(prompt * nodes, (prompt + 1) * nodes);
    for (int64_t beam = 0; beam < p_.beams; ++beam) {
      if (s.ranges[beam].size() > 0) one_beam(prompt, beam, barred, s);
    }
    write(s.open.sorted(), s, p_.best_scores + prompt * p_.width, p_.best_parents + prompt * p_.width,
          p_.best_tokens + prompt * p_.width, p_.best_nodes + prompt * p_.width);
    write(s.ended.sorted(), s, p_.end_scores + prompt * p_.width, p_.end_parents + prompt * p_.width, nullptr,
          p_.end_nodes + prompt * p_.width);
  }

  // On a tree larger than the caches child ranges and tokens are misses: all of a prompt's at once.
  void find_children(int64_t prompt, Scratch& s) const {
    const int64_t* const nodes = p_.nodes + prompt * p_.beams;
    for (int64_t beam = 0; beam < p_.beams; ++beam) {
      if (!empty(prompt * p_.beams + beam)) GFLOWGR_PREFETCH(tree_.child_begin(nodes[beam]));
    }
    s.first[0] = 0;
    for (int64_t beam = 0; beam < p_.beams; ++beam) {
      s.ranges[beam] = empty(prompt * p_.beams + beam) ? NodeRange{0, 0} : tree_.children(nodes[beam]);
      s.first[beam + 1] = s.first[beam] + static_cast<uint32_t>(s.ranges[beam].size());
      if (s.ranges[beam].size() == 0) continue;
      s.depth[beam] = tree_.depth(nodes[beam]);
      // Tokens ascend: no logit is read because a header says that it is there.
      if (tree_.token(s.depth[beam], s.ranges[beam].end - 1) >= p_.vocabulary) {
        beyond_ = true;
        s.ranges[beam] = {0, 0};
        continue;
      }
      const uint8_t* const codes = tree_.codes(s.depth[beam], s.ranges[beam].begin);
      const int64_t bytes = s.ranges[beam].size() * tree_.level(s.depth[beam])[kTokenBytes];
      for (int64_t at = 0; at < std::min(bytes + kLine, 8 * kLine); at += kLine) {
        GFLOWGR_PREFETCH(codes + std::min(at, bytes - 1));
      }
      if (p_.live != nullptr) GFLOWGR_PREFETCH(p_.live + s.ranges[beam].begin);
    }
    // A few logits in each of many long rows are misses too; a whole row would be read anyway.
    if (p_.normalize != Normalize::children || p_.layout != LogitLayout::vocabulary) return;
    for (int64_t beam = 0; beam < p_.beams; ++beam) {
      const NodeRange range = s.ranges[beam];
      for (int64_t node = range.begin; node < std::min(range.end, range.begin + kPrefetched); ++node) {
        GFLOWGR_PREFETCH(logits(prompt * p_.beams + beam, tree_.token(s.depth[beam], node)));
      }
    }
  }

  void one_beam(int64_t prompt, int64_t beam, const Keys& barred, Scratch& s) const {
    const int64_t row = prompt * p_.beams + beam, depth = s.depth[beam];
    const NodeRange range = s.ranges[beam];
    const int64_t count = range.size();
    if (static_cast<int64_t>(s.scores.size()) < count) {
      s.logits.resize(count);
      s.scores.resize(count);
    }
    const float* x = s.logits.data();
    if (p_.layout == LogitLayout::children) {
      x = static_cast<const float*>(logits(row, 0));
    } else {
      kernels_.gather(logits(row, base(depth)), p_.logits_type, tree_.codes(depth, range.begin),
                      tree_.level(depth)[kTokenBytes], count, s.logits.data());
    }
    const float lse = normalisers_.empty() ? normaliser(row, depth, x, count) : normalisers_[row];
    if (lse == -kInfinity) return;  // every logit is: no child may be taken
    kernels_.add_scores(x, count, scale_, lse, p_.scores[row], s.scores.data());

    const bool deepest = depth + 1 == tree_.levels(), mixed = tree_.ragged() && !deepest;
    const int64_t root = prompt * tree_.nodes();  // of the prompt's keys
    const Keys gone = barred.within(root + range.begin, root + range.end);
    const float* const scores = s.scores.data();
    for (int64_t i = -1;;) {
      const float threshold = deepest ? s.ended.threshold()
                              : mixed ? std::min(s.open.threshold(), s.ended.threshold())
                                      : s.open.threshold();
      i = kernels_.find_above(scores, i + 1, count, threshold);
      if (i >= count) break;
      const int64_t node = range.begin + i;
      if (p_.live != nullptr && !p_.live[node]) continue;
      if (gone.has(root + node)) continue;
      // A forbidden token stays forbidden where the beam's score or the normaliser makes NaN of it.
      if (x[i] == -kInfinity && !std::isnan(lse)) continue;
      const uint32_t number = s.first[beam] + static_cast<uint32_t>(i);
      if (!deepest && (!mixed || goes_on(node, root, barred))) s.open.offer(scores[i], number);
      if (deepest || mixed) {
        if (may_end(prompt, node)) s.ended.offer(scores[i], number);
      }
    }
  }

  bool goes_on(int64_t node, int64_t root, const Keys& barred) const {
    const NodeRange range = tree_.children(node);
    if (range.size() == 0) return false;
    if (!restricted_ || tree_.leaf(node) < 0) return true;
    // An identifier ends here as well, and may be all that is left of the node.
    const Keys gone = barred.within(root + range.begin, root + range.end);
    for (int64_t child = range.begin; child < range.end; ++child) {
      if ((p_.live == nullptr || p_.live[child]) && !gone.has(root + child)) return true;
    }
    return false;
  }

  bool may_end(int64_t prompt, int64_t node) const {
    const int64_t leaf = tree_.leaf(node);
    if (leaf < 0 || (p_.live_leaves != nullptr && !p_.live_leaves[leaf])) return false;
    return !Keys{p_.barred_leaves, p_.barred_leaves + p_.barred_leaves_count}.has(prompt * tree_.leaves() + leaf);
  }

  void write(const std::vector<uint64_t>& keys, const Scratch& s, float* scores, int64_t* parents,
             int64_t* tokens, int64_t* nodes) const {
    const auto count = static_cast<int64_t>(keys.size());
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t number = ~static_cast<uint32_t>(keys[i]);
      const int64_t beam = std::upper_bound(s.first.begin(), s.first.end(), number) - s.first.begin() - 1;
      scores[i] = score_of(static_cast<uint32_t>(keys[i] >> 32));
      parents[i] = beam;
      nodes[i] = s.ranges[beam].begin + (number - s.first[beam]);
      if (tokens != nullptr) tokens[i] = tree_.token(s.depth[beam], nodes[i]);
    }
    std::fill(scores + count, scores + p_.width, -kInfinity);
    std::fill(parents + count, parents + p_.width, -1);
    std::fill(nodes + count, nodes + p_.width, -1);
    if (tokens != nullptr) std::fill(tokens + count, tokens + p_.width, -1);
  }

  const BeamStepPass& p_;
  const TreeView tree_;
  const BeamKernels& kernels_;
  const float scale_;
  const bool restricted_;
  std::vector<float> normalisers_;  // empty: made where they are needed
  mutable std::atomic<bool> beyond_{false};  // whether a token was met that has no logit
};

}  // namespace

void run_beam_step(const BeamStepPass& pass) { Step(pass).run(); }

}  // namespace gflowgr
