// AVX-512 (F, BW, VL, DQ).
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#include <immintrin.h>

#include <algorithm>
#include <vector>

#include "kernels.h"

namespace whet::avx512 {
namespace {

using Vec = __m512;
constexpr int kLanes = 16;
constexpr int kTileRows = 8;  // with two rows of W, sixteen of the 32 registers hold sums

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec set1(float value) { return _mm512_set1_ps(value); }
inline Vec load(const float* from) { return _mm512_loadu_ps(from); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline void store(float* to, Vec v) { _mm512_storeu_ps(to, v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec load_bf16(const uint16_t* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Vec widen_int8(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); }
inline Vec load_int8(const int8_t* from) {
  return widen_int8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline void unpack_int4(const uint8_t* from, char shift, Vec* out) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m128i mask = _mm_set1_epi8(15), added = _mm_set1_epi8(shift);
  const __m128i low = _mm_sub_epi8(_mm_and_si128(bytes, mask), added);
  const __m128i high = _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(bytes, 4), mask), added);
  out[0] = widen_int8(_mm_unpacklo_epi8(low, high));
  out[1] = widen_int8(_mm_unpackhi_epi8(low, high));
}
inline float sum(Vec v) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}

}  // namespace

#include "rows.inl"

}  // namespace whet::avx512
#endif
