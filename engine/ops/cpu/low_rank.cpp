// How the operations of low_rank.inl are cut into pieces for the threads.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace whet {
namespace {

// Least tokens whose gradients of A and B are summed by themselves; the sums are then added in order, so that the result
// does not depend on the threads. Fewer tokens would have more sums to add.
constexpr int64_t kPartTokens = 128;
// Most such parts, and most numbers of their sums together, 64 MiB.
constexpr int64_t kMostParts = 32, kMostSums = 1 << 24;
// Numbers that a thread keeps for the next call.
constexpr size_t kKeptNumbers = 1 << 22;
// Numbers of a block of tokens, which several products pass over, and so stay near.
constexpr int64_t kBlockNumbers = 1 << 15;
// Numbers of the sums that one piece adds.
constexpr int64_t kPieceSums = 1 << 12;

int64_t block_tokens(int64_t width) { return std::clamp<int64_t>(kBlockNumbers / width / 8, 1, 8) * 8; }

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
  struct Run {
    int64_t begin, end;
  };
  thread_local std::vector<Run> memory_of_runs;
  auto& found = memory_of_runs;
  found.clear();
  for (int64_t row = 0; row < op.tokens; ++row) {
    const int64_t slot = op.slots[row];
    if (slot < 0 || op.addresses[slot * op.address_stride] == 0) continue;
    if (!found.empty() && found.back().end == row && row - found.back().begin < kRows && op.slots[row - 1] == slot)
      ++found.back().end;
    else
      found.push_back({row, row + 1});
  }
  const Run* const runs = found.data();
  in_parallel(static_cast<int64_t>(found.size()), [&](int64_t index) {
    const auto [row, end] = runs[index];
    const int64_t slot = op.slots[row], rank = op.ranks[slot * op.rank_stride];
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
  const int64_t step = block_tokens(std::max(op.inputs, op.outputs));
  const int64_t of_a = op.rank * op.inputs, of_b = op.rank * op.outputs;
  const int64_t most = std::clamp<int64_t>(kMostSums / (of_a + of_b), 1, kMostParts);
  const int64_t part_tokens = std::max(kPartTokens, ceil_div(op.tokens, most)), parts = ceil_div(op.tokens, part_tokens);
  const int64_t size = of_a + of_b + part_tokens * op.rank;
  thread_local std::vector<float> kept;
  std::vector<float> once;
  const size_t needed = parts * size;
  auto& memory = needed > kKeptNumbers ? once : kept;
  memory.resize(needed);
  float* const sums = memory.data();  // of each part: those of A, those of B [r, O], and its d_low
  in_parallel(parts, [&](int64_t part) {
    float *const d_a = sums + part * size, *const d_b = d_a + of_a, *const d_low = d_b + of_b;
    const int64_t first = part * part_tokens, last = std::min(op.tokens, first + part_tokens);
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
