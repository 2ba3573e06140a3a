// AVX-512 with VNNI: as gemm_avxvnni.cpp, in vectors of twice the size.
#if defined(__x86_64__)
#include <algorithm>

#include "gemm.h"

// After the headers above: a function of theirs that is not inlined must run on every CPU.
#pragma GCC target("avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#include <immintrin.h>

namespace whet::gemm::avx512vnni {
namespace {

using Ints = __m512i;
using Floats = __m512;
constexpr int kLanes = 16;
constexpr int kTileRows = 8;
constexpr Format kInt8Format = Format::kBiased;

#include "gemm_512.inl"

struct Int8Sum {
  static constexpr int kUnit = 4;
  static Ints start(const int32_t* corrections) { return load_ints(corrections); }
  static Ints add(Ints sum, Ints w, Ints x) { return _mm512_dpbusd_epi32(sum, x, w); }
  static Ints total(Ints sum) { return sum; }
};

struct Int4Sum {
  static constexpr int kUnit = 4;
  static Ints start(const int32_t*) { return _mm512_setzero_si512(); }
  static Ints add(Ints sum, Ints w, Ints x) { return _mm512_dpbusd_epi32(sum, w, x); }
  static Ints total(Ints sum) { return sum; }
};

}  // namespace

#include "gemm.inl"

}  // namespace whet::gemm::avx512vnni
#endif
