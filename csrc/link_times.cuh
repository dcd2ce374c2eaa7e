// When copies over the link took place, by the GPU's own clock: timing events inside a CUDA graph
// could be read only between two replays. Device code only.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace twilight {

__device__ __forceinline__ unsigned long long now_ns() {
  unsigned long long ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
  return ns;
}

// Lowers times[0] to `start`, raises times[1] to now.
__device__ __forceinline__ void note_times(int64_t* times, unsigned long long start) {
  auto* ns = reinterpret_cast<unsigned long long*>(times);
  atomicMin(&ns[0], start);
  atomicMax(&ns[1], now_ns());
}

}  // namespace twilight
