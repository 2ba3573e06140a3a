// AVX2 with AVX-VNNI, which multiplies unsigned bytes with signed ones and adds four products to 32 bits: x of int8
// weights is biased to be unsigned, and 4-bit weights are unsigned themselves.
#if defined(__x86_64__)
#include <algorithm>

#include "gemm.h"

// After the headers above: a function of theirs that is not inlined must run on every CPU.
#pragma GCC target("avxvnni,avx2,fma,f16c")
#include <immintrin.h>

namespace whet::gemm::avxvnni {
namespace {

using Ints = __m256i;
using Floats = __m256;
constexpr int kLanes = 8;
constexpr int kTileRows = 4;
constexpr Format kInt8Format = Format::kBiased;

#include "gemm_256.inl"

struct Int8Sum {
  static constexpr int kUnit = 4;
  static Ints start(const int32_t* corrections) { return load_ints(corrections); }
  static Ints add(Ints sum, Ints w, Ints x) { return _mm256_dpbusd_avx_epi32(sum, x, w); }
  static Ints total(Ints sum) { return sum; }
};

struct Int4Sum {
  static constexpr int kUnit = 4;
  static Ints start(const int32_t*) { return _mm256_setzero_si256(); }
  static Ints add(Ints sum, Ints w, Ints x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
  static Ints total(Ints sum) { return sum; }
};

}  // namespace

#include "gemm.inl"

}  // namespace whet::gemm::avxvnni
#endif
