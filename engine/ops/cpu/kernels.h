// Products of a few rows of activations with weights as they are stored, for CPUs.
//
// Shapes: M rows of x, K inputs, N outputs, S group size, G = K / S groups. All matrices are row-major.
//
// A decoded token reads every weight once, so what counts is to read them at the memory's rate and to widen them on the
// way. One thread takes some rows of W at a time and multiplies all rows of x by them while they are near; x is not cut
// into blocks for the caches, which is why these kernels stop paying at some tens of rows.
#pragma once

#include <cstdint>

namespace whet {

enum class Storage : int32_t {
  kFloat32 = 0,  // data: float [N, K]
  kBfloat16 = 1, // data: bfloat16 [N, K]
  kInt8 = 2,     // data: int8 [N, K]; w = (q - zero) * scale + offset
  kInt4 = 3,     // data: two values a byte [N, K / 2], the lower half first, each q + shift; w as in kInt8
};

// One weight matrix. scales, zeros, offsets: [N, G], all float or all float16; zeros and offsets may be null, for 0.
struct Weight {
  const void* data;
  const void* scales;
  const void* zeros;
  const void* offsets;
  int64_t rows;        // N
  int64_t group_size;  // S, a multiple of 16 (of 32 for kInt4) that divides K
  Storage storage;
  int32_t half_scales;  // scales, zeros and offsets are float16
  int32_t shift;        // 0 or 8
  int32_t reserved;
};

// y[m, n] = sum_k x[m, k] w[n, k] for n in [begin, end); y has row stride ldy.
using RowsKernel = void (*)(const Weight& weight, int64_t inputs, int64_t begin, int64_t end, const float* x, int64_t ldx,
                            int64_t rows, float* y, int64_t ldy);

// w[n, k] as float for n in [begin, end), end to end.
using WidenKernel = void (*)(const Weight& weight, int64_t inputs, int64_t begin, int64_t end, float* out);

namespace avx2 {
void multiply_rows(const Weight&, int64_t, int64_t, int64_t, const float*, int64_t, int64_t, float*, int64_t);
void widen_rows(const Weight&, int64_t, int64_t, int64_t, float*);
}  // namespace avx2
namespace avx512 {
void multiply_rows(const Weight&, int64_t, int64_t, int64_t, const float*, int64_t, int64_t, float*, int64_t);
void widen_rows(const Weight&, int64_t, int64_t, int64_t, float*);
}  // namespace avx512

// Work shared by the calling thread and the pool's. `body(context, index)` runs once for each index in [0, count).
using Body = void (*)(void* context, int64_t index);
void parallel_for(Body body, void* context, int64_t count);
void set_num_threads(int count);

}  // namespace whet
