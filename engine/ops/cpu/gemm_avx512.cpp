// AVX-512 (F, BW, VL, DQ): as gemm_avx2.cpp, in vectors of twice the size.
#if defined(__x86_64__)
#include <algorithm>

#include "gemm.h"

// After the headers above: a function of theirs that is not inlined must run on every CPU.
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#include <immintrin.h>

namespace whet::gemm::avx512 {
namespace {

using Ints = __m512i;
using Floats = __m512;
constexpr int kLanes = 16;
constexpr int kTileRows = 8;
constexpr Format kInt8Format = Format::kWords;

#include "gemm_512.inl"

struct Int8Sum {
  static constexpr int kUnit = 2;
  static Ints start(const int32_t*) { return _mm512_setzero_si512(); }
  static Ints add(Ints sum, Ints w, Ints x) { return _mm512_add_epi32(sum, _mm512_madd_epi16(w, x)); }
  static Ints total(Ints sum) { return sum; }
};

struct Int4Sum {
  static constexpr int kUnit = 4;
  static Ints start(const int32_t*) { return _mm512_setzero_si512(); }
  static Ints add(Ints sum, Ints w, Ints x) { return _mm512_add_epi16(sum, _mm512_maddubs_epi16(w, x)); }
  static Ints total(Ints sum) { return _mm512_madd_epi16(sum, _mm512_set1_epi16(1)); }
};

}  // namespace

#include "gemm.inl"

}  // namespace whet::gemm::avx512
#endif
