// Products of many rows by floats, for one instruction set; after rows.inl.
//
// kPanel columns of the result are computed together, over a part of what is summed: that part of W is laid out as a panel
// [k][kPanel], widened on the way, small enough for the nearest cache, and all rows of x pass over it, some at a time,
// their sums in registers (the scheme of K. Goto and R. van de Geijn, "Anatomy of High-Performance Matrix Multiplication",
// 2008). A panel is used by hundreds of rows, so that widening and transposing W cost some percent, for any storage and
// for W as well as for its transpose.
//
// The sum of one product goes over k in order, whatever the other rows and columns are: a row of y does not depend on how
// many there are.

constexpr int kPanelVecs = 2;
constexpr int kPanel = kPanelVecs * kLanes;
constexpr int kPanelRows = kLanes == 8 ? 6 : 12;  // with two vectors of a panel, all registers but a few hold sums
constexpr int64_t kPanelPart = 4096 / kPanel;     // 16 KiB
static_assert(kProductColumns % kPanel == 0);

// Numbers [first, first + count) of row n of a weight, as float. Where W has groups, both are multiples of 16, and for
// kInt4 of 32.
template <Storage kStorage, bool kZeros>
void widen_part(const Weight& weight, int64_t inputs, int64_t n, int64_t first, int64_t count, float* out) {
  using W = Widen<kStorage>;
  const W row(weight, n, inputs);
  if constexpr (is_float(kStorage)) {
    int64_t k = 0;
    for (; k + W::kStep <= count; k += W::kStep) {
      Vec w[W::kStep / kLanes];
      row(first + k, w);
      for (int i = 0; i < W::kStep / kLanes; ++i) store(out + k + i * kLanes, w[i]);
    }
    for (; k < count; ++k) out[k] = row.scalar(first + k);
  } else {
    for (int64_t k = first, last = first + count; k < last;) {
      const int64_t index = k / weight.group_size, end = std::min(last, (index + 1) * weight.group_size);
      const Group<kZeros> group(row, index);
      for (; k < end; k += W::kStep) {
        Vec w[W::kStep / kLanes];
        row(k, w);
        for (int i = 0; i < W::kStep / kLanes; ++i) store(out + (k - first) + i * kLanes, group.value(w[i]));
      }
    }
  }
}

// Has numbers [first, first + count) of row n of W brought near. No hardware prefetcher sees a part of each row coming.
template <Storage kStorage>
inline void fetch_part(const Weight& weight, int64_t inputs, int64_t n, int64_t first, int64_t count) {
  constexpr int64_t kBits = kStorage == Storage::kFloat32 ? 32
                            : is_float(kStorage)           ? 16
                            : kStorage == Storage::kInt8   ? 8
                                                           : 4;
  const char* const from = static_cast<const char*>(weight.data) + (n * inputs + first) * kBits / 8;
  for (int64_t at = 0; at < count * kBits / 8; at += 64) _mm_prefetch(from + at, _MM_HINT_T0);
}

// Eight numbers of each of eight rows become columns.
inline void transpose_eight(const float* const* rows, int64_t at, float* to, int64_t stride) {
  __m256 r[8], a[8], b[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(rows[i] + at);
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    b[4 * i] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
    b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
    b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
    b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) _mm256_storeu_ps(to + i * stride, _mm256_permute2f128_ps(b[i], b[i + 4], 0x20));
  for (int i = 0; i < 4; ++i) _mm256_storeu_ps(to + (i + 4) * stride, _mm256_permute2f128_ps(b[i], b[i + 4], 0x31));
}

// Panels of `columns` outputs of W from row n on, over inputs [first, first + count): panel after panel, each
// [count][kPanel]. Columns past the last are those of some row.
template <Storage kStorage, bool kZeros>
void pack_outputs(const FloatProduct& op, int64_t n, int64_t columns, int64_t first, int64_t count, float* panels) {
  alignas(64) float wide[8][kPanelPart];
  const float* rows[8];
  for (int j = 0; j < 8; ++j) rows[j] = wide[j];
  for (int64_t c = 0; c < ceil_to(columns, kPanel); c += 8) {
    for (int64_t row = n + c + 8; row < std::min(n + c + 16, op.end); ++row)
      fetch_part<kStorage>(*op.weight, op.inputs, row, first, count);
    for (int j = 0; j < 8; ++j) {
      const int64_t row = std::min(n + c + j, op.end - 1);
      if constexpr (kStorage == Storage::kFloat32)
        rows[j] = static_cast<const float*>(op.weight->data) + row * op.inputs + first;
      else
        widen_part<kStorage, kZeros>(*op.weight, op.inputs, row, first, count, wide[j]);
    }
    float* const out = panels + c / kPanel * count * kPanel + c % kPanel;
    int64_t k = 0;
    for (; k + 8 <= count; k += 8) transpose_eight(rows, k, out + k * kPanel, kPanel);
    for (; k < count; ++k)
      for (int j = 0; j < 8; ++j) out[k * kPanel + j] = rows[j][k];
  }
}

constexpr int64_t kRowsToCome = 16;  // from the row that is packed to the one that is fetched

// Panels of `columns` inputs of W from `column` on, over rows [first, first + count).
template <Storage kStorage, bool kZeros>
void pack_inputs(const FloatProduct& op, int64_t column, int64_t columns, int64_t first, int64_t count, float* panels) {
  using W = Widen<kStorage>;
  constexpr bool kGroups = kStorage == Storage::kInt8 || kStorage == Storage::kInt4;
  const Weight weight = *op.weight;
  alignas(64) float edge[kProductColumns] = {};
  for (int64_t n = first; n < first + count; ++n, panels += kPanel) {
    if (n + kRowsToCome < first + count) fetch_part<kStorage>(weight, op.inputs, n + kRowsToCome, column, columns);
    const auto write = [&](int64_t c, Vec v) { store(panels + c / kPanel * count * kPanel + c % kPanel, v); };
    if (columns < kProductColumns) {
      widen_part<kStorage, kZeros>(weight, op.inputs, n, column, columns, edge);
      for (int64_t c = 0; c < kProductColumns; c += kLanes) write(c, load(edge + c));
      continue;
    }
    const W row(weight, n, op.inputs);
    for (int64_t c = 0; c < kProductColumns; c += W::kStep) {
      Vec w[W::kStep / kLanes];
      row(column + c, w);
      if constexpr (kGroups) {
        const Group<kZeros> group(row, (column + c) / weight.group_size);
        for (Vec& v : w) v = group.value(v);
      }
      for (int i = 0; i < W::kStep / kLanes; ++i) write(c + i * kLanes, w[i]);
    }
  }
}

using Pack = void (*)(const FloatProduct&, int64_t, int64_t, int64_t, int64_t, float*);

template <Storage kStorage, bool kZeros>
Pack packer(bool transposed) {
  return transposed ? pack_inputs<kStorage, kZeros> : pack_outputs<kStorage, kZeros>;
}

Pack packer(const FloatProduct& op) {
  const bool zeros = op.weight->zeros != nullptr, transposed = op.transposed != 0;
  switch (op.weight->storage) {
    case Storage::kFloat32: return packer<Storage::kFloat32, false>(transposed);
    case Storage::kBfloat16: return packer<Storage::kBfloat16, false>(transposed);
    case Storage::kFloat16: return packer<Storage::kFloat16, false>(transposed);
    case Storage::kInt8:
      return zeros ? packer<Storage::kInt8, true>(transposed) : packer<Storage::kInt8, false>(transposed);
    case Storage::kInt4: break;
  }
  return zeros ? packer<Storage::kInt4, true>(transposed) : packer<Storage::kInt4, false>(transposed);
}

// Up to kPanelRows rows of x side by side: [count][kPanelRows], and some numbers after it; rows that are not there repeat
// the last.
void pack_rows(const float* x, int64_t stride, int64_t rows, int64_t count, float* out) {
  const float* from[8];
  // What is stored past a place of kPanelRows numbers is stored over by what comes later.
  for (int64_t first = (kPanelRows - 1) / 8 * 8; first >= 0; first -= 8) {
    for (int j = 0; j < 8; ++j) from[j] = x + std::min(first + j, rows - 1) * stride;
    int64_t k = 0;
    for (; k + 8 <= count; k += 8) transpose_eight(from, k, out + k * kPanelRows + first, kPanelRows);
    for (; k < count; ++k)
      for (int64_t j = 0; first + j < kPanelRows && j < 8; ++j) out[k * kPanelRows + first + j] = from[j][k];
  }
}

// y[m, :kPanel] (+)= packed rows [count][kPanelRows] times a panel, for the first kRows of them.
template <int kRows>
void multiply_panel(const float* x, const float* panel, int64_t count, const float* start, int64_t start_stride, float* y,
                    int64_t stride) {
  Vec sums[kRows][kPanelVecs];
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVecs; ++v)
      sums[m][v] = start == nullptr ? zero() : load(start + m * start_stride + v * kLanes);
#pragma GCC unroll 4
  for (int64_t k = 0; k < count; ++k, panel += kPanel, x += kPanelRows) {
    const Vec first = load(panel), second = load(panel + kLanes);
#pragma GCC unroll 12
    for (int m = 0; m < kRows; ++m) {
      const Vec value = set1(x[m]);
      sums[m][0] = fma(value, first, sums[m][0]);
      sums[m][1] = fma(value, second, sums[m][1]);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVecs; ++v) store(y + m * stride + v * kLanes, sums[m][v]);
}

using MultiplyPanel = void (*)(const float*, const float*, int64_t, const float*, int64_t, float*, int64_t);

template <int... kRows>
MultiplyPanel panel_kernel(int64_t rows, std::integer_sequence<int, kRows...>) {
  static constexpr MultiplyPanel kernels[] = {multiply_panel<kRows + 1>...};
  return kernels[rows - 1];
}

// Columns [column, column + columns) of y, at most kProductColumns of them.
void multiply_packed(const FloatProduct& op, const PackedRows& x, int64_t column, int64_t columns) {
  const int64_t parts = (x.count + kPanelPart - 1) / kPanelPart, part = ceil_to((x.count + parts - 1) / parts, 32);
  alignas(64) static thread_local float panels[kProductColumns * kPanelPart];
  const Pack pack = packer(op);
  for (int64_t first = 0; first < x.count; first += part) {
    const int64_t count = std::min(part, x.count - first);
    if (op.transposed != 0)
      pack(op, column, columns, op.begin + x.first + first, count, panels);
    else
      pack(op, op.begin + column, columns, x.first + first, count, panels);
    const bool adds = x.first + first > 0;
    for (int64_t m = 0; m < x.rows; m += kPanelRows) {
      const int64_t rows = std::min<int64_t>(kPanelRows, x.rows - m);
      const MultiplyPanel kernel = panel_kernel(rows, std::make_integer_sequence<int, kPanelRows>());
      const float* const tile = x.tiles + m / kPanelRows * x.tile_size + first * kPanelRows;
      for (int64_t c = 0; c < columns; c += kPanel) {
        float* const y = op.y + (x.row + m) * op.y_stride + column + c;
        const float* const panel = panels + c / kPanel * count * kPanel;
        if (c + kPanel <= columns) {
          kernel(tile, panel, count, adds ? y : nullptr, op.y_stride, y, op.y_stride);
          continue;
        }
        // The edge of y: by way of a whole panel.
        alignas(64) float whole[kPanelRows * kPanel] = {};
        for (int64_t i = 0; adds && i < rows; ++i) std::copy_n(y + i * op.y_stride, columns - c, whole + i * kPanel);
        kernel(tile, panel, count, whole, kPanel, whole, kPanel);
        for (int64_t i = 0; i < rows; ++i) std::copy_n(whole + i * kPanel, columns - c, y + i * op.y_stride);
      }
    }
  }
}
