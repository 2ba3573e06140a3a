// How the operations of sequence.inl and sequence_gradient.inl are cut into pieces for the threads.
#include <algorithm>

#include "kernels.h"
#include "parallel.h"

namespace whet {
namespace {

// Outputs of a piece of a convolution.
constexpr int64_t kPieceNumbers = 1 << 17;

}  // namespace

void run(const Conv& op, const Kernels& kernels) {
  const int64_t step = std::max<int64_t>(1, kPieceNumbers / op.channels);
  in_parallel((op.tokens + step - 1) / step, [&](int64_t index) {
    kernels.convolve_rows(op, index * step, std::min(op.tokens, (index + 1) * step));
  });
}

void run(const DeltaChunk& op, const Kernels& kernels) {
  in_parallel(op.value_heads, [&](int64_t head) { kernels.advance_chunks(op, head); });
}

void run(const ConvGradient& op, const Kernels& kernels) {
  constexpr int64_t kChannels = 256;
  const int64_t parts = (op.channels + kChannels - 1) / kChannels;
  in_parallel(op.sequences * parts, [&](int64_t index) {
    const int64_t first = index % parts * kChannels;
    kernels.convolve_gradient(op, index / parts, first, std::min(kChannels, op.channels - first));
  });
}

void run(const DeltaChunkGradient& op, const Kernels& kernels) {
  const int64_t heads = op.forward.key_heads;
  in_parallel(op.sequences * heads,
              [&](int64_t index) { kernels.advance_gradient(op, index / heads, index % heads); });
}

}  // namespace whet
