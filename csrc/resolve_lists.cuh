// What csrc/resolve_rows.cu does with the lists: looks their entries up. Device code only.
#pragma once

#include <cuda_pipeline.h>

#include <climits>

#include "csrc/common.cuh"
#include "csrc/resolve_rows.h"

namespace twilight {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kEach = 8;                 // list entries a thread at a time, kThreads apart
constexpr int kTile = kThreads * kEach;  // entries a block at a time
constexpr int kEarly = 2;                // of them, those read before the list's count is known
constexpr int kStagedPages = 4096;       // of a page table, in shared memory; a longer one stays
constexpr int kOwnersEach = 8;           // chunks whose owner a thread reads at a time
static_assert(kWarps == 16, "a vector holds a byte a warp");

// One (sequence, KV head) of the step, and what its block knows of it.
struct Segment {
  int b, h, step;
  unsigned inverse;       // of inverse_of
  const int* table;       // b's page table, in shared or in global memory
  int* map;               // [keys_per_head], or null
  int* src;               // [fetch_capacity]
  int* dst;               // [fetch_capacity]
  int fetched;            // entries of src and dst so far
  const uint16_t* owned;  // shared, ascending: the head's chunks
  int num_owned;
  // Shared, a word for kOwnersEach chunks: a bit for each that is owned, and above these bits the
  // number of owned chunks before the first.
  const unsigned* places;
};

// A query row's list, and the thread's first tokens of its first tile.
struct List {
  int64_t start;  // in tokens and locations
  int count, tiles;
  int early[kEarly];

  __device__ static int entry(int tile, int j) {
    return tile * kTile + j * kThreads + static_cast<int>(threadIdx.x);
  }
};

// What became of a thread's entries of a tile: a row, a miss with its key, or nothing.
struct Entries {
  int found[kEach];

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

__device__ __forceinline__ int key_of(const int* table, int page_size, unsigned inverse,
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
__device__ __forceinline__ const int* stage_table(const ResolveRowsParams& p, int b, int* staged) {
  const int* table = p.page_table + b * p.table_stride;
  if (staged_pages(p) == 0) return table;
#pragma unroll 4
  for (int i = threadIdx.x; i < p.table_pages; i += kThreads) {
    __pipeline_memcpy_async(staged + i, table + i, sizeof(int));
  }
  return staged;
}

__device__ __forceinline__ List open_list(const ResolveRowsParams& p, const Segment& s, int n) {
  List list;
  const int64_t index = static_cast<int64_t>(n) * p.num_kv_heads + s.h;
  list.start = index * p.capacity;
#pragma unroll
  for (int j = 0; j < kEarly; ++j) {  // as far as the buffer goes: beside the count, not after it
    const int i = List::entry(0, j);
    list.early[j] = i < p.capacity ? p.tokens[list.start + i] : 0;
  }
  list.count = min(p.counts[index], p.capacity);
  list.tiles = (list.count + kTile - 1) / kTile;
  return list;
}

// Looks the thread's entries of a tile up: all tokens are on their way at once, then all rows.
__device__ __forceinline__ Entries look_up(const ResolveRowsParams& p, const Segment& s,
                                           const List& list, int tile) {
  int key[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int i = List::entry(tile, j);
    key[j] = 0;
    if (j < kEarly && tile == 0) {
      key[j] = list.early[j];
    } else if (i < list.count) {
      key[j] = p.tokens[list.start + i];
    }
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const bool sought = List::entry(tile, j) < list.count && s.map != nullptr;
    key[j] = sought ? key_of(s.table, p.page_size, s.inverse, key[j]) : 0;
  }
  Entries entries;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const bool listed = List::entry(tile, j) < list.count;
    entries.found[j] = listed ? kNoRow : Entries::kNoEntry;
    if (listed && s.map != nullptr) entries.found[j] = __ldcg(&s.map[key[j]]);
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    if (entries.found[j] == kNoRow) entries.found[j] = Entries::miss(key[j]);
  }
  return entries;
}

// A tile of the list as it was left in p.locations by this thread.
__device__ __forceinline__ Entries look_again(const ResolveRowsParams& p, const Segment& s,
                                              const List& list, int tile) {
  Entries entries;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int i = List::entry(tile, j);
    entries.found[j] = i < list.count ? p.locations[list.start + i] : Entries::kNoEntry;
    if (entries.found[j] != kNoRow) continue;
    const int token = p.tokens[list.start + i];
    entries.found[j] = Entries::miss(key_of(s.table, p.page_size, s.inverse, token));
  }
  return entries;
}

// The misses of a tile by warp and round; two tiles take turns.
struct MissCounts {
  uint4 rounds[2][kEach];  // a byte a warp
};

// Which of the tile's misses the first one of each of this warp's rounds is: lane j has that of
// round j. total: misses of the tile. One barrier.
__device__ __forceinline__ int rank_misses(const Entries& entries, MissCounts& counts, int tile,
                                           int* total) {
  constexpr unsigned kAll = 0xffffffffu, kEachByte = 0x01010101u;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint4* const rounds = counts.rounds[tile % 2];
  int mine = 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int misses = __popc(__ballot_sync(kAll, entries.is_miss(j)));
    if (lane == j) mine = misses;
  }
  if (lane < kEach) reinterpret_cast<uint8_t*>(rounds + lane)[warp] = static_cast<uint8_t>(mine);
  __syncthreads();
  const uint4 row = lane < kEach ? rounds[lane] : uint4{};
  const unsigned words[] = {row.x, row.y, row.z, row.w};
  unsigned all = 0, below = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int bytes = min(max(warp - 4 * k, 0), 4);  // of warps below this one
    all = __dp4a(words[k], kEachByte, all);
    below = __dp4a(words[k], bytes == 4 ? kEachByte : kEachByte & ((1u << 8 * bytes) - 1), below);
  }
  unsigned end = all;
#pragma unroll
  for (int offset = 1; offset < kEach; offset *= 2) {
    const unsigned before = __shfl_up_sync(kAll, end, offset);
    if (lane >= offset) end += before;
  }
  *total = __shfl_sync(kAll, end, kEach - 1);
  return end - all + below;
}

}  // namespace twilight
