// A softmax's normaliser, built up value by value and merged across lanes, warps and blocks.
#pragma once

#include <cuda_runtime.h>

namespace twilight {

constexpr float kLowest = -3.0e38f;  // a maximum of nothing that can still be subtracted

// Running (max, sum of exp) of one head.
struct Softmax {
  float max = kLowest;
  float sum = 0.0f;

  __device__ void add(float value, float count = 1.0f) {
    const float top = fmaxf(max, value);
    sum = sum * __expf(max - top) + count * __expf(value - top);
    max = top;
  }

  // parts: pairs of max and sum.
  template <int kCount>
  __device__ void merge(const float2 (&parts)[kCount]) {
    float top = max;
#pragma unroll
    for (const float2& part : parts) top = fmaxf(top, part.x);
    sum *= __expf(max - top);
#pragma unroll
    for (const float2& part : parts) sum += part.y * __expf(part.x - top);
    max = top;
  }

  // Merges the states of the lanes that are equal modulo kFirst; each of them gets the result.
  template <int kFirst>
  __device__ void merge_lanes() {
    float top = max;
#pragma unroll
    for (int mask = kFirst; mask < 32; mask *= 2) {
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, mask));
    }
    sum *= __expf(max - top);
#pragma unroll
    for (int mask = kFirst; mask < 32; mask *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    }
    max = top;
  }
};

}  // namespace twilight
