// quest_scores: scores[n, hq, j] = softmax_scale * sum_d max(q[d] * lo[d], q[d] * hi[d]) with the
// bounds [lo, hi] of K over block j; -inf where the block holds no list token.
//
// A thread block owns a (query row, KV head) and a share of its blocks of tokens, with the group's
// q in shared memory as float32. A warp owns a block of tokens at a time: its lanes hold 4 (D 256:
// 8) channels of the bounds and run through the group's heads, so the bounds are read once for all
// of them. Bytes moved: 4 * D a block of tokens and KV head, N times for N rows of one sequence.
// Source: Quest (Tang et al., ICML 2024).
#include "csrc/common.cuh"
#include "csrc/quest_scores.h"

namespace twilight {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksPerWarp = 4;  // spreads the group's q, read once a thread block, over 32
constexpr int kLaneChannels = 4;
constexpr int kStep = 32 * kLaneChannels;

__device__ __forceinline__ void load_halves(const __half* p, float (&x)[kLaneChannels]) {
  const uint2 raw = *reinterpret_cast<const uint2*>(p);
  const float2 a = __half22float2(*reinterpret_cast<const __half2*>(&raw.x));
  const float2 b = __half22float2(*reinterpret_cast<const __half2*>(&raw.y));
  x[0] = a.x, x[1] = a.y, x[2] = b.x, x[3] = b.y;
}

template <typename T, int kSteps>
__global__ void __launch_bounds__(kThreads) quest_scores_kernel(QuestScoresParams p) {
  extern __shared__ float4 q_shared[];  // [G, D]
  const int n = blockIdx.z, h = blockIdx.y, dim = p.head_dim;
  const int group = p.num_q_heads / p.num_kv_heads;
  const int64_t first_head = static_cast<int64_t>(n) * p.num_q_heads + h * group;
  const T* q = static_cast<const T*>(p.q) + first_head * dim;
  for (int i = threadIdx.x; i < group * dim; i += kThreads) {
    reinterpret_cast<float*>(q_shared)[i] = to_float(q[i]);
  }
  __syncthreads();

  const int lane = threadIdx.x % 32;
  const int b = p.query_seq[n];
  const int first = max(p.ctx_starts[n], p.num_sink);
  const int end = min(p.positions[n] + 1, p.window_starts[b]);
  const int per_page = (p.page_size + p.block - 1) / p.block;
  float* scores = p.scores + first_head * p.num_blocks;
  for (int j = blockIdx.x * kWarps + threadIdx.x / 32; j < p.num_blocks; j += gridDim.x * kWarps) {
    const int start = j / per_page * p.page_size + j % per_page * p.block;
    const int stop = min(start + p.block, (j / per_page + 1) * p.page_size);
    const bool scored = start < end && stop > first;
    const int page = scored ? p.page_table[b * p.page_table_stride + j / per_page] : kNoRow;
    if (page < 0) {
      for (int g = lane; g < group; g += 32) {
        scores[static_cast<int64_t>(g) * p.num_blocks + j] = -INFINITY;
      }
      continue;
    }
    const int64_t record =
        (static_cast<int64_t>(page) * p.num_kv_heads + h) * per_page + j % per_page;
    const __half* bounds = static_cast<const __half*>(p.bounds) + record * 2 * dim;
    float lo[kSteps][kLaneChannels], hi[kSteps][kLaneChannels];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int d = s * kStep + lane * kLaneChannels;
      if (d >= dim) continue;
      load_halves(bounds + d, lo[s]);
      load_halves(bounds + dim + d, hi[s]);
      if (!p.by_channel) continue;
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i) {
        const float scale = lo[s][i];
        lo[s][i] = hi[s][i];
        hi[s][i] += 15.0f * scale;
      }
    }
    for (int g = 0; g < group; ++g) {
      float sum = 0.0f;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int d = s * kStep + lane * kLaneChannels;
        if (d >= dim) continue;
        const float4 x = q_shared[(g * dim + d) / 4];
        sum += fmaxf(x.x * lo[s][0], x.x * hi[s][0]);
        sum += fmaxf(x.y * lo[s][1], x.y * hi[s][1]);
        sum += fmaxf(x.z * lo[s][2], x.z * hi[s][2]);
        sum += fmaxf(x.w * lo[s][3], x.w * hi[s][3]);
      }
      sum = warp_sum(sum);
      if (lane == 0) {
        scores[static_cast<int64_t>(g) * p.num_blocks + j] = sum * p.softmax_scale;
      }
    }
  }
}

}  // namespace

cudaError_t launch_quest_scores(const QuestScoresParams& p, cudaStream_t stream) {
  const int per_block = kWarps * kBlocksPerWarp;
  const dim3 grid((p.num_blocks + per_block - 1) / per_block, p.num_kv_heads, p.num_queries);
  const size_t shared = sizeof(float) * (p.num_q_heads / p.num_kv_heads) * p.head_dim;
  return TWILIGHT_DISPATCH_ROW(p.dtype, T, {
    if (p.head_dim <= kStep) {
      quest_scores_kernel<T, 1><<<grid, kThreads, shared, stream>>>(p);
    } else {
      quest_scores_kernel<T, 2><<<grid, kThreads, shared, stream>>>(p);
    }
    return cudaGetLastError();
  });
}

}  // namespace twilight
