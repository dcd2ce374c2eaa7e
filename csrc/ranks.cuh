// The blocks of a cluster that share one piece of work. Device code only.
#pragma once

#include <cooperative_groups.h>

namespace twilight {

// Before sm_90, which has no clusters, a block is alone.
struct Ranks {
#if __CUDA_ARCH__ >= 900
  __device__ int rank() const { return cooperative_groups::this_cluster().block_rank(); }
  __device__ int count() const { return cooperative_groups::this_cluster().num_blocks(); }
  // Says that this thread came, and nothing about what it wrote: no memory barrier.
  __device__ void arrive() const {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  }
  __device__ void wait() const { cooperative_groups::this_cluster().barrier_wait(); }
#else
  __device__ int rank() const { return 0; }
  __device__ int count() const { return 1; }
  __device__ void arrive() const {}
  __device__ void wait() const {}
#endif
};

}  // namespace twilight
