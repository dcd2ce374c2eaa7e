// lse[n, hq] = log sum exp(scores[n, hq, t]);  out = sum exp(scores[n, hq, t] - lse) v_mean[page],
// t over the tokens of grade kGradeTail that row n sees and that are neither sinks nor in the
// window.
//
// Persistent blocks share all pages evenly (split_attend.cuh). A warp takes one slice of a page, up
// to 64 tokens, at a time: two tokens a lane for the mass of every head, then two channels a lane
// of v_mean, each times the mass. Bytes a token: 1 of grades, 4 G of scores; 2 D a slice.
#include "csrc/attend_means.h"
#include "csrc/split_attend.cuh"

namespace twilight {
namespace {

constexpr int kSliceTokens = 64;

template <int kD>
struct MeansWorker {
  static constexpr int kHeadDim = kD;
  static constexpr int kUnitItems = kSplitWarps;
  static constexpr int kParts = 1;
  static constexpr int kPairs = (kD / 2 + 31) / 32;  // channel pairs of a lane
  static constexpr int kSharedBytes = kSplitWarps * kHeadTile * (kD + 4) * 4;

  const AttendMeansParams& params;
  int num_heads = 0;
  float2 out[kHeadTile][kPairs];
  float max[kHeadTile], sum[kHeadTile];

  __device__ explicit MeansWorker(const AttendMeansParams& params) : params(params) {}

  __device__ int slices_per_page() const {
    return (params.step.page_size + kSliceTokens - 1) / kSliceTokens;
  }

  // Tokens [first, last) of row n are neither sinks nor in the window.
  __device__ void listed(int n, int& first, int& last) const {
    const StepView& step = params.step;
    first = max_of(step.ctx_starts[n], step.num_sink);
    last = min(step.window_starts[step.query_seq[n]], step.positions[n] + 1);
  }

  __device__ static int max_of(int a, int b) { return a > b ? a : b; }

  __device__ int num_items(int n, int) const {
    int first, last;
    listed(n, first, last);
    if (first >= last) return 0;
    const int page_size = params.step.page_size;
    return ((last - 1) / page_size - first / page_size + 1) * slices_per_page();
  }

  __device__ void attend(const Segment& segment, int first_item, int last_item) {
    const StepView& step = params.step;
    const int hkv = params.work.num_kv_heads, slices = slices_per_page();
    const int* pages =
        step.page_table + int64_t{step.query_seq[segment.n]} * step.page_table_stride;
    const float* scores =
        params.scores +
        (int64_t{segment.n} * hkv * params.work.group + segment.first_head) * params.score_capacity;
    const uint8_t* grades =
        params.grades + (int64_t{segment.n} * hkv + segment.h) * params.grade_capacity;
    int first, last;
    listed(segment.n, first, last);
    num_heads = segment.num_heads;
#pragma unroll
    for (int g = 0; g < kHeadTile; ++g) {
      max[g] = kNegInf;
      sum[g] = 0.f;
#pragma unroll
      for (int j = 0; j < kPairs; ++j) out[g][j] = make_float2(0.f, 0.f);
    }
    for (int item = first_item + threadIdx.x / 32; item < last_item; item += kUnitItems) {
      const int index = first / step.page_size + item / slices;
      const int begin = index * step.page_size + item % slices * kSliceTokens;
      const int end = min((index + 1) * step.page_size, begin + kSliceTokens);
      const int64_t row = (int64_t{pages[index]} * hkv + segment.h) * kD;
      add_slice(scores, grades, static_cast<const __half*>(params.v_mean) + row,
                max_of(begin, first), min(end, last));
    }
  }

  __device__ void add_slice(const float* scores, const uint8_t* grades, const __half* mean,
                            int begin, int end) {
    const int token = begin + threadIdx.x % 32;
    const bool tail0 = token < end && grades[token] == kGradeTail;
    const bool tail1 = token + 32 < end && grades[token + 32] == kGradeTail;
    float2 v[kPairs];
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int pair = threadIdx.x % 32 + 32 * j;
      v[j] = pair < kD / 2 ? __half22float2(reinterpret_cast<const __half2*>(mean)[pair])
                           : make_float2(0.f, 0.f);
    }
    float score[kHeadTile][2];
#pragma unroll
    for (int g = 0; g < kHeadTile; ++g) {
      if (g >= num_heads) break;
      const float* row = scores + g * params.score_capacity + token;
      score[g][0] = tail0 ? row[0] * kLog2e : kNegInf;
      score[g][1] = tail1 ? row[32] * kLog2e : kNegInf;
    }
#pragma unroll
    for (int g = 0; g < kHeadTile; ++g) {
      if (g >= num_heads) break;
      const float top = fmaxf(max[g], warp_max(fmaxf(score[g][0], score[g][1])));
      const float factor = state_weight(max[g], top);
      const float mass = warp_sum(state_weight(score[g][0], top) + state_weight(score[g][1], top));
      max[g] = top;
      sum[g] = sum[g] * factor + mass;
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        out[g][j].x = out[g][j].x * factor + mass * v[j].x;
        out[g][j].y = out[g][j].y * factor + mass * v[j].y;
      }
    }
  }

  __device__ void store_state(SplitShared& shared) const {
    if (threadIdx.x % 32 != 0) return;
#pragma unroll
    for (int g = 0; g < kHeadTile; ++g) {
      shared.max[threadIdx.x / 32][g] = max[g];
      shared.sum[threadIdx.x / 32][g] = sum[g];
    }
  }

  __device__ void store_out(float* parts) const {
    float* to = parts + threadIdx.x / 32 * kHeadTile * (kD + 4);
#pragma unroll
    for (int g = 0; g < kHeadTile; ++g) {
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        const int pair = threadIdx.x % 32 + 32 * j;
        if (pair < kD / 2) *reinterpret_cast<float2*>(to + g * (kD + 4) + pair * 2) = out[g][j];
      }
    }
  }
};

template <int kD>
__global__ void __launch_bounds__(kSplitThreads) attend_means_kernel(AttendMeansParams params) {
  extern __shared__ __align__(16) char shared[];
  MeansWorker<kD> worker(params);
  split_attend(worker, params.work, reinterpret_cast<float*>(shared));
}

}  // namespace

cudaError_t launch_attend_means(const AttendMeansParams& params, cudaStream_t stream) {
  return TWILIGHT_DISPATCH_HEAD_DIM(params.head_dim, {
    return launch_split(attend_means_kernel<kD>, params, params.work, kD,
                        MeansWorker<kD>::kSharedBytes, stream);
  });
}

}  // namespace twilight
