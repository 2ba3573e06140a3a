// Norms, rotations, activations and sums, for one instruction set.

// One row. The squares are summed in vectors, in order: the same whatever the other rows are.
void norm_rows(const RmsNorm& op, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* x = op.x + row / op.inner * op.outer_stride + row % op.inner * op.inner_stride;
    const float* gate = op.gate == nullptr ? nullptr : op.gate + row * op.width;
    float* out = op.out + row * op.width;
    const float mean = dot(x, x, op.width) / static_cast<float>(op.width);
    const Vec inverse = set1(1.0f / std::sqrt(mean + op.eps)), shift = set1(op.shift);
    for_each_vector(op.width, [&](auto read, auto write) {
      Vec y = mul(mul(read(x), inverse), add(read(op.weight), shift));
      if (gate != nullptr) {
        const Vec z = read(gate);
        y = mul(y, mul(z, sigmoid(z)));
      }
      write(out, y);
    });
  }
}

void rotate(const Rope& op, int64_t begin, int64_t end) {
  const int64_t half = op.rotary / 2;
  for (int64_t token = begin; token < end; ++token) {
    const float *cos = op.cos + token * op.rotary, *sin = op.sin + token * op.rotary;
    for (int64_t head = 0; head < op.heads; ++head) {
      const float* x = op.x + token * op.token_stride + head * op.head_stride;
      float* out = op.out + (token * op.heads + head) * op.width;
      for_each_vector(half, [&](auto read, auto write) {
        const Vec first = read(x), second = read(x + half);
        write(out, sub(mul(first, read(cos)), mul(second, read(sin))));
        write(out + half, fma(second, read(cos + half), mul(first, read(sin + half))));
      });
      std::memcpy(out + op.rotary, x + op.rotary, (op.width - op.rotary) * sizeof(float));
    }
  }
}

template <Activation kActivation>
inline Vec activation(Vec x) {
  if constexpr (kActivation == Activation::kNone) return x;
  if constexpr (kActivation == Activation::kSilu) return mul(x, sigmoid(x));
  if constexpr (kActivation == Activation::kSigmoid) return sigmoid(x);
  if constexpr (kActivation == Activation::kRelu) return max(zero(), x);
  const Vec half = mul(x, set1(0.5f));
  if constexpr (kActivation == Activation::kGelu) return fma(half, erf(mul(x, set1(0.70710678118654752f))), half);
  const Vec inner = mul(set1(0.79788456080286536f), fma(mul(x, mul(x, x)), set1(0.044715f), x));
  return fma(half, tanh(inner), half);
}

template <Activation kActivation>
void activate(const GatedActivation& op, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t outer = row / op.inner, inner = row % op.inner;
    const float* gate = op.gate + outer * op.gate_outer + inner * op.gate_inner;
    const float* up = op.up + outer * op.up_outer + inner * op.up_inner;
    float* out = op.out + row * op.width;
    for_each_vector(op.width, [&](auto read, auto write) {
      write(out, mul(activation<kActivation>(read(gate)), read(up)));
    });
  }
}

void activate_rows(const GatedActivation& op, int64_t begin, int64_t end) {
  switch (op.activation) {
    case Activation::kSilu: return activate<Activation::kSilu>(op, begin, end);
    case Activation::kGelu: return activate<Activation::kGelu>(op, begin, end);
    case Activation::kGeluTanh: return activate<Activation::kGeluTanh>(op, begin, end);
    case Activation::kRelu: return activate<Activation::kRelu>(op, begin, end);
    case Activation::kSigmoid: return activate<Activation::kSigmoid>(op, begin, end);
    case Activation::kNone: return activate<Activation::kNone>(op, begin, end);
  }
}

void add_rows(const Add& op, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float *a = op.a + row * op.width, *b = op.b + row * op.b_stride;
    float* out = op.out + row * op.width;
    for_each_vector(op.width, [&](auto read, auto write) { write(out, add(read(a), read(b))); });
  }
}
