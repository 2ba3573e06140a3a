// The vectors of AVX-512.

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
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
// A bit for each lane in which a >= b.
inline unsigned at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline Vec round(Vec v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// The second where either is NaN.
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
// v * 2^n for integers n in [-126, 127].
inline Vec times_power_of_two(Vec v, Vec n) {
  const __m512i exponent = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23);
  return _mm512_mul_ps(v, _mm512_castsi512_ps(exponent));
}
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

// The sums of four vectors.
inline void sum_of_four(const Vec* of, float* out) {
  __m256 half[4];
  for (int i = 0; i < 4; ++i) half[i] = _mm256_add_ps(_mm512_castps512_ps256(of[i]), _mm512_extractf32x8_ps(of[i], 1));
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}

// Bytes of int8 products: kBytes at a time, two groups.
using Bytes = __m512i;
constexpr int kBytes = 64;
inline Bytes load_bytes(const char* from) { return _mm512_loadu_si512(from); }
// See avx2.cpp; here a vector has four groups of 4 bits, and sixteen sums are taken together.
inline Bytes multiply_nibbles(Bytes w, const int8_t* x) {
  const Bytes mask = _mm512_set1_epi8(15);
  const Bytes low = _mm512_and_si512(w, mask), high = _mm512_and_si512(_mm512_srli_epi16(w, 4), mask);
  return _mm512_add_epi16(_mm512_maddubs_epi16(low, _mm512_loadu_si512(x)),
                          _mm512_maddubs_epi16(high, _mm512_loadu_si512(x + kBytes)));
}
inline Bytes halve(Bytes a, Bytes b) {
  return _mm512_add_epi16(_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b));
}
inline Vec sums_of_groups(const Bytes* of) {
  const Bytes first = halve(of[0], of[1]), second = halve(of[2], of[3]);
  const Bytes quarters = _mm512_add_epi16(_mm512_unpacklo_epi32(first, second), _mm512_unpackhi_epi32(first, second));
  const Bytes together = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
  const Bytes sums = _mm512_madd_epi16(_mm512_shuffle_epi8(quarters, together), _mm512_set1_epi16(1));
  const Bytes order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_cvtepi32_ps(_mm512_permutexvar_epi32(order, sums));
}
inline Vec sums_of_four(Bytes products) {
  return _mm512_cvtepi32_ps(_mm512_madd_epi16(products, _mm512_set1_epi16(1)));
}
inline Vec factors_of_nibbles(Vec factors, int64_t first) {
  const Bytes lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return _mm512_permutexvar_ps(_mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(first))), factors);
}
// The first `count` lanes, and 0 in the others.
inline Vec first_lanes(Vec v, int count) { return _mm512_maskz_mov_ps(static_cast<__mmask16>((1u << count) - 1), v); }
inline Vec group_factors(const float* from) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_broadcast_ss(from)), _mm256_broadcast_ss(from + 1), 1);
}
inline Vec load_half(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
