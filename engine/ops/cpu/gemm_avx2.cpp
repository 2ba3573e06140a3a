// AVX2 and FMA. Products of pairs of int8 would saturate vpmaddubsw, so int8 is multiplied as words; the 16 values of
// a 4-bit weight leave room for the sums of a whole group in 16 bits: 8 units * 2 * 15 * 127 = 30480.
#if defined(__x86_64__)
#include <algorithm>

#include "gemm.h"

// After the headers above: a function of theirs that is not inlined must run on every CPU.
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

namespace whet::gemm::avx2 {
namespace {

using Ints = __m256i;
using Floats = __m256;
constexpr int kLanes = 8;
constexpr int kTileRows = 4;
constexpr Format kInt8Format = Format::kWords;

#include "gemm_256.inl"

struct Int8Sum {
  static constexpr int kUnit = 2;
  static Ints start(const int32_t*) { return _mm256_setzero_si256(); }
  static Ints add(Ints sum, Ints w, Ints x) { return _mm256_add_epi32(sum, _mm256_madd_epi16(w, x)); }
  static Ints total(Ints sum) { return sum; }
};

struct Int4Sum {
  static constexpr int kUnit = 4;
  static Ints start(const int32_t*) { return _mm256_setzero_si256(); }
  static Ints add(Ints sum, Ints w, Ints x) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x)); }
  static Ints total(Ints sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
};

}  // namespace

#include "gemm.inl"

}  // namespace whet::gemm::avx2
#endif
