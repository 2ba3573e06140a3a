// Products of many rows of activations with weights stored as integers, by integer arithmetic, for CPUs.
//
// Shapes: M rows of x, K inputs, N outputs, g group (32, or 16), P = K / g groups. All matrices are row-major.
//
// x is rounded to int8, each row in groups of g values with a scale of their own (the largest magnitude / 127), and so
// becomes xq * xs. With w = q * scale + offset (a zero point goes into the offset), one group of one product is
//
//     xs * scale * sum(q * xq) + offset * xs * sum(xq),
//
// whose sums are exact integers. The rounding of x is the only one that a product of floats does not have, and every
// level of instructions has the same; so do all M: a row of y does not depend on the others. A group of x with a value
// that is not finite makes its row of y NaN.
//
// Weights stay as they are stored. One thread takes kColumns rows of W at a time, packs a part of K of them for the
// multiplication into the nearest cache, and passes all rows of x over it. Packing costs as much as some four rows of x.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace whet::gemm {

// Values of x as a level multiplies them. Values of a row that are multiplied together, 4 bytes of them, are a unit:
// tiles of x and strips of W hold units side by side for their rows, [K / unit][rows].
enum class Format : int32_t {
  kWords = 0,   // int16, two a unit
  kHalves = 1,  // int8, four a unit: of eight values those of even and then those of odd index, as halves of bytes lie
  kBiased = 2,  // uint8, 128 more than the value, four a unit
};

inline int64_t value_bytes(Format format) { return format == Format::kWords ? 2 : 1; }

// Some rows of x.
struct Tile {
  char* values;   // units [K / unit][tile_rows]
  float* scales;  // xs [P][tile_rows]
  float* sums;    // xs * sum(xq) [P][tile_rows]
};

// One of several products of the same x.
struct Target {
  const Weight* weight;
  float* y;              // [M, N]
  int64_t ldy;
  const Finish* finish;  // or null
};

// One product, once x is packed.
struct Product {
  const Weight* weight;
  int64_t inputs;
  int64_t group;
  const char* tiles;   // of tile_bytes each
  int64_t tile_bytes;
  int64_t rows;        // M
  float* y;
  int64_t ldy;
};

// The kernels of one set of instructions.
struct Level {
  int64_t tile_rows;  // rows of x that are multiplied together
  int64_t columns;    // rows of W that are packed together
  Format int8_format, int4_format;
  // Packs `rows` rows of x, at most tile_rows.
  void (*pack_tile)(const float* x, int64_t ldx, int64_t rows, int64_t inputs, int64_t group, Format format, Tile tile);
  // y[:, n : n + columns] for all rows; past the last row of W nothing is written.
  void (*multiply_strip)(const Product& product, int64_t n);
};

// Where the parts of a tile lie in its memory.
inline int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }
inline Tile tile_at(char* memory, int64_t tile_rows, int64_t inputs, int64_t group, Format format) {
  char* const scales = memory + aligned(tile_rows * inputs * value_bytes(format));
  const int64_t bytes = aligned(tile_rows * (inputs / group) * 4);
  return {memory, reinterpret_cast<float*>(scales), reinterpret_cast<float*>(scales + bytes)};
}
inline int64_t tile_bytes(int64_t tile_rows, int64_t inputs, int64_t group, Format format) {
  return aligned(tile_rows * inputs * value_bytes(format)) + 2 * aligned(tile_rows * (inputs / group) * 4);
}

// Whether two weights have x rounded in the same way, so that they can be targets of one call.
bool round_alike(const Weight& a, const Weight& b);

// y [M, N] = x [M, K], rounded to int8, times a weight of integers transposed, for each target. Throws std::bad_alloc.
void multiply(const Target* targets, int64_t count, int64_t inputs, const float* x, int64_t ldx, int64_t rows,
              const Kernels& kernels);

namespace avx2 { extern const Level kLevel; }
namespace avxvnni { extern const Level kLevel; }
namespace avx512 { extern const Level kLevel; }
namespace avx512vnni { extern const Level kLevel; }

}  // namespace whet::gemm
