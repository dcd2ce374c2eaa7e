// What csrc/resolve_rows.cu does with the lists: looks their entries up. Device code only.
#pragma once

#include <cuda_pipeline.h>

#include <climits>

#include "csrc/block_scan.cuh"
#include "csrc/common.cuh"
#include "csrc/resolve_rows.h"

namespace twilight {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kEach = 8;                 // list entries a thread at a time, kThreads apart
constexpr int kTile = kThreads * kEach;  // entries a block at a time
constexpr int kGroup = 4;                // of kEach, those skipped together
constexpr int kStagedPages = 4096;       // of a page table, in shared memory; a longer one stays
constexpr int kOwnersEach = 16;          // chunks whose owner a thread reads at a time
constexpr float kOverMean = 1.25f;       // of its mean, what a list may have to be read at once

// The block's dynamic shared memory from this byte on. A pointer kept instead is one to any memory
// for the compiler, of 64 bits and slower to read.
template <typename T>
__device__ __forceinline__ T* in_shared(int offset) {
  extern __shared__ __align__(16) unsigned char dynamic[];
  return reinterpret_cast<T*>(dynamic + offset);
}

// A sequence's page table: in shared memory, or a long one where it was.
struct PageTable {
  int staged;  // of in_shared; < 0: not there
  const int* global;

  __device__ __forceinline__ int operator[](int page) const {
    return staged >= 0 ? in_shared<const int>(staged)[page] : global[page];
  }
};

// One (sequence, KV head) of the step, and what its block knows of it.
struct Segment {
  int h, step;
  unsigned inverse;  // of inverse_of
  PageTable table;   // b's
  int* map;          // [keys_per_head], or null
  int fetched;       // entries of its fetch lists so far
  int num_owned;
  int places_at, owned_at;  // of in_shared
  unsigned tag;             // of its announcements

  // Of the head's first kept_orders slots.
  __device__ uint16_t* orders() const { return in_shared<uint16_t>(0); }
  // The head's chunks, ascending.
  __device__ uint16_t* owned() const { return in_shared<uint16_t>(owned_at); }
  // A word for kOwnersEach chunks: a bit for each that is owned, and above these bits the number of
  // owned chunks before the first, of 65535 at most.
  __device__ unsigned* places() const { return in_shared<unsigned>(places_at); }
};

// A query row's list, and the thread's tokens of the tile that is looked up next.
struct List {
  int64_t first;  // in tokens and locations: the thread's first entry
  int count, tiles;
  int early;  // entries read before the count was known, of the first tile
  int token[kEach];
};

// The thread's entries of a tile, kThreads apart, and what became of them: a row, a miss with its
// key, or nothing.
struct Entries {
  int left;  // of the list from the thread's first entry on; none if negative
  int found[kEach];

  __device__ bool listed(int j) const { return j * kThreads < left; }
  // Calls body(j) for the first entry of each group of kGroup that the warp has something of: most
  // lists are short, and the warps share the multiprocessor's instructions.
  template <typename Body>
  __device__ __forceinline__ void for_each_group(Body body) const {
#pragma unroll
    for (int j = 0; j < kEach; j += kGroup) {
      if (j * kThreads < left + static_cast<int>(threadIdx.x % 32)) body(j);
    }
  }
  // The same for the entries of these groups.
  template <typename Body>
  __device__ __forceinline__ void for_each(Body body) const {
    for_each_group([&](int first) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) body(first + j);
    });
  }
  __device__ static int miss(int key) { return ~key; }
  __device__ int key(int j) const { return ~found[j]; }
  __device__ bool is_miss(int j) const { return found[j] < 0 && found[j] != kNoEntry; }
  __device__ int location(int j) const { return max(found[j], kNoRow); }

  static constexpr int kNoEntry = INT_MIN;  // past the list's end; no key is INT_MAX
};
static_assert(kNoRow == -1, "the greatest number that is no row");

// 1 / page_size as a fraction of 2^32, rounded down: a division by a run-time value takes twenty
// instructions.
__device__ __forceinline__ unsigned inverse_of(int page_size) {
  return 0xffffffffu / static_cast<unsigned>(page_size);
}

template <typename Table>
__device__ __forceinline__ int key_of(const Table& table, int page_size, unsigned inverse,
                                      int token) {
  int page = __umulhi(token, inverse);  // or one less than it is
  int offset = token - page * page_size;
  if (offset >= page_size) {
    ++page;
    offset -= page_size;
  }
  return table[page] * page_size + offset;
}

// Entries of a page table that go to shared memory: all, or none of a long one.
__host__ __device__ __forceinline__ int staged_pages(const ResolveRowsParams& p) {
  return p.slot_map != nullptr && p.table_pages <= kStagedPages ? p.table_pages : 0;
}

// Words of Segment::places.
__host__ __device__ __forceinline__ int place_words(const ResolveRowsParams& p) {
  return (p.num_chunks + kOwnersEach - 1) / kOwnersEach;
}

// Starts the copy of b's page table into shared memory, if it fits.
__device__ __forceinline__ PageTable stage_table(const ResolveRowsParams& p, int b, int offset) {
  const int* const global = p.page_table + b * p.table_stride;
  if (staged_pages(p) == 0) return {-1, global};
#pragma unroll 4
  for (int i = threadIdx.x; i < p.table_pages; i += kThreads) {
    __pipeline_memcpy_async(in_shared<int>(offset) + i, global + i, sizeof(int));
  }
  return {offset, global};
}

// Of the list, those from the thread's first entry of a tile on.
__device__ __forceinline__ int left_of(int count, int tile) {
  return count - tile * kTile - static_cast<int>(threadIdx.x);
}

// Reads the thread's tokens of a tile, as far as they lie among the list's entries from .. end - 1.
__device__ __forceinline__ void read_tokens(const ResolveRowsParams& p, List& list, int tile,
                                            int from, int end) {
  const int* const tokens = p.tokens + list.first + tile * kTile;
  const int skipped = left_of(from, tile), left = left_of(end, tile);
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    if (skipped <= j * kThreads && j * kThreads < left) list.token[j] = tokens[j * kThreads];
  }
}

// How many entries of a list to read before its count is known, by the mean of those before it: to
// read on past the end costs more than it saves, for that is not in the L2.
__device__ __forceinline__ int early_entries(float mean) {
  return max(kThreads, static_cast<int>(fminf(kOverMean * mean, kTile)));
}

// early: entries to read beside the count, not after it.
__device__ __forceinline__ List open_list(const ResolveRowsParams& p, const Segment& s, int n,
                                          int early) {
  List list{};
  const int64_t index = static_cast<int64_t>(n) * p.num_kv_heads + s.h;
  list.first = index * p.capacity + threadIdx.x;
  list.early = early;
  read_tokens(p, list, 0, 0, early);
  list.count = min(p.counts[index], p.capacity);
  list.tiles = (list.count + kTile - 1) / kTile;
  return list;
}

// Looks the thread's entries of a tile up: all tokens are on their way at once, then all rows.
__device__ __forceinline__ Entries look_up(const ResolveRowsParams& p, const Segment& s, List& list,
                                           int tile) {
  Entries entries;
  entries.left = left_of(list.count, tile);
  if (list.early < list.count) read_tokens(p, list, tile, list.early, list.count);
  int key[kEach] = {};
  if (s.map != nullptr) {
    entries.for_each([&](int j) {
      const int token = entries.listed(j) ? list.token[j] : 0;  // rather than a branch
      key[j] = key_of(s.table, p.page_size, s.inverse, token);
    });
  }
  entries.for_each([&](int j) {
    entries.found[j] = entries.listed(j) ? kNoRow : Entries::kNoEntry;
    if (entries.listed(j) && s.map != nullptr) entries.found[j] = __ldcg(&s.map[key[j]]);
  });
  entries.for_each([&](int j) {
    if (entries.found[j] == kNoRow) entries.found[j] = Entries::miss(key[j]);
  });
#pragma unroll
  for (int j = 0; j < kEach; ++j) list.token[j] = 0;  // no register stays behind for it
  return entries;
}

// The misses of a tile by round and warp, in list order; two tiles take turns.
struct MissCounts {
  __align__(8) uint8_t rounds[2][kEach][kWarps];
};
static_assert(kEach * kWarps == 8 * 32, "a lane sums eight counts");

// The lane that knows where the misses of round j of this warp begin.
__device__ __forceinline__ int rank_lane(int j) {
  return j * (kWarps / 8) + static_cast<int>(threadIdx.x / 32 / 8);
}

// Which of the tile's misses the first one of each of this warp's rounds is, in the lane of
// rank_lane. total: misses of the tile. One barrier.
__device__ __forceinline__ int rank_misses(const Entries& entries, MissCounts& counts, int tile,
                                           int* total) {
  constexpr unsigned kAll = 0xffffffffu, kEachByte = 0x01010101u;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int mine = 0;
  entries.for_each([&](int j) {
    const int misses = __popc(__ballot_sync(kAll, entries.is_miss(j)));
    if (lane == j) mine = misses;
  });
  if (lane < kEach) counts.rounds[tile % 2][lane][warp] = static_cast<uint8_t>(mine);
  __syncthreads();
  const uint2 word = reinterpret_cast<const uint2*>(counts.rounds[tile % 2])[lane];
  const unsigned sum = __dp4a(word.y, kEachByte, __dp4a(word.x, kEachByte, 0u));
  const unsigned end = warp_inclusive_sum(sum);
  *total = __shfl_sync(kAll, end, 31);
  const bool second = warp % 8 >= 4;  // this warp's count is in word.y
  const unsigned cut = kEachByte & ((1u << warp % 4 * 8) - 1);
  const unsigned below = __dp4a(word.x, second ? kEachByte : cut, 0u);
  return end - sum + __dp4a(word.y, second ? cut : 0u, below);
}

}  // namespace twilight
