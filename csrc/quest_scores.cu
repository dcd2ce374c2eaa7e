// quest_scores: scores[n, hq, j] = softmax_scale * sum_d max(q[d] * lo[d], q[d] * hi[d]) with the
// bounds [lo, hi] of K over block j; -inf where the block holds no list token.
//
// As lo <= hi, the larger product is q * hi for q > 0 and q * lo for others: two multiplications by
// parts of q that a lane keeps in registers.
//
// A warp owns a stretch of up to 32 blocks of tokens of a (query row, KV head): each lane finds the
// record of one, from metadata alone, before the kernel's inputs are there. Then the warp takes a
// tile of them at a time: a lane copies 16 bytes of either bound of a few blocks to shared memory,
// tiles ahead of the one whose scores it adds up for up to four heads; it alone reads them again.
// More heads read the stretch again, from the L2. Bytes moved: 4 * D a block of tokens and KV head,
// N times for N rows of one sequence.
// Source: Quest (Tang et al., ICML 2024).
#include <algorithm>

#include "csrc/common.cuh"
#include "csrc/dependent_launch.cuh"
#include "csrc/ptx.cuh"
#include "csrc/quest_scores.h"

namespace twilight {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksPerSm = 4;  // of threads: at most 128 registers each
constexpr int kLaneChannels = 8;
constexpr int kLeastStretch = 8, kMostStretch = 32;  // blocks of tokens a warp
// Stretches grow until the warps of all run at once on 132 SMs.
constexpr int64_t kMostWarps = 132 * kBlocksPerSm * kWarps;

// 8 KiB a warp, 128 an SM: at 3.1 TB/s, 5 us of its share of the memory's throughput.
constexpr int kRingPieces = 16;

// Blocks whose bounds a warp asks the L2 for while it waits: as many as its ring holds at first, 17
// MB of all warps; the step's append, 5 us, hides that.
constexpr int kAsked = 16;

// kLanes: that hold a block's channels. kHeads: that are scored at once.
template <int kLanes, int kHeads>
struct Tile {
  static constexpr int kAbreast = 32 / kLanes;
  static constexpr int kDeep = kHeads == 4 ? 2 : 4;
  static constexpr int kBlocks = kAbreast * kDeep;
  static constexpr int kValues = kDeep * kHeads;  // of which a lane holds a part
  static constexpr int kStages = kRingPieces / (2 * kDeep);
  static_assert(kBlocks <= kMostStretch && kValues <= kLanes);
};

// A warp's copies of bounds: a piece is what its lanes hold of one of the two rows, (scale, min) or
// (min, max), of a record each.
struct Ring {
  uint4 pieces[kRingPieces][32];
};

// The record of block j, or kNoRow where it holds no list token. From metadata alone.
__device__ int find_record(const QuestScoresParams& p, int n, int h, int j, int per_page) {
  const int b = p.query_seq[n];
  const int first = max(p.ctx_starts[n], p.num_sink);
  const int end = min(p.positions[n] + 1, p.window_starts[b]);
  const int place = j / per_page, run = j - place * per_page;
  const int page_start = place * p.page_size, start = page_start + run * p.block;
  const int stop = min(start + p.block, page_start + p.page_size);
  if (start >= end || stop <= first) return kNoRow;
  const int page = p.page_table[b * p.page_table_stride + place];
  // Fits: 2^31 records would take 512 GiB.
  return page < 0 ? kNoRow : (page * p.num_kv_heads + h) * per_page + run;
}

__device__ __forceinline__ void unpack(const uint4& raw, float (&x)[kLaneChannels]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
    x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
  }
}

// Sums each of x over kLanes lanes that hold parts of it; lane i gets sum i % kValues. All sums add
// in the same order, so equal bounds have equal scores.
template <int kLanes, int kValues>
__device__ __forceinline__ float sum_over_lanes(float (&x)[kValues], int lane) {
#pragma unroll
  for (int half = kValues / 2; half > 0; half /= 2) {
    const bool upper = lane & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float kept = upper ? x[i + half] : x[i], sent = upper ? x[i] : x[i + half];
      x[i] = kept + __shfl_xor_sync(kAllLanes, sent, half);
    }
  }
#pragma unroll
  for (int offset = kValues; offset < kLanes; offset *= 2) {
    x[0] += __shfl_xor_sync(kAllLanes, x[0], offset);
  }
  return x[0];
}

// What a lane's channels of the two rows are multiplied by; zeros for channels that are none.
template <typename T, int kHeads>
struct Factors {
  static constexpr int kWords = kLaneChannels * sizeof(T) / sizeof(uint4);
  float first[kHeads][kLaneChannels], second[kHeads][kLaneChannels];

  __device__ Factors(const T* q, int dim, int channel, int heads, bool by_channel) {
    const bool inside = channel < dim;
    uint4 words[kHeads][kWords];
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
      const T* row = q + min(g, heads - 1) * dim + (inside ? channel : 0);
#pragma unroll
      for (int w = 0; w < kWords; ++w) words[g][w] = reinterpret_cast<const uint4*>(row)[w];
    }
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i) {
        const float loaded = to_float(reinterpret_cast<const T*>(words[g])[i]);
        const float x = inside ? loaded : 0.0f, positive = fmaxf(x, 0.0f);
        first[g][i] = by_channel ? 15.0f * positive : fminf(x, 0.0f);
        second[g][i] = by_channel ? x : positive;
      }
    }
  }
};

// Copies a tile's bounds to shared memory, from block `first` of the stretch on; record: of block
// `lane` of the stretch.
template <typename Tile>
__device__ __forceinline__ void copy_tile(const char* lane_bounds, unsigned row_bytes, int record,
                                          int first, int side, uint4* to) {
#pragma unroll
  for (int u = 0; u < Tile::kDeep; ++u) {
    const unsigned at = __shfl_sync(kAllLanes, record, first + u * Tile::kAbreast + side);
    const char* row = lane_bounds + uint64_t{at} * (2 * row_bytes);
    copy_async<16>(shared_address(to + 2 * u * 32), row);
    copy_async<16>(shared_address(to + (2 * u + 1) * 32), row + row_bytes);
  }
}

// Adds up a lane's part of each (head, block) of a tile, heads outermost.
template <typename Tile, typename T, int kHeads>
__device__ __forceinline__ void add_tile(const Factors<T, kHeads>& factors, const uint4* pieces,
                                         float (&sums)[Tile::kValues]) {
#pragma unroll
  for (int u = 0; u < Tile::kDeep; ++u) {
    float first[kLaneChannels], second[kLaneChannels];
    unpack(pieces[2 * u * 32], first);
    unpack(pieces[(2 * u + 1) * 32], second);
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i) {
        sum = fmaf(factors.first[g][i], first[i], sum);
        sum = fmaf(factors.second[g][i], second[i], sum);
      }
      sums[g * Tile::kDeep + u] = sum;
    }
  }
}

// Scores a stretch's blocks whose bit in `valid` is set for up to kHeads heads. record: one that
// can be read also for the others.
template <typename T, int kLanes, int kHeads>
__device__ __forceinline__ void score_heads(const QuestScoresParams& p, const T* q, int heads,
                                            int record, unsigned valid, int stretch, Ring& ring,
                                            float* scores) {
  using Tile = Tile<kLanes, kHeads>;
  const int lane = threadIdx.x % 32, side = lane / kLanes, dim = p.head_dim;
  const int channel = lane % kLanes * kLaneChannels;
  const char* lane_bounds =
      static_cast<const char*>(p.bounds) + (channel < dim ? channel * sizeof(__half) : 0);
  uint4* pieces = &ring.pieces[0][lane];
  const auto copy = [&](int first) {
    const int stage = first / Tile::kBlocks % Tile::kStages;
    if (first < stretch) {
      copy_tile<Tile>(lane_bounds, dim * sizeof(__half), record, first, side,
                      pieces + stage * Tile::kDeep * 2 * 32);
    }
    commit_copies();
  };
  for (int i = 0; i < Tile::kStages - 1; ++i) copy(i * Tile::kBlocks);
  const Factors<T, kHeads> factors(q, dim, channel, heads, p.by_channel);
  const int value = lane % Tile::kValues, own_head = value / Tile::kDeep;
  const int own_block = value % Tile::kDeep * Tile::kAbreast + side;
  const bool stores = lane % kLanes < Tile::kValues && own_head < heads;
  scores += static_cast<int64_t>(own_head) * p.num_blocks + own_block;
  valid = stores ? valid >> own_block : 0;
#pragma unroll 1
  for (int first = 0; first < stretch; first += Tile::kBlocks) {
    copy(first + (Tile::kStages - 1) * Tile::kBlocks);  // to the stage read last
    wait_copies<Tile::kStages - 1>();
    const int stage = first / Tile::kBlocks % Tile::kStages;
    float sums[Tile::kValues];
    add_tile<Tile>(factors, pieces + stage * Tile::kDeep * 2 * 32, sums);
    const float sum = sum_over_lanes<kLanes>(sums, lane);
    if (valid >> first & 1) scores[first] = sum * p.softmax_scale;
  }
  wait_copies<0>();
}

template <typename T, int kLanes, int kHeads>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    quest_scores_kernel(QuestScoresParams p, int per_page, int stretch) {
  __shared__ Ring rings[kWarps];
  let_next_start();
  const int n = blockIdx.z, h = blockIdx.y, lane = threadIdx.x % 32;
  const int begin = (blockIdx.x * kWarps + threadIdx.x / 32) * stretch;
  const bool inside = lane < stretch && begin + lane < p.num_blocks;
  int record = inside ? find_record(p, n, h, begin + lane, per_page) : kNoRow;
  if (record >= 0 && lane < kAsked) {  // a hint: what is read comes after the wait
    const int record_bytes = 2 * p.head_dim * sizeof(__half);
    const char* bounds = static_cast<const char*>(p.bounds) + int64_t{record} * record_bytes;
    for (int at = 0; at < record_bytes; at += 128) prefetch(bounds + at);
  }
  wait_for_inputs();
  const int group = p.num_q_heads / p.num_kv_heads;
  const int64_t first_head = static_cast<int64_t>(n) * p.num_q_heads + h * group;
  const T* q = static_cast<const T*>(p.q) + first_head * p.head_dim;
  float* scores = p.scores + first_head * p.num_blocks + begin;
  if (inside && record < 0) {
#pragma unroll 1
    for (int g = 0; g < group; ++g)
      scores[static_cast<int64_t>(g) * p.num_blocks + lane] = -INFINITY;
  }
  const unsigned valid = __ballot_sync(kAllLanes, record >= 0);
  if (valid == 0) return;
  const int readable = __shfl_sync(kAllLanes, record, __ffs(valid) - 1);
  if (record < 0) record = readable;
#pragma unroll 1
  for (int g = 0; g < group; g += kHeads) {
    score_heads<T, kLanes, kHeads>(p, q + g * p.head_dim, group - g, record, valid, stretch,
                                   rings[threadIdx.x / 32],
                                   scores + static_cast<int64_t>(g) * p.num_blocks);
  }
}

template <typename T, int kLanes, int kHeads>
cudaError_t launch(const QuestScoresParams& p, cudaStream_t stream) {
  const int64_t blocks = static_cast<int64_t>(p.num_blocks) * p.num_kv_heads * p.num_queries;
  int stretch = std::max(kLeastStretch, Tile<kLanes, kHeads>::kBlocks);
  while (stretch < kMostStretch && blocks > stretch * kMostWarps) stretch *= 2;
  const int per_block = kWarps * stretch;
  const dim3 grid((p.num_blocks + per_block - 1) / per_block, p.num_kv_heads, p.num_queries);
  const int per_page = (p.page_size + p.block - 1) / p.block;
  return launch_dependent(quest_scores_kernel<T, kLanes, kHeads>, grid, dim3(kThreads), 0, stream,
                          1, p, per_page, stretch);
}

template <typename T, int kLanes>
cudaError_t launch_group(const QuestScoresParams& p, cudaStream_t stream) {
  const int group = p.num_q_heads / p.num_kv_heads;
  if (group == 1) return launch<T, kLanes, 1>(p, stream);
  if (group == 2) return launch<T, kLanes, 2>(p, stream);
  return launch<T, kLanes, 4>(p, stream);
}

}  // namespace

cudaError_t launch_quest_scores(const QuestScoresParams& p, cudaStream_t stream) {
  return TWILIGHT_DISPATCH_ROW(p.dtype, T, {
    if (p.head_dim <= 8 * kLaneChannels) return launch_group<T, 8>(p, stream);
    if (p.head_dim <= 16 * kLaneChannels) return launch_group<T, 16>(p, stream);
    return launch_group<T, 32>(p, stream);
  });
}

}  // namespace twilight
