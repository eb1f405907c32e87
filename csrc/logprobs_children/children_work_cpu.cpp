#include "logprobs_children/children_work.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "common/convert_cpu.h"

namespace gflowgr {
namespace {

constexpr int64_t kTaskRows = 64;
constexpr int64_t kTaskProducts = 1 << 18;  // at most, unless one row has more children
constexpr int64_t kPanel = 1 << 24;         // slopes held at once when they are computed again
constexpr int64_t kSlice = 512;             // columns: what is added to stays in the L2 cache

// Memory of one thread that keeps its size from block to block; not set to zero.
class Scratch {
 public:
  float* get(int64_t count) {
    if (count > size_) {
      data_.reset(new float[count]);
      size_ = count;
    }
    return data_.get();
  }

 private:
  std::unique_ptr<float[]> data_;
  int64_t size_ = 0;
};

// Rows of a matrix in any type, as float32 and from column `from` on: where they are, or a copy.
class Rows {
 public:
  Rows(const void* data, Dtype type, int64_t width) : data_(data), type_(type), width_(width) {}

  const float* const* get(const int64_t* rows, int64_t count, int64_t from, int64_t columns) {
    pointers_.resize(count);
    if (type_ == Dtype::float32) {
      const float* const first = static_cast<const float*>(data_) + from;
      for (int64_t i = 0; i < count; ++i) pointers_[i] = first + rows[i] * width_;
      return pointers_.data();
    }
    float* const copy = scratch_.get(count * columns);
    for (int64_t i = 0; i < count; ++i) {
      widen(element(data_, type_, rows[i] * width_ + from), type_, columns, copy + i * columns);
      pointers_[i] = copy + i * columns;
    }
    return pointers_.data();
  }

 private:
  const void* data_;
  Dtype type_;
  int64_t width_;
  std::vector<const float*> pointers_;
  Scratch scratch_;
};

// Children at a time: rows of a 16-bit head are converted in pieces that fit the L2 cache.
int64_t child_block(const ChildrenHead& head, int64_t columns) {
  if (head.weight_type == Dtype::float32) return int64_t{1} << 16;
  return std::clamp<int64_t>((1 << 17) / std::max<int64_t>(columns, 1), 12, 256);
}

}  // namespace

ChildrenWork::ChildrenWork(const uint8_t* tree, int64_t steps, const ChildrenPlan& plan,
                           const ChildrenHead& head, int threads, Parallel parallel)
    : kernels_(children_kernels()), plan_(plan), head_(head), steps_(steps), tree_(tree),
      total_rows_(plan.targets - plan.rows), threads_(threads), parallel_(std::move(parallel)) {
  int64_t offset = 0;
  cost_.push_back(0);
  for (int64_t g = 0; g < plan_.groups(); ++g) {
    const int64_t begin = plan_.group_begin[g], end = plan_.group_end(g);
    const int64_t child = static_cast<int64_t>(tokens_.size());
    append_child_tokens(tree, plan_.group_node[g], plan_.rows[begin] % steps, tokens_);
    const int64_t children = static_cast<int64_t>(tokens_.size()) - child;
    const int64_t step = std::clamp<int64_t>(kTaskProducts / children, 1, kTaskRows);
    for (int64_t first = begin; first < end; first += step) {
      const int64_t rows = std::min(step, end - first);
      tasks_.push_back({g, first, rows, child, children, offset});
      cost_.push_back(cost_.back() + (rows + 2) * (children + 8));
      offset += rows * children;
    }
  }
}

void ChildrenWork::run_forward(int64_t first_task, int64_t end_task, float* log_pf, float* slopes,
                               int64_t base, const ChildrenDivergence* divergence) const {
  Rows hidden(head_.hidden, head_.hidden_type, head_.width);
  Rows weight(head_.weight, head_.weight_type, head_.width);
  Scratch logits, bias, policy;
  FlowScratch flows;
  ChildPolicy target{false, 0.0};
  std::pair<int64_t, int64_t> known{-1, -1};  // node and prompt that `policy` and `target` are of
  const int64_t block = child_block(head_, head_.width);
  for (int64_t t = first_task; t < end_task; ++t) {
    const ChildrenTask& task = tasks_[t];
    const int64_t c = task.children;
    const int64_t* const rows = plan_.rows + task.first;
    const int64_t* const tokens = tokens_.data() + task.child;
    float* const out = slopes != nullptr ? slopes + (task.offset - base) : logits.get(task.rows * c);
    const float* const* const states = hidden.get(rows, task.rows, 0, head_.width);
    for (int64_t j = 0; j < c; j += block) {
      const int64_t count = std::min(block, c - j);
      kernels_.dots(states, task.rows, weight.get(tokens + j, count, 0, head_.width), count, head_.width,
                    out + j, c);
    }
    float* own_bias = nullptr;
    if (head_.bias != nullptr) {
      own_bias = bias.get(c);
      for (int64_t j = 0; j < c; ++j) {
        if (head_.bias_type == Dtype::float32) {
          own_bias[j] = static_cast<const float*>(head_.bias)[tokens[j]];
        } else {
          widen(element(head_.bias, head_.bias_type, tokens[j]), head_.bias_type, 1, own_bias + j);
        }
      }
    }
    if (divergence != nullptr) {
      const int64_t node = plan_.group_node[task.group];
      const Range range = tree_children(tree_, node);
      float* const p = policy.get(c);
      for (int64_t i = 0; i < task.rows; ++i) {
        const int64_t trajectory = rows[i] / steps_;
        const std::pair<int64_t, int64_t> wanted{node, trajectory / divergence->per_prompt};
        if (wanted != known) {  // rows of a prompt at a node follow each other
          target = child_policy(*divergence->rewards, flows, wanted.second, node, {range.begin, range.end}, p);
          known = wanted;
        }
        const bool alive = target.alive;
        const float weight = divergence->weights != nullptr ? divergence->weights[trajectory] : alive ? -1.0f : 0.0f;
        divergence->alive[rows[i]] = alive;
        divergence->value[rows[i]] =
            kernels_.divergence(out + i * c, c, own_bias, head_.temperature, plan_.targets[task.first + i], p,
                                alive ? 1.0f : 0.0f, target.p_log_p, weight, log_pf + rows[i]);
      }
      continue;
    }
    for (int64_t i = 0; i < task.rows; ++i) {
      const float value =
          kernels_.softmax(out + i * c, c, own_bias, head_.temperature, plan_.targets[task.first + i]);
      if (log_pf != nullptr) log_pf[rows[i]] = value;
    }
  }
}

void ChildrenWork::forward(float* log_pf, float* slopes, const ChildrenDivergence* divergence) const {
  const int64_t tasks = static_cast<int64_t>(tasks_.size());
  const int64_t parts = std::min<int64_t>(threads_, tasks);
  const auto start_of = [&](int64_t part) {
    const int64_t before = cost_.back() / std::max<int64_t>(parts, 1) * part;
    return part == parts ? tasks : std::lower_bound(cost_.begin(), cost_.end(), before) - cost_.begin();
  };
  parallel_(parts, [&](int64_t part) { run_forward(start_of(part), start_of(part + 1), log_pf, slopes, 0, divergence); });
}

void ChildrenWork::backward_slice(int64_t first_task, int64_t end_task, const float* slopes, int64_t base,
                                  const ChildrenGradients& gradients, int64_t from, int64_t to) const {
  const int64_t width = to - from;
  Rows hidden(head_.hidden, head_.hidden_type, head_.width);
  Rows weight(head_.weight, head_.weight_type, head_.width);
  Scratch scaled, copies;
  std::vector<float*> hidden_out, weight_out;
  const int64_t block = child_block(head_, width);
  for (int64_t t = first_task; t < end_task; ++t) {
    const ChildrenTask& task = tasks_[t];
    const int64_t c = task.children;
    const int64_t* const rows = plan_.rows + task.first;
    const float* const slope = slopes + (task.offset - base);
    // Gradient of the loss with respect to the products.
    float* const products = scaled.get(task.rows * c);
    for (int64_t i = 0; i < task.rows; ++i) {
      const float factor = gradients.upstream[rows[i]] / head_.temperature;
      if (gradients.log_pf[rows[i]] == -INFINITY) {  // its upstream gradient is not defined
        std::fill(products + i * c, products + (i + 1) * c, 0.0f);
      } else {
        for (int64_t j = 0; j < c; ++j) products[i * c + j] = slope[i * c + j] * factor;
      }
    }
    if (gradients.hidden != nullptr) {
      const bool direct = head_.hidden_type == Dtype::float32;
      float* const first = direct ? static_cast<float*>(gradients.hidden) : copies.get(task.rows * width);
      hidden_out.resize(task.rows);
      for (int64_t i = 0; i < task.rows; ++i) {
        hidden_out[i] = direct ? first + rows[i] * head_.width + from : first + i * width;
      }
      for (int64_t j = 0; j < c; j += block) {
        const int64_t count = std::min(block, c - j);
        const int64_t* const tokens = tokens_.data() + task.child + j;
        kernels_.accumulate(hidden_out.data(), task.rows, products + j, c, 1,
                            weight.get(tokens, count, from, width), count, width, j > 0);
      }
      for (int64_t i = 0; i < task.rows && !direct; ++i) {
        narrow(hidden_out[i], width, head_.hidden_type,
               element(gradients.hidden, head_.hidden_type, rows[i] * head_.width + from));
      }
    }
    if (gradients.weight != nullptr) {
      weight_out.resize(c);
      for (int64_t j = 0; j < c; ++j) {
        weight_out[j] = gradients.weight + gradients.weight_row[task.child + j] * head_.width + from;
      }
      kernels_.accumulate(weight_out.data(), c, products, 1, c, hidden.get(rows, task.rows, from, width),
                          task.rows, width, true);
    }
  }
}

void ChildrenWork::backward_bias(int64_t first_task, int64_t end_task, const float* slopes, int64_t base,
                                 const ChildrenGradients& gradients) const {
  Scratch sums;
  std::vector<float> factors;
  std::vector<const float*> rows;
  for (int64_t t = first_task; t < end_task; ++t) {
    const ChildrenTask& task = tasks_[t];
    factors.clear();
    rows.clear();
    for (int64_t i = 0; i < task.rows; ++i) {
      const int64_t row = plan_.rows[task.first + i];
      if (gradients.log_pf[row] == -INFINITY) continue;
      factors.push_back(gradients.upstream[row] / head_.temperature);
      rows.push_back(slopes + (task.offset - base) + i * task.children);
    }
    float* const sum = sums.get(task.children);
    float* const out[] = {sum};
    kernels_.accumulate(out, 1, factors.data(), 0, 1, rows.data(), static_cast<int64_t>(rows.size()),
                        task.children, false);
    for (int64_t j = 0; j < task.children; ++j) gradients.bias[gradients.bias_row[task.child + j]] += sum[j];
  }
}

void ChildrenWork::clear_other_rows(void* hidden) const {
  const int64_t bytes = head_.width * bytes_of(head_.hidden_type);
  const int64_t begin = plan_.active(), count = total_rows_ - begin;
  const int64_t parts = std::clamp<int64_t>(count * bytes / (1 << 16), 1, threads_);
  parallel_(parts, [&](int64_t part) {
    const int64_t end = begin + count * (part + 1) / parts;
    for (int64_t i = begin + count * part / parts; i < end; ++i) {
      auto* const row = static_cast<uint8_t*>(hidden) + plan_.rows[i] * bytes;
      std::fill(row, row + bytes, uint8_t{0});
    }
  });
}

void ChildrenWork::backward(const float* slopes, const ChildrenGradients& gradients) const {
  if (gradients.hidden != nullptr) clear_other_rows(gradients.hidden);
  const int64_t tasks = static_cast<int64_t>(tasks_.size());
  const int64_t share = (head_.width + threads_ - 1) / threads_;
  const int64_t unit = share >= 64 ? 64 : 16;
  const int64_t slice = std::clamp<int64_t>((share + unit - 1) / unit * unit, 16, kSlice);
  const int64_t slices = (head_.width + slice - 1) / slice;
  std::vector<float> panel;
  for (int64_t first = 0; first < tasks;) {
    int64_t end = tasks;
    const int64_t base = slopes != nullptr ? 0 : tasks_[first].offset;
    const float* values = slopes;
    if (slopes == nullptr) {
      end = first + 1;
      while (end < tasks && tasks_[end].offset + tasks_[end].rows * tasks_[end].children - base <= kPanel) {
        ++end;
      }
      const ChildrenTask& last = tasks_[end - 1];
      panel.resize(last.offset + last.rows * last.children - base);
      const int64_t parts = std::min<int64_t>(threads_, end - first), count = end - first;
      parallel_(parts, [&](int64_t part) {
        run_forward(first + count * part / parts, first + count * (part + 1) / parts, nullptr, panel.data(),
                    base, nullptr);
      });
      values = panel.data();
    }
    if (gradients.hidden != nullptr || gradients.weight != nullptr) {
      parallel_(slices, [&](int64_t s) {
        const int64_t from = s * slice, to = std::min(from + slice, head_.width);
        for (int64_t row = 0; row < gradients.clear && first == 0; ++row) {
          float* const zeros = gradients.weight + row * head_.width;
          std::fill(zeros + from, zeros + to, 0.0f);
        }
        backward_slice(first, end, values, base, gradients, from, to);
      });
    }
    if (gradients.bias != nullptr) backward_bias(first, end, values, base, gradients);
    first = end;
  }
}

}  // namespace gflowgr
