// What encoders do between their products, for one instruction set; after elementwise.inl.

// One row: its sum, then deviations from the mean, then their squares; all of it stays in the nearest cache.
void normalize_rows(const LayerNorm& op, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* const x = op.x + row * op.width;
    const float* const residual = op.residual == nullptr ? nullptr : op.residual + row * op.width;
    float* const out = op.out + row * op.width;
    Vec total = zero();
    for_each_vector(op.width, [&](auto read, auto write) {
      Vec v = read(x);
      if (op.added != nullptr) v = add(v, read(op.added));
      if (residual != nullptr) v = add(v, read(residual));
      write(out, v);
      total = add(total, v);
    });
    const Vec mean = set1(sum(total) / static_cast<float>(op.width));
    for_each_vector(op.width, [&](auto read, auto write) { write(out, sub(read(out), mean)); });
    const Vec inverse = set1(1.0f / std::sqrt(dot(out, out, op.width) / static_cast<float>(op.width) + op.eps));
    for_each_vector(op.width, [&](auto read, auto write) {
      write(out, fma(mul(read(out), inverse), read(op.weight), read(op.bias)));
    });
  }
}

template <Activation kActivation>
void bias_and_activate(const BiasActivation& op, int64_t begin, int64_t end) {
  if (op.width == 2 * kLanes && op.bias != nullptr) {  // a strip of a product, as it has just been computed
    const Vec first = load(op.bias), second = load(op.bias + kLanes);
    for (int64_t row = begin; row < end; ++row) {
      const float* const x = op.x + row * op.stride;
      const Vec a = activation<kActivation>(add(load(x), first));
      const Vec b = activation<kActivation>(add(load(x + kLanes), second));
      store(op.out + row * op.stride, a);
      store(op.out + row * op.stride + kLanes, b);
    }
    return;
  }
  for (int64_t row = begin; row < end; ++row) {
    const float* const x = op.x + row * op.stride;
    float* const out = op.out + row * op.stride;
    for_each_vector(op.width, [&](auto read, auto write) {
      const Vec v = read(x);
      write(out, activation<kActivation>(op.bias == nullptr ? v : add(v, read(op.bias))));
    });
  }
}

void bias_and_activate_rows(const BiasActivation& op, int64_t begin, int64_t end) {
  switch (op.activation) {
    case Activation::kSilu: return bias_and_activate<Activation::kSilu>(op, begin, end);
    case Activation::kGelu: return bias_and_activate<Activation::kGelu>(op, begin, end);
    case Activation::kGeluTanh: return bias_and_activate<Activation::kGeluTanh>(op, begin, end);
    case Activation::kRelu: return bias_and_activate<Activation::kRelu>(op, begin, end);
    case Activation::kSigmoid: return bias_and_activate<Activation::kSigmoid>(op, begin, end);
    case Activation::kNone: return bias_and_activate<Activation::kNone>(op, begin, end);
  }
}
