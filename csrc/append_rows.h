#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "csrc/index_pages.h"

namespace twilight {

// Byte strides are multiples of 16, and so are all row addresses.
struct AppendRowsParams {
  const char* k;  // [N, Hkv] rows of head_bytes
  const char* v;
  int64_t k_stride_bytes[2];  // over N, over Hkv
  int64_t v_stride_bytes[2];
  char* host_kv;  // [Hkv] x [P, S] rows of 2 * head_bytes, host memory mapped to the device
  int64_t host_head_bytes;  // from one KV head's pages to the next's
  char* pages;              // as host_kv, on the device; or null
  int64_t pages_head_bytes;
  char* windows;  // [R] rows of 2 * head_bytes; or null
  int window_rows;
  int num_sink;
  const int* page_table;  // [B, page_table_stride]
  int64_t page_table_stride;
  const int* seq_slots;     // [B]
  const int* seq_lens;      // [B]
  const int* cu_seqlens_q;  // [B + 1]
  const int* query_seq;     // [N]
  const int* positions;     // [N]
  int64_t* counters;        // [NUM_COUNTERS], or null
  int num_queries;          // N
  int num_seqs;             // B
  int num_kv_heads;
  int page_size;
  int head_bytes;  // D * itemsize
};

// index: where the pages go that the rows complete; k_codes null: nowhere.
cudaError_t launch_append_rows(const AppendRowsParams& p, const IndexPagesParams& index,
                               cudaStream_t stream);

}  // namespace twilight
