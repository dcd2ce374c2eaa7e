// Split-KV attention balanced as stream-K: the skeleton that the attention kernels share.
//
// Every segment (split_attend.h) has a number of items (tokens, or pages), known on the device
// only, cut into units. The units of all segments in a row are dealt out evenly to a fixed number
// of blocks, so uneven lists cost nothing and no count is read on the host. A block reduces each
// stretch of a segment it owns to one partial state (out, max, sum) in the workspace, in slot
// block + segment: along the row of stretches one of the two grows by one at each step, so slots
// are distinct. merge_kernel then weighs a segment's partials. Scores, maxima and sums are in
// log2 units: exp2 is one instruction, and lse is converted at the end.
//
// Source: Flash-Decoding (split-KV); stream-K (Osama et al., arXiv 2301.03598).
#pragma once

#include "csrc/common.cuh"
#include "csrc/split_attend.h"

namespace twilight {

constexpr int kSplitWarps = 4;
constexpr int kSplitThreads = 32 * kSplitWarps;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kNegInf = -INFINITY;

__host__ __device__ inline int head_tiles(const SplitWork& work) {
  return (work.group + kHeadTile - 1) / kHeadTile;
}

__host__ __device__ inline int num_segments(const SplitWork& work) {
  return work.num_queries * work.num_kv_heads * head_tiles(work);
}

__host__ __device__ inline int64_t num_slots(const SplitWork& work) {
  return int64_t{work.num_blocks} + num_segments(work);
}

__device__ inline float* slot_out(const SplitWork& work, int64_t slot, int head_dim) {
  return work.workspace + slot * kHeadTile * head_dim;
}

__device__ inline float* slot_state(const SplitWork& work, int64_t slot, int head_dim) {
  return work.workspace + num_slots(work) * kHeadTile * head_dim + slot * kHeadTile * 2;
}

__device__ inline int* segment_starts(const SplitWork& work, int head_dim) {
  return reinterpret_cast<int*>(slot_state(work, num_slots(work), head_dim));
}

// Weight of a state with this max in a sum whose terms are relative to top; 0 for empty states.
__device__ __forceinline__ float state_weight(float max, float top) {
  return max == kNegInf ? 0.f : exp2f(max - top);
}

struct Segment {
  int n, h, first_head, num_heads;  // first_head: of the query heads, counted over all KV heads
};

__device__ inline Segment segment_of(const SplitWork& work, int index) {
  const int tiles = head_tiles(work);
  const int tile = index % tiles, nh = index / tiles;
  const int h = nh % work.num_kv_heads;
  return {nh / work.num_kv_heads, h, h * work.group + tile * kHeadTile,
          min(kHeadTile, work.group - tile * kHeadTile)};
}

struct SplitShared {
  int warp_units[kSplitWarps];
  int segment, segment_start;
  float max[kSplitWarps][kHeadTile];
  float sum[kSplitWarps][kHeadTile];
};

struct UnitRange {
  int begin, end;              // units of this block
  int segment, segment_start;  // the segment of the first unit, and that segment's first unit
};

template <class Worker>
__device__ int segment_units(const Worker& worker, const SplitWork& work, int index) {
  const Segment segment = segment_of(work, index);
  return (worker.num_items(segment.n, segment.h) + Worker::kUnitItems - 1) / Worker::kUnitItems;
}

// The block's share of all units; false if it has none. Block 0 leaves the prefix for the merge.
template <class Worker>
__device__ bool find_range(const Worker& worker, const SplitWork& work, SplitShared& shared,
                           UnitRange& range) {
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int segments = num_segments(work);
  const int per_thread = (segments + kSplitThreads - 1) / kSplitThreads;
  const int first = min(segments, tid * per_thread), last = min(segments, first + per_thread);
  int mine = 0;
  for (int i = first; i < last; ++i) mine += segment_units(worker, work, i);
  int scan = mine;
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    const int left = __shfl_up_sync(0xffffffffu, scan, offset);
    if (lane >= offset) scan += left;
  }
  if (lane == 31) shared.warp_units[warp] = scan;
  __syncthreads();
  int before = scan - mine, total = 0;
  for (int w = 0; w < kSplitWarps; ++w) {
    if (w < warp) before += shared.warp_units[w];
    total += shared.warp_units[w];
  }
  if (blockIdx.x == 0) {
    int* starts = segment_starts(work, Worker::kHeadDim);
    for (int i = first, start = before; i < last; ++i) {
      starts[i] = start;
      start += segment_units(worker, work, i);
    }
    if (tid == 0) starts[segments] = total;
  }
  const int blocks = min(static_cast<int>(gridDim.x), total);
  if (static_cast<int>(blockIdx.x) >= blocks) return false;
  range.begin = static_cast<int>(int64_t{blockIdx.x} * total / blocks);
  range.end = static_cast<int>((int64_t{blockIdx.x} + 1) * total / blocks);
  if (before <= range.begin && range.begin < before + mine) {
    int index = first, start = before;
    for (int units = segment_units(worker, work, index); start + units <= range.begin;) {
      start += units;
      units = segment_units(worker, work, ++index);
    }
    shared.segment = index;
    shared.segment_start = start;
  }
  __syncthreads();
  range.segment = shared.segment;
  range.segment_start = shared.segment_start;
  return true;
}

// Merges the warps' states in shared memory and writes the block's partial of this segment.
// parts: [kSplitWarps * kParts][kHeadTile][D + 4], +4 so that a column does not hit one bank.
template <class Worker>
__device__ void write_partial(const SplitWork& work, const SplitShared& shared, const float* parts,
                              int segment, int num_heads) {
  constexpr int kD = Worker::kHeadDim;
  const int64_t slot = int64_t{blockIdx.x} + segment;
  for (int i = threadIdx.x; i < num_heads * kD; i += kSplitThreads) {
    const int head = i / kD, channel = i % kD;
    float top = kNegInf, out = 0.f, sum = 0.f;
#pragma unroll
    for (int w = 0; w < kSplitWarps; ++w) top = fmaxf(top, shared.max[w][head]);
#pragma unroll
    for (int w = 0; w < kSplitWarps; ++w) {
      const float weight = state_weight(shared.max[w][head], top);
      float x = 0.f;
#pragma unroll
      for (int part = 0; part < Worker::kParts; ++part) {
        x += parts[((w * Worker::kParts + part) * kHeadTile + head) * (kD + 4) + channel];
      }
      out += weight * x;
      sum += weight * shared.sum[w][head];
    }
    slot_out(work, slot, kD)[i] = out;
    if (channel == 0) {
      slot_state(work, slot, kD)[head * 2] = top;
      slot_state(work, slot, kD)[head * 2 + 1] = sum;
    }
  }
}

// Walks the block's units. A Worker has kHeadDim, kUnitItems (items a unit), kParts (partial sums
// of out a warp leaves), num_items(n, h), attend(segment, first, last) which reduces these items
// to a state in registers, store_state (max and sum a warp and head) and store_out (parts).
template <class Worker>
__device__ void split_attend(Worker& worker, const SplitWork& work, float* parts) {
  __shared__ SplitShared shared;
  UnitRange range;
  if (!find_range(worker, work, shared, range)) return;
  int start = range.segment_start;
  for (int index = range.segment, unit = range.begin; unit < range.end; ++index) {
    const Segment segment = segment_of(work, index);
    const int items = worker.num_items(segment.n, segment.h);
    const int units = (items + Worker::kUnitItems - 1) / Worker::kUnitItems;
    const int stop = min(start + units, range.end);
    if (unit < stop) {
      worker.attend(segment, (unit - start) * Worker::kUnitItems,
                    min(items, (stop - start) * Worker::kUnitItems));
      worker.store_state(shared);
      __syncthreads();  // `parts` may lie where the warps were still reading
      worker.store_out(parts);
      __syncthreads();
      write_partial<Worker>(work, shared, parts, index, segment.num_heads);
      __syncthreads();
      unit = stop;
    }
    start += units;
  }
}

namespace {

// One block merges the partials of one query head: lse, and out normalised.
__global__ void __launch_bounds__(kSplitThreads) merge_kernel(SplitWork work, int head_dim) {
  __shared__ float weights[kMaxSplitBlocks];
  __shared__ float scratch[kSplitWarps][256];
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int index = blockIdx.x, head = blockIdx.y;
  const Segment segment = segment_of(work, index);
  if (head >= segment.num_heads) return;
  const int* starts = segment_starts(work, head_dim);
  const int64_t first = starts[index], last = starts[index + 1];
  const int64_t total = starts[num_segments(work)];
  const int64_t row =
      int64_t{segment.n} * work.num_kv_heads * work.group + segment.first_head + head;
  if (first == last) {
    for (int c = tid; c < head_dim; c += kSplitThreads) work.out[row * head_dim + c] = 0.f;
    if (tid == 0) work.lse[row] = kNegInf;
    return;
  }
  // Block i has units [i * total / blocks, (i + 1) * total / blocks).
  const int64_t blocks = min(int64_t{work.num_blocks}, total);
  const int64_t first_block = ((first + 1) * blocks - 1) / total;
  const int count = static_cast<int>((last * blocks - 1) / total - first_block) + 1;
  const int64_t slot = first_block + index;

  float top = kNegInf;
  for (int i = tid; i < count; i += kSplitThreads) {
    weights[i] = slot_state(work, slot + i, head_dim)[head * 2];
    top = fmaxf(top, weights[i]);
  }
  top = warp_max(top);
  if (lane == 0) scratch[warp][0] = top;
  __syncthreads();
  for (int w = 0; w < kSplitWarps; ++w) top = fmaxf(top, scratch[w][0]);
  float sum = 0.f;
  for (int i = tid; i < count; i += kSplitThreads) {
    weights[i] = state_weight(weights[i], top);
    sum += weights[i] * slot_state(work, slot + i, head_dim)[head * 2 + 1];
  }
  sum = warp_sum(sum);
  if (lane == 0) scratch[warp][1] = sum;
  __syncthreads();
  sum = 0.f;
  for (int w = 0; w < kSplitWarps; ++w) sum += scratch[w][1];
  __syncthreads();

  float out[8] = {};
#pragma unroll 2
  for (int i = warp; i < count; i += kSplitWarps) {
    const float* part = slot_out(work, slot + i, head_dim) + head * head_dim;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (lane + 32 * j < head_dim) out[j] += weights[i] * part[lane + 32 * j];
    }
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) scratch[warp][lane + 32 * j] = out[j];
  __syncthreads();
  const float norm = sum > 0.f ? 1.f / sum : 0.f;
  for (int c = tid; c < head_dim; c += kSplitThreads) {
    float x = 0.f;
    for (int w = 0; w < kSplitWarps; ++w) x += scratch[w][c];
    work.out[row * head_dim + c] = x * norm;
  }
  if (tid == 0) work.lse[row] = sum > 0.f ? (top + log2f(sum)) * kLn2 : kNegInf;
}

// Launches `kernel` on the persistent blocks, then the merge of its partials.
template <typename Kernel, typename Params>
cudaError_t launch_split(Kernel kernel, const Params& params, const SplitWork& work, int head_dim,
                         int shared_bytes, cudaStream_t stream) {
  if (work.num_blocks < 1 || work.num_blocks > kMaxSplitBlocks) return cudaErrorInvalidValue;
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess) return status;
  kernel<<<work.num_blocks, kSplitThreads, shared_bytes, stream>>>(params);
  status = cudaGetLastError();
  if (status != cudaSuccess) return status;
  const dim3 grid(num_segments(work), work.group < kHeadTile ? work.group : kHeadTile);
  merge_kernel<<<grid, kSplitThreads, 0, stream>>>(work, head_dim);
  return cudaGetLastError();
}

}  // namespace

// Calls body with kD bound to a supported head_dim; others give cudaErrorInvalidValue.
#define TWILIGHT_DISPATCH_HEAD_DIM(head_dim, ...) \
  [&]() -> cudaError_t {                          \
    switch (head_dim) {                           \
      case 64: {                                  \
        constexpr int kD = 64;                    \
        __VA_ARGS__;                              \
      }                                           \
      case 80: {                                  \
        constexpr int kD = 80;                    \
        __VA_ARGS__;                              \
      }                                           \
      case 96: {                                  \
        constexpr int kD = 96;                    \
        __VA_ARGS__;                              \
      }                                           \
      case 128: {                                 \
        constexpr int kD = 128;                   \
        __VA_ARGS__;                              \
      }                                           \
      case 256: {                                 \
        constexpr int kD = 256;                   \
        __VA_ARGS__;                              \
      }                                           \
    }                                             \
    return cudaErrorInvalidValue;                 \
  }()

}  // namespace twilight
