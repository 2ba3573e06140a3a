// AVX-512 (F, BW, VL, DQ).
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
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")

namespace whet::avx512 {
namespace {

#include "vectors_512.inl"

// Sums of four products each, of signed w and x in [-127, 127]: 2 * 128 * 127 fits in 16 bits.
inline Vec dot_signed(Bytes w, Bytes x) {
  const Bytes signed_x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x);
  return _mm512_cvtepi32_ps(_mm512_madd_epi16(_mm512_maddubs_epi16(_mm512_abs_epi8(w), signed_x), _mm512_set1_epi16(1)));
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

}  // namespace whet::avx512
#endif
