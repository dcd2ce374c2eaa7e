// A sum over the threads before each one of a block. Device code only.
#pragma once

#include <cuda_runtime.h>

namespace twilight {

// What block_exclusive_sum keeps in shared memory.
struct BlockScan {
  unsigned warp_ends[32];
};

// The sum of `value` over all threads below this one; total: over the whole block. All threads of a
// block of whole warps must call it; scratch may be used again at once.
__device__ __forceinline__ unsigned block_exclusive_sum(unsigned value, BlockScan& scratch,
                                                        unsigned* total) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  unsigned end = value;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const unsigned below = __shfl_up_sync(0xffffffffu, end, offset);
    if (lane >= offset) end += below;
  }
  if (lane == 31) scratch.warp_ends[warp] = end;
  __syncthreads();
  if (warp == 0) {
    unsigned warp_end = lane < num_warps ? scratch.warp_ends[lane] : 0;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const unsigned below = __shfl_up_sync(0xffffffffu, warp_end, offset);
      if (lane >= offset) warp_end += below;
    }
    scratch.warp_ends[lane] = warp_end;
  }
  __syncthreads();
  const unsigned before = warp == 0 ? 0 : scratch.warp_ends[warp - 1];
  *total = scratch.warp_ends[num_warps - 1];
  __syncthreads();
  return before + end - value;
}

}  // namespace twilight
