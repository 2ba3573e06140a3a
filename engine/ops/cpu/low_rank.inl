// The low-rank update of a product in training, for one instruction set: tall and narrow products, of which a row of x
// or of a gradient costs 2 r operations a number. So sums stay in registers, and what a block of tokens reads serves all
// products over it while it is near (low_rank.cpp).

// How many rows, and how many sums of each, are taken together; rows that are not there repeat the last.
constexpr int kDotRows = kLanes == 8 ? 3 : 6;  // four ranks of each: all registers but a few hold sums
constexpr int kSumRows = kLanes == 8 ? 4 : 8;
constexpr int kSumVecs = 3;

// out[t, j] = factor * sum_k x[t, k] w[j, k], for w [rank, width] and out [rows, rank]. A sum goes over k in the same
// order whatever the other rows are.
void dot_rows(const float* x, int64_t rows, int64_t width, const float* w, int64_t rank, float factor, float* out) {
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t t = 0; t < rows; t += kDotRows) {
    const float* from[kDotRows];
    for (int m = 0; m < kDotRows; ++m) from[m] = x + std::min(t + m, rows - 1) * width;
    for (int64_t j = 0; j < rank; j += 4) {
      const float* by[4];
      for (int r = 0; r < 4; ++r) by[r] = w + std::min(j + r, rank - 1) * width;
      Vec sums[kDotRows][4];
      for (int m = 0; m < kDotRows; ++m)
        for (int r = 0; r < 4; ++r) sums[m][r] = zero();
      for (int64_t k = 0; k < whole; k += kLanes) {
        Vec values[kDotRows];
#pragma GCC unroll 6
        for (int m = 0; m < kDotRows; ++m) values[m] = load(from[m] + k);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          const Vec factors = load(by[r] + k);
#pragma GCC unroll 6
          for (int m = 0; m < kDotRows; ++m) sums[m][r] = fma(values[m], factors, sums[m][r]);
        }
      }
      for (int m = 0; m < std::min<int64_t>(kDotRows, rows - t); ++m) {
        float found[4];
        sum_of_four(sums[m], found);
        for (int r = 0; r < std::min<int64_t>(4, rank - j); ++r) {
          for (int64_t k = whole; k < width; ++k) found[r] += from[m][k] * by[r][k];
          out[(t + m) * rank + j + r] = factor * found[r];
        }
      }
    }
  }
}

// A matrix whose element (m, s) is at data[m * row + s * column].
struct Factors {
  const float* data;
  int64_t row, column;
};

// Columns [column, column + kVecs * kLanes) of kSumRows rows of `add_products`.
template <int kVecs>
inline void add_tile(const Factors& f, const int64_t* rows, const float* w, int64_t width, int64_t count, bool adds,
                     float* out, int64_t column) {
  Vec sums[kSumRows][kVecs];
  for (int m = 0; m < kSumRows; ++m)
    for (int v = 0; v < kVecs; ++v) sums[m][v] = adds ? load(out + rows[m] * width + column + v * kLanes) : zero();
  for (int64_t s = 0; s < count; ++s) {
    Vec values[kVecs];
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) values[v] = load(w + s * width + column + v * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kSumRows; ++m) {
      const Vec factor = set1(f.data[rows[m] * f.row + s * f.column]);
#pragma GCC unroll 3
      for (int v = 0; v < kVecs; ++v) sums[m][v] = fma(factor, values[v], sums[m][v]);
    }
  }
  for (int m = 0; m < kSumRows; ++m)
    for (int v = 0; v < kVecs; ++v) store(out + rows[m] * width + column + v * kLanes, sums[m][v]);
}

// out[m, n] = sum_s f(m, s) w[s, n], for w [count, width] and out [rows, width]; `adds`: to what out has.
void add_products(const Factors& f, int64_t rows, const float* w, int64_t width, int64_t count, bool adds, float* out) {
  for (int64_t first = 0; first < rows; first += kSumRows) {
    int64_t taken[kSumRows], n = 0;
    for (int m = 0; m < kSumRows; ++m) taken[m] = std::min(first + m, rows - 1);
    for (; n + kSumVecs * kLanes <= width; n += kSumVecs * kLanes)
      add_tile<kSumVecs>(f, taken, w, width, count, adds, out, n);
    for (; n + kLanes <= width; n += kLanes) add_tile<1>(f, taken, w, width, count, adds, out, n);
    for (; n < width; ++n)
      for (int64_t m = first; m < std::min(first + kSumRows, rows); ++m) {
        float total = adds ? out[m * width + n] : 0.0f;
        for (int64_t s = 0; s < count; ++s) total += f.data[m * f.row + s * f.column] * w[s * width + n];
        out[m * width + n] = total;
      }
  }
}

void update_rows(const LowRank& op, const float* b, int64_t begin, int64_t end) {
  float* const low = op.low + begin * op.rank;
  dot_rows(op.x + begin * op.inputs, end - begin, op.inputs, op.a, op.rank, op.scaling, low);
  add_products({low, op.rank, 1}, end - begin, b, op.outputs, op.rank, true, op.y + begin * op.outputs);
}

void update_few_rows(const LowRank& op, float* update) {
  dot_rows(op.x, op.tokens, op.inputs, op.a, op.rank, op.scaling, op.low);
  dot_rows(op.low, op.tokens, op.rank, op.b, op.outputs, 1.0f, update);
  for_each_vector(op.tokens * op.outputs, [&](auto read, auto write) { write(op.y, add(read(op.y), read(update))); });
}

void update_gradient(const LowRankGradient& op, const float* b, int64_t begin, int64_t end, bool adds, float* d_low,
                     float* d_a, float* d_b) {
  const int64_t rows = end - begin;
  const float *gradient = op.gradient + begin * op.outputs, *x = op.x + begin * op.inputs;
  dot_rows(gradient, rows, op.outputs, b, op.rank, op.scaling, d_low);
  add_products({op.low + begin * op.rank, 1, op.rank}, op.rank, gradient, op.outputs, rows, adds, d_b);
  if (op.d_x != nullptr)
    add_products({d_low, op.rank, 1}, rows, op.a, op.inputs, op.rank, true, op.d_x + begin * op.inputs);
  add_products({d_low, 1, op.rank}, op.rank, x, op.inputs, rows, adds, d_a);
}
