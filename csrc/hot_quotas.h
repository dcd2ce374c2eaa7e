#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace twilight {

struct RebalanceQuotasParams {
  int* slot_map;          // [Hkv, keys_per_head]
  int* slot_key;          // [num_chunks * kSlotsPerChunk]
  int* chunk_owner;       // [num_chunks]
  const float* set_mean;  // [num_owners] = [num_seq_slots, Hkv]
  const uint8_t* active;  // [num_seq_slots]
  int num_chunks;
  int num_owners;  // at most 2048
  int num_kv_heads;
  int64_t keys_per_head;  // P * S
};

struct ReleaseSequenceParams {
  int* slot_map;        // [Hkv, keys_per_head]
  int* slot_key;        // [num_chunks * kSlotsPerChunk]
  int* chunk_owner;     // [num_chunks]
  float* set_mean;      // [num_seq_slots, Hkv]
  const int* page_ids;  // [num_pages]; < 0: skip
  int num_pages;
  int seq_slot;
  int num_chunks;
  int num_kv_heads;
  int page_size;
  int64_t keys_per_head;  // P * S
  int first_row;
};

cudaError_t launch_rebalance_quotas(const RebalanceQuotasParams& p, cudaStream_t stream);
cudaError_t launch_release_sequence(const ReleaseSequenceParams& p, cudaStream_t stream);

}  // namespace twilight
