#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace twilight {

struct SelectBlocksParams {
  const float* scores;       // [N, Hq, NB]
  const int* query_seq;      // [N]
  const int* positions;      // [N]
  const int* ctx_starts;     // [N]
  const int* window_starts;  // [B]
  uint8_t* candidates;       // [N, Hkv, NB]
  double budget;             // tokens, or a share of a row's list tokens
  bool budget_is_share;
  int block;        // tokens
  int num_queries;  // N
  int num_q_heads;
  int num_kv_heads;
  int num_blocks;  // NB
  int num_sink;
};

cudaError_t launch_select_blocks(const SelectBlocksParams& p, cudaStream_t stream);

}  // namespace twilight
