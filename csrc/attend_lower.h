// Attention over the grades below exact: INT4 V of index-grade tokens, page means of the tail.
#pragma once

#include <cuda_runtime.h>

#include "csrc/split_attend.h"

namespace twilight {

struct AttendLowerParams {
  SplitWork work;
  StepView step;
  const float* scores;    // [N, Hq, score_capacity]
  const float* lse;       // [N, Hq] of all scores: a weight is exp(score - lse)
  const uint8_t* grades;  // [N, Hkv, grade_capacity]
  const int*
      index_counts;  // [N, Hkv] tokens of kGradeIndex, or null: the shares of work assume none
  const uint8_t* v_codes;  // [P, Hkv, S, D / 2], or null: no index grade
  const void* v_scale;     // [P, Hkv, S, 2] float16: scale, min; null with v_codes
  const void* v_mean;      // [P, Hkv, D] float16, or null: no tail
  int64_t score_capacity;
  int64_t grade_capacity;
  int head_dim;  // 64, 80, 96, 128 or 256
};

cudaError_t launch_attend_lower(const AttendLowerParams& params, cudaStream_t stream);

}  // namespace twilight
