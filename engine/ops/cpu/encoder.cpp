// The layers of an encoder in one call, without anything of Python or of the other threads between their operations: each
// thread takes some whole sequences, whose activations stay near it, through all layers. Where there are fewer tokens than
// that pays for, all threads share each operation.
#include <algorithm>
#include <new>
#include <vector>

#include "gemm.h"
#include "kernels.h"
#include "parallel.h"

namespace whet {
namespace {

// Tokens that are taken together: so many that laying weights out for a product costs some percent of it.
constexpr int64_t kTokens = 512;
// Of a thread by itself, at least; each weight is laid out for each.
constexpr int64_t kLeastTokens = 96;
// Numbers between the rows of the feed-forward block: of powers of two, a column of them would share a few places of the
// caches.
constexpr int64_t kApart = 16;
// Numbers that a thread keeps for the next call, 32 MiB: those of kTokens tokens of all but the largest encoders.
constexpr size_t kKeptNumbers = 1 << 23;

enum Matrix { kQuery, kKey, kValue, kOutput, kUp, kDown };  // of a layer

template <typename T>
void run_one(Kind kind, const T& args, const Kernels& kernels) {
  const Op op{kind, &args};
  if (run(&op, 1, kernels) != Status::kDone) throw std::bad_alloc();  // the only failure that these know
}

// Some rows, from one to the next `stride` numbers.
struct Rows {
  float* first;
  int64_t stride;
};

// Some tokens on their way through the layers.
struct Part {
  const EncoderLayers& op;
  const Kernels& kernels;
  int64_t rows;

  // Few rows, whose product is bound by reading the weight.
  bool is_short() const { return rows <= kLinearRows; }

  // One product, or several of one x, whose results are `ys` in the layer's order; with `finish`, activation(y + bias).
  void multiply(const EncoderLayer& layer, Matrix first, int count, int64_t inputs, Rows x, const Rows* ys,
                const Activation* finish) const {
    Finish finishes[3];
    gemm::Target targets[3];
    const Weight* const* const weights = layer.weights + first;
    bool rounds = op.rounds != 0, alike = true;
    for (int i = 0; i < count; ++i) {
      finishes[i] = {layer.biases[first + i], finish == nullptr ? Activation::kNone : *finish};
      const bool none = finish == nullptr || (*finish == Activation::kNone && finishes[i].bias == nullptr);
      targets[i] = {weights[i], ys[i].first, ys[i].stride, none ? nullptr : finishes + i};
      rounds = rounds && !is_float(weights[i]->storage);
      alike = alike && gemm::round_alike(*weights[0], *weights[i]);
    }
    if (is_short()) return multiply_short(targets, count, inputs, x);
    if (rounds && alike) return gemm::multiply(targets, count, inputs, x.first, x.stride, rows, kernels);
    for (int i = 0; i < count; ++i) {
      if (op.rounds != 0 && !is_float(weights[i]->storage)) {
        gemm::multiply(targets + i, 1, inputs, x.first, x.stride, rows, kernels);
        continue;
      }
      const FloatProduct product{weights[i], x.first, ys[i].first, inputs, rows, 0, weights[i]->rows,
                                 x.stride, ys[i].stride, targets[i].finish, 0, 0};
      run_one(Kind::kFloatProduct, product, kernels);
    }
  }

  void multiply_short(const gemm::Target* targets, int count, int64_t inputs, Rows x) const {
    Linear linears[3];
    Op ops[3];
    for (int i = 0; i < count; ++i) {
      const bool rounds = op.rounds != 0 && !is_float(targets[i].weight->storage);
      linears[i] = {targets[i].weight, x.first, targets[i].y, inputs, rows, rounds, 0};
      ops[i] = {Kind::kLinear, linears + i};
    }
    if (run(ops, count, kernels) != Status::kDone) throw std::bad_alloc();
    for (int i = 0; i < count; ++i)
      if (const auto& [weight, y, ldy, finish] = targets[i]; finish != nullptr)
        run_one(Kind::kBiasActivation, finishing(*finish, y, ldy, rows, 0, weight->rows), kernels);
  }
};

// Sequences [begin, end) through all layers.
void run_sequences(const EncoderLayers& op, int64_t begin, int64_t end, const Kernels& kernels) {
  const int64_t first = op.seq_starts[begin], rows = op.seq_starts[end] - first, width = op.width, size = rows * width;
  const Part part{op, kernels, rows};
  const int64_t stride = part.is_short() ? op.inner : op.inner + kApart;
  thread_local std::vector<float> kept;
  std::vector<float> once;
  const size_t needed = 4 * size + rows * stride;
  auto& memory = needed > kKeptNumbers ? once : kept;
  if (memory.size() < needed) memory.resize(needed);
  float* const x = op.x + first * width;
  float *const q = memory.data(), *const k = q + size, *const v = k + size, *const attended = v + size;
  float* const y = q;  // which attention is done with
  const Rows inner{attended + size, stride}, projections[] = {{q, width}, {k, width}, {v, width}}, result{y, width};
  const WholeAttention attention{q, k, v, attended, op.heads, width / op.heads, op.scale};
  const auto add_and_normalize = [&](const float* added, const float* const* norm) {
    const LayerNorm sum{y, added, x, norm[0], norm[1], x, rows, width, op.eps, 0.0f};
    run_one(Kind::kLayerNorm, sum, kernels);
  };
  constexpr Activation kBiasAlone = Activation::kNone;
  for (int64_t i = 0; i < op.count; ++i) {
    const EncoderLayer& layer = op.layers[i];
    part.multiply(layer, kQuery, 3, width, {x, width}, projections, &kBiasAlone);
    in_parallel((end - begin) * op.heads, [&](int64_t index) {
      const int64_t sequence = begin + index / op.heads, start = op.seq_starts[sequence];
      kernels.attend_whole(attention, start - first, op.seq_starts[sequence + 1] - start, index % op.heads);
    });
    part.multiply(layer, kOutput, 1, width, {attended, width}, &result, nullptr);
    add_and_normalize(layer.biases[kOutput], layer.norms);
    part.multiply(layer, kUp, 1, width, {x, width}, &inner, &op.activation);
    part.multiply(layer, kDown, 1, op.inner, inner, &result, nullptr);
    add_and_normalize(layer.biases[kDown], layer.norms + 2);
  }
}

}  // namespace

void run(const EncoderLayers& op, const Kernels& kernels) {
  const int64_t tokens = op.seq_starts[op.sequences], threads = num_threads();
  if (tokens == 0) return;
  int64_t parts = (tokens + kTokens - 1) / kTokens;
  const bool apart = threads > 1 && tokens >= threads * kLeastTokens && op.sequences >= threads;
  if (apart) parts = (parts + threads - 1) / threads * threads;
  // Parts of about equal length.
  std::vector<int64_t> bounds{0};
  for (int64_t s = 1; s <= op.sequences; ++s)
    if (s == op.sequences || op.seq_starts[s] * parts >= static_cast<int64_t>(bounds.size()) * tokens) bounds.push_back(s);
  const int64_t count = static_cast<int64_t>(bounds.size()) - 1;
  const auto body = [&](int64_t i) { run_sequences(op, bounds[i], bounds[i + 1], kernels); };
  if (apart && count >= threads) return in_parallel(count, body);
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace whet
