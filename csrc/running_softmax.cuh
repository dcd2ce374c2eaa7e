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
  __device__ void merge(float other_max, float other_sum) {
    const float top = fmaxf(max, other_max);
    sum = sum * __expf(max - top) + other_sum * __expf(other_max - top);
    max = top;
  }
  __device__ void merge_lanes(int mask) {
    const float other_max = __shfl_xor_sync(0xffffffffu, max, mask);
    const float other_sum = __shfl_xor_sync(0xffffffffu, sum, mask);
    merge(other_max, other_sum);
  }
};

}  // namespace twilight
