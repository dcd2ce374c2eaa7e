#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace twilight {

struct GatherRowsParams {
  const char* host_kv;  // [Hkv] x [P * S] rows of row_bytes, host memory the device maps
  const int* src;       // [B * Hkv, capacity] rows of the segment's head; < 0: skip
  const int* dst;       // [B * Hkv, capacity] rows of the pool; < 0: skip
  const int* counts;    // [B * Hkv]
  char* rows;           // [R] rows of row_bytes
  int64_t* counters;    // [NUM_COUNTERS], or null
  int64_t* times;       // [2] ns: least start and greatest end of a block so far, or null
  int num_segments;     // B * Hkv, at most 8192
  int num_kv_heads;
  int capacity;
  int64_t head_stride_bytes;  // from one KV head's rows to the next's; a multiple of 16
  int row_bytes;              // a multiple of 16
  int num_blocks;

  // What resolve_rows, launched just before on the stream, announces (csrc/announced_misses.cuh),
  // or null; the hot rows' step counter and the layer tell it from other announcements.
  const uint64_t* announced;
  const int* step;
  unsigned layer;
};

cudaError_t launch_gather_rows(GatherRowsParams p, cudaStream_t stream);

}  // namespace twilight
