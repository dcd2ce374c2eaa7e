#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace twilight {

// Division by a number that the host knows, in five instructions.
struct Divisor {
  unsigned by, inverse;

  static Divisor of(int by) { return {unsigned(by), 0xffffffffu / unsigned(by)}; }

#ifdef __CUDACC__
  // The high half of the product is the quotient or one less.
  __device__ int divide(int n) const {
    const unsigned quotient = __umulhi(unsigned(n), inverse);
    return quotient + (unsigned(n) - quotient * by >= by);
  }
#endif
};

struct EstimateScoresParams {
  int num_rows;      // N
  int num_kv_heads;  // Hkv
  int group;         // G = Hq / Hkv
  int head_dim;      // D: 64, 80, 96, 128 or 256
  int page_size;     // S
  int num_sink;
  int window_rows;
  int capacity;      // C, tokens a row of scores holds
  int table_stride;  // P_max
  int num_pages;     // P, pages a row of errors holds
  int num_blocks;    // NB, candidate blocks a (row, head); block restarts at each page
  bool by_token;     // a candidate entry is a token, else a page or a run of kQuestBlock tokens
  int row_dtype;     // RowDtype of q and rows
  bool per_token;    // int4_token, else int4_channel
  bool early;        // read metadata and index pages before the kernels before have ended
  bool drop;         // left-out tokens get -inf, else their block's midpoint (by_token: their own)
  float softmax_scale;
  int64_t codes_page_stride;   // elements from a page to the next
  int64_t scale_page_stride;   // likewise
  int64_t bounds_page_stride;  // likewise

  const void* q;              // [N, Hq, D] row_dtype, at a multiple of 16 bytes
  const uint8_t* k_codes;     // [P, Hkv, S, D / 2]
  const uint16_t* k_scale;    // fp16: [P, Hkv, 2, D], or per_token [P, Hkv, S, 2]
  const uint16_t* k_bounds;   // fp16: [P, Hkv, runs, 2, D], per_token with candidates only
  void* rows;                 // [R, 2 * D] row_dtype
  const uint8_t* candidates;  // [N, Hkv, NB], or null: all
  const int* page_table;      // [B, P_max]
  const int* seq_slots;       // [B]
  const int* window_starts;   // [B]
  const int* query_seq;       // [N]
  const int* positions;       // [N]
  const int* ctx_starts;      // [N]

  // The step's own rows, one a sequence, [N, Hkv, D] row_dtype at multiples of 16 bytes, where
  // append_rows may not have put them into the windows yet: this kernel does so itself. Or null.
  const char *new_k, *new_v;
  int64_t new_k_stride_bytes[2], new_v_stride_bytes[2];  // over N, over Hkv

  float* scores;        // [N, Hq, C]
  float* lse;           // [N, Hq]
  float* errors;        // [N, Hq, P], or null
  unsigned* workspace;  // [workspace_size], zero between launches; 8-byte aligned
  int64_t workspace_size;

  // Set by the launcher.
  Divisor by_page, by_window, by_groups, by_blocks;  // page_size, window_rows, head_groups, grid
  int head_groups;                                   // units of a row and KV head
  int residents;                                     // items of resident tokens of a unit
  int pieces;                                        // of a page
  bool vector_codes;   // codes of a page and head lie at multiples of 16 bytes
  bool vector_scores;  // likewise: scores of every fourth token of a page do
};

// Elements that the workspace has at least. One that is larger serves steps of more rows too; all
// of it is left zero.
int64_t estimate_scores_workspace(int num_rows, int num_kv_heads, int group);

cudaError_t launch_estimate_scores(EstimateScoresParams params, cudaStream_t stream);

}  // namespace twilight
