// What csrc/resolve_rows.cu does with the lists: looks their entries up. Device code only.
#pragma once

#include <cuda_pipeline.h>

#include "csrc/common.cuh"
#include "csrc/resolve_rows.h"

namespace twilight {

constexpr int kThreads = 512;
constexpr int kEach = 2;                 // neighbouring list entries a thread at a time
constexpr int kTile = kThreads * kEach;  // entries a block at a time
constexpr int kStagedPages = 4096;       // of a page table, in shared memory; a longer one stays
constexpr int kNoEntry = -2;             // beside kNoRow: past the list's end

// One (sequence, KV head) of the step, and what its block knows of it.
struct Segment {
  int b, h, step;
  int page_shift;         // log2 of the page size, or -1
  const int* table;       // b's page table, in shared or in global memory
  int* map;               // [keys_per_head], or null
  int* src;               // [fetch_capacity]
  int* dst;               // [fetch_capacity]
  int fetched;            // entries of src and dst so far
  const uint16_t* owned;  // shared, ascending: the head's chunks
  int num_owned;
  int search_size;  // the greatest power of two up to num_owned, or 0
};

// A query row's list, and the thread's tokens of its first tile.
struct List {
  int64_t start;  // in tokens and locations
  int count, tiles;
  int token[kEach];

  __device__ static int entry(int tile) { return tile * kTile + threadIdx.x * kEach; }
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

// log2 of a power of two, or -1: a division by a run-time value takes a tenth of a microsecond.
__device__ __forceinline__ int shift_of(int size) {
  return (size & (size - 1)) == 0 ? __ffs(size) - 1 : -1;
}

__device__ __forceinline__ int key_of(const int* table, int page_size, int page_shift, int token) {
  const int page = page_shift >= 0 ? token >> page_shift : token / page_size;
  return table[page] * page_size + (token - page * page_size);
}

// Entries of a page table that go to shared memory: all, or none of a long one.
__host__ __device__ __forceinline__ int staged_pages(const ResolveRowsParams& p) {
  return p.slot_map != nullptr && p.table_pages <= kStagedPages ? p.table_pages : 0;
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

// Tokens of a tile as far as the buffer goes: they need not wait for the list's count.
__device__ __forceinline__ void read_tokens(const ResolveRowsParams& p, int64_t start, int tile,
                                            int (&token)[kEach]) {
  const int i = List::entry(tile);
#pragma unroll
  for (int j = 0; j < kEach; ++j) token[j] = i + j < p.capacity ? p.tokens[start + i + j] : 0;
}

__device__ __forceinline__ List open_list(const ResolveRowsParams& p, const Segment& s, int n) {
  List list;
  const int64_t index = static_cast<int64_t>(n) * p.num_kv_heads + s.h;
  list.start = index * p.capacity;
  list.count = min(p.counts[index], p.capacity);
  list.tiles = (list.count + kTile - 1) / kTile;
  read_tokens(p, list.start, 0, list.token);
  return list;
}

// Looks the thread's tokens of a tile up.
__device__ __forceinline__ Entries look_up(const ResolveRowsParams& p, const Segment& s,
                                           const List& list, int tile, const int (&token)[kEach]) {
  const int i = List::entry(tile);
  Entries found;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const bool sought = i + j < list.count && s.map != nullptr;
    found.key[j] = sought ? key_of(s.table, p.page_size, s.page_shift, token[j]) : 0;
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    found.row[j] = i + j < list.count ? kNoRow : kNoEntry;
    if (i + j < list.count && s.map != nullptr) found.row[j] = __ldcg(&s.map[found.key[j]]);
  }
  return found;
}

// A tile of the list as it was left in p.locations by this thread.
__device__ __forceinline__ Entries look_again(const ResolveRowsParams& p, const Segment& s,
                                              const List& list, int tile) {
  const int i = List::entry(tile);
  Entries found;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    found.row[j] = i + j < list.count ? p.locations[list.start + i + j] : kNoEntry;
    found.key[j] = 0;
    if (found.row[j] == kNoRow) {
      found.key[j] = key_of(s.table, p.page_size, s.page_shift, p.tokens[list.start + i + j]);
    }
  }
  return found;
}

}  // namespace twilight
