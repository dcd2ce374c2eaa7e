// The blocks of a cluster that share one piece of work. Device code only.
#pragma once

#include <cooperative_groups.h>

namespace twilight {

// Before sm_90, which has no clusters, a block is alone.
struct Ranks {
#if __CUDA_ARCH__ >= 900
  __device__ int rank() const { return cooperative_groups::this_cluster().block_rank(); }
  __device__ int count() const { return cooperative_groups::this_cluster().num_blocks(); }
  __device__ int log_count() const { return __ffs(count()) - 1; }  // of a power of two
  __device__ void sync() const { cooperative_groups::this_cluster().sync(); }
  // Says that this thread came, and nothing about what it wrote: no memory barrier.
  __device__ void arrive() const {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  }
  __device__ void wait() const { cooperative_groups::this_cluster().barrier_wait(); }
  template <typename T>
  __device__ T* of(T* shared, int r) const {
    return cooperative_groups::this_cluster().map_shared_rank(shared, r);
  }
  template <typename T>
  __device__ const T* of(const T* shared, int r) const {
    return cooperative_groups::this_cluster().map_shared_rank(const_cast<T*>(shared), r);
  }
#else
  __device__ int rank() const { return 0; }
  __device__ int count() const { return 1; }
  __device__ int log_count() const { return 0; }
  __device__ void sync() const { __syncthreads(); }
  __device__ void arrive() const {}
  __device__ void wait() const {}
  template <typename T>
  __device__ T* of(T* shared, int) const {
    return shared;
  }
  template <typename T>
  __device__ const T* of(const T* shared, int) const {
    return shared;
  }
#endif
};

}  // namespace twilight
