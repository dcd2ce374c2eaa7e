// What csrc/resolve_rows.cu does with the hot slots: divides those of a head among the ranks, ranks
// them by age and gives them to the misses. Device code only.
#pragma once

#include "csrc/block_scan.cuh"
#include "csrc/common.cuh"
#include "csrc/ranks.cuh"
#include "csrc/resolve_lists.cuh"
#include "csrc/resolve_rows.h"

namespace twilight {

constexpr int kWarps = kThreads / 32;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kMaxRanks = 1;
#else
constexpr int kMaxRanks = 8;  // blocks of a cluster every device can schedule
#endif
constexpr int kOwnersEach = 8;     // chunks a thread at a time, of the table of owners
constexpr int kChunksEach = 4;     // chunks a warp at a time, of the share
constexpr int kSectorInts = 8;     // 32 bytes, what the L2 fetches at least
constexpr int kKeptOrders = 4096;  // slots whose order stays in shared memory
constexpr int kMaxAge = 1023;      // must match layout.MAX_AGE
constexpr int kInUse = kMaxAge + 1;
constexpr unsigned kAllLanes = 0xffffffffu;
static_assert(2 * kThreads == kInUse, "a thread sums two orders");
static_assert(kSlotsPerChunk == 32, "a warp reads a chunk");

struct Shared {
  BlockScan scan;
  int2 histogram[kThreads];      // slots of this rank by order; those in use are not counted
  uint16_t orders[kKeptOrders];  // of its first slots
  int about[4];                  // the sequence: its slot, first and end query row; the step
  int2 histograms[kMaxRanks][kThreads];  // of every rank, which writes it here itself
  int missing[kMaxRanks];                // in every rank's part of the list, likewise
  int num_owned;                         // chunks, in its part of the pool
  int threshold, ties, ties_before;
};

// 0 for a free slot, then rising with recency up to kMaxAge; kInUse for one of this step.
__device__ __forceinline__ int eviction_order(int key, int stamp, int step) {
  return key == kNoRow ? 0 : kInUse - min(max(step - stamp, 0), kMaxAge);
}

__device__ __forceinline__ void prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Brings this rank's part of the table of owners into the L2.
__device__ inline void prefetch_owners(const ResolveRowsParams& p, int begin, int part) {
  const int end = min(begin + part, p.num_chunks);
  for (int i = begin + threadIdx.x * kOwnersEach; i < end; i += kThreads * kOwnersEach) {
    prefetch(p.chunk_owner + i);
  }
}

// Lists the chunks lent to this owner in this rank's part of the pool.
__device__ inline void list_owned_chunks(const ResolveRowsParams& p, int owner, const Ranks& ranks,
                                         uint16_t* owned, Shared& shared) {
  const int part = (p.num_chunks + ranks.count() - 1) / ranks.count();
  const int begin = ranks.rank() * part, end = min(begin + part, p.num_chunks);
  int num_owned = 0;
  for (int start = begin; start < end; start += kThreads * kOwnersEach) {
    const int first = start + threadIdx.x * kOwnersEach;
    int owners[kOwnersEach];
#pragma unroll
    for (int j = 0; j < kOwnersEach; ++j) {
      owners[j] = first + j < end ? p.chunk_owner[first + j] : kNoRow;
    }
    unsigned mine = 0;  // a bit a chunk
#pragma unroll
    for (int j = 0; j < kOwnersEach; ++j) mine |= (owners[j] == owner ? 1u : 0u) << j;
    unsigned total;
    int at = num_owned + block_exclusive_sum(__popc(mine), shared.scan, &total);
    for (; mine != 0; mine &= mine - 1)
      owned[at++] = static_cast<uint16_t>(first + __ffs(mine) - 1);
    num_owned += total;
  }
  if (threadIdx.x == 0) shared.num_owned = num_owned;
}

// Divides the chunks that the ranks have listed: this one's go to `share`, and their state is
// brought into the L2.
__device__ inline void take_share(const ResolveRowsParams& p, const Ranks& ranks,
                                  const uint16_t* owned, uint16_t* share, const Shared& shared,
                                  Segment& s) {
  int listed[kMaxRanks];
  s.num_owned = 0;
#pragma unroll
  for (int r = 0; r < kMaxRanks; ++r) {
    listed[r] = r < ranks.count() ? *ranks.of(&shared.num_owned, r) : 0;
    s.num_owned += listed[r];
  }
  const int first = s.num_owned * ranks.rank() / ranks.count();
  s.num_share = s.num_owned * (ranks.rank() + 1) / ranks.count() - first;
  s.share = ranks.count() > 1 ? share : owned;
  for (int j = threadIdx.x; j < s.num_share; j += kThreads) {
    int place = first + j, holder = 0;
#pragma unroll
    for (int r = 0; r < kMaxRanks; ++r) {
      if (holder == r && place >= listed[r]) {
        place -= listed[r];
        ++holder;
      }
    }
    const int chunk = *ranks.of(owned + place, holder);
    if (ranks.count() > 1) share[j] = static_cast<uint16_t>(chunk);
#pragma unroll
    for (int i = 0; i < kSlotsPerChunk; i += kSectorInts) {
      prefetch(p.slot_key + chunk * kSlotsPerChunk + i);
      prefetch(p.slot_stamp + chunk * kSlotsPerChunk + i);
    }
  }
}

__device__ inline int order_of(const ResolveRowsParams& p, const Segment& s, int slot) {
  return eviction_order(__ldcg(p.slot_key + slot), __ldcg(p.slot_stamp + slot), s.step);
}

// Counts the orders of this rank's slots, and sends the counts to all ranks.
__device__ inline void count_orders(const ResolveRowsParams& p, const Segment& s,
                                    const Ranks& ranks, Shared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int* histogram = &shared.histogram[0].x;
  for (int start = warp; start < s.num_share; start += kWarps * kChunksEach) {
    int key[kChunksEach], stamp[kChunksEach], order[kChunksEach];
#pragma unroll
    for (int u = 0; u < kChunksEach; ++u) {  // the first chunk, once more, in place of one too many
      const int j = start + u * kWarps;
      const int slot = s.share[j < s.num_share ? j : start] * kSlotsPerChunk + lane;
      key[u] = __ldcg(p.slot_key + slot);
      stamp[u] = __ldcg(p.slot_stamp + slot);
    }
#pragma unroll
    for (int u = 0; u < kChunksEach; ++u) {
      const bool counts = start + u * kWarps < s.num_share;
      order[u] = counts ? eviction_order(key[u], stamp[u], s.step) : kInUse;
      const int place = (start + u * kWarps) * kSlotsPerChunk + lane;
      if (place < kKeptOrders) shared.orders[place] = static_cast<uint16_t>(order[u]);
      const unsigned peers = __match_any_sync(kAllLanes, order[u]);
      if (order[u] < kInUse && __ffs(peers) - 1 == lane) {
        atomicAdd(&histogram[order[u]], __popc(peers));
      }
    }
  }
  __syncthreads();
  for (int r = 0; r < ranks.count(); ++r) {
    ranks.of(&shared.histograms[ranks.rank()][0], r)[threadIdx.x] = shared.histogram[threadIdx.x];
  }
}

// Sets threshold and ties so that the slots with order < threshold and the first `ties` slots with
// order == threshold are `wanted` in number, or all that may go; returns how many that are.
// below_before and shared.ties_before: those that lie in the ranks before this one.
__device__ inline int find_threshold(int wanted, const Ranks& ranks, Shared& shared,
                                     int* below_before) {
  int2 here{}, prior{};
#pragma unroll
  for (int r = 0; r < kMaxRanks; ++r) {
    const int2 sum = r < ranks.count() ? shared.histograms[r][threadIdx.x] : int2{};
    here.x += sum.x;
    here.y += sum.y;
    prior.x += r < ranks.rank() ? sum.x : 0;
    prior.y += r < ranks.rank() ? sum.y : 0;
  }
  if (threadIdx.x == 0) {
    shared.threshold = kInUse;
    shared.ties = 0;
    shared.ties_before = 0;
  }
  unsigned total;
  const int low = block_exclusive_sum(here.x + here.y, shared.scan, &total);
  const int middle = low + here.x, high = middle + here.y;
  const int order = 2 * threadIdx.x;
  if (low < wanted && wanted <= high) {  // true of one thread at most
    const bool first = wanted <= middle;
    shared.threshold = order + !first;
    shared.ties = wanted - (first ? low : middle);
    shared.ties_before = first ? prior.x : prior.y;
  }
  __syncthreads();
  const int threshold = shared.threshold;
  unsigned below;
  block_exclusive_sum((order < threshold ? prior.x : 0) + (order + 1 < threshold ? prior.y : 0),
                      shared.scan, &below);
  *below_before = below;
  return min(wanted, static_cast<int>(total));
}

// Puts fetch entry `entry` into a slot; returns whether another sequence had its row already.
template <bool kShared>
__device__ bool install(const ResolveRowsParams& p, const Segment& s, const List& list, int entry,
                        int slot) {
  const int old = __ldcg(p.slot_key + slot);
  const int key = __ldcg(s.src + entry), place = __ldcg(s.dst + entry);
  const int row = p.first_row + slot;
  if (old != kNoRow) s.map[old] = kNoRow;
  int found = kNoRow;
  if (kShared) {
    found = atomicCAS(&s.map[key], kNoRow, row);
  } else {
    s.map[key] = row;
  }
  const bool first = found == kNoRow;
  p.slot_key[slot] = first ? key : kNoRow;
  p.slot_stamp[slot] = s.step;
  s.dst[entry] = first ? row : kNoRow;
  p.locations[list.start + place] = first ? row : found;
  return !first;
}

// Gives the oldest slots to the first `placed` misses of this list, in slot order; returns how many
// of this thread's had a row already.
template <bool kShared>
__device__ unsigned place_misses(const ResolveRowsParams& p, const Segment& s, const List& list,
                                 int placed, int below, Shared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int threshold = shared.threshold, ties = shared.ties;
  int tied = shared.ties_before;
  unsigned found = 0;
  for (int start = 0; start < s.num_share; start += kWarps) {
    if (below + min(tied, ties) >= placed) break;  // the same in all threads
    const int j = start + warp, at = j * kSlotsPerChunk + lane;
    int order = kInUse;
    int slot = 0;
    if (j < s.num_share) {
      slot = s.share[j] * kSlotsPerChunk + lane;
      order = at < kKeptOrders ? shared.orders[at] : order_of(p, s, slot);
    }
    const bool is_below = order < threshold, is_tied = ties > 0 && order == threshold;
    unsigned total;  // two counts in one word: neither exceeds kThreads
    const unsigned before = block_exclusive_sum(is_below | is_tied << 16, shared.scan, &total);
    const int below_before = below + (before & 0xffff), tied_before = tied + (before >> 16);
    if (is_below || (is_tied && tied_before < ties)) {
      const int entry = s.fetched + below_before + min(tied_before, ties);
      found += install<kShared>(p, s, list, entry, slot);
    }
    below += total & 0xffff;
    tied += total >> 16;
  }
  return found;
}

}  // namespace twilight
