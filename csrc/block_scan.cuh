// Sums over the lanes of a warp up to each one, and over the threads of a block before each one.
// Device code only.
#pragma once

#include <cuda_runtime.h>

#include "csrc/ptx.cuh"

namespace twilight {

// The sum of `value` over this lane and those below it. All lanes must call it.
template <typename T>
__device__ __forceinline__ T warp_inclusive_sum(T value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const T below = __shfl_up_sync(kAllLanes, value, offset);
    if (lane >= offset) value += below;
  }
  return value;
}

// What block_exclusive_sum keeps in shared memory.
struct BlockScan {
  unsigned warp_ends[32];
};

// The sum of `value` over all threads below this one; total: over the whole block. All threads of a
// block of whole warps must call it. One barrier: scratch may be used again after the block's next.
__device__ __forceinline__ unsigned block_exclusive_sum(unsigned value, BlockScan& scratch,
                                                        unsigned* total) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  const unsigned end = warp_inclusive_sum(value);
  if (lane == 31) scratch.warp_ends[warp] = end;
  __syncthreads();
  const unsigned warp_end = lane < num_warps ? scratch.warp_ends[lane] : 0;
  *total = __reduce_add_sync(kAllLanes, warp_end);
  return __reduce_add_sync(kAllLanes, lane < warp ? warp_end : 0) + end - value;
}

}  // namespace twilight
