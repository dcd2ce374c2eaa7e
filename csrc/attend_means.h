// Attention over the tail: estimated mass by page times the page's mean V.
#pragma once

#include <cuda_runtime.h>

#include "csrc/split_attend.h"

namespace twilight {

struct AttendMeansParams {
  SplitWork work;
  StepView step;
  const float* scores;    // [N, Hq, score_capacity]
  const uint8_t* grades;  // [N, Hkv, grade_capacity]
  const void* v_mean;     // [P, Hkv, D] float16
  int64_t score_capacity;
  int64_t grade_capacity;
  int head_dim;  // 64, 80, 96, 128 or 256
};

cudaError_t launch_attend_means(const AttendMeansParams& params, cudaStream_t stream);

}  // namespace twilight
