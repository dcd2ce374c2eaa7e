#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace twilight {

struct ResolveRowsParams {
  const int* tokens;        // [N, Hkv, capacity]
  const int* counts;        // [N, Hkv]
  const int* page_table;    // [B, table_stride]
  const int* seq_slots;     // [B]; < 0: a padding sequence
  const int* cu_seqlens_q;  // [B + 1]
  const int* query_seq;     // [N]

  int* slot_map;           // [Hkv, keys_per_head], or null (with all of the state): no slots
  int* slot_key;           // [num_chunks * kSlotsPerChunk]
  int* slot_stamp;         // [num_chunks * kSlotsPerChunk]
  const int* chunk_owner;  // [num_chunks]
  float* set_mean;         // [num_seq_slots, Hkv]
  const int* step;         // [1]

  int* locations;     // [N, Hkv, capacity]
  int* fetch_src;     // [B, Hkv, fetch_capacity]
  int* fetch_dst;     // [B, Hkv, fetch_capacity]
  int* fetch_counts;  // [B, Hkv]
  int* fetch_direct;  // [B, Hkv]
  int64_t* counters;  // [NUM_COUNTERS], or null

  int num_queries;  // N
  int num_seqs;     // B
  int num_kv_heads;
  int capacity;
  int fetch_capacity;
  int num_chunks;  // at most 65536
  int first_row;
  int page_size;
  int table_pages;  // entries of a row of page_table
  int64_t table_stride;
  int64_t keys_per_head;  // P * S
  bool shared_pages;      // sequences may have pages in common

  // Where misses are announced before they have slots (csrc/announced_misses.cuh), or null. For
  // steps of one query row a sequence, without shared pages.
  uint64_t* announced;
  unsigned layer;  // tells the layer's announcements from others
};

cudaError_t launch_resolve_rows(const ResolveRowsParams& p, cudaStream_t stream);

}  // namespace twilight
