// What csrc/resolve_rows.cu does with the hot slots of a head: ranks them by age and chooses those
// that the misses get. Device code only.
#pragma once

#include "csrc/block_scan.cuh"
#include "csrc/common.cuh"
#include "csrc/ptx.cuh"
#include "csrc/resolve_lists.cuh"
#include "csrc/resolve_rows.h"

namespace twilight {

constexpr int kChunksEach = 8;      // chunks a warp at a time: 16 loads a lane on their way
constexpr int kSlotsEach = 8;       // slots a thread at a time: 16 bytes of orders
constexpr int kSectorInts = 8;      // 32 bytes, what the L2 fetches at least
constexpr int kKeptOrders = 8192;   // slots whose order stays in shared memory
constexpr int kKeptVictims = 1024;  // slots chosen; more wait in fetch_dst
constexpr int kKeptMisses = 1024;   // misses that wait for their slots at a time
constexpr int kMaxAge = 1023;       // must match layout.MAX_AGE
constexpr int kInUse = kMaxAge + 1;
static_assert(2 * kThreads == kInUse, "a thread sums two orders");
static_assert(kSlotsPerChunk == 32, "a warp reads a chunk");
static_assert(kKeptOrders % (kThreads * kSlotsEach) == 0, "all orders a thread reads are kept");

struct Miss {
  int key, place;  // in its list
};

struct Shared {
  BlockScan scans[2];
  MissCounts misses;
  int2 histogram[kThreads];  // slots by order; those in use are not counted
  int2 used[kThreads];       // of them, those taken since: only ever added to, see use_place
  __align__(16) uint16_t orders[kKeptOrders];
  int victims[kKeptVictims];
  Miss missing[kKeptMisses];
  int threshold, ties;
};

// 0 for a free slot, then rising with recency up to kMaxAge; kInUse for one of this step.
__device__ __forceinline__ int eviction_order(int key, int stamp, int step) {
  return key == kNoRow ? 0 : kInUse - min(max(step - stamp, 0), kMaxAge);
}

__device__ __forceinline__ int order_of(const ResolveRowsParams& p, const Segment& s, int slot) {
  return eviction_order(__ldcg(p.slot_key + slot), __ldcg(p.slot_stamp + slot), s.step);
}

// Lists the chunks lent to this owner and fills s.places; returns their number.
__device__ inline int list_owned_chunks(const ResolveRowsParams& p, int owner, uint16_t* owned,
                                        unsigned* places, BlockScan& scan) {
  int num_owned = 0;
  for (int start = 0; start < p.num_chunks; start += kThreads * kOwnersEach) {
    const int first = start + threadIdx.x * kOwnersEach;
    unsigned mine = 0;  // a bit a chunk
#pragma unroll
    for (int j = 0; j < kOwnersEach; ++j) {
      const int lent_to = first + j < p.num_chunks ? p.chunk_owner[first + j] : kNoRow;
      mine |= (lent_to == owner ? 1u : 0u) << j;
    }
    unsigned total;
    int at = num_owned + block_exclusive_sum(__popc(mine), scan, &total);
    if (first < p.num_chunks) places[first / kOwnersEach] = at << kOwnersEach | mine;
    for (; mine != 0; mine &= mine - 1) {
      owned[at++] = static_cast<uint16_t>(first + __ffs(mine) - 1);
    }
    num_owned += total;
    __syncthreads();
  }
  return num_owned;
}

// Brings the state of the head's slots into the L2.
__device__ inline void prefetch_slots(const ResolveRowsParams& p, const Segment& s) {
  constexpr int kSectors = kSlotsPerChunk / kSectorInts;
  for (int i = threadIdx.x; i < s.num_owned * kSectors; i += kThreads) {
    const int slot = s.owned[i / kSectors] * kSlotsPerChunk + i % kSectors * kSectorInts;
    prefetch(p.slot_key + slot);
    prefetch(p.slot_stamp + slot);
  }
}

// Finds the orders of the head's slots and counts them.
__device__ inline void count_orders(const ResolveRowsParams& p, const Segment& s, Shared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int* histogram = &shared.histogram[0].x;
  for (int start = warp; start < s.num_owned; start += kWarps * kChunksEach) {
    int key[kChunksEach], stamp[kChunksEach];
#pragma unroll
    for (int u = 0; u < kChunksEach; ++u) {
      const int j = start + u * kWarps;
      if (j >= s.num_owned) continue;
      const int slot = s.owned[j] * kSlotsPerChunk + lane;
      key[u] = __ldcg(p.slot_key + slot);
      stamp[u] = __ldcg(p.slot_stamp + slot);
    }
#pragma unroll
    for (int u = 0; u < kChunksEach; ++u) {
      const int j = start + u * kWarps, place = j * kSlotsPerChunk + lane;
      if (j >= s.num_owned) continue;
      const int order = eviction_order(key[u], stamp[u], s.step);
      if (place < kKeptOrders) shared.orders[place] = static_cast<uint16_t>(order);
      if (order < kInUse) atomicAdd(&histogram[order], 1);
    }
  }
}

// Takes a slot of this place and order out of those that may go. Most hits are of the same order,
// that of the step before: lanes that add one to the same word do so at once, those that subtract
// from it wait for each other.
__device__ __forceinline__ void use_place(int place, int order, Shared& shared) {
  if (place < kKeptOrders) shared.orders[place] = kInUse;  // else by its stamp
  if (order < kInUse) atomicAdd(&shared.used[0].x + order, 1);
}

// The place among the head's slots, or -1 for a slot that is not the head's.
__device__ __forceinline__ int place_of(const Segment& s, int slot) {
  const unsigned chunk = static_cast<unsigned>(slot) / kSlotsPerChunk;
  const unsigned word = s.places[chunk / kOwnersEach], bit = 1u << chunk % kOwnersEach;
  const int at = (word >> kOwnersEach) + __popc(word & (bit - 1));
  return (word & bit) != 0 ? at * kSlotsPerChunk + slot % kSlotsPerChunk : -1;
}

// Stamps the hits among a thread's entries, so that they are nobody's victims. All entries of a
// list may be stamped at once, those of two lists not: they may be the same.
__device__ __forceinline__ void stamp_hits(const ResolveRowsParams& p, const Segment& s,
                                           const Entries& entries, Shared& shared) {
  int place[kEach], order[kEach];  // -1: no hit, or another sequence's slot, by a shared page
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    place[j] = entries.found[j] < 0 ? -1 : place_of(s, entries.found[j] - p.first_row);
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    order[j] = place[j] >= 0 && place[j] < kKeptOrders ? shared.orders[place[j]] : kInUse;
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    if (entries.found[j] < 0) continue;
    const int slot = entries.found[j] - p.first_row;
    if (place[j] >= kKeptOrders) order[j] = order_of(p, s, slot);
    if (place[j] >= 0) use_place(place[j], order[j], shared);
    p.slot_stamp[slot] = s.step;
  }
}

// Where a victim's slot waits for its miss.
__device__ __forceinline__ int* victim_at(const Segment& s, int victim, Shared& shared) {
  return victim < kKeptVictims ? &shared.victims[victim] : &s.dst[s.fetched + victim];
}

// Sets threshold and ties so that the slots with order < threshold and the first `ties` slots with
// order == threshold are `wanted` in number, or all that may go; returns how many that are.
__device__ inline int find_threshold(int wanted, Shared& shared) {
  const int2 all = shared.histogram[threadIdx.x], used = shared.used[threadIdx.x];
  const int2 here{all.x - used.x, all.y - used.y};
  if (threadIdx.x == 0) {
    shared.threshold = kInUse;
    shared.ties = 0;
  }
  unsigned total;
  const int low = block_exclusive_sum(here.x + here.y, shared.scans[1], &total);
  const int middle = low + here.x, high = middle + here.y;
  if (low < wanted && wanted <= high) {  // true of one thread at most
    const bool first = wanted <= middle;
    shared.threshold = 2 * threadIdx.x + !first;
    shared.ties = wanted - (first ? low : middle);
  }
  __syncthreads();
  return min(wanted, static_cast<int>(total));
}

struct Orders {
  int of[kSlotsEach];
};

// Orders of the slots at place .. of the head's.
__device__ __forceinline__ Orders read_orders(const ResolveRowsParams& p, const Segment& s,
                                              int place, const Shared& shared) {
  Orders orders;
  if (place >= s.num_owned * kSlotsPerChunk) {
#pragma unroll
    for (int i = 0; i < kSlotsEach; ++i) orders.of[i] = kInUse;
  } else if (place < kKeptOrders) {
    const uint4 packed = *reinterpret_cast<const uint4*>(shared.orders + place);
    const unsigned words[] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < kSlotsEach; ++i) orders.of[i] = words[i / 2] >> (i % 2 * 16) & 0xffff;
  } else {
    const int slot = s.owned[place / kSlotsPerChunk] * kSlotsPerChunk + place % kSlotsPerChunk;
#pragma unroll
    for (int i = 0; i < kSlotsEach; ++i) orders.of[i] = order_of(p, s, slot + i);
  }
  return orders;
}

// Chooses the `placed` oldest slots, in slot order. again: a later list will choose, too.
__device__ inline void choose_victims(const ResolveRowsParams& p, const Segment& s, int placed,
                                      bool again, Shared& shared) {
  const int threshold = shared.threshold, ties = shared.ties;
  int below = 0, tied = 0, turn = 0;
  for (int start = 0; below + min(tied, ties) < placed && start < s.num_owned * kSlotsPerChunk;
       start += kThreads * kSlotsEach) {
    const int place = start + threadIdx.x * kSlotsEach;
    const Orders orders = read_orders(p, s, place, shared);
    unsigned is_below = 0, is_tied = 0;  // a bit a slot
#pragma unroll
    for (int i = 0; i < kSlotsEach; ++i) {
      is_below |= (orders.of[i] < threshold ? 1u : 0u) << i;
      is_tied |= (orders.of[i] == threshold ? 1u : 0u) << i;
    }
    if (ties == 0) is_tied = 0;  // the threshold may be kInUse
    unsigned total;              // two counts in one word: neither exceeds kThreads * kSlotsEach
    const unsigned before =
        block_exclusive_sum(__popc(is_below) | __popc(is_tied) << 16, shared.scans[turn], &total);
    turn ^= 1;
    int below_before = below + (before & 0xffff), tied_before = tied + (before >> 16);
    for (unsigned left = is_below | is_tied; left != 0; left &= left - 1) {
      const int i = __ffs(left) - 1, at = place + i;
      const int victim = below_before + min(tied_before, ties);
      const bool takes = is_below >> i & 1 || tied_before < ties;
      (is_below >> i & 1 ? below_before : tied_before) += 1;
      if (!takes || victim >= placed) continue;
      const int slot = s.owned[at / kSlotsPerChunk] * kSlotsPerChunk + at % kSlotsPerChunk;
      *victim_at(s, victim, shared) = slot;
      if (again) use_place(at, at < kKeptOrders ? shared.orders[at] : order_of(p, s, slot), shared);
    }
    below += total & 0xffff;
    tied += total >> 16;
  }
  __syncthreads();
}

// Puts a miss into a slot; returns whether another sequence had its row already.
template <bool kShared>
__device__ __forceinline__ bool install(const ResolveRowsParams& p, const Segment& s,
                                        const List& list, Miss miss, int victim, Shared& shared) {
  const int slot = *victim_at(s, victim, shared);
  const int old = __ldcg(p.slot_key + slot);
  const int row = p.first_row + slot;
  int found = kNoRow;
  if (kShared) {
    found = atomicCAS(&s.map[miss.key], kNoRow, row);
  } else {
    s.map[miss.key] = row;
  }
  const bool first = found == kNoRow;
  s.src[s.fetched + victim] = miss.key;
  s.dst[s.fetched + victim] = first ? row : kNoRow;
  p.locations[list.start + miss.place] = first ? row : found;
  p.slot_stamp[slot] = s.step;
  if (old != kNoRow) s.map[old] = kNoRow;
  p.slot_key[slot] = first ? miss.key : kNoRow;
  return !first;
}

// Notes the tile's misses from number `from` on, as many as are kept; ranks: of rank_misses.
__device__ __forceinline__ void note_misses(const Entries& entries, int tile, int ranks, int from,
                                            Shared& shared) {
  constexpr unsigned kAll = 0xffffffffu;
  const unsigned lanes_below = (1u << threadIdx.x % 32) - 1;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const unsigned misses = __ballot_sync(kAll, entries.is_miss(j));
    const int at = __shfl_sync(kAll, ranks, j) + __popc(misses & lanes_below) - from;
    if (entries.is_miss(j) && at >= 0 && at < kKeptMisses) {
      shared.missing[at] = {entries.key(j), List::entry(tile, j)};
    }
  }
}

// Gives slots to the first `count` misses noted, from `victim` on. Returns how many of the thread's
// had a row already.
template <bool kShared>
__device__ unsigned place_noted(const ResolveRowsParams& p, const Segment& s, const List& list,
                                int victim, int count, Shared& shared) {
  unsigned had_row = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) {
    had_row += install<kShared>(p, s, list, shared.missing[i], victim + i, shared);
  }
  return had_row;
}

// Gives the victims to the first `placed` misses of the list, in order, some at a time.
template <bool kShared>
__device__ unsigned place_misses(const ResolveRowsParams& p, const Segment& s, const List& list,
                                 int placed, Shared& shared) {
  unsigned had_row = 0;
  int passed = 0;
#pragma unroll 1
  for (int tile = 0; passed < placed; ++tile) {
    const Entries entries = look_again(p, s, list, tile);
    int total;
    const int ranks = rank_misses(entries, shared.misses, tile, &total);
    const int end = min(passed + total, placed);
#pragma unroll 1
    for (int first = passed; first < end; first += kKeptMisses) {
      note_misses(entries, tile, ranks, first - passed, shared);
      __syncthreads();
      const int count = min(end - first, kKeptMisses);
      had_row += place_noted<kShared>(p, s, list, first, count, shared);
      __syncthreads();
    }
    passed += total;
  }
  return had_row;
}

}  // namespace twilight
