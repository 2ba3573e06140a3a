// The functions that Python calls through ctypes.
#include <algorithm>

#include "kernels.h"

namespace whet {
namespace {

// Bytes of W that one piece of work covers: some microseconds.
constexpr int64_t kPieceBytes = 1 << 16;

int level() {
#if defined(__x86_64__)
  static const int found = [] {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      return 2;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") ? 1 : 0;
  }();
  return found;
#else
  return 0;
#endif
}

int forced_level = -1;

RowsKernel rows_kernel() {
#if defined(__x86_64__)
  return (forced_level < 0 ? level() : forced_level) == 2 ? avx512::multiply_rows : avx2::multiply_rows;
#else
  return nullptr;
#endif
}

WidenKernel widen_kernel() {
#if defined(__x86_64__)
  return (forced_level < 0 ? level() : forced_level) == 2 ? avx512::widen_rows : avx2::widen_rows;
#else
  return nullptr;
#endif
}

int64_t row_bytes(const Weight& weight, int64_t inputs) {
  switch (weight.storage) {
    case Storage::kFloat32: return 4 * inputs;
    case Storage::kBfloat16: return 2 * inputs;
    case Storage::kInt8: return inputs + 4 * (inputs / weight.group_size);
    case Storage::kInt4: return inputs / 2 + 4 * (inputs / weight.group_size);
  }
  return inputs;
}

struct Call {
  const Weight* weights;
  int64_t count;
  int64_t inputs;
  const float* x;
  int64_t rows;
  float* y;
  int64_t ldy;
  int64_t piece_rows;
  RowsKernel kernel;
};

// The pieces of all weights are numbered through, so that small weights of one call fill the threads together.
void piece(void* context, int64_t index) {
  const Call& call = *static_cast<const Call*>(context);
  float* y = call.y;
  for (int64_t i = 0; i < call.count; ++i) {
    const Weight& weight = call.weights[i];
    const int64_t pieces = (weight.rows + call.piece_rows - 1) / call.piece_rows;
    if (index < pieces) {
      const int64_t begin = index * call.piece_rows;
      const int64_t end = std::min(begin + call.piece_rows, weight.rows);
      call.kernel(weight, call.inputs, begin, end, call.x, call.inputs, call.rows, y, call.ldy);
      return;
    }
    index -= pieces;
    y += weight.rows;
  }
}

struct WidenCall {
  const Weight* weight;
  int64_t inputs;
  int64_t begin, end;
  float* out;
  int64_t piece_rows;
  WidenKernel kernel;
};

void widen_piece(void* context, int64_t index) {
  const WidenCall& call = *static_cast<const WidenCall*>(context);
  const int64_t begin = call.begin + index * call.piece_rows;
  const int64_t end = std::min(begin + call.piece_rows, call.end);
  call.kernel(*call.weight, call.inputs, begin, end, call.out + (begin - call.begin) * call.inputs);
}

}  // namespace
}  // namespace whet

#define WHET_API __attribute__((visibility("default")))

extern "C" {

// 0: this CPU has no kernel here; 1: AVX2; 2: AVX-512.
WHET_API int whet_cpu_level() { return whet::level(); }

// For tests: the kernels of a lower level than the CPU's. -1: the CPU's own.
WHET_API void whet_cpu_force_level(int level) { whet::forced_level = level; }

WHET_API void whet_cpu_set_num_threads(int count) { whet::set_num_threads(count); }

// y [M, sum of N] = x [M, K] times each weight transposed, side by side.
WHET_API void whet_cpu_linear(const whet::Weight* weights, int64_t count, int64_t inputs, const float* x, int64_t rows,
                     float* y) {
  int64_t outputs = 0, bytes = 1;
  for (int64_t i = 0; i < count; ++i) {
    outputs += weights[i].rows;
    bytes = std::max(bytes, whet::row_bytes(weights[i], inputs));
  }
  whet::Call call{weights, count, inputs, x, rows, y, outputs, std::max<int64_t>(1, whet::kPieceBytes / bytes),
                  whet::rows_kernel()};
  int64_t pieces = 0;
  for (int64_t i = 0; i < count; ++i) pieces += (weights[i].rows + call.piece_rows - 1) / call.piece_rows;
  whet::parallel_for(whet::piece, &call, pieces);
}

// out [end - begin, K] = rows of a weight of integers.
WHET_API void whet_cpu_widen(const whet::Weight* weight, int64_t inputs, int64_t begin, int64_t end, float* out) {
  const int64_t rows = std::max<int64_t>(1, whet::kPieceBytes / (4 * inputs));
  whet::WidenCall call{weight, inputs, begin, end, out, rows, whet::widen_kernel()};
  whet::parallel_for(whet::widen_piece, &call, (end - begin + rows - 1) / rows);
}

}
