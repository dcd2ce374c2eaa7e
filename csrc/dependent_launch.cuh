// Programmatic dependent launch: a kernel's blocks may start while the kernel before it on the same
// stream still runs, so that launch and prologue cost nothing on the path; in a CUDA graph too.
//
// The rule that keeps it right: a kernel launched by launch_dependent calls wait_for_inputs() in
// every thread before it first reads or writes memory that another kernel touches. The wait ends
// when the kernel before has ended, which itself waited for the one before it, so everything
// earlier on the stream is done. let_next_start() only says that the next kernel may be brought in
// once all blocks of this one have said so; it promises nothing about memory.
//
// The exception: in a step of one query row a sequence and no candidates, estimate_scores reads,
// before it waits, the step's metadata (page table, positions, slots, where context and window
// start) and the index pages of list tokens. No kernel that can still be running writes them:
// - Metadata comes from torch's kernels at the start of the step. They are launched without the
//   attribute and never let the next one start: they have ended when a dependent one begins.
// - A page that append_rows completes in this step lies in the window: it begins page_size tokens
//   before the sequence's end, the window at least num_recent >= page_size before it. The pages of
//   list tokens were completed in earlier steps, or by index_pages, which lets the next kernel
//   start only when they are written.
// Other callers of estimate_scores keep to the same: the kernel just before it writes neither.
// Several kernels read the step's metadata before they wait, and nothing else: whatever may still
// run then was launched after the kernels that wrote it had ended.
//
// For the same reasons append_rows may run beside or behind the step's estimate, on another stream
// that is joined before the step ends: the estimate puts the step's own row into the windows
// itself, the same bytes in the same place (p.new_k), for itself and for attend_rows behind it.
#pragma once

#include <cuda_runtime.h>

#include <utility>

namespace twilight {

__device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Whether the current device can: from compute capability 9.0 on.
inline bool can_launch_dependent() {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major >= 9;
}

// kernel<<<grid, block, shared_bytes, stream>>>(args...) that need not wait for its predecessor's
// end; cluster: blocks of a cluster, 1 for none.
template <typename... Params, typename... Args>
cudaError_t launch_dependent(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                             cudaStream_t stream, unsigned cluster, Args&&... args) {
  cudaLaunchAttribute attributes[2] = {};
  int count = 0;
  if (can_launch_dependent()) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {cluster, 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

}  // namespace twilight
