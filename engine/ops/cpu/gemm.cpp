// What Python calls of gemm.h: the division of a product among threads, and the choice of a level.
#include "gemm.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

namespace whet::gemm {
namespace {

// Packed rows of x that are multiplied before more are packed: they stay in a core's second-level cache or near it, and
// memory for them is bounded.
constexpr int64_t kPackedBytes = 1 << 20;

// Multiplications of a piece of work, at least: some microseconds.
constexpr int64_t kPieceProducts = 1 << 18;

constexpr int kLevels = 5;

const Level* level_at(int index) {
#if defined(__x86_64__)
  const Level* const levels[kLevels] = {nullptr, &avx2::kLevel, &avxvnni::kLevel, &avx512::kLevel, &avx512vnni::kLevel};
  return levels[index];
#else
  static_cast<void>(index);
  return nullptr;
#endif
}

bool is_there(int index) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  switch (index) {
    case 1: return avx2;
    case 2: return avx2 && __builtin_cpu_supports("avxvnni");
    case 3: return avx512;
    case 4: return avx512 && __builtin_cpu_supports("avx512vnni");
  }
#endif
  return index == 0;
}

int best_level() {
  static const int found = [] {
    int index = kLevels - 1;
    while (!is_there(index)) --index;
    return index;
  }();
  return found;
}

int forced_level = -1;

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};

// Memory of the calling thread, kept for its next call.
char* scratch(int64_t bytes) {
  thread_local std::unique_ptr<char, Free> memory;
  thread_local int64_t size = 0;
  if (size < bytes) {
    memory.reset();
    size = 0;
    memory.reset(static_cast<char*>(std::aligned_alloc(64, aligned(bytes))));
    if (memory == nullptr) throw std::bad_alloc();
    size = bytes;
  }
  return memory.get();
}

struct PackCall {
  const Level* level;
  const float* x;
  int64_t ldx, rows, inputs, group;
  Format format;
  char* tiles;
  int64_t bytes;  // of a tile
};

void pack_piece(void* context, int64_t index) {
  const PackCall& call = *static_cast<const PackCall*>(context);
  const int64_t rows = call.level->tile_rows, begin = index * rows;
  const Tile tile = tile_at(call.tiles + index * call.bytes, rows, call.inputs, call.group, call.format);
  call.level->pack_tile(call.x + begin * call.ldx, call.ldx, std::min(rows, call.rows - begin), call.inputs,
                        call.group, call.format, tile);
}

struct MultiplyCall {
  const Level* level;
  const Target* targets;
  const Kernels* kernels;
  Product product;   // but for the weight and y, which are the targets'
  int64_t row;       // of x that the packed ones begin with
  int64_t together;  // strips of a piece

  int64_t pieces(const Target& target) const {
    const int64_t columns = level->columns * together;
    return (target.weight->rows + columns - 1) / columns;
  }
};

// The pieces of all targets are numbered through, so that small weights fill the threads together.
void multiply_piece(void* context, int64_t index) {
  const MultiplyCall& call = *static_cast<const MultiplyCall*>(context);
  const Target* target = call.targets;
  for (int64_t of_this; index >= (of_this = call.pieces(*target)); ++target) index -= of_this;
  Product product = call.product;
  product.weight = target->weight;
  product.ldy = target->ldy;
  product.y = target->y + call.row * product.ldy;
  const int64_t columns = call.level->columns, begin = index * call.together * columns;
  const int64_t end = std::min(begin + call.together * columns, target->weight->rows);
  for (int64_t n = begin; n < end; n += columns) {
    call.level->multiply_strip(product, n);
    if (target->finish == nullptr) continue;
    const int64_t now = std::min(columns, end - n);
    call.kernels->bias_and_activate_rows(finishing(*target->finish, product.y, product.ldy, product.rows, n, now), 0,
                                         product.rows);
  }
}

int64_t group_of(const Weight& weight) { return weight.group_size % 32 == 0 ? 32 : 16; }

}  // namespace

bool round_alike(const Weight& a, const Weight& b) {
  return (a.storage == Storage::kInt4) == (b.storage == Storage::kInt4) && group_of(a) == group_of(b);
}

void multiply(const Target* targets, int64_t count, int64_t inputs, const float* x, int64_t ldx, int64_t rows,
              const Kernels& kernels) {
  if (rows == 0) return;
  const Level& level = *level_at(forced_level < 0 ? best_level() : forced_level);
  const Weight& weight = *targets[0].weight;
  const int64_t group = group_of(weight);
  const Format format = weight.storage == Storage::kInt4 ? level.int4_format : level.int8_format;
  const int64_t bytes = tile_bytes(level.tile_rows, inputs, group, format);
  const int64_t most = std::max<int64_t>(1, kPackedBytes / bytes), all = (rows + level.tile_rows - 1) / level.tile_rows;
  const int64_t blocks = (all + most - 1) / most, per_block = (all + blocks - 1) / blocks;
  char* const tiles = scratch(per_block * bytes);
  for (int64_t first = 0; first < all; first += per_block) {
    const int64_t packed = std::min(per_block, all - first), begin = first * level.tile_rows;
    const int64_t now = std::min(packed * level.tile_rows, rows - begin);
    PackCall pack{&level, x + begin * ldx, ldx, now, inputs, group, format, tiles, bytes};
    parallel_for(pack_piece, &pack, packed);
    const Product product{nullptr, inputs, group, tiles, bytes, now, nullptr, 0};
    const int64_t together = std::max<int64_t>(1, kPieceProducts / (now * inputs * level.columns));
    MultiplyCall call{&level, targets, &kernels, product, begin, together};
    int64_t pieces = 0;
    for (int64_t i = 0; i < count; ++i) pieces += call.pieces(targets[i]);
    parallel_for(multiply_piece, &call, pieces);
  }
}

}  // namespace whet::gemm

#define WHET_API __attribute__((visibility("default")))

extern "C" {

// 0: this CPU has no kernel here; 1: AVX2; 2: AVX-VNNI; 3: AVX-512; 4: AVX-512 VNNI.
WHET_API int whet_cpu_gemm_level() { return whet::gemm::best_level(); }

// Whether this CPU has the instructions of a level.
WHET_API int whet_cpu_gemm_has_level(int level) { return whet::gemm::is_there(level); }

// For tests: the kernels of a level that the CPU has. -1: the best one.
WHET_API void whet_cpu_gemm_force_level(int level) { whet::gemm::forced_level = level; }

}
