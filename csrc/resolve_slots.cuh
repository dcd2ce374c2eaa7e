// What csrc/resolve_rows.cu does with the hot slots of a head: ranks them by age and chooses those
// that the misses get. Device code only.
#pragma once

#include "csrc/announced_misses.cuh"
#include "csrc/block_scan.cuh"
#include "csrc/common.cuh"
#include "csrc/ptx.cuh"
#include "csrc/resolve_lists.cuh"
#include "csrc/resolve_rows.h"

namespace twilight {

constexpr int kChunksEach = 4;      // chunks a warp at a time: 8 loads a lane on their way
constexpr int kSlotsEach = 8;       // slots a thread at a time: 16 bytes of orders
constexpr int kSectorInts = 8;      // 32 bytes, what the L2 fetches at least
constexpr int kKeptOrders = 16384;  // slots whose order stays in shared memory
constexpr int kKeptVictims = 1024;  // slots chosen; more wait in fetch_dst
constexpr int kKeptMisses = 1024;   // misses noted
constexpr int kMaxAge = 1023;       // must match layout.MAX_AGE
constexpr int kInUse = kMaxAge + 1;
static_assert(kThreads == kInUse, "a thread sums an order");
static_assert(kThreads == kKeptMisses, "a thread places a miss");
static_assert(kSlotsPerChunk == 32, "a warp reads a chunk");
static_assert(kSlotsPerChunk % kSlotsEach == 0, "all orders a thread reads are kept, or none");

struct Miss {
  int key, entry;  // of its list
};

// A segment's running mean of list lengths: where it is kept, or null, and what it was. Shared, for
// it is not needed before the end.
struct Mean {
  float* at;
  float old;
};

struct Victim {
  int slot, key;  // the key that leaves it, or kNoRow
};

struct Shared {
  BlockScan scans[2];
  MissCounts misses;
  int histogram[kInUse];  // slots by order; those in use are not counted
  int used[kInUse];       // of them, those taken since: only ever added to, see use_place
  int victims[kKeptVictims];
  Miss missing[kKeptMisses];
  int threshold, ties;
  Mean mean;
};

// Slots of a head whose order is kept: whole chunks.
__host__ __device__ __forceinline__ int kept_orders(const ResolveRowsParams& p) {
  return p.num_chunks < kKeptOrders / kSlotsPerChunk ? p.num_chunks * kSlotsPerChunk : kKeptOrders;
}

// 0 for a free slot, then rising with recency up to kMaxAge; kInUse for one of this step.
__device__ __forceinline__ int eviction_order(int key, int stamp, int step) {
  return key == kNoRow ? 0 : kInUse - min(max(step - stamp, 0), kMaxAge);
}

__device__ __forceinline__ int order_of(const ResolveRowsParams& p, const Segment& s, int slot) {
  return eviction_order(__ldcg(p.slot_key + slot), __ldcg(p.slot_stamp + slot), s.step);
}

// Lists the chunks lent to this owner, with their places; returns their number.
__device__ inline int list_owned_chunks(const ResolveRowsParams& p, const Segment& s, int owner,
                                        BlockScan& scan) {
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
    if (first < p.num_chunks) s.places()[first / kOwnersEach] = at << kOwnersEach | mine;
    for (; mine != 0; mine &= mine - 1) {
      s.owned()[at++] = static_cast<uint16_t>(first + __ffs(mine) - 1);
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
    const int slot = s.owned()[i / kSectors] * kSlotsPerChunk + i % kSectors * kSectorInts;
    prefetch(p.slot_key + slot);
    prefetch(p.slot_stamp + slot);
  }
}

// Finds the orders of the head's slots and counts them.
__device__ inline void count_orders(const ResolveRowsParams& p, const Segment& s, Shared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int kept = kept_orders(p);
  for (int start = warp; start < s.num_owned; start += kWarps * kChunksEach) {
    int key[kChunksEach], stamp[kChunksEach];
#pragma unroll
    for (int u = 0; u < kChunksEach; ++u) {
      const int j = start + u * kWarps;
      if (j >= s.num_owned) continue;
      const int slot = s.owned()[j] * kSlotsPerChunk + lane;
      key[u] = __ldcg(p.slot_key + slot);
      stamp[u] = __ldcg(p.slot_stamp + slot);
    }
#pragma unroll
    for (int u = 0; u < kChunksEach; ++u) {
      const int j = start + u * kWarps, place = j * kSlotsPerChunk + lane;
      if (j >= s.num_owned) continue;
      const int order = eviction_order(key[u], stamp[u], s.step);
      if (place < kept) s.orders()[place] = static_cast<uint16_t>(order);
      if (order < kInUse) atomicAdd(&shared.histogram[order], 1);
    }
  }
}

// Takes a slot out of those that may go: by its order where that is kept, which stamp_used turns
// into a stamp, else by its stamp. Most hits are of the same order, that of the step before: lanes
// that add one to the same word do so at once, those that subtract from it wait for each other.
__device__ __forceinline__ void use_place(const ResolveRowsParams& p, const Segment& s, int slot,
                                          int place, int order, Shared& shared) {
  if (static_cast<unsigned>(place) < static_cast<unsigned>(kept_orders(p))) {
    s.orders()[place] = kInUse;
  } else {
    p.slot_stamp[slot] = s.step;
  }
  if (order < kInUse) atomicAdd(&shared.used[order], 1);
}

// Stamps the slots in use whose order is kept, a chunk a warp: the hits of a list lie anywhere, and
// each would be a write of its own.
__device__ __forceinline__ void stamp_used(const ResolveRowsParams& p, const Segment& s) {
  const int lane = threadIdx.x % 32;
  const int chunks = min(s.num_owned, kept_orders(p) / kSlotsPerChunk);
#pragma unroll 4
  for (int j = threadIdx.x / 32; j < chunks; j += kWarps) {
    const bool in_use = s.orders()[j * kSlotsPerChunk + lane] == kInUse;
    if (in_use) p.slot_stamp[s.owned()[j] * kSlotsPerChunk + lane] = s.step;
  }
}

// The place among the head's slots, or -1 for a slot that is not the head's.
__device__ __forceinline__ int place_of(const Segment& s, int slot) {
  const unsigned chunk = static_cast<unsigned>(slot) / kSlotsPerChunk;
  const unsigned word = s.places()[chunk / kOwnersEach], bit = 1u << chunk % kOwnersEach;
  const int at = (word >> kOwnersEach) + __popc(word & (bit - 1));
  return (word & bit) != 0 ? at * kSlotsPerChunk + slot % kSlotsPerChunk : -1;
}

// Takes the hits among a thread's entries, so that they are nobody's victims. All entries of a
// list may be taken at once, those of two lists not: they may be the same.
__device__ __forceinline__ void use_hits(const ResolveRowsParams& p, const Segment& s,
                                         const Entries& entries, Shared& shared) {
  const int kept = kept_orders(p);
  entries.for_each_group([&](int first) {
    int place[kGroup], order[kGroup];  // -1: no hit, or another sequence's slot, by a shared page
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const int row = entries.found[first + j];
      place[j] = row < 0 ? -1 : place_of(s, row - p.first_row);
      order[j] = place[j] >= 0 && place[j] < kept ? s.orders()[place[j]] : kInUse;
    }
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      if (entries.found[first + j] < 0) continue;
      const int slot = entries.found[first + j] - p.first_row;
      if (place[j] >= kept) order[j] = order_of(p, s, slot);
      use_place(p, s, slot, place[j], order[j], shared);
    }
  });
}

// Where the fetch of a victim's new row is listed.
__device__ __forceinline__ int64_t fetch_at(const ResolveRowsParams& p, const Segment& s,
                                            int victim) {
  return static_cast<int64_t>(blockIdx.x) * p.fetch_capacity + s.fetched + victim;
}

// Where a victim's slot waits for its miss.
__device__ __forceinline__ int* victim_at(const ResolveRowsParams& p, const Segment& s, int victim,
                                          Shared& shared) {
  return victim < kKeptVictims ? &shared.victims[victim] : p.fetch_dst + fetch_at(p, s, victim);
}

// Sets threshold and ties so that the slots with order < threshold and the first `ties` slots with
// order == threshold are `wanted` in number, or all that may go; returns how many that are.
__device__ inline int find_threshold(int wanted, Shared& shared) {
  const int here = shared.histogram[threadIdx.x] - shared.used[threadIdx.x];
  if (threadIdx.x == 0) {
    shared.threshold = kInUse;
    shared.ties = 0;
  }
  unsigned total;
  const int low = block_exclusive_sum(here, shared.scans[1], &total);
  if (low < wanted && wanted <= low + here) {  // true of one thread at most
    shared.threshold = threadIdx.x;
    shared.ties = wanted - low;
  }
  __syncthreads();
  return min(wanted, static_cast<int>(total));
}

struct Orders {
  int of[kSlotsEach];
};

// Orders of the slots at place .. of the head's.
__device__ __forceinline__ Orders read_orders(const ResolveRowsParams& p, const Segment& s,
                                              int place) {
  Orders orders;
  if (place >= s.num_owned * kSlotsPerChunk) {
#pragma unroll
    for (int i = 0; i < kSlotsEach; ++i) orders.of[i] = kInUse;
  } else if (place < kept_orders(p)) {
    const uint4 packed = *reinterpret_cast<const uint4*>(s.orders() + place);
    const unsigned words[] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < kSlotsEach; ++i) orders.of[i] = words[i / 2] >> (i % 2 * 16) & 0xffff;
  } else {
    const int slot = s.owned()[place / kSlotsPerChunk] * kSlotsPerChunk + place % kSlotsPerChunk;
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
    const Orders orders = read_orders(p, s, place);
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
      const int slot = s.owned()[at / kSlotsPerChunk] * kSlotsPerChunk + at % kSlotsPerChunk;
      *victim_at(p, s, victim, shared) = slot;
      int order = kInUse;  // not to be counted
      if (again) order = at < kept_orders(p) ? s.orders()[at] : order_of(p, s, slot);
      use_place(p, s, slot, at, order, shared);
    }
    below += total & 0xffff;
    tied += total >> 16;
  }
  __syncthreads();
}

__device__ __forceinline__ Victim read_victim(const ResolveRowsParams& p, const Segment& s, int at,
                                              Shared& shared) {
  const int slot = *victim_at(p, s, at, shared);
  return {slot, __ldcg(p.slot_key + slot)};
}

// Puts a miss into the slot of victim `at`; returns whether another sequence had its row already.
template <bool kShared>
__device__ __forceinline__ bool install(const ResolveRowsParams& p, const Segment& s,
                                        const List& list, Miss miss, int at, Victim victim) {
  const int row = p.first_row + victim.slot;
  int found = kNoRow;
  if (kShared) {
    found = atomicCAS(&s.map[miss.key], kNoRow, row);
  } else {
    s.map[miss.key] = row;
  }
  const bool first = found == kNoRow;
  p.fetch_src[fetch_at(p, s, at)] = miss.key;
  p.fetch_dst[fetch_at(p, s, at)] = first ? row : kNoRow;
  p.locations[list.first - threadIdx.x + miss.entry] = first ? row : found;
  if (victim.key != kNoRow) s.map[victim.key] = kNoRow;
  p.slot_key[victim.slot] = first ? miss.key : kNoRow;
  return !first;
}

// Notes the tile's misses, as far as they are among the list's first kKeptMisses, and announces
// them; before: those of the tiles before it; ranks: of rank_misses.
__device__ __forceinline__ void note_misses(const ResolveRowsParams& p, const Segment& s,
                                            const Entries& entries, int tile, int ranks, int before,
                                            Shared& shared) {
  constexpr unsigned kAll = 0xffffffffu;
  const unsigned lanes_below = (1u << threadIdx.x % 32) - 1;
  entries.for_each([&](int j) {
    const unsigned misses = __ballot_sync(kAll, entries.is_miss(j));
    if (misses == 0) return;
    const int at = before + __shfl_sync(kAll, ranks, rank_lane(j)) + __popc(misses & lanes_below);
    if (entries.is_miss(j) && at < kKeptMisses) {
      shared.missing[at] = {entries.key(j),
                            tile * kTile + j * kThreads + static_cast<int>(threadIdx.x)};
      if (p.announced != nullptr) {
        announce(p.announced, blockIdx.x, 1 + at, s.tag, entries.key(j));
      }
    }
  });
}

// Gives the victims to the first `placed` misses of the list, in order, which were not all noted.
// Returns how many of the thread's had a row already.
template <bool kShared>
__device__ unsigned place_misses(const ResolveRowsParams& p, const Segment& s, const List& list,
                                 int placed, Shared& shared) {
  unsigned had_row = 0;
  int passed = 0;
#pragma unroll 1
  for (int start = 0; passed < placed; start += kThreads) {
    const int entry = start + threadIdx.x;
    int token = 0;
    bool is_miss = false;
    if (entry < list.count) {
      is_miss = p.locations[list.first + start] == kNoRow;  // as this thread left it
      token = p.tokens[list.first + start];
    }
    unsigned total;
    const int at =
        passed + block_exclusive_sum(is_miss, shared.scans[start / kThreads % 2], &total);
    if (is_miss && at < placed) {
      const int key = key_of(s.table, p.page_size, s.inverse, token);
      had_row += install<kShared>(p, s, list, {key, entry}, at, read_victim(p, s, at, shared));
    }
    passed += total;
  }
  return had_row;
}

}  // namespace twilight
