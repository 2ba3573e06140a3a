// How operations are cut into pieces for the threads.
#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "gemm.h"
#include "kernels.h"
#include "parallel.h"

namespace whet {
namespace {

// Bytes of W that one piece of a product covers: about a microsecond.
constexpr int64_t kPieceBytes = 1 << 14;

// Rows of x up to which each is multiplied as if it were alone, by rounded.inl: packing costs as much as three of them.
constexpr int64_t kUnpackedRows = 4;
// Rows that kernels take together: a piece has whole ones, so that what a row gives does not depend on the piece.
constexpr int64_t kStripRows = 4;
// Numbers that one piece of a cheap operation covers; less is not worth a second thread.
constexpr int64_t kPieceNumbers = 1 << 14;
// Rows of queries that are taken together.
constexpr int64_t kTileQueries = 96;
// Tokens of a sequence whose softmax is taken together: few, since a short sequence has few pieces for the threads.
constexpr int64_t kSpan = 32;
// Numbers of a token's keys that one piece of attention reads, side by side: whole heads, at least one.
constexpr int64_t kSpanNumbers = 512;

// Rows of x that pass over a panel of W, enough that making it costs little, and numbers of each: together they stay near.
constexpr int64_t kBlockRows = 288;
constexpr int64_t kBlockSums = 4096;

// Runs body(begin, end) over [0, rows), in pieces that cost about kPieceNumbers.
template <typename F>
void over_rows(int64_t rows, int64_t numbers_per_row, F body) {
  const int64_t step = std::max<int64_t>(1, kPieceNumbers / std::max<int64_t>(1, numbers_per_row));
  in_parallel(ceil_div(rows, step), [&](int64_t index) {
    body(index * step, std::min(rows, (index + 1) * step));
  });
}

int64_t row_bytes(const Weight& weight, int64_t inputs) {
  switch (weight.storage) {
    case Storage::kFloat32: return 4 * inputs;
    case Storage::kBfloat16:
    case Storage::kFloat16: return 2 * inputs;
    case Storage::kInt8: return inputs + 4 * (inputs / weight.group_size);
    case Storage::kInt4: return inputs / 2 + 4 * (inputs / weight.group_size);
  }
  return inputs;
}

// Rows of x in int8, in memory of the calling thread that the next call takes again.
struct RoundedRows {
  Rounded rows[kUnpackedRows];
};
RoundedRows round_rows(const Linear& op, bool split, const Kernels& kernels) {
  thread_local std::vector<int8_t> values[2];
  thread_local std::vector<float> numbers[2];
  const int64_t count = ceil_div(op.inputs / kRounded, 64) * 64;
  values[split].assign(op.rows * count * kRounded, 0);
  numbers[split].assign(op.rows * 2 * count, 0.0f);
  RoundedRows rounded;
  for (int64_t m = 0; m < op.rows; ++m) {
    int8_t* const row = values[split].data() + m * count * kRounded;
    float *const scales = numbers[split].data() + m * 2 * count, *const sums = scales + count;
    kernels.round_row(op.x + m * op.inputs, op.inputs, split, row, scales, sums);
    rounded.rows[m] = {row, scales, sums};
  }
  return rounded;
}

// The pieces of all products are numbered through, so that small weights of one input fill the threads together.
void run(const Op* ops, int64_t count, const Kernels& kernels, const Linear& first) {
  int64_t bytes = 1, pieces = 0;
  const auto linear = [&](int64_t i) -> const Linear& { return *static_cast<const Linear*>(ops[i].args); };
  for (int64_t i = 0; i < count; ++i) bytes = std::max(bytes, row_bytes(*linear(i).weight, first.inputs));
  const int64_t step = std::max<int64_t>(1, kPieceBytes / bytes / kStripRows) * kStripRows;
  RoundedRows rounded[2];
  for (const bool split : {false, true}) {
    const auto wants = [&](int64_t i) {
      return linear(i).rounds != 0 && (linear(i).weight->storage == Storage::kInt4) == split;
    };
    for (int64_t i = 0; i < count; ++i) {
      if (!wants(i)) continue;
      rounded[split] = round_rows(first, split, kernels);
      break;
    }
  }
  for (int64_t i = 0; i < count; ++i) pieces += ceil_div(linear(i).weight->rows, step);
  in_parallel(pieces, [&](int64_t index) {
    int64_t i = 0;
    for (int64_t of_this; index >= (of_this = ceil_div(linear(i).weight->rows, step)); ++i) index -= of_this;
    const Linear& op = linear(i);
    const int64_t outputs = op.weight->rows, begin = index * step, end = std::min(begin + step, outputs);
    if (op.rounds != 0) {
      const RoundedRows& x = rounded[op.weight->storage == Storage::kInt4];
      kernels.multiply_rounded(*op.weight, op.inputs, begin, end, x.rows, op.rows, op.y, outputs);
      return;
    }
    kernels.multiply_rows(*op.weight, op.inputs, begin, end, op.x, op.inputs, op.rows, op.y, outputs);
  }, true);
}

void run(const FloatProduct& op, const Kernels& kernels) {
  if (op.rows == 0) return;
  const int64_t width = op.end - op.begin, columns = op.transposed != 0 ? op.inputs : width;
  const int64_t summed = op.transposed != 0 ? width : op.inputs, per_tile = kernels.panel_rows;
  const int64_t blocks = ceil_div(op.rows, kBlockRows), block = ceil_to(ceil_div(op.rows, blocks), per_tile);
  thread_local std::vector<float> memory;
  for (int64_t row = 0; row < op.rows; row += block) {
    for (int64_t first = 0; first < summed; first += kBlockSums) {
      const int64_t rows = std::min(block, op.rows - row), count = std::min(kBlockSums, summed - first);
      const int64_t tiles = ceil_div(rows, per_tile), size = ceil_to(count * per_tile + 8, 16);
      if (static_cast<int64_t>(memory.size()) < tiles * size) memory.resize(tiles * size);
      float* const packed = memory.data();
      in_parallel(tiles, [&](int64_t tile) {
        const int64_t begin = tile * per_tile;
        kernels.pack_rows(op.x + (row + begin) * op.x_stride + first, op.x_stride, std::min(per_tile, rows - begin),
                          count, packed + tile * size);
      });
      const PackedRows x{packed, size, row, rows, first, count};
      const bool finishes = op.finish != nullptr && first + count == summed;
      in_parallel(ceil_div(columns, kProductColumns), [&](int64_t index) {
        const int64_t column = index * kProductColumns, now = std::min(kProductColumns, columns - column);
        kernels.multiply_packed(op, x, column, now);
        if (!finishes) return;
        float* const y = op.y + row * op.y_stride;
        kernels.bias_and_activate_rows(finishing(*op.finish, y, op.y_stride, rows, column, now), 0, rows);
      });
    }
  }
}

void run(const WidenRows& op, const Kernels& kernels) {
  over_rows(op.end - op.begin, op.inputs, [&](int64_t begin, int64_t end) {
    kernels.widen_rows(*op.weight, op.inputs, op.begin + begin, op.begin + end, op.out + begin * op.inputs);
  });
}

// False where an id is no row.
bool run(const Gather& op, const Kernels& kernels) {
  if (std::any_of(op.ids, op.ids + op.rows, [&](int64_t id) { return id < 0 || id >= op.weight->rows; })) return false;
  over_rows(op.rows, op.inputs, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      kernels.widen_rows(*op.weight, op.inputs, op.ids[row], op.ids[row] + 1, op.out + row * op.inputs);
  });
  return true;
}

void run(const RmsNorm& op, const Kernels& kernels) {
  over_rows(op.outer * op.inner, op.width, [&](int64_t begin, int64_t end) { kernels.norm_rows(op, begin, end); });
}

void run(const RopeTable& op) {
  for (int64_t token = 0; token < op.tokens; ++token) {
    const float position = static_cast<float>(op.positions[token]);
    float *cos = op.cos + token * 2 * op.frequencies, *sin = op.sin + token * 2 * op.frequencies;
    for (int64_t i = 0; i < op.frequencies; ++i) {
      const float angle = position * op.inv_freq[i];
      cos[i] = cos[i + op.frequencies] = std::cos(angle) * op.factor;
      sin[i] = sin[i + op.frequencies] = std::sin(angle) * op.factor;
    }
  }
}

void run(const Rope& op, const Kernels& kernels) {
  over_rows(op.tokens, op.heads * op.width, [&](int64_t begin, int64_t end) { kernels.rotate(op, begin, end); });
}

// One span of a sequence, for the queries of some key heads.
struct Span {
  int64_t token, kv_head, heads, begin, end;
  int64_t result;  // of its first query; those of all query heads of a span lie together
};

void run(const Attention& op, const Kernels& kernels) {
  const int64_t row = op.kv_heads * op.width, queries = op.heads / op.kv_heads;
  for (int64_t token = 0; token < op.tokens; ++token) {
    std::copy_n(op.k + token * row, row, op.keys + op.slots[token] * row);
    std::copy_n(op.v + token * row, row, op.values + op.slots[token] * row);
  }
  const int64_t step = std::clamp<int64_t>(kSpanNumbers / op.width, 1, op.kv_heads);
  thread_local std::vector<Span> spans;
  thread_local std::vector<int64_t> starts;
  thread_local std::vector<float> buffer;
  spans.clear();
  starts.assign(1, 0);
  for (int64_t token = 0; token < op.tokens; ++token) {
    const int64_t end = op.kv_lens[token], begin = op.window > 0 ? std::max<int64_t>(0, end - op.window) : 0;
    int64_t result = starts.back();
    for (int64_t at = begin, next; at < end; at = next, result += op.heads) {
      next = std::min(end, at / kSpan * kSpan + kSpan);
      for (int64_t head = 0; head < op.kv_heads; head += step)
        spans.push_back({token, head, std::min(step, op.kv_heads - head), at, next, result + head * queries});
    }
    starts.push_back(result);
  }
  const int64_t results = starts.back();
  buffer.resize(results * (2 + op.width));
  // References: a lambda of the pool's threads would find thread_local vectors of its own.
  const Span* all = spans.data();
  const int64_t* start = starts.data();
  float *peaks = buffer.data(), *sums = peaks + results, *weighted = sums + results;
  in_parallel(static_cast<int64_t>(spans.size()), [&](int64_t i) {
    const Span& span = all[i];
    kernels.attend(op, span.token, span.kv_head, span.heads, span.begin, span.end, peaks + span.result,
                   sums + span.result, weighted + span.result * op.width);
  }, true);
  const int64_t rows = op.tokens * op.heads;
  over_rows(rows, results * op.width / std::max<int64_t>(1, rows), [&](int64_t begin, int64_t end) {
    for (int64_t row_of_q = begin; row_of_q < end; ++row_of_q) {
      const int64_t token = row_of_q / op.heads, first = start[token] + row_of_q % op.heads, last = start[token + 1];
      float* out = op.out + row_of_q * op.width;
      float peak = peaks[first], total = 0.0f;
      for (int64_t i = first; i < last; i += op.heads) peak = std::max(peak, peaks[i]);
      std::fill(out, out + op.width, 0.0f);
      for (int64_t i = first; i < last; i += op.heads) {
        const float factor = std::exp(peaks[i] - peak);
        total += factor * sums[i];
        const float* part = weighted + i * op.width;
        for (int64_t d = 0; d < op.width; ++d) out[d] += factor * part[d];
      }
      for (int64_t d = 0; d < op.width; ++d) out[d] /= total;
    }
  });
}

// Some new tokens of one sequence, for the queries of one key head.
struct QueryTile {
  int64_t sequence, first, tokens, kv_head;
};

void run(const TiledAttention& op, const Kernels& kernels) {
  if (op.new_keys != nullptr) {
    const int64_t row = op.kv_heads * op.width;
    over_rows(op.seq_starts[op.sequences], 2 * row, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        std::copy_n(op.new_keys + t * op.new_key_stride, row, op.keys + op.slots[t] * op.key_stride);
        std::copy_n(op.new_values + t * op.new_value_stride, row, op.values + op.slots[t] * op.value_stride);
      }
    });
  }
  const int64_t step = std::max<int64_t>(1, kTileQueries / (op.heads / op.kv_heads));
  thread_local std::vector<QueryTile> tiles;
  tiles.clear();
  for (int64_t s = 0; s < op.sequences; ++s) {
    const int64_t tokens = op.seq_starts[s + 1] - op.seq_starts[s];
    if (tokens == 0) continue;
    // The last ones first: they see most, and what is left at the end should be short.
    for (int64_t first = (tokens - 1) / step * step; first >= 0; first -= step)
      for (int64_t head = 0; head < op.kv_heads; ++head)
        tiles.push_back({s, first, std::min(step, tokens - first), head});
  }
  const QueryTile* all = tiles.data();
  in_parallel(static_cast<int64_t>(tiles.size()), [&](int64_t i) {
    kernels.attend_tile(op, all[i].sequence, all[i].first, all[i].tokens, all[i].kv_head);
  });
}

void run(const AttentionGradient& op, const Kernels& kernels) {
  in_parallel(op.sequences * op.kv_heads,
              [&](int64_t index) { kernels.attend_gradient(op, index / op.kv_heads, index % op.kv_heads); });
}

void run(const GatedActivation& op, const Kernels& kernels) {
  // An exponential costs as much as some sums.
  over_rows(op.outer * op.inner, 4 * op.width, [&](int64_t begin, int64_t end) { kernels.activate_rows(op, begin, end); });
}

void run(const Add& op, const Kernels& kernels) {
  over_rows(op.rows, op.width, [&](int64_t begin, int64_t end) { kernels.add_rows(op, begin, end); });
}

void run(const LayerNorm& op, const Kernels& kernels) {
  over_rows(op.rows, op.width, [&](int64_t begin, int64_t end) { kernels.normalize_rows(op, begin, end); });
}

void run(const BiasActivation& op, const Kernels& kernels) {
  over_rows(op.rows, 4 * op.width, [&](int64_t begin, int64_t end) { kernels.bias_and_activate_rows(op, begin, end); });
}

// False where a target is no logit.
bool run(const TokenLikelihood& op, const Kernels& kernels) {
  const auto is_none = [&](int64_t target) { return target < 0 || target >= op.width; };
  if (std::any_of(op.targets, op.targets + op.rows, is_none)) return false;
  over_rows(op.rows, op.width, [&](int64_t begin, int64_t end) { kernels.score_rows(op, begin, end); });
  return true;
}

void run(const RmsNormGradient& op, const Kernels& kernels) {
  over_rows(op.rows, 2 * op.width, [&](int64_t begin, int64_t end) { kernels.norm_gradient_rows(op, begin, end); });
}

void run(const GatedActivationGradient& op, const Kernels& kernels) {
  over_rows(op.rows, 6 * op.width, [&](int64_t begin, int64_t end) { kernels.activation_gradient_rows(op, begin, end); });
}

void run(const ConvStep& op, const Kernels& kernels) {
  constexpr int64_t kChannels = 1024;
  const int64_t parts = ceil_div(op.channels, kChannels);
  in_parallel(op.tokens * parts, [&](int64_t index) {
    const int64_t begin = index % parts * kChannels;
    kernels.convolve(op, index / parts, begin, std::min(op.channels, begin + kChannels));
  });
}

void run(const DeltaStep& op, const Kernels& kernels) {
  in_parallel(op.tokens * op.value_heads,
              [&](int64_t index) { kernels.advance(op, index / op.value_heads, index % op.value_heads); });
}

// Whether a product of integers is one of gemm.h, which packs its x: all but those of a few rows, and those whose groups
// are smaller than what rounded.inl knows.
bool is_packed(const Linear& op) {
  return op.rounds != 0 && (op.rows > kUnpackedRows || op.weight->group_size % kRounded != 0);
}

// How many operations from ops[0] on are products of one and the same x, all of them packed, in one way, or none.
int64_t products_of_one_input(const Op* ops, int64_t count) {
  const auto& first = *static_cast<const Linear*>(ops[0].args);
  const bool packed = is_packed(first);
  int64_t same = 1;
  for (; same < count && ops[same].kind == Kind::kLinear; ++same) {
    const auto& next = *static_cast<const Linear*>(ops[same].args);
    if (next.x != first.x || next.inputs != first.inputs || next.rows != first.rows || is_packed(next) != packed) break;
    if (packed && !gemm::round_alike(*first.weight, *next.weight)) break;
  }
  return same;
}

// Products of one x that are packed.
void multiply_packed(const Op* ops, int64_t count, const Kernels& kernels) {
  const auto& first = *static_cast<const Linear*>(ops[0].args);
  std::vector<gemm::Target> targets;
  for (int64_t i = 0; i < count; ++i) {
    const auto& op = *static_cast<const Linear*>(ops[i].args);
    targets.push_back({op.weight, op.y, op.weight->rows, nullptr});
  }
  gemm::multiply(targets.data(), count, first.inputs, first.x, first.inputs, first.rows, kernels);
}

}  // namespace

Status run(const Op* ops, int64_t count, const Kernels& kernels) try {
  for (int64_t i = 0; i < count; ++i) {
    const void* args = ops[i].args;
    switch (ops[i].kind) {
      case Kind::kLinear: {
        const auto& op = *static_cast<const Linear*>(args);
        const int64_t same = products_of_one_input(ops + i, count - i);
        if (is_packed(op))
          multiply_packed(ops + i, same, kernels);
        else
          run(ops + i, same, kernels, op);
        i += same - 1;
        break;
      }
      case Kind::kWidenRows: run(*static_cast<const WidenRows*>(args), kernels); break;
      case Kind::kGather:
        if (!run(*static_cast<const Gather*>(args), kernels)) return Status::kNoSuchRow;
        break;
      case Kind::kRmsNorm: run(*static_cast<const RmsNorm*>(args), kernels); break;
      case Kind::kRopeTable: run(*static_cast<const RopeTable*>(args)); break;
      case Kind::kRope: run(*static_cast<const Rope*>(args), kernels); break;
      case Kind::kAttention: run(*static_cast<const Attention*>(args), kernels); break;
      case Kind::kTiledAttention: run(*static_cast<const TiledAttention*>(args), kernels); break;
      case Kind::kGatedActivation: run(*static_cast<const GatedActivation*>(args), kernels); break;
      case Kind::kAdd: run(*static_cast<const Add*>(args), kernels); break;
      case Kind::kConvStep: run(*static_cast<const ConvStep*>(args), kernels); break;
      case Kind::kDeltaStep: run(*static_cast<const DeltaStep*>(args), kernels); break;
      case Kind::kRmsNormGradient: run(*static_cast<const RmsNormGradient*>(args), kernels); break;
      case Kind::kGatedActivationGradient: run(*static_cast<const GatedActivationGradient*>(args), kernels); break;
      case Kind::kAttentionGradient: run(*static_cast<const AttentionGradient*>(args), kernels); break;
      case Kind::kConvGradient: run(*static_cast<const ConvGradient*>(args), kernels); break;
      case Kind::kDeltaChunkGradient: run(*static_cast<const DeltaChunkGradient*>(args), kernels); break;
      case Kind::kChoose: run(*static_cast<const Choose*>(args), kernels); break;
      case Kind::kLoraRows: run(*static_cast<const LoraRows*>(args), kernels); break;
      case Kind::kLowRank: run(*static_cast<const LowRank*>(args), kernels); break;
      case Kind::kLowRankGradient: run(*static_cast<const LowRankGradient*>(args), kernels); break;
      case Kind::kConv: run(*static_cast<const Conv*>(args), kernels); break;
      case Kind::kDeltaChunk: run(*static_cast<const DeltaChunk*>(args), kernels); break;
      case Kind::kFloatProduct: run(*static_cast<const FloatProduct*>(args), kernels); break;
      case Kind::kLayerNorm: run(*static_cast<const LayerNorm*>(args), kernels); break;
      case Kind::kBiasActivation: run(*static_cast<const BiasActivation*>(args), kernels); break;
      case Kind::kEncoderLayers: run(*static_cast<const EncoderLayers*>(args), kernels); break;
      case Kind::kTokenLikelihood:
        if (!run(*static_cast<const TokenLikelihood*>(args), kernels)) return Status::kNoSuchRow;
        break;
    }
  }
  return Status::kDone;
} catch (const std::bad_alloc&) {
  return Status::kNoMemory;
}

}  // namespace whet
