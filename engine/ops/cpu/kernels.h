// The operations of a decoded token, for CPUs.
//
// Each is a struct of pointers and sizes, which Python fills (engine/ops/cpu/calls.py mirrors every one). A single one is
// run as it comes; a program of them is run in one call, which is how a whole step costs Python next to nothing.
//
// Shapes: M rows, T tokens (one of each sequence where an operation reads a cache), H heads, D their width. Products: K
// inputs, N outputs, S group size, G = K / S groups. All is row-major, strides are in elements, activations are float.
#pragma once

#include <cstdint>

namespace whet {

inline int64_t ceil_to(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

enum class Storage : int32_t {
  kFloat32 = 0,  // data: float [N, K]
  kBfloat16 = 1, // data: bfloat16 [N, K]
  kInt8 = 2,     // data: int8 [N, K]; w = (q - zero) * scale + offset
  kInt4 = 3,     // data: two values a byte [N, K / 2], the lower half first, each q + shift; w as in kInt8
  kFloat16 = 4,  // data: IEEE half precision [N, K]
};

// Whether a storage is of floats, which have no groups.
constexpr bool is_float(Storage storage) {
  return storage == Storage::kFloat32 || storage == Storage::kBfloat16 || storage == Storage::kFloat16;
}

// One weight matrix. scales, zeros, offsets: [N, G], all float or all float16; zeros and offsets may be null, for 0.
struct Weight {
  const void* data;
  const void* scales;
  const void* zeros;
  const void* offsets;
  int64_t rows;        // N
  int64_t group_size;  // S, a multiple of 16 (of 32 for kInt4) that divides K
  Storage storage;
  int32_t half_scales;  // scales, zeros and offsets are float16
  int32_t shift;        // 0 or 8
  int32_t reserved;
};

// y = x W^T. A decoded token reads every weight once, so what counts is to read them at the memory's rate and to widen
// them on the way. One thread takes some rows of W at a time and multiplies all rows of x by them while they are near; x
// is not cut into blocks for the caches, which is why this stops paying at some tens of rows.
struct Linear {
  const Weight* weight;
  const float* x;  // [M, K]
  float* y;        // [M, N]
  int64_t inputs;  // K
  int64_t rows;    // M
  // x is rounded to int8 and multiplied by the weight's integers (gemm.h).
  int32_t rounds;
  int32_t reserved;
};

enum class Activation : int32_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3, kSigmoid = 4, kNone = 5 };

// What the columns of a product become as soon as they are there, while they are near: activation(y + bias).
struct Finish {
  const float* bias;  // [N], or null
  Activation activation;
};

// y = x W^T, or x W, for many rows of x and rows [begin, end) of W (panels.inl).
constexpr int64_t kProductColumns = 32;  // of y that are computed together
struct FloatProduct {
  const Weight* weight;
  const float* x;      // [M, K]; transposed: [M, end - begin]
  float* y;            // [M, end - begin]; transposed: [M, K]
  int64_t inputs;      // K
  int64_t rows;        // M
  int64_t begin, end;
  int64_t x_stride, y_stride;  // from row to row
  const Finish* finish;        // or null
  int32_t transposed;
  int32_t reserved;
};

// Some rows of the x of a FloatProduct, over some of what is summed, laid out for the multiplication.
struct PackedRows {
  const float* tiles;  // one of Kernels::panel_rows rows after the other, each [count][panel_rows]
  int64_t tile_size;   // numbers from one to the next
  int64_t row, rows;
  int64_t first, count;  // of what is summed
};

// A row of x in int8, each group of kRounded values with a scale.
constexpr int64_t kRounded = 32;
struct Rounded {
  const int8_t* values;  // [K], in an order that the kernels choose; after all of these, zeros: whole vectors are read
  const float* scales;   // [K / kRounded]
  const float* sums;     // as many: the sum of a group's values times its scale
};

// Rows [begin, end) of a weight of integers, as float, end to end.
struct WidenRows {
  const Weight* weight;
  float* out;
  int64_t inputs;
  int64_t begin, end;
};

// Rows ids[m] of a weight, as float [M, K].
struct Gather {
  const Weight* weight;
  const int64_t* ids;  // [M]
  float* out;
  int64_t inputs;
  int64_t rows;
};

// x / sqrt(mean(x^2) + eps) * (weight + shift) [* silu(gate)], over rows of `width` in two levels: [outer, inner, width].
struct RmsNorm {
  const float* x;
  const float* weight;  // [width]
  const float* gate;    // like out, or null
  float* out;           // [outer, inner, width]
  int64_t outer, inner, width;
  int64_t outer_stride, inner_stride;  // of x
  float eps;
  float shift;  // 0 or 1
};

// cos and sin of positions[t] * inv_freq[i] times factor, each twice: [T, 2 F].
struct RopeTable {
  const int64_t* positions;  // [T]
  const float* inv_freq;     // [F]
  float* cos;
  float* sin;
  int64_t tokens;
  int64_t frequencies;  // F
  float factor;
  float reserved;
};

// Rotates the first `rotary` of D; dimension i pairs with i + rotary / 2.
struct Rope {
  const float* x;    // [T, H, D]
  const float* cos;  // [T, rotary]
  const float* sin;
  float* out;  // [T, H, D]
  int64_t tokens, heads, width, rotary;
  int64_t token_stride, head_stride;  // of x
};

// One token of each of T sequences: its key and value enter the cache, and its queries attend to what the sequence has.
// The tokens of a sequence are taken kSpan at a time, each span's softmax by itself, and spans are then joined in order:
// so the result depends neither on threads nor on other sequences.
struct Attention {
  const float* q;          // [T, H_q, D]
  const float* k;          // [T, H_kv, D]
  const float* v;          // [T, H_kv, D]
  float* keys;             // [blocks, P, H_kv, D]
  float* values;           // [blocks, P, H_kv, D]
  const int64_t* slots;    // [T], block * P + offset
  const int32_t* tables;   // [T, table_stride], blocks in order
  const int64_t* kv_lens;  // [T], the new token included
  float* out;              // [T, H_q, D]
  int64_t tokens, heads, kv_heads, width;
  int64_t block_size;  // P
  int64_t table_stride;
  int64_t window;  // tokens a query sees, itself included; 0: all
  float scale;
  float reserved;
};

// Any number of new tokens of each of S sequences attend to what their sequence has, the new tokens included, whose keys
// and values enter the cache first if there is one (attention_tiles.inl).
struct TiledAttention {
  const float* q;             // [T, H_q, D]
  const float* new_keys;      // [T, H_kv, D]; null: they are in their places
  const float* new_values;    // [T, H_kv, D]
  const int64_t* slots;       // [T], rows of keys and values
  float* keys;                // rows [H_kv, D]
  float* values;              // the same
  const int32_t* tables;      // [S, table_stride], blocks of P rows in order; null: a sequence's rows lie end to end
  const int64_t* seq_starts;  // [S + 1], rows of q
  const int64_t* kv_lens;     // [S], with the new tokens
  float* out;                 // [T, H_q, D]
  float* log_sums;            // [T, H_q], of the softmaxes: the logarithm of each one's sum of exp(score); or null
  int64_t sequences, heads, kv_heads, width;
  int64_t q_stride, new_key_stride, new_value_stride;  // from token to token; heads are end to end
  int64_t key_stride, value_stride;
  int64_t block_size;  // P
  int64_t table_stride;
  int64_t window;  // tokens that a query sees on each side, itself included; 0: all
  float scale;
  int32_t causal;
};

// The gradients of TiledAttention for its inputs, causal, without window and cache (attention_gradient.inl). All is end to
// end, D is a multiple of 32.
struct AttentionGradient {
  const float* q;             // [T, H_q, D]
  const float* k;             // [T, H_kv, D]
  const float* v;             // [T, H_kv, D]
  const float* out;           // [T, H_q, D]
  const float* gradient;      // [T, H_q, D], of out
  const float* log_sums;      // [T, H_q]
  const int64_t* seq_starts;  // [S + 1]
  float* d_q;
  float* d_k;
  float* d_v;
  int64_t sequences, heads, kv_heads, width;
  float scale;
  float reserved;
};

// activation(gate) * up, [outer, inner, width]; gate and up may have strides.
struct GatedActivation {
  const float* gate;
  const float* up;
  float* out;
  int64_t outer, inner, width;
  int64_t gate_outer, gate_inner, up_outer, up_inner;
  Activation activation;
  int32_t reserved;
};

// The gradients of RmsNorm for its input and for its gate, if it has one: rows of `width`, end to end.
struct RmsNormGradient {
  const float* x;
  const float* weight;    // [width]
  const float* gate;      // like x, or null
  const float* gradient;  // of the output
  float* out;
  float* d_gate;  // or null
  int64_t rows, width;
  float eps;
  float reserved;
};

// The gradients of GatedActivation for its inputs, of any of the activations that are smooth; rows end to end.
struct GatedActivationGradient {
  const float* gate;
  const float* up;
  const float* gradient;  // of the output
  float* d_gate;
  float* d_up;
  int64_t rows, width;
  Activation activation;
  int32_t reserved;
};

// a + b of [M, width]; b may be one row for all (b_stride 0).
struct Add {
  const float* a;
  const float* b;
  float* out;
  int64_t rows, width;
  int64_t b_stride;
};

// One step of a causal convolution with SiLU: the window of slots[t], [W - 1, C], moves on by x[t].
struct ConvStep {
  const float* x;        // [T, C]
  const float* weight;   // [C, W]
  float* windows;        // [slots, W - 1, C]
  const int64_t* slots;  // [T]
  float* out;            // [T, C]
  int64_t tokens, channels, taps;
};

// One step of the gated delta rule (engine/ops/delta_rule.py: gated_delta_step_slots) for row t of the state slots[t].
struct DeltaStep {
  const float* q;  // [T, H_k, K]
  const float* k;  // [T, H_k, K]
  const float* v;  // [T, H_v, V]
  const float* a;  // [T, H_v]
  const float* b;  // [T, H_v]
  const float* a_log;    // [H_v]
  const float* dt_bias;  // [H_v]
  float* states;         // [slots, H_v, K, V]
  const int64_t* slots;  // [T]
  float* out;            // [T, H_v, V]
  int64_t tokens, key_heads, value_heads, key_width, value_width;
  int64_t q_stride, k_stride, v_stride;  // from token to token; heads are end to end
  float eps;
  float reserved;
};

// A causal convolution over the tokens of one sequence: y[t] = sum_j weight[j] x[t - (W - 1) + j], where places before the
// first token are those of the window.
constexpr int64_t kMaxTaps = 8;
struct Conv {
  const float* x;       // [T, C]
  const float* weight;  // [W, C], at most kMaxTaps of them
  const float* window;  // [W - 1, C], or null for zeros
  float* out;           // [T, C]
  int64_t tokens, channels, taps;
  int64_t x_stride;  // from token to token
  int64_t silu;      // 1: out is silu(y)
};

// The gated delta rule over the tokens of one sequence, kChunkTokens at a time (engine/ops/delta_rule.py:
// chunk_gated_delta_rule). K and V are multiples of 16.
constexpr int64_t kChunkTokens = 32;
struct DeltaChunk {
  const float* q;  // [T, H_k, K]
  const float* k;  // [T, H_k, K]
  const float* v;  // [T, H_v, V]
  const float* a;  // [T, H_v]
  const float* b;  // [T, H_v]
  const float* a_log;    // [H_v]
  const float* dt_bias;  // [H_v]
  float* state;          // [H_v, K, V], advanced in place
  float* out;            // [T, H_v, V]
  int64_t tokens, key_heads, value_heads, key_width, value_width;
  int64_t q_stride, k_stride, v_stride;  // from token to token; heads are end to end
  float eps;
  float reserved;
};

// The gradient of Conv for x, over whole sequences (sequence_gradient.inl).
struct ConvGradient {
  const float* x;             // [T, C]
  const float* weight;        // [W, C], at most kMaxTaps of them
  const float* gradient;      // [T, C], of the output
  const int64_t* seq_starts;  // [S + 1]
  float* d_x;                 // [T, C]
  int64_t sequences, channels, taps;
  int64_t silu;  // 1: the output was silu(y)
};

// The gradients of DeltaChunk for what it was given, over whole sequences without a state before (sequence_gradient.inl).
struct DeltaChunkGradient {
  DeltaChunk forward;         // state and out are not read
  const float* gradient;      // [T, H_v, V], of out
  const int64_t* seq_starts;  // [S + 1]
  float* d_q;                 // [T, H_k, K]
  float* d_k;                 // [T, H_k, K]
  float* d_v;                 // [T, H_v, V]
  float* d_a;                 // [T, H_v]
  float* d_b;                 // [T, H_v]
  int64_t sequences;
};

// y += scaling B A x, and what its gradient needs (engine/ops/low_rank.py, low_rank.inl).
struct LowRank {
  const float* x;  // [T, I]
  const float* a;  // [r, I]
  const float* b;  // [O, r]
  float* y;        // [T, O]
  float* low;      // [T, r]: scaling A x
  int64_t tokens, inputs, outputs, rank;
  float scaling;
  float reserved;
};

// y += scaling B A x of single rows, which each have an adapter or none: factors are found through a table, so that a
// program serves whichever adapters it holds when it is run.
struct LoraRows {
  const float* x;            // [T, I]
  float* y;                  // [T, O]
  const int64_t* slots;      // [T], of each row's adapter; -1: none
  const int64_t* addresses;  // of A [r, I] and B [O, r] for this linear; 0: the adapter has none
  const int64_t* ranks;
  const float* scalings;
  int64_t tokens, inputs, outputs;
  int64_t address_stride, rank_stride, scaling_stride;  // from slot to slot
};

// The gradients of LowRank.
struct LowRankGradient {
  const float* x;
  const float* a;
  const float* b;
  const float* low;
  const float* gradient;  // [T, O], of y
  float* d_x;             // [T, I], which is added to; or null
  float* d_a;
  float* d_b;
  int64_t tokens, inputs, outputs, rank;
  float scaling;
  float reserved;
};

// (x + added + residual), normalised to mean 0 and variance 1 over each row, times weight, plus bias.
struct LayerNorm {
  const float* x;         // [M, width]
  const float* added;     // [width], or null
  const float* residual;  // [M, width], or null
  const float* weight;    // [width]
  const float* bias;      // [width]
  float* out;             // [M, width]
  int64_t rows, width;
  float eps;
  float reserved;
};

// activation(x + bias).
struct BiasActivation {
  const float* x;     // [M, width]
  const float* bias;  // [width], or null
  float* out;         // [M, width]; may be x
  int64_t rows, width;
  int64_t stride;  // of x and out, from row to row
  Activation activation;
  int32_t reserved;
};

// Columns [column, column + columns) of y.
inline BiasActivation finishing(const Finish& finish, float* y, int64_t stride, int64_t rows, int64_t column,
                                int64_t columns) {
  const float* const bias = finish.bias == nullptr ? nullptr : finish.bias + column;
  return {y + column, bias, y + column, rows, columns, stride, finish.activation, 0};
}

// One layer of an encoder (J. Devlin et al., BERT): attention and feed-forward block, each added to what goes into it and
// normalised. Weights of any storages; biases may be null.
struct EncoderLayer {
  const Weight* weights[6];  // q, k, v and output [D, D]; up [F, D]; down [D, F]
  const float* biases[6];    // of these
  const float* norms[4];     // weight and bias after attention, weight and bias after the feed-forward block: [D]
};

// x through some such layers, each of S sequences by itself (encoder.cpp).
struct EncoderLayers {
  const EncoderLayer* layers;
  float* x;                   // [T, D], written over
  const int64_t* seq_starts;  // [S + 1], rows of x
  int64_t count, sequences;
  int64_t width, inner, heads;  // D, F, H
  float eps;
  float scale;  // of scores, above 0
  Activation activation;
  int32_t rounds;  // as Linear has it, where a weight has integers
};

// Attention of sequences that see all of themselves and nothing else (attention_whole.inl).
struct WholeAttention {
  const float* q;  // [T, H, D]
  const float* k;  // [T, H, D]
  const float* v;  // [T, H, D]
  float* out;            // [T, H, D]
  int64_t heads, width;  // H, D
  float scale;           // above 0
};

// -log softmax(logits)[target] of each row, in nats.
struct TokenLikelihood {
  const float* logits;     // [M, width]
  const int64_t* targets;  // [M]
  double* out;             // [M]
  int64_t rows, width;
  int64_t stride;  // from row to row
};

// A token for each row: the first of the likeliest, or one that is drawn (choose.cpp). -1 where the largest logit is not
// finite, a NaN is in the row, or a draw is too close to call.
struct Choose {
  const float* logits;   // [M, width]
  const double* params;  // [M, 5]: uniform number, temperature (0: the likeliest), top_k, top_p, min_p; null: all 0
  int64_t* tokens;       // [M]
  int64_t rows, width;
};

// Logits after the temperature.
constexpr int64_t kScoreBlock = 256;  // scores that are summed together
struct Scores {
  float peak;         // the largest logit
  float temperature;
  bool plain;         // scores are the logits; else (logit - peak) / temperature
  float top() const { return plain ? peak : 0.0f; }  // the largest score
};

enum class Kind : int64_t {
  kLinear, kWidenRows, kGather, kRmsNorm, kRopeTable, kRope, kAttention, kGatedActivation, kAdd, kConvStep, kDeltaStep,
  kTiledAttention,
  kConv, kDeltaChunk, kFloatProduct, kLayerNorm, kBiasActivation, kTokenLikelihood,
  kRmsNormGradient, kGatedActivationGradient, kAttentionGradient, kConvGradient,
  kDeltaChunkGradient, kChoose, kLowRank, kLowRankGradient, kEncoderLayers, kLoraRows,
};

struct Op {
  Kind kind;
  const void* args;  // the struct of that kind
};

// What one instruction set computes of each. Pieces are cut in ops.cpp.
struct Kernels {
  // y[m, n] = sum_k x[m, k] w[n, k] for n in [begin, end).
  void (*multiply_rows)(const Weight& weight, int64_t inputs, int64_t begin, int64_t end, const float* x, int64_t ldx,
                        int64_t rows, float* y, int64_t ldy);
  // See panels.inl.
  int64_t panel_rows;
  void (*pack_rows)(const float* x, int64_t stride, int64_t rows, int64_t count, float* out);
  void (*multiply_packed)(const FloatProduct& op, const PackedRows& x, int64_t column, int64_t columns);
  // See rounded.inl; `split` for kInt4.
  void (*round_row)(const float* x, int64_t inputs, bool split, int8_t* values, float* scales, float* sums);
  // y[m * ldy + n] = sum_k x[m][k] w[n, k] for n in [begin, end).
  void (*multiply_rounded)(const Weight& weight, int64_t inputs, int64_t begin, int64_t end, const Rounded* x,
                           int64_t rows, float* y, int64_t ldy);
  // w[n, k] as float for n in [begin, end), end to end; weights of any storage.
  void (*widen_rows)(const Weight& weight, int64_t inputs, int64_t begin, int64_t end, float* out);
  void (*norm_rows)(const RmsNorm& op, int64_t begin, int64_t end);          // outer * inner rows
  void (*rotate)(const Rope& op, int64_t begin, int64_t end);                // tokens
  void (*activate_rows)(const GatedActivation& op, int64_t begin, int64_t end);  // outer * inner rows
  void (*add_rows)(const Add& op, int64_t begin, int64_t end);
  // Tokens [begin, end) of one sequence's cache for the queries of some key heads: peak and sum of the softmax of each
  // query, and its weighted values [heads * queries, D], not yet divided by the sum.
  void (*attend)(const Attention& op, int64_t token, int64_t kv_head, int64_t heads, int64_t begin, int64_t end,
                 float* peaks, float* sums, float* weighted);
  // Tokens [first, first + tokens) of the new ones of a sequence, for the queries of one key head.
  void (*attend_tile)(const TiledAttention& op, int64_t sequence, int64_t first, int64_t tokens, int64_t kv_head);
  void (*convolve)(const ConvStep& op, int64_t token, int64_t begin, int64_t end);  // channels
  void (*advance)(const DeltaStep& op, int64_t token, int64_t value_head);
  void (*convolve_rows)(const Conv& op, int64_t begin, int64_t end);  // tokens
  void (*advance_chunks)(const DeltaChunk& op, int64_t value_head);
  void (*normalize_rows)(const LayerNorm& op, int64_t begin, int64_t end);
  void (*bias_and_activate_rows)(const BiasActivation& op, int64_t begin, int64_t end);
  void (*score_rows)(const TokenLikelihood& op, int64_t begin, int64_t end);
  void (*norm_gradient_rows)(const RmsNormGradient& op, int64_t begin, int64_t end);
  void (*activation_gradient_rows)(const GatedActivationGradient& op, int64_t begin, int64_t end);
  void (*attend_gradient)(const AttentionGradient& op, int64_t sequence, int64_t kv_head);
  void (*convolve_gradient)(const ConvGradient& op, int64_t sequence, int64_t first, int64_t width);  // channels
  void (*advance_gradient)(const DeltaChunkGradient& op, int64_t sequence, int64_t key_head);
  // The largest of `count` numbers, at least 1, and its first place; NaN and any place where there is one.
  void (*find_largest)(const float* x, int64_t count, int64_t* place, float* value);
  // Of each kScoreBlock scores of `count` logits: the largest, and the sum of exp(score - scores.top()).
  void (*weigh)(const Scores& scores, const float* logits, int64_t count, float* largest, double* sums);
  // Those of the scores that are at least `lowest`, in order, with their places after `first`. Returns how many.
  int64_t (*collect)(const Scores& scores, const float* logits, int64_t count, float lowest, int32_t first,
                     float* found, int32_t* places);
  void (*exp_less)(const float* x, int64_t count, float less, float* out);  // exp(x - less)
  // Tokens [begin, end); b is that of the operation as [r, O].
  void (*update_rows)(const LowRank& op, const float* b, int64_t begin, int64_t end);
  // All tokens of the operation, of which there are few; b as it is. `update` is memory for [tokens, O].
  void (*update_few_rows)(const LowRank& op, float* update);
  // Of the same the gradients d_low [tokens, r] and d_a [r, I], d_b [r, O]; `adds`: to what these two have.
  void (*update_gradient)(const LowRankGradient& op, const float* b, int64_t begin, int64_t end, bool adds, float* d_low,
                          float* d_a, float* d_b);
  // The sequence of `tokens` from row `start` on.
  void (*attend_whole)(const WholeAttention& op, int64_t start, int64_t tokens, int64_t head);
};

namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512vnni { extern const Kernels kernels; }

enum class Status : int32_t {
  kDone = 0,
  kNoSuchRow = 1,  // a Gather is asked for a row that its weight lacks, or a TokenLikelihood for a logit that is none
  kNoMemory = 2,
};

// Rows of x up to which a product is bound by reading the weight.
constexpr int64_t kLinearRows = 16;

// Runs operations one after the other, up to one that fails. Linears that follow each other and share x run as one.
Status run(const Op* ops, int64_t count, const Kernels& kernels);

// See choose.cpp.
void run(const Choose& op, const Kernels& kernels);

// See sequence.cpp.
void run(const Conv& op, const Kernels& kernels);
void run(const DeltaChunk& op, const Kernels& kernels);
void run(const ConvGradient& op, const Kernels& kernels);
void run(const DeltaChunkGradient& op, const Kernels& kernels);

// See low_rank.cpp.
void run(const LowRank& op, const Kernels& kernels);
void run(const LoraRows& op, const Kernels& kernels);
void run(const LowRankGradient& op, const Kernels& kernels);

// See encoder.cpp.
void run(const EncoderLayers& op, const Kernels& kernels);

// Work shared by the calling thread and the pool's. `body(context, index)` runs once for each index in [0, count). With
// `in_order`, a thread runs indices that follow each other, as far as they are there. Within such a body, the thread that
// runs it does all of the work.
using Body = void (*)(void* context, int64_t index);
void parallel_for(Body body, void* context, int64_t count, bool in_order = false);
void set_num_threads(int count);
int num_threads();

}  // namespace whet
