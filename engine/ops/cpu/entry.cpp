// The functions that Python calls through ctypes.
#include <algorithm>
#include <chrono>

#include "kernels.h"

namespace whet {
namespace {

int level() {
#if defined(__x86_64__)
  static const int found = [] {
    // What the files for AVX-512 are compiled with as well.
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 0;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      return __builtin_cpu_supports("avx512vnni") ? 3 : 2;
    return 1;
  }();
  return found;
#else
  return 0;
#endif
}

int forced_level = -1;

Status run_here(const Op* ops, int64_t count) {
#if defined(__x86_64__)
  const Kernels* const kernels[] = {&avx2::kernels, &avx512::kernels, &avx512vnni::kernels};
  return run(ops, count, *kernels[(forced_level < 0 ? level() : forced_level) - 1]);
#else
  return Status::kDone;
#endif
}

}  // namespace
}  // namespace whet

#define WHET_API __attribute__((visibility("default")))

extern "C" {

// 0: this CPU has no kernel here; 1: AVX2; 2: AVX-512; 3: AVX-512 with VNNI.
WHET_API int whet_cpu_level() { return whet::level(); }

// For tests: the kernels of a lower level than the CPU's. -1: the CPU's own.
WHET_API void whet_cpu_force_level(int level) { whet::forced_level = level; }

WHET_API void whet_cpu_set_num_threads(int count) { whet::set_num_threads(count); }

// Bytes of the struct of a kind of operation, so that Python can tell that its mirror has the same.
WHET_API int64_t whet_cpu_size(int64_t kind) {
  switch (static_cast<whet::Kind>(kind)) {
    case whet::Kind::kLinear: return sizeof(whet::Linear);
    case whet::Kind::kWidenRows: return sizeof(whet::WidenRows);
    case whet::Kind::kGather: return sizeof(whet::Gather);
    case whet::Kind::kRmsNorm: return sizeof(whet::RmsNorm);
    case whet::Kind::kRopeTable: return sizeof(whet::RopeTable);
    case whet::Kind::kRope: return sizeof(whet::Rope);
    case whet::Kind::kAttention: return sizeof(whet::Attention);
    case whet::Kind::kGatedActivation: return sizeof(whet::GatedActivation);
    case whet::Kind::kAdd: return sizeof(whet::Add);
    case whet::Kind::kConvStep: return sizeof(whet::ConvStep);
    case whet::Kind::kDeltaStep: return sizeof(whet::DeltaStep);
    case whet::Kind::kTiledAttention: return sizeof(whet::TiledAttention);
    case whet::Kind::kRmsNormGradient: return sizeof(whet::RmsNormGradient);
    case whet::Kind::kGatedActivationGradient: return sizeof(whet::GatedActivationGradient);
    case whet::Kind::kAttentionGradient: return sizeof(whet::AttentionGradient);
    case whet::Kind::kConvGradient: return sizeof(whet::ConvGradient);
    case whet::Kind::kDeltaChunkGradient: return sizeof(whet::DeltaChunkGradient);
    case whet::Kind::kConv: return sizeof(whet::Conv);
    case whet::Kind::kDeltaChunk: return sizeof(whet::DeltaChunk);
    case whet::Kind::kFloatProduct: return sizeof(whet::FloatProduct);
    case whet::Kind::kLayerNorm: return sizeof(whet::LayerNorm);
    case whet::Kind::kBiasActivation: return sizeof(whet::BiasActivation);
    case whet::Kind::kTokenLikelihood: return sizeof(whet::TokenLikelihood);
    case whet::Kind::kChoose: return sizeof(whet::Choose);
    case whet::Kind::kLoraRows: return sizeof(whet::LoraRows);
    case whet::Kind::kLowRank: return sizeof(whet::LowRank);
    case whet::Kind::kLowRankGradient: return sizeof(whet::LowRankGradient);
    case whet::Kind::kEncoderLayers: return sizeof(whet::EncoderLayers);
  }
  return -1;
}

// These only where whet_cpu_level() is not 0. They return a Status.
WHET_API int whet_cpu_call(int64_t kind, const void* args) {
  const whet::Op op{static_cast<whet::Kind>(kind), args};
  return static_cast<int>(whet::run_here(&op, 1));
}
WHET_API int whet_cpu_run(const whet::Op* ops, int64_t count) { return static_cast<int>(whet::run_here(ops, count)); }

// For profiles: the same, and the nanoseconds of each operation. Products that follow each other may be one; the first
// has the time of all.
WHET_API int whet_cpu_run_timed(const whet::Op* ops, int64_t count, int64_t* nanoseconds) {
  using Clock = std::chrono::steady_clock;
  for (int64_t i = 0, end; i < count; i = end) {
    end = i + 1;
    while (ops[i].kind == whet::Kind::kLinear && end < count && ops[end].kind == whet::Kind::kLinear) ++end;
    const auto began = Clock::now();
    const whet::Status status = whet::run_here(ops + i, end - i);
    nanoseconds[i] = std::chrono::nanoseconds(Clock::now() - began).count();
    std::fill(nanoseconds + i + 1, nanoseconds + end, 0);
    if (status != whet::Status::kDone) return static_cast<int>(status);
  }
  return static_cast<int>(whet::Status::kDone);
}

}
