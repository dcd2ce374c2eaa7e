// Merge of attention states over disjoint sets of tokens.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace twilight {

constexpr int kMaxStates = 8;  // MAX_STATES in twilight_engine/ops/merge_states.py

struct MergeStatesParams {
  const float* outs[kMaxStates];  // num_states times [rows, D]
  const float* lses[kMaxStates];  // num_states times [rows]
  void* out;                      // [rows, D] of the row dtype
  float* lse;                     // [rows]
  int num_states;
  int rows;  // N * Hq
  int head_dim;
  int row_dtype;  // RowDtype
};

cudaError_t launch_merge_states(const MergeStatesParams& params, cudaStream_t stream);

}  // namespace twilight
