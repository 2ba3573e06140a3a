// How the operations of low_rank.inl are cut into pieces for the threads.
#include <algorithm>
#include <vector>

#include "kernels.h"

namespace whet {
namespace {

// Tokens whose gradients of A and B are summed by themselves; the sums are then added in order, so that the result does
// not depend on the threads. Fewer tokens would have more sums to add.
constexpr int64_t kPartTokens = 128;
// Numbers of a block of tokens, which several products pass over, and so stay near.
constexpr int64_t kBlockNumbers = 1 << 15;
// Numbers of the sums that one piece adds.
constexpr int64_t kPieceSums = 1 << 12;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t block_tokens(int64_t width) { return std::clamp<int64_t>(kBlockNumbers / width / 8, 1, 8) * 8; }

template <typename F>
void in_parallel(int64_t count, F body) {
  if (count == 1) return body(0);
  parallel_for([](void* context, int64_t index) { (*static_cast<F*>(context))(index); }, &body, count);
}

// B [O, r] as [r, O], in memory of the calling thread that the next call takes again.
const float* transposed(const float* b, int64_t outputs, int64_t rank) {
  thread_local std::vector<float> memory;
  memory.resize(outputs * rank);
  for (int64_t n = 0; n < outputs; ++n)
    for (int64_t j = 0; j < rank; ++j) memory[j * outputs + n] = b[n * rank + j];
  return memory.data();
}

}  // namespace

void run(const LowRank& op, const Kernels& kernels) {
  const float* const b = transposed(op.b, op.outputs, op.rank);
  const int64_t step = block_tokens(std::max(op.inputs, op.outputs));
  in_parallel(ceil_div(op.tokens, step), [&](int64_t index) {
    kernels.update_rows(op, b, index * step, std::min(op.tokens, (index + 1) * step));
  });
}

void run(const LoraRows& op, const Kernels& kernels) {
  constexpr int64_t kRows = 4;  // neighbours of one adapter that are taken together
  thread_local std::vector<int64_t> starts;
  starts.clear();
  for (int64_t row = 0; row < op.tokens; ++row) {
    const bool joins = !starts.empty() && op.slots[row] == op.slots[starts.back()] && row - starts.back() < kRows;
    if (op.slots[row] >= 0 && op.addresses[op.slots[row] * op.address_stride] != 0 && !joins) starts.push_back(row);
  }
  const int64_t* const first = starts.data();
  in_parallel(static_cast<int64_t>(starts.size()), [&](int64_t index) {
    const int64_t row = first[index], slot = op.slots[row], rank = op.ranks[slot * op.rank_stride];
    int64_t end = row + 1;
    while (end < std::min(row + kRows, op.tokens) && op.slots[end] == slot) ++end;
    const int64_t* const factors = op.addresses + slot * op.address_stride;
    thread_local std::vector<float> memory;
    memory.resize((end - row) * (rank + op.outputs));
    const LowRank update{op.x + row * op.inputs,
                         reinterpret_cast<const float*>(factors[0]),
                         reinterpret_cast<const float*>(factors[1]),
                         op.y + row * op.outputs,
                         memory.data(),
                         end - row,
                         op.inputs,
                         op.outputs,
                         rank,
                         op.scalings[slot * op.scaling_stride],
                         0.0f};
    kernels.update_few_rows(update, memory.data() + (end - row) * rank);
  });
}

void run(const LowRankGradient& op, const Kernels& kernels) {
  const float* const b = transposed(op.b, op.outputs, op.rank);
  const int64_t parts = ceil_div(op.tokens, kPartTokens), step = block_tokens(std::max(op.inputs, op.outputs));
  const int64_t of_a = op.rank * op.inputs, of_b = op.rank * op.outputs, size = of_a + of_b + kPartTokens * op.rank;
  thread_local std::vector<float> memory;
  memory.resize(parts * size);
  float* const sums = memory.data();  // of each part: those of A, those of B [r, O], and its d_low
  in_parallel(parts, [&](int64_t part) {
    float *const d_a = sums + part * size, *const d_b = d_a + of_a, *const d_low = d_b + of_b;
    const int64_t first = part * kPartTokens, last = std::min(op.tokens, first + kPartTokens);
    for (int64_t begin = first; begin < last; begin += step)
      kernels.update_gradient(op, b, begin, std::min(last, begin + step), begin > first, d_low, d_a, d_b);
  });
  in_parallel(ceil_div(of_a + of_b, kPieceSums), [&](int64_t index) {
    const int64_t begin = index * kPieceSums, end = std::min(of_a + of_b, begin + kPieceSums);
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = begin; i < end; ++i) sums[i] += sums[part * size + i];
    std::copy(sums + std::min(begin, of_a), sums + std::min(end, of_a), op.d_a + std::min(begin, of_a));
    for (int64_t i = std::max(begin, of_a) - of_a; i < end - of_a; ++i)
      op.d_b[i % op.outputs * op.rank + i / op.outputs] = sums[of_a + i];
  });
}

}  // namespace whet
