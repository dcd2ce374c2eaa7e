// How estimate_scores shares its work: one list of items, an equal run of it for every block.
//
// A unit is a query row, a KV head and up to kHeads of its query heads. Its items are chunks of
// kResidentTokens resident tokens, then pieces of up to kPieceTokens tokens of the pages that hold
// its list tokens: some 4 KB each, a warp's work. Units follow each other by row, then by head. A
// segment is a block's part of a unit; blocks meet in the workspace, at slot block + unit, which is
// another for every segment, since from one segment to the next the block or the unit moves on.
#pragma once

#include "csrc/common.cuh"
#include "csrc/estimate_scores.h"
#include "csrc/int4_tiles.cuh"

namespace twilight {

constexpr int kHeads = 8;            // query heads of a unit: the columns of an m16n8k16 tile
constexpr int kPieceTokens = 64;     // four runs of int4_token's bounds
constexpr int kResidentTokens = 16;  // of an item, exact dots

static_assert(kPieceTokens == 4 * kQuestBlock);

struct Segment {
  int unit, n, kv_head, first_head, heads, seq;
  int start, stop;          // visible tokens
  int first, last;          // list tokens
  int first_page;           // that holds some
  int begin, end;           // items of the unit
  int first_block, blocks;  // that share the unit

  __device__ int64_t q_head(const EstimateScoresParams& p, int head) const {
    return int64_t(n) * p.num_kv_heads * p.group + first_head + head;
  }
  __device__ const uint8_t* candidates(const EstimateScoresParams& p) const {
    return p.candidates + (int64_t(n) * p.num_kv_heads + kv_head) * p.num_blocks;
  }
};

// Computed by whole warps, every lane alike; small enough to be kept in shared memory.
struct Schedule {
  int residents;    // items of resident tokens that every unit begins with
  int pieces;       // of a page
  int head_groups;  // units of a row and KV head
  int blocks;       // that have work: a warp or more each
  int64_t total;    // items

  __device__ static Schedule make(const EstimateScoresParams& p, int warps) {
    Schedule made;
    made.residents = max(1, ceil_div(p.num_sink + p.window_rows, kResidentTokens));
    made.pieces = ceil_div(p.page_size, kPieceTokens);
    made.head_groups = ceil_div(p.group, kHeads);
    made.total = made.find(p, INT64_MAX).start;
    made.blocks = int(min(int64_t(gridDim.x), (made.total + warps - 1) / warps));
    return made;
  }

  // Where a block's items begin.
  __device__ int64_t begin(int block) const { return total * block / blocks; }

  // The segment that begins at an item and ends with its unit, or at item `stop`.
  __device__ Segment segment(const EstimateScoresParams& p, int64_t item, int64_t stop) const {
    const Row row = find(p, item);
    const int unit = int(item - row.start) / row.items;
    const int64_t unit_start = row.start + int64_t(unit) * row.items;
    Segment s;
    s.n = row.n;
    s.unit = row.n * units_per_row(p) + unit;
    s.kv_head = unit / head_groups;
    const int skipped = unit % head_groups * kHeads;
    s.first_head = s.kv_head * p.group + skipped;
    s.heads = min(kHeads, p.group - skipped);
    s.begin = int(item - unit_start);
    s.end = int(min(stop - unit_start, int64_t(row.items)));
    s.first_block = owner(unit_start);
    s.blocks = owner(unit_start + row.items - 1) + 1 - s.first_block;
    see(p, row.n, s);
    s.first_page = s.first / p.page_size;
    return s;
  }

 private:
  struct Row {
    int n;
    int items;      // of each of its units
    int64_t start;  // items of the rows before it
  };

  __device__ int units_per_row(const EstimateScoresParams& p) const {
    return p.num_kv_heads * head_groups;
  }

  __device__ int owner(int64_t item) const { return int(((item + 1) * blocks - 1) / total); }

  // Sets what row n sees.
  __device__ static void see(const EstimateScoresParams& p, int n, Segment& s) {
    s.seq = p.query_seq[n];
    s.start = p.ctx_starts[n];
    s.stop = p.positions[n] + 1;
    s.first = max(s.start, p.num_sink);
    s.last = min(s.stop, p.window_starts[s.seq]);
  }

  __device__ int items(const EstimateScoresParams& p, int n) const {
    Segment s;
    see(p, n, s);
    if (s.first >= s.last) return residents;
    const int pages = ceil_div(s.last, p.page_size) - s.first / p.page_size;
    return residents + pages * pieces;
  }

  // The row that an item belongs to; past the last one, a row that starts where all items end.
  __device__ Row find(const EstimateScoresParams& p, int64_t item) const {
    const int lane = threadIdx.x % 32;
    int64_t before = 0;
    for (int base = 0; base < p.num_rows; base += 32) {
      const int mine = base + lane < p.num_rows ? items(p, base + lane) : 0;
      int64_t upto = int64_t(mine) * units_per_row(p);
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const int64_t below = __shfl_up_sync(0xffffffffu, upto, offset);
        if (lane >= offset) upto += below;
      }
      const unsigned past = __ballot_sync(0xffffffffu, before + upto > item);
      if (past != 0) {
        const int found = __ffs(past) - 1;
        const int count = __shfl_sync(0xffffffffu, mine, found);
        const int64_t end = __shfl_sync(0xffffffffu, upto, found);
        return {base + found, count, before + end - int64_t(count) * units_per_row(p)};
      }
      before += __shfl_sync(0xffffffffu, upto, 31);
    }
    return {p.num_rows, 0, before};
  }
};

}  // namespace twilight
