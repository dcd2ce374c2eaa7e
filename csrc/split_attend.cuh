// Split-KV attention balanced as stream-K: the skeleton that the attention kernels share.
//
// Every segment (split_attend.h) has a number of items (rows, or slices of pages), known on the
// device only, cut into units. The units of all segments in a row are dealt out evenly to a fixed
// number of blocks, so uneven lists cost nothing and no count is read on the host. A block reduces
// each stretch of a segment it owns to one partial state (out, max, sum) in the workspace, in slot
// block + segment: along the row of stretches one of the two grows by one at each step, so slots
// are distinct. csrc/merge_states.cu weighs the partials of one or several such kernels. Maxima and
// sums are in log2 units: exp2 is one instruction, and lse is converted at the end.
//
// Source: Flash-Decoding (split-KV); stream-K (Osama et al., arXiv 2301.03598).
#pragma once

#include "csrc/block_scan.cuh"
#include "csrc/common.cuh"
#include "csrc/dependent_launch.cuh"
#include "csrc/ptx.cuh"
#include "csrc/split_attend.h"

namespace twilight {

constexpr int kSplitWarps = 4;
constexpr int kSplitThreads = 32 * kSplitWarps;
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

// [kHeadTile, D] of a slot.
__device__ inline float* slot_out(const SplitWork& work, int64_t slot, int head_dim) {
  return work.workspace + slot * kHeadTile * head_dim;
}

// [kHeadTile] of (max, sum) of a slot.
__device__ inline float2* slot_state(const SplitWork& work, int64_t slot, int head_dim) {
  return reinterpret_cast<float2*>(work.workspace + num_slots(work) * kHeadTile * head_dim) +
         slot * kHeadTile;
}

// [segments] of (first slot, number of slots).
__device__ inline int2* segment_slots(const SplitWork& work, int head_dim) {
  return reinterpret_cast<int2*>(slot_state(work, num_slots(work), head_dim));
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
  const int nh = tiles == 1 ? index : index / tiles, tile = index - nh * tiles;
  const int n = work.num_queries == 1 ? 0 : nh / work.num_kv_heads, h = nh - n * work.num_kv_heads;
  return {n, h, h * work.group + tile * kHeadTile, min(kHeadTile, work.group - tile * kHeadTile)};
}

// Units are dealt out in a row: the first `more` of `blocks` get each + 1, the others `each`.
struct Deal {
  int blocks, each, more;

  __device__ int first_unit(int block) const { return block * each + min(block, more); }
  __device__ int block_of(int unit) const {
    const int longer = more * (each + 1);
    return unit < longer ? unit / (each + 1) : more + (unit - longer) / each;
  }
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

// The slots of a segment with units [first, last).
__device__ inline int2 slots_of(int index, int first, int last, const Deal& deal) {
  if (first == last) return make_int2(0, 0);
  const int block = deal.block_of(first);
  return make_int2(block + index, deal.block_of(last - 1) - block + 1);
}

// The block's share of all units; false if it has none. Every warp finds it by itself, which takes
// no barrier. The last block, whose share is never the larger one, leaves the segments' slots for
// the merge.
template <class Worker>
__device__ bool find_range(const Worker& worker, const SplitWork& work, UnitRange& range) {
  const int lane = threadIdx.x % 32, block = blockIdx.x, num_blocks = gridDim.x;
  const int segments = num_segments(work), per_lane = (segments + 31) / 32;
  const int first = min(segments, lane * per_lane), last = min(segments, first + per_lane);
  int mine = 0;
#pragma unroll 2
  for (int i = first; i < last; ++i) mine += segment_units(worker, work, i);
  const int end = warp_inclusive_sum(mine);
  const int total = __shfl_sync(kAllLanes, end, 31), blocks = min(num_blocks, total);
  const int each = total <= num_blocks ? 1 : total / blocks;
  const Deal deal{blocks, each, total - each * blocks};
  range.begin = deal.first_unit(block);
  range.end = deal.first_unit(block + 1);
  const bool leaves_slots = block == num_blocks - 1 && threadIdx.x < 32;
  const bool has_first = block < blocks && end - mine <= range.begin && range.begin < end;
  if (leaves_slots || has_first) {
    int2* slots = segment_slots(work, Worker::kHeadDim);
#pragma unroll 1
    for (int i = first, start = end - mine; i < last; ++i) {
      const int stop = start + (per_lane == 1 ? mine : segment_units(worker, work, i));
      if (start <= range.begin && range.begin < stop) {
        range.segment = i;
        range.segment_start = start;
      }
      if (leaves_slots) slots[i] = slots_of(i, start, stop, deal);
      start = stop;
    }
  }
  if (block >= blocks) return false;
  const int holder = __ffs(__ballot_sync(kAllLanes, has_first)) - 1;
  range.segment = __shfl_sync(kAllLanes, range.segment, holder);
  range.segment_start = __shfl_sync(kAllLanes, range.segment_start, holder);
  return true;
}

// Walks the block's units. A Worker has kHeadDim, kUnitItems (items a unit), num_items(n, h),
// attend(segment, first, last) which reduces these items to a state in registers, and
// write_partial(segment, slot) which merges the warps' states into that slot of the workspace and
// synchronises the block before it returns.
template <class Worker>
__device__ void split_attend(Worker& worker, const SplitWork& work) {
  UnitRange range{};
  if (!find_range(worker, work, range)) return;
  int start = range.segment_start;
  for (int index = range.segment, unit = range.begin; unit < range.end; ++index) {
    const Segment segment = segment_of(work, index);
    const int items = worker.num_items(segment.n, segment.h);
    const int units = (items + Worker::kUnitItems - 1) / Worker::kUnitItems;
    const int stop = min(start + units, range.end);
    if (unit < stop) {
      worker.attend(segment, (unit - start) * Worker::kUnitItems,
                    min(items, (stop - start) * Worker::kUnitItems));
      worker.write_partial(segment, int64_t{blockIdx.x} + index);
      unit = stop;
    }
    start += units;
  }
}

// Launches `kernel` on the persistent blocks.
template <typename Params>
cudaError_t launch_split(void (*kernel)(Params), const Params& params, const SplitWork& work,
                         int shared_bytes, cudaStream_t stream) {
  if (work.num_blocks < 1) return cudaErrorInvalidValue;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess) return status;
  return launch_dependent(kernel, dim3(work.num_blocks), dim3(kSplitThreads), shared_bytes, stream,
                          1, params);
}

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
