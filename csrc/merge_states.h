// Merge of the partial attention states that kernels over disjoint sets of tokens left.
#pragma once

#include <cuda_runtime.h>

#include "csrc/split_attend.h"

namespace twilight {

constexpr int kMaxStates = 3;  // MAX_STATES in twilight_engine/ops/merge_states.py

struct MergeStatesParams {
  SplitWork works[kMaxStates];  // num_states of them, of the same N, Hkv and G
  void* out;                    // [N, Hq, D] of the row dtype
  float* lse;                   // [N, Hq]
  int num_states;
  int head_dim;   // 64, 80, 96, 128 or 256
  int row_dtype;  // RowDtype
};

cudaError_t launch_merge_states(const MergeStatesParams& params, cudaStream_t stream);

}  // namespace twilight
