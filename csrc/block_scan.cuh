// A sum over the threads before each one of a block. Device code only.
#pragma once

#include <cuda_runtime.h>

namespace twilight {

// What block_exclusive_sum keeps in shared memory.
struct BlockScan {
  unsigned warp_ends[32];
};

// The sum of `value` over all threads below this one; total: over the whole block. All threads of a
// block of whole warps must call it. One barrier: scratch may be used again after the block's next.
__device__ __forceinline__ unsigned block_exclusive_sum(unsigned value, BlockScan& scratch,
                                                        unsigned* total) {
  constexpr unsigned kAll = 0xffffffffu;
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  unsigned end = value;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const unsigned below = __shfl_up_sync(kAll, end, offset);
    if (lane >= offset) end += below;
  }
  if (lane == 31) scratch.warp_ends[warp] = end;
  __syncthreads();
  const unsigned warp_end = lane < num_warps ? scratch.warp_ends[lane] : 0;
  *total = __reduce_add_sync(kAll, warp_end);
  return __reduce_add_sync(kAll, lane < warp ? warp_end : 0) + end - value;
}

}  // namespace twilight
