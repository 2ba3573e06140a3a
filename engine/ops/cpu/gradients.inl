// Gradients of norms and activations, for one instruction set: each is one pass over what the forward was given.

// activation(x), and its derivative in *slope.
template <Activation kActivation>
inline Vec activation_and_slope(Vec x, Vec* slope) {
  const Vec one = set1(1.0f);
  if constexpr (kActivation == Activation::kGeluTanh) {
    const Vec square = mul(x, x), half = mul(x, set1(0.5f)), factor = set1(0.79788456080286536f);
    const Vec t = tanh(mul(factor, fma(mul(x, square), set1(0.044715f), x)));
    const Vec inner = mul(factor, fma(square, set1(3 * 0.044715f), one));
    *slope = fma(mul(half, fma(sub(zero(), t), t, one)), inner, fma(t, set1(0.5f), set1(0.5f)));
    return fma(half, t, half);
  }
  const Vec s = sigmoid(x), rest = sub(one, s);
  if constexpr (kActivation == Activation::kSigmoid) {
    *slope = mul(s, rest);
    return s;
  }
  *slope = mul(s, fma(x, rest, one));
  return mul(x, s);
}

// dx = r h - x r^3 / width sum(h x) with r = 1 / sqrt(mean(x^2) + eps) and h = gradient * weight * silu(gate), and
// dgate = gradient * weight * x r silu'(gate).
void norm_gradient_rows(const RmsNormGradient& op, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * op.width;
    const float *x = op.x + at, *gradient = op.gradient + at, *gate = op.gate == nullptr ? nullptr : op.gate + at;
    float* out = op.out + at;
    const float width = static_cast<float>(op.width);
    const float inverse = 1.0f / std::sqrt(dot(x, x, op.width) / width + op.eps);
    const Vec r = set1(inverse);
    Vec along = zero();
    for_each_vector(op.width, [&](auto read, auto write) {
      Vec h = mul(read(gradient), read(op.weight));
      if (gate != nullptr) {
        Vec slope;
        const Vec value = activation_and_slope<Activation::kSilu>(read(gate), &slope);
        write(op.d_gate + at, mul(mul(h, slope), mul(read(x), r)));
        h = mul(h, value);
        write(out, h);
      }
      along = fma(h, read(x), along);
    });
    const Vec back = set1(-sum(along) * inverse * inverse * inverse / width);
    for_each_vector(op.width, [&](auto read, auto write) {
      const Vec h = gate != nullptr ? read(out) : mul(read(gradient), read(op.weight));
      write(out, fma(read(x), back, mul(h, r)));
    });
  }
}

template <Activation kActivation>
void activation_gradient(const GatedActivationGradient& op, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * op.width;
    for_each_vector(op.width, [&](auto read, auto write) {
      Vec slope;
      const Vec value = activation_and_slope<kActivation>(read(op.gate + at), &slope), gradient = read(op.gradient + at);
      write(op.d_gate + at, mul(mul(gradient, read(op.up + at)), slope));
      write(op.d_up + at, mul(gradient, value));
    });
  }
}

void activation_gradient_rows(const GatedActivationGradient& op, int64_t begin, int64_t end) {
  switch (op.activation) {
    case Activation::kSilu: return activation_gradient<Activation::kSilu>(op, begin, end);
    case Activation::kGeluTanh: return activation_gradient<Activation::kGeluTanh>(op, begin, end);
    case Activation::kSigmoid: return activation_gradient<Activation::kSigmoid>(op, begin, end);
    case Activation::kGelu:
    case Activation::kRelu:
    case Activation::kNone: break;  // Python does not ask for these
  }
}
