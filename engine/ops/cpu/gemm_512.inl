// The vectors of gemm.inl in 512 bits.
inline Ints load_ints(const void* from) { return _mm512_load_si512(from); }
inline Ints broadcast(const char* from) {
  int32_t unit;
  __builtin_memcpy(&unit, from, sizeof(unit));
  return _mm512_set1_epi32(unit);
}
inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Floats v) { _mm512_storeu_ps(to, v); }
inline Floats set1(float value) { return _mm512_set1_ps(value); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
