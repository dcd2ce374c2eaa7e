// lse[n, hq] = log sum exp(scores[n, hq, t]);  out = sum exp(scores[n, hq, t] - lse) v_hat[t],
// v_hat[t] = min[t] + scale[t] * code[t], t over the list of (n, KV head).
//
// Persistent blocks share all lists evenly (split_attend.cuh). A warp takes 32 tokens at a time:
// first a lane a token for the weights, then D / 8 lanes a token, 4 bytes of codes (8 channels) a
// lane, so that all heads of a group share each load. scale is folded into a token's weight, and
// sum w * min is one number a head. Bytes a token: D / 2 + 4 of index, 4 of list, 4 G of scores.
#include "csrc/attend_index.h"
#include "csrc/split_attend.cuh"

namespace twilight {
namespace {

constexpr int kStepTokens = 32;

struct StepWeights {
  float weight[kStepTokens][kHeadTile];  // exp2(score - max) * scale
};

template <int kD>
struct IndexWorker {
  static constexpr int kHeadDim = kD;
  static constexpr int kUnitItems = kSplitWarps * kStepTokens;
  static constexpr int kLanes = kD / 8;       // lanes of a token
  static constexpr int kParts = 32 / kLanes;  // tokens of a warp's load
  static constexpr int kLoads = (kStepTokens + kParts - 1) / kParts;
  static constexpr int kSharedBytes = kSplitWarps * kParts * kHeadTile * (kD + 4) * 4;

  const AttendIndexParams& params;
  StepWeights& weights;  // the warp's
  int num_heads = 0;
  float out[kHeadTile][8];
  float max[kHeadTile], sum[kHeadTile], low[kHeadTile];  // low: sum of weight * min

  __device__ IndexWorker(const AttendIndexParams& params, StepWeights& weights)
      : params(params), weights(weights) {}

  __device__ int num_items(int n, int h) const {
    return params.counts[int64_t{n} * params.work.num_kv_heads + h];
  }

  __device__ void attend(const Segment& segment, int first, int last) {
    const StepView& step = params.step;
    const int lane = threadIdx.x % 32, hkv = params.work.num_kv_heads;
    const int* tokens =
        params.tokens + (int64_t{segment.n} * hkv + segment.h) * params.list_capacity;
    const int* pages =
        step.page_table + int64_t{step.query_seq[segment.n]} * step.page_table_stride;
    const float* scores =
        params.scores +
        (int64_t{segment.n} * hkv * params.work.group + segment.first_head) * params.score_capacity;
    num_heads = segment.num_heads;
#pragma unroll
    for (int g = 0; g < kHeadTile; ++g) {
      max[g] = kNegInf;
      sum[g] = low[g] = 0.f;
#pragma unroll
      for (int c = 0; c < 8; ++c) out[g][c] = 0.f;
    }
    for (int i = first + threadIdx.x / 32 * kStepTokens; i < last; i += kUnitItems) {
      const bool listed = i + lane < last;
      const int token = listed ? tokens[i + lane] : 0;
      const int page = listed ? pages[token / step.page_size] : 0;
      // A lane without a token points at the index's first row, with weight 0.
      const int64_t row =
          listed ? (int64_t{page} * hkv + segment.h) * step.page_size + token % step.page_size : 0;
      add_step(scores, listed, token, row);
    }
  }

  __device__ void add_step(const float* scores, bool listed, int token, int64_t row) {
    const int lane = threadIdx.x % 32, part = lane / kLanes, word = lane % kLanes;
    uint32_t codes[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int source = j * kParts + part;
      const int64_t at = __shfl_sync(0xffffffffu, row, source % 32);
      codes[j] = part < kParts && source < kStepTokens
                     ? reinterpret_cast<const uint32_t*>(params.v_codes + at * (kD / 2))[word]
                     : 0;
    }
    // Row 0 may be of a page never indexed: 0 * nan must not reach a weight.
    const float2 affine = listed ? __half22float2(static_cast<const __half2*>(params.v_scale)[row])
                                 : make_float2(0.f, 0.f);
#pragma unroll
    for (int g = 0; g < kHeadTile; ++g) {
      if (g >= num_heads) break;
      const float score = listed ? scores[g * params.score_capacity + token] * kLog2e : kNegInf;
      const float top = fmaxf(max[g], warp_max(score));
      const float factor = state_weight(max[g], top), p = state_weight(score, top);
      max[g] = top;
      sum[g] = sum[g] * factor + p;
      low[g] = low[g] * factor + p * affine.y;
      weights.weight[lane][g] = p * affine.x;
      if (factor != 1.f) {  // the same in all lanes
#pragma unroll
        for (int c = 0; c < 8; ++c) out[g][c] *= factor;
      }
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      if (part < kParts && j * kParts + part < kStepTokens) {
        add_token(codes[j], weights.weight[j * kParts + part]);
      }
    }
    __syncwarp();
  }

  __device__ void add_token(uint32_t codes, const float* weight) {
    float v[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      // 2^23 + code, exactly, less 2^23: cheaper than an integer conversion.
      v[c] = __uint_as_float(0x4b000000u | (codes >> (4 * c) & 15u)) - 8388608.f;
    }
#pragma unroll
    for (int g = 0; g < kHeadTile; ++g) {
      if (g >= num_heads) break;
      const float w = weight[g];
#pragma unroll
      for (int c = 0; c < 8; ++c) out[g][c] += w * v[c];
    }
  }

  __device__ void store_state(SplitShared& shared) {
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int g = 0; g < kHeadTile; ++g) {
      sum[g] = warp_sum(sum[g]);
      low[g] = warp_sum(low[g]);
      if (threadIdx.x % 32 == 0) {
        shared.max[warp][g] = max[g];
        shared.sum[warp][g] = sum[g];
      }
    }
  }

  __device__ void store_out(float* parts) const {
    const int lane = threadIdx.x % 32, part = lane / kLanes, word = lane % kLanes;
    if (part >= kParts) return;
    float* to = parts + (threadIdx.x / 32 * kParts + part) * kHeadTile * (kD + 4) + word * 8;
#pragma unroll
    for (int g = 0; g < kHeadTile; ++g) {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        to[g * (kD + 4) + c] = out[g][c] + (part == 0 ? low[g] : 0.f);
      }
    }
  }
};

template <int kD>
__global__ void __launch_bounds__(kSplitThreads) attend_index_kernel(AttendIndexParams params) {
  extern __shared__ __align__(16) char shared[];
  __shared__ StepWeights weights[kSplitWarps];
  IndexWorker<kD> worker(params, weights[threadIdx.x / 32]);
  split_attend(worker, params.work, reinterpret_cast<float*>(shared));
}

}  // namespace

cudaError_t launch_attend_index(const AttendIndexParams& params, cudaStream_t stream) {
  return TWILIGHT_DISPATCH_HEAD_DIM(params.head_dim, {
    return launch_split(attend_index_kernel<kD>, params, params.work, kD,
                        IndexWorker<kD>::kSharedBytes, stream);
  });
}

}  // namespace twilight
