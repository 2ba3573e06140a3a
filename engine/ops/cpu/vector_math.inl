// Functions of vectors that the instruction sets lack.

// The first `count` < kLanes numbers; the other lanes are 0.
inline Vec load_part(const float* from, int64_t count) {
  float buffer[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = from[i];
  return load(buffer);
}

inline void store_part(float* to, Vec v, int64_t count) {
  float buffer[kLanes];
  store(buffer, v);
  for (int64_t i = 0; i < count; ++i) to[i] = buffer[i];
}

// body(read, write) for a row of `width`: read(from) gives the vector at the place, write(to, v) stores it there.
template <typename Body>
inline void for_each_vector(int64_t width, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes)
    body([i](const float* from) { return load(from + i); }, [i](float* to, Vec v) { store(to + i, v); });
  if (i < width) {
    const int64_t count = width - i;
    body([=](const float* from) { return load_part(from + i, count); },
         [=](float* to, Vec v) { store_part(to + i, v, count); });
  }
}

inline float dot(const float* a, const float* b, int64_t width) {
  Vec total = zero();
  for_each_vector(width, [&](auto read, auto) { total = fma(read(a), read(b), total); });
  return sum(total);
}

// e^x to about one unit in the last place, for x up to 88.3 (above: e^88.3; below -87.3: e^-87.3; NaN stays). Range
// reduction by ln 2 in two parts, then a polynomial (S. Moshier, Cephes: expf).
inline Vec exp(Vec x) {
  x = min(set1(88.3f), max(set1(-87.3f), x));
  const Vec n = round(mul(x, set1(1.44269504088896341f)));
  Vec r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  Vec p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), set1(1.0f));
  return times_power_of_two(p, n);
}

inline Vec sigmoid(Vec x) { return div(set1(1.0f), add(set1(1.0f), exp(sub(zero(), x)))); }

inline Vec tanh(Vec x) {
  return sub(set1(1.0f), div(set1(2.0f), add(set1(1.0f), exp(add(x, x)))));
}

// To 4e-7, and exactly -1 and 1 beyond 4 (NaN stays): x P(x^2) / Q(x^2), fitted to the least relative error on [-4, 4].
inline Vec erf(Vec x) {
  x = min(set1(4.0f), max(set1(-4.0f), x));
  const Vec z = mul(x, x);
  Vec p = set1(1.9869689822e-6f);
  p = fma(p, z, set1(2.8454494895e-4f));
  p = fma(p, z, set1(3.8823455107e-3f));
  p = fma(p, z, set1(5.3098611534e-2f));
  p = fma(p, z, set1(1.9352152944e-1f));
  p = fma(p, z, set1(1.1283791065f));
  Vec q = set1(3.7421046727e-5f);
  q = fma(q, z, set1(1.1853332398e-3f));
  q = fma(q, z, set1(1.5205229633e-2f));
  q = fma(q, z, set1(1.1534025520e-1f));
  q = fma(q, z, set1(5.0483655930e-1f));
  q = fma(q, z, set1(1.0f));
  return min(set1(1.0f), max(set1(-1.0f), div(mul(x, p), q)));
}
