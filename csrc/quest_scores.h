#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace twilight {

struct QuestScoresParams {
  const void* q;          // [N, Hq, D]
  const void* bounds;     // float16 [P, Hkv, blocks a page, 2, D]: (scale, min) or (min, max)
  bool by_channel;        // bounds are (scale, min)
  const int* page_table;  // [B, page_table_stride]
  int64_t page_table_stride;
  const int* query_seq;      // [N]
  const int* positions;      // [N]
  const int* ctx_starts;     // [N]
  const int* window_starts;  // [B]
  float* scores;             // [N, Hq, NB]
  int num_queries;           // N
  int num_q_heads;
  int num_kv_heads;
  int head_dim;
  int num_blocks;  // NB
  int block;       // tokens
  int page_size;
  int num_sink;
  float softmax_scale;
  int dtype;  // RowDtype of q
};

cudaError_t launch_quest_scores(const QuestScoresParams& p, cudaStream_t stream);

}  // namespace twilight
