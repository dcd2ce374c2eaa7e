// What the kernels share: row dtypes, conversions and warp reductions. Device code only; no torch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace twilight {

// Must match ROW_DTYPES in twilight_engine/ops/launch.py.
enum RowDtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Must match layout.py.
constexpr int kNoRow = -1;
constexpr int kGradeTail = 0;
constexpr int kGradeIndex = 1;
constexpr int kGradeExact = 2;
constexpr int kGradeDropped = 3;
constexpr int kQuestBlock = 16;
constexpr int kSlotsPerChunk = 32;
constexpr int kCounterFetchedBytes = 0;
constexpr int kCounterDirectBytes = 1;
constexpr int kCounterStreamedBytes = 2;
constexpr int kCounterWrittenBytes = 3;
constexpr int kCounterHitRows = 4;
constexpr int kCounterMissedRows = 5;
constexpr int kCounterDirectRows = 6;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

}  // namespace twilight

// Calls body with T bound to the C++ type of a RowDtype; other values give cudaErrorInvalidValue.
#define TWILIGHT_DISPATCH_ROW(dtype, T, ...) \
  [&]() -> cudaError_t {                     \
    switch (dtype) {                         \
      case ::twilight::kFloat32: {           \
        using T = float;                     \
        __VA_ARGS__;                         \
      }                                      \
      case ::twilight::kFloat16: {           \
        using T = __half;                    \
        __VA_ARGS__;                         \
      }                                      \
      case ::twilight::kBFloat16: {          \
        using T = __nv_bfloat16;             \
        __VA_ARGS__;                         \
      }                                      \
    }                                        \
    return cudaErrorInvalidValue;            \
  }()
