// Chooses tokens as engine/sampling/sampler.py does, without sorting a vocabulary.
//
// Scores are computed by the same operations on floats, so what top_k keeps is the same to the token. Probabilities are
// not rounded as torch rounds them. So what depends on a sum, the edges of top_p and min_p and the draw itself, is only
// decided where it is further from the other outcome than both roundings together could take it; -1 says that it is not,
// and the sampler itself decides. What is left of a row after the filters is always the tokens whose scores reach some
// least score, so an edge that is in doubt is two of them: a draw is given where it is the same for all between.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace whet {
namespace {

constexpr int64_t kParams = 5;
// Logits that one piece covers; whole blocks.
constexpr int64_t kPieceLogits = 1 << 14;
static_assert(kPieceLogits % kScoreBlock == 0);

// How far a cumulative probability may be from that of torch's softmax, whose exponentials are off by up to 6e-7 for each
// unit below the largest score; ours are off by 1e-7, sums of a block by 3e-7. An error e of single probabilities moves a
// fraction of their sum by at most e / 2, and 7 below the largest score few have any weight. Of 320 rows of 49,152 random
// logits no cumulative probability was further off than 2e-8.
constexpr double kDrawDoubt = 2e-6;
// The same of top_p, where torch subtracts the rounded logarithm of the sum and takes a better exponential: half a unit in
// the last place of that logarithm, and as much of the difference. 2e-6 was the most there, with logits of 35.
constexpr double kMassDoubt = 1.5e-6, kMassDoubtPerScore = 1.3e-7;

// How far below the largest score tokens are looked at first; then twice as far, and so on.
constexpr float kFirstReach = 4.0f;

// Bins by which the edge of a nucleus is looked for.
constexpr int64_t kBins = 512;

// The least score that stays: `sure` of those that do so however sums are rounded, `may` of those that may.
struct Edge {
  float sure = std::numeric_limits<float>::lowest(), may = std::numeric_limits<float>::lowest();
};
Edge both(Edge a, Edge b) { return {std::max(a.sure, b.sure), std::max(a.may, b.may)}; }

// A row of logits from which a token is drawn.
class Row {
 public:
  Row(const float* logits, int64_t width, const Scores& scores, const double* params, const float* largest,
      const double* sums, const Kernels& kernels)
      : logits_(logits),
        width_(width),
        blocks_(ceil_div(width, kScoreBlock)),
        scores_(scores),
        uniform_(params[0]),
        top_k_(params[2] > 0 && params[2] < static_cast<double>(width) ? static_cast<int64_t>(params[2]) : 0),
        top_p_(params[3]),
        least_(std::log(static_cast<float>(params[4]))),
        largest_(largest),
        sums_(sums),
        kernels_(kernels) {}

  int64_t draw() {
    if (top_k_ == 0 && top_p_ >= 1.0 && std::isinf(least_)) return draw_of_all();
    double total = 0.0;
    if (top_k_ > 0) {
      keep_top_k();
      for (int64_t i = 0; i < count_; ++i) total += weights_[i];
    } else {
      for (int64_t block = 0; block < blocks_; ++block) total += sums_[block];
    }
    Edge edge = edge_of_min_p();
    if (top_p_ < 1.0) {
      if (top_k_ == 0) gather_mass(total);
      edge = both(edge, edge_of_top_p(total));
    } else if (top_k_ == 0) {
      gather(edge.may);
    }
    double sure = 0.0, doubtful = 0.0;
    for (int64_t i = 0; i < count_; ++i)
      if (found_[i] >= edge.may) (found_[i] >= edge.sure ? sure : doubtful) += weights_[i];
    if (!(sure > 0.0)) return -1;
    return pick(edge.sure, 0.0, uniform_ * sure, kDrawDoubt * sure + doubtful);
  }

 private:
  int64_t block_size(int64_t block) const { return std::min(kScoreBlock, width_ - block * kScoreBlock); }

  // Makes the tokens of these blocks whose scores are at least `lowest` those that are looked at, in order.
  void gather(float lowest, int64_t first, int64_t last) {
    lowest = std::max(lowest, std::numeric_limits<float>::lowest());  // -inf is no token that can be drawn
    if (static_cast<int64_t>(found_.size()) < width_) found_.resize(width_), weights_.resize(width_), places_.resize(width_);
    count_ = 0;
    for (int64_t block = first; block < last; ++block) {
      if (!(largest_[block] >= lowest)) continue;
      const int64_t begin = block * kScoreBlock;
      count_ += kernels_.collect(scores_, logits_ + begin, block_size(block), lowest, static_cast<int32_t>(begin),
                                 found_.data() + count_, places_.data() + count_);
    }
    kernels_.exp_less(found_.data(), count_, scores_.top(), weights_.data());
  }
  void gather(float lowest) { gather(lowest, 0, blocks_); }

  // The token in whose part of the sum, which begins at `before`, the target lies; -1 if it lies within `doubt` of others.
  int64_t pick(float lowest, double before, double target, double doubt) const {
    for (int64_t i = 0; i < count_; ++i) {
      if (found_[i] < lowest) continue;
      const double after = before + weights_[i];
      if (target < after) return target - before > doubt && after - target > doubt ? places_[i] : -1;
      before = after;
    }
    return -1;
  }

  int64_t draw_of_all() {
    double total = 0.0, before = 0.0;
    for (int64_t i = 0; i < blocks_; ++i) total += sums_[i];
    const double target = uniform_ * total;
    int64_t block = 0;
    for (; block < blocks_ - 1 && before + sums_[block] <= target; ++block) before += sums_[block];
    gather(std::numeric_limits<float>::lowest(), block, block + 1);
    return pick(std::numeric_limits<float>::lowest(), before, target, kDrawDoubt * total);
  }

  // The tokens that are as likely as the k-th likeliest, or likelier.
  void keep_top_k() {
    auto& numbers = numbers_;
    if (top_k_ <= blocks_) {
      // As many blocks have a score of this size.
      numbers.assign(largest_, largest_ + blocks_);
      std::nth_element(numbers.begin(), numbers.begin() + top_k_ - 1, numbers.end(), std::greater<float>());
      gather(numbers[top_k_ - 1]);
    } else {
      for (float below = kFirstReach; count_ < top_k_; below *= 2) {
        gather(scores_.top() - below);
        if (scores_.top() - below <= std::numeric_limits<float>::lowest()) break;
      }
    }
    if (count_ < top_k_) return;  // all others are impossible
    numbers.assign(found_.begin(), found_.begin() + count_);
    std::nth_element(numbers.begin(), numbers.begin() + top_k_ - 1, numbers.end(), std::greater<float>());
    const float kth = numbers[top_k_ - 1];
    int64_t kept = 0;
    for (int64_t i = 0; i < count_; ++i) {
      if (found_[i] < kth) continue;
      found_[kept] = found_[i], weights_[kept] = weights_[i], places_[kept++] = places_[i];
    }
    count_ = kept;
  }

  // Likeliest tokens that have probability top_p together, and no more than that takes.
  void gather_mass(double total) {
    // So far below the largest score even the whole vocabulary would not be what top_p leaves out.
    const double enough = std::log(static_cast<double>(width_) / ((1.0 - top_p_) * total)) + 0.1;
    for (double below = kFirstReach;; below = below < enough ? std::min(2 * below, enough) : 1e39) {
      const float lowest = scores_.top() - static_cast<float>(below);
      gather(lowest);
      double mass = 0.0;
      for (int64_t i = 0; i < count_; ++i) mass += weights_[i];
      if (mass - doubt_of_mass(total) >= top_p_ * total || std::isinf(lowest)) return;
    }
  }

  double doubt_of_mass(double total) const {
    const double size = std::max<double>(std::fabs(scores_.top()), std::fabs(scores_.top() + std::log(total)));
    return (kMassDoubt + kMassDoubtPerScore * size) * total;
  }

  // A token stays if those likelier than it have less than top_p. Of equal ones, torch puts any first.
  Edge edge_of_top_p(double total) {
    if (count_ == 0) return {};
    const double wanted = top_p_ * total, doubt = doubt_of_mass(total);
    const float top = scores_.top(), least = *std::min_element(found_.begin(), found_.begin() + count_);
    const float per_bin = top > least ? (kBins - 1) / (top - least) : 0.0f;
    const auto bin_of = [&](float score) {
      const float bin = (top - score) * per_bin;  // NaN where top and least are the next numbers but one
      return bin < kBins - 1 ? static_cast<int64_t>(std::max(bin, 0.0f)) : kBins - 1;
    };
    double masses[kBins] = {};
    for (int64_t i = 0; i < count_; ++i) masses[bin_of(found_[i])] += weights_[i];
    // Bins before `first` surely stay, those from `last` on surely do not.
    int64_t first = 0, last;
    double before = 0.0;
    for (; first < kBins && before + masses[first] + doubt < wanted; ++first) before += masses[first];
    double until = before;
    for (last = first; last < kBins && until - doubt < wanted; ++last) until += masses[last];

    auto& sorted = sorted_;
    sorted.clear();
    for (int64_t i = 0; i < count_; ++i)
      if (const int64_t bin = bin_of(found_[i]); bin >= first && bin < last) sorted.emplace_back(found_[i], weights_[i]);
    if (sorted.empty()) return {};  // all stay
    std::sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
    Edge edge;
    edge.sure = edge.may = std::nextafter(sorted[0].first, std::numeric_limits<float>::infinity());
    bool sure = true;
    for (size_t i = 0, next; i < sorted.size() && before - doubt < wanted; i = next) {
      const auto [score, weight] = sorted[i];
      for (next = i + 1; next < sorted.size() && sorted[next].first == score;) ++next;
      const double equals = static_cast<double>(next - i) * weight;
      const bool is_first = before == 0.0 && next == i + 1;  // which always stays
      sure = sure && (is_first || before + equals - weight + doubt < wanted);
      if (sure) edge.sure = score;
      edge.may = score;
      before += equals;
    }
    return edge;
  }

  // Torch's logarithm may be rounded in another way.
  Edge edge_of_min_p() const {
    if (std::isinf(least_)) return {};
    const float top = scores_.top(), lowest = top + least_;
    const float doubt = 5e-7f * (std::fabs(least_) + std::fabs(lowest));
    return {std::min(top, lowest + doubt), lowest - doubt};
  }

  // Of the thread, so that memory is not asked for at each step.
  static thread_local std::vector<float> found_, weights_, numbers_;
  static thread_local std::vector<int32_t> places_;
  static thread_local std::vector<std::pair<float, float>> sorted_;

  const float* logits_;
  int64_t width_, blocks_;
  Scores scores_;
  double uniform_;
  int64_t top_k_;  // 0: all
  double top_p_;
  float least_;  // logarithm of min_p; -inf: none
  const float* largest_;
  const double* sums_;
  const Kernels& kernels_;
  int64_t count_ = 0;  // of found_, weights_ and places_: score, exp(score - top) and token of those that are looked at
};

thread_local std::vector<float> Row::found_, Row::weights_, Row::numbers_;
thread_local std::vector<int32_t> Row::places_;
thread_local std::vector<std::pair<float, float>> Row::sorted_;

}  // namespace

void run(const Choose& op, const Kernels& kernels) {
  const int64_t parts = std::max<int64_t>(1, ceil_div(op.width, kPieceLogits));
  const int64_t blocks = ceil_div(op.width, kScoreBlock), blocks_per_part = kPieceLogits / kScoreBlock;
  thread_local std::vector<int64_t> place_memory, drawing_memory;
  thread_local std::vector<float> value_memory, largest_memory;
  thread_local std::vector<double> sum_memory;
  place_memory.resize(op.rows * parts);
  value_memory.resize(op.rows * parts);
  int64_t* const places = place_memory.data();
  float* const values = value_memory.data();
  const auto part_of = [&](int64_t index) {
    const int64_t begin = index % parts * kPieceLogits;
    return std::pair(begin, std::min(kPieceLogits, op.width - begin));
  };
  in_parallel(op.rows * parts, [&](int64_t index) {
    const auto [begin, count] = part_of(index);
    kernels.find_largest(op.logits + index / parts * op.width + begin, count, places + index, values + index);
    places[index] += begin;
  }, true);
  auto& drawing = drawing_memory;
  drawing.clear();
  for (int64_t row = 0; row < op.rows; ++row) {
    int64_t best = row * parts;
    for (int64_t i = best + 1; i < (row + 1) * parts; ++i)
      if (values[i] > values[best] || std::isnan(values[i])) best = i;  // nothing is greater than a NaN
    op.tokens[row] = std::isfinite(values[best]) ? places[best] : -1;
    values[row * parts] = values[best];
    if (op.tokens[row] >= 0 && op.params != nullptr && op.params[row * kParams + 1] > 0.0) drawing.push_back(row);
  }
  if (drawing.empty()) return;

  const auto count = static_cast<int64_t>(drawing.size());
  largest_memory.resize(count * blocks);
  sum_memory.resize(count * blocks);
  const int64_t* const rows = drawing.data();
  float* const largest = largest_memory.data();
  double* const sums = sum_memory.data();
  const auto scores_of = [&](int64_t row) {
    const double temperature = op.params[row * kParams + 1];
    return Scores{values[row * parts], static_cast<float>(temperature), temperature == 1.0};
  };
  in_parallel(count * parts, [&](int64_t index) {
    const int64_t row = rows[index / parts], at = index / parts * blocks + index % parts * blocks_per_part;
    const auto [begin, size] = part_of(index);
    kernels.weigh(scores_of(row), op.logits + row * op.width + begin, size, largest + at, sums + at);
  }, true);
  in_parallel(count, [&](int64_t index) {
    const int64_t row = rows[index], at = index * blocks;
    Row of(op.logits + row * op.width, op.width, scores_of(row), op.params + row * kParams, largest + at, sums + at,
           kernels);
    op.tokens[row] = of.draw();
  }, true);
}

}  // namespace whet
