// Sizes and buffers that the attention kernels share: segments, partial states and results.
#pragma once

#include <cstdint>

namespace twilight {

constexpr int kHeadTile = 8;  // query heads that share one pass; HEAD_TILE in attend_workspace.py

// A segment is one (query row n, KV head h, tile of kHeadTile query heads of the group), in that
// order; there are num_queries * num_kv_heads * ceil(group / kHeadTile).
struct SplitWork {
  int num_queries;   // N
  int num_kv_heads;  // Hkv
  int group;         // G = Hq / Hkv
  int num_blocks;    // persistent blocks
  float* workspace;  // slots * kHeadTile * (D + 2) + 2 * segments, slots = num_blocks + segments
};

// What the kernels read of layout.StepMeta; all int32.
struct StepView {
  const int* page_table;     // [B, P_max]
  const int* seq_slots;      // [B]
  const int* window_starts;  // [B]
  const int* query_seq;      // [N]
  const int* positions;      // [N]
  const int* ctx_starts;     // [N]
  int64_t page_table_stride;
  int page_size;
  int num_sink;
};

}  // namespace twilight
