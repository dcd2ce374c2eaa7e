#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace twilight {

struct LshCandidatesParams {
  const uint16_t* q_codes;  // [N, Hq, L]
  const uint16_t* k_codes;  // [P, Hkv, S, L]
  const int* page_table;    // [B, page_table_stride]
  int64_t page_table_stride;
  const int* query_seq;      // [N]
  const int* positions;      // [N]
  const int* ctx_starts;     // [N]
  const int* window_starts;  // [B]
  uint8_t* candidates;       // [N, Hkv, num_tokens]
  int num_queries;           // N
  int num_q_heads;
  int num_kv_heads;
  int num_tables;  // L, at most kMaxLshTables
  int num_tokens;  // whole pages
  int page_size;
  int num_sink;
};

constexpr int kMaxLshTables = 512;

cudaError_t launch_lsh_candidates(const LshCandidatesParams& p, cudaStream_t stream);

}  // namespace twilight
