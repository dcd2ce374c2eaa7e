// Attention over index-grade tokens: estimated scores, INT4 V.
#pragma once

#include <cuda_runtime.h>

#include "csrc/split_attend.h"

namespace twilight {

struct AttendIndexParams {
  SplitWork work;
  StepView step;
  const float* scores;     // [N, Hq, score_capacity]
  const uint8_t* v_codes;  // [P, Hkv, S, D / 2]
  const void* v_scale;     // [P, Hkv, S, 2] float16: scale, min
  const int* tokens;       // [N, Hkv, list_capacity]
  const int* counts;       // [N, Hkv]
  int64_t score_capacity;
  int64_t list_capacity;
  int head_dim;  // 64, 80, 96, 128 or 256
};

cudaError_t launch_attend_index(const AttendIndexParams& params, cudaStream_t stream);

}  // namespace twilight
