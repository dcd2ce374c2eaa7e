#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace twilight {

struct PruneParams {
  int num_rows;      // N
  int num_kv_heads;  // Hkv
  int group;         // G = Hq / Hkv
  int page_size;     // S
  int num_sink;
  int max_len;         // bounds every position
  int capacity;        // C of scores and weights
  int exact_capacity;  // of a list
  int grades_capacity;
  int block;          // tokens of a candidate block, which restarts at each page
  int num_blocks;     // NB of candidates
  bool unite;         // group rule: a set a query head, united; else one set of the mean
  bool dropped;       // list tokens outside the candidates, and no others, score -inf in all heads
  bool expand_pages;  // list tokens of a page that holds an exact one become exact
  int num_pages;      // P of errors
  float margin;       // standard errors that the exact mass is raised by

  const float* scores;        // [N, Hq, C]
  const float* lse;           // [N, Hq]
  const float* top_p;         // [B]
  const float* index_top_p;   // [B], or null: no index grade
  const int* top_k;           // [B], or null; values < 1: top_p holds
  const uint8_t* candidates;  // [N, Hkv, NB], or null: all
  const float* errors;        // [N, Hq, P] standard error of a page's scores, or null: no margin
  const int* window_starts;   // [B]
  const int* query_seq;       // [N]
  const int* positions;       // [N]
  const int* ctx_starts;      // [N]

  float* weights;     // [N, Hkv, C] workspace
  int* exact_tokens;  // [N, Hkv, exact_capacity]
  int* exact_counts;  // [N, Hkv]
  int* index_counts;  // [N, Hkv]
  uint8_t* grades;    // [N, Hkv, grades_capacity]
  float* mass;        // [N, Hkv]
};

cudaError_t launch_prune(const PruneParams& params, cudaStream_t stream);

}  // namespace twilight
