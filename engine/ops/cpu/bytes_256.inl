// Floats to bytes, for all instruction sets: 256 bits are what they share.

// 32 integers in [-127, 127], as floats, to bytes. With `split`, those with even indices to `first` and those with odd ones
// to `second`; else the first 16 and the last.
inline void store_bytes(const float* from, bool split, int8_t* first, int8_t* second) {
  const auto words = [from](int i) {
    const __m256i low = _mm256_cvtps_epi32(_mm256_loadu_ps(from + i));
    return _mm256_packs_epi32(low, _mm256_cvtps_epi32(_mm256_loadu_ps(from + i + 8)));
  };
  // Packing takes the halves of vectors side by side: fours of bytes come as 0 2 4 6 | 1 3 5 7.
  const __m256i mixed = _mm256_packs_epi16(words(0), words(16));
  __m256i bytes = _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  if (split) {
    const __m128i apart = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    bytes = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(apart)), 0b11011000);
  }
  _mm_storeu_si128(reinterpret_cast<__m128i*>(first), _mm256_castsi256_si128(bytes));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(second), _mm256_extracti128_si256(bytes, 1));
}
