// AVX2 and FMA: every x86-64 server since 2013.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "kernels.h"

// After the headers: what they define may be shared with files for older processors.
#pragma GCC target("avx2,fma,f16c")

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
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
// A bit for each lane in which a >= b.
inline unsigned at_least(Vec a, Vec b) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
}
inline Vec round(Vec v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// The second where either is NaN.
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
// v * 2^n for integers n in [-126, 127].
inline Vec times_power_of_two(Vec v, Vec n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(v, _mm256_castsi256_ps(exponent));
}
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

// The sums of four vectors.
inline void sum_of_four(const Vec* of, float* out) {
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(of[0], of[1]), _mm256_hadd_ps(of[2], of[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}

// Bytes of int8 products: kBytes at a time.
using Bytes = __m256i;
constexpr int kBytes = 32;
inline Bytes load_bytes(const char* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
// Weights of 4 bits from 0 to 15 times x in [-127, 127]; x + kBytes holds what the upper halves are multiplied by. Sums of
// four products each, in 16 bits: eight of a group, which sixteen bytes hold.
inline Bytes multiply_nibbles(Bytes w, const int8_t* x) {
  const Bytes mask = _mm256_set1_epi8(15);
  const Bytes low = _mm256_and_si256(w, mask), high = _mm256_and_si256(_mm256_srli_epi16(w, 4), mask);
  const auto* partners = reinterpret_cast<const Bytes*>(x);
  return _mm256_add_epi16(_mm256_maddubs_epi16(low, _mm256_loadu_si256(partners)),
                          _mm256_maddubs_epi16(high, _mm256_loadu_si256(partners + 1)));
}
// The sums of each of eight groups, in order: of four vectors as multiply_nibbles gives them. 32 products of 15 * 127 at
// most, halved once more, fit in 16 bits.
inline Bytes halve(Bytes a, Bytes b) {
  return _mm256_add_epi16(_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b));
}
inline Vec sums_of_groups(const Bytes* of) {
  const Bytes first = halve(of[0], of[1]), second = halve(of[2], of[3]);
  const Bytes quarters = _mm256_add_epi16(_mm256_unpacklo_epi32(first, second), _mm256_unpackhi_epi32(first, second));
  const Bytes together = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
  const Bytes sums = _mm256_madd_epi16(_mm256_shuffle_epi8(quarters, together), _mm256_set1_epi16(1));
  return _mm256_cvtepi32_ps(_mm256_permutevar8x32_epi32(sums, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
}
// Of one such vector: four sums for each group. And the factors [first, first + 2), four of each.
inline Vec sums_of_four(Bytes products) {
  return _mm256_cvtepi32_ps(_mm256_madd_epi16(products, _mm256_set1_epi16(1)));
}
inline Vec factors_of_nibbles(Vec factors, int64_t first) {
  const __m256i lanes = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  return _mm256_permutevar8x32_ps(factors, _mm256_add_epi32(lanes, _mm256_set1_epi32(static_cast<int>(first))));
}
// Sums of four products each, of signed w and x in [-127, 127]: 2 * 128 * 127 fits in 16 bits.
inline Vec dot_signed(Bytes w, Bytes x) {
  return _mm256_cvtepi32_ps(
      _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)), _mm256_set1_epi16(1)));
}
// The first `count` lanes, and 0 in the others.
inline Vec first_lanes(Vec v, int count) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes)));
}
inline Vec group_factors(const float* from) { return _mm256_broadcast_ss(from); }
inline Vec load_half(const uint16_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

#include "vector_math.inl"
#include "rows.inl"
#include "panels.inl"
#include "bytes_256.inl"
#include "rounded.inl"
#include "elementwise.inl"
#include "encoder.inl"
#include "likelihood.inl"
#include "choose.inl"
#include "gradients.inl"
#include "attention.inl"
#include "attention_tiles.inl"
#include "attention_whole.inl"
#include "attention_gradient.inl"
#include "recurrent.inl"
#include "sequence.inl"
#include "sequence_gradient.inl"
#include "low_rank.inl"

}  // namespace

const Kernels kernels{multiply_rows, kPanelRows, pack_rows, multiply_packed, round_row, multiply_rounded, widen_rows, norm_rows, rotate, activate_rows, add_rows, attend, attend_tile, convolve, advance, convolve_rows, advance_chunks, normalize_rows, bias_and_activate_rows, score_rows, norm_gradient_rows, activation_gradient_rows, attend_gradient, convolve_gradient, advance_gradient, find_largest, weigh, collect, exp_less, update_rows, update_few_rows, update_gradient, attend_whole};

}  // namespace whet::avx2
#endif
