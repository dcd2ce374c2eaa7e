// What csrc/resolve_rows.cu does with the lists: looks their entries up, marks hits and writes the
// misses into the fetch list. Device code only.
#pragma once

#include <cuda_pipeline.h>

#include "csrc/block_scan.cuh"
#include "csrc/common.cuh"
#include "csrc/ranks.cuh"
#include "csrc/resolve_rows.h"

namespace twilight {

constexpr int kThreads = 512;
constexpr int kEach = 2;            // list entries a thread at a time
constexpr int kStagedPages = 4096;  // of a page table, in shared memory; a longer one stays global
constexpr int kNoEntry = -2;        // beside kNoRow: past the list's end

// One (sequence, KV head) of the step, and what its blocks know of it.
struct Segment {
  int b, h, step;
  const int* table;       // b's page table, in shared or in global memory
  int* map;               // [keys_per_head]
  int* src;               // [fetch_capacity]
  int* dst;               // [fetch_capacity]
  int fetched;            // entries of src and dst so far
  const uint16_t* share;  // shared, ascending: this rank's chunks, after those of the ranks before
  int num_share;
  int num_owned;  // chunks, of all ranks
};

// A query row's list, and this rank's part of it: `tiles` times kThreads * each entries.
struct List {
  int64_t start;  // in tokens and locations
  int count;
  int first, tiles, each;

  __device__ int entry(int tile) const { return first + (tile * kThreads + threadIdx.x) * each; }
  __device__ bool has(int i, int j) const { return j < each && i + j < count; }
};

// A thread's entries of a tile: the row, kNoRow for a miss or kNoEntry, and the key.
struct Entries {
  int row[kEach], key[kEach];

  __device__ int misses() const {
    int sum = 0;
#pragma unroll
    for (int j = 0; j < kEach; ++j) sum += row[j] == kNoRow;
    return sum;
  }
};

// What a thread read of query row n == b before it knew the sequence's query rows: in plain decode
// it is the right one. `token` is its entry of a list that takes one tile of one entry a thread.
struct Early {
  int count, token;
};

__device__ __forceinline__ int key_of(const int* table, int page_size, int token) {
  const int page = token / page_size;
  return table[page] * page_size + (token - page * page_size);
}

__device__ __forceinline__ Early read_early(const ResolveRowsParams& p, int b, int h, int rank) {
  if (b >= p.num_queries) return {};
  const int64_t list = static_cast<int64_t>(b) * p.num_kv_heads + h;
  const int i = rank * kThreads + threadIdx.x;
  return {p.counts[list], i < p.capacity ? p.tokens[list * p.capacity + i] : 0};
}

// Entries of a page table that go to shared memory: all, or none of a long one.
__host__ __device__ __forceinline__ int staged_pages(const ResolveRowsParams& p) {
  return p.slot_map != nullptr && p.table_pages <= kStagedPages ? p.table_pages : 0;
}

// Starts the copy of b's page table into shared memory, if it fits.
__device__ __forceinline__ const int* stage_table(const ResolveRowsParams& p, int b, int* staged) {
  const int* table = p.page_table + b * p.table_stride;
  if (staged_pages(p) == 0) return table;
  for (int i = threadIdx.x; i < p.table_pages; i += kThreads) {
    __pipeline_memcpy_async(staged + i, table + i, sizeof(int));
  }
  return staged;
}

__device__ __forceinline__ List open_list(const ResolveRowsParams& p, const Segment& s, int n,
                                          const Early& early, const Ranks& ranks) {
  const int64_t list = static_cast<int64_t>(n) * p.num_kv_heads + s.h;
  const int count = min(n == s.b ? early.count : p.counts[list], p.capacity);
  const int at_once = kThreads * ranks.count();
  const int each = min(max((count + at_once - 1) / at_once, 1), kEach);
  const int tiles = (count + at_once * each - 1) / (at_once * each);
  return {list * p.capacity, count, ranks.rank() * tiles * each * kThreads, tiles, each};
}

// Looks a tile up; the loads are on their way when it returns.
__device__ __forceinline__ Entries look_up(const ResolveRowsParams& p, const Segment& s,
                                           const List& list, int tile, const int* early_token) {
  const int i = list.entry(tile);
  Entries found;
  int token[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    token[j] = 0;
    if (list.has(i, j)) token[j] = early_token ? *early_token : p.tokens[list.start + i + j];
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const bool sought = list.has(i, j) && s.map != nullptr;
    found.key[j] = sought ? key_of(s.table, p.page_size, token[j]) : 0;
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    found.row[j] = list.has(i, j) ? kNoRow : kNoEntry;
    if (list.has(i, j) && s.map != nullptr) found.row[j] = __ldcg(&s.map[found.key[j]]);
  }
  return found;
}

// Writes the locations of a tile and, if this kernel is to, stamps its hits.
template <bool kStamps>
__device__ __forceinline__ void keep(const ResolveRowsParams& p, const Segment& s, const List& list,
                                     int tile, const Entries& found) {
  const int i = list.entry(tile);
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    if (found.row[j] == kNoEntry) continue;
    if (kStamps && found.row[j] >= 0) p.slot_stamp[found.row[j] - p.first_row] = s.step;
    p.locations[list.start + i + j] = found.row[j];
  }
}

// Looks this rank's part of a list up; `found` holds its first tile, and then its last. Returns
// this thread's misses.
template <bool kStamps>
__device__ __forceinline__ int mark(const ResolveRowsParams& p, const Segment& s, const List& list,
                                    Entries& found) {
  int misses = 0;
  for (int tile = 0; tile < list.tiles; ++tile) {
    if (tile > 0) found = look_up(p, s, list, tile, nullptr);
    keep<kStamps>(p, s, list, tile, found);
    misses += found.misses();
  }
  return misses;
}

// A tile of the list as mark left it.
__device__ __forceinline__ Entries look_again(const ResolveRowsParams& p, const Segment& s,
                                              const List& list, int tile) {
  const int i = list.entry(tile);
  Entries found;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    found.row[j] = list.has(i, j) ? p.locations[list.start + i + j] : kNoEntry;
    found.key[j] = 0;
    if (found.row[j] == kNoRow) {
      found.key[j] = key_of(s.table, p.page_size, p.tokens[list.start + i + j]);
    }
  }
  return found;
}

// Writes this rank's misses to entries at .. of the fetch list below `end`, in list order: the key
// to src, the place in the list to dst. before: the misses of the threads below this one.
__device__ __forceinline__ void list_misses(const ResolveRowsParams& p, const Segment& s,
                                            const List& list, Entries found, unsigned before,
                                            int at, int end, BlockScan& scan) {
  for (int tile = 0; tile < list.tiles; ++tile) {
    unsigned total = 0;
    if (list.tiles > 1) {
      found = look_again(p, s, list, tile);
      before = block_exclusive_sum(found.misses(), scan, &total);
    }
    const int i = list.entry(tile);
    int entry = at + before;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (found.row[j] != kNoRow) continue;
      if (entry < end) {
        s.src[entry] = found.key[j];
        s.dst[entry] = i + j;
      }
      ++entry;
    }
    at += total;
  }
}

}  // namespace twilight
