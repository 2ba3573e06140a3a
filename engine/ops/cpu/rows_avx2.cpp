// AVX2 and FMA: every x86-64 server since 2013.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

#include <algorithm>
#include <vector>

#include "kernels.h"

namespace whet::avx2 {
namespace {

using Vec = __m256;
constexpr int kLanes = 8;
constexpr int kTileRows = 4;  // with two rows of W, eight of the sixteen registers hold sums

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec set1(float value) { return _mm256_set1_ps(value); }
inline Vec load(const float* from) { return _mm256_loadu_ps(from); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline void store(float* to, Vec v) { _mm256_storeu_ps(to, v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec load_bf16(const uint16_t* from) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Vec load_int8(const int8_t* from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
inline Vec widen_int8(__m128i bytes) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)); }
inline void unpack_int4(const uint8_t* from, char shift, Vec* out) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m128i mask = _mm_set1_epi8(15), added = _mm_set1_epi8(shift);
  const __m128i low = _mm_sub_epi8(_mm_and_si128(bytes, mask), added);
  const __m128i high = _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(bytes, 4), mask), added);
  const __m128i first = _mm_unpacklo_epi8(low, high), second = _mm_unpackhi_epi8(low, high);
  out[0] = widen_int8(first);
  out[1] = widen_int8(_mm_srli_si128(first, 8));
  out[2] = widen_int8(second);
  out[3] = widen_int8(_mm_srli_si128(second, 8));
}
inline float sum(Vec v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

}  // namespace

#include "rows.inl"

}  // namespace whet::avx2
#endif
