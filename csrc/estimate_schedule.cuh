// How estimate_scores shares its work: one list of items, an equal run of it for every block.
//
// A unit is a query row, a KV head and up to kHeads of its query heads. Its items are chunks of
// kResidentTokens resident tokens, then pieces of up to kPieceTokens tokens of the pages that hold
// its list tokens: some 4 KB each, a warp's work. Units follow each other by row, then by head. A
// segment is a block's part of a unit; blocks meet in the workspace, at slot block + unit, which is
// another for every segment, since from one segment to the next the block or the unit moves on.
#pragma once

#include <climits>

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
  int start, stop;           // visible tokens
  int first, last;           // list tokens
  int first_page;            // that holds some
  int begin, end;            // items of the unit
  int unit_begin, unit_end;  // the same of the whole unit, in the list of all items

  __device__ int64_t q_head(const EstimateScoresParams& p, int head) const {
    return int64_t(n) * p.num_kv_heads * p.group + first_head + head;
  }
  __device__ const uint8_t* candidates(const EstimateScoresParams& p) const {
    return p.candidates + (int64_t(n) * p.num_kv_heads + kv_head) * p.num_blocks;
  }
};

// Computed by whole warps, every lane alike; small enough to be kept in shared memory. 32 bits are
// enough: an item stands for 256 bytes of scores or more.
struct Schedule {
  int residents;    // items of resident tokens that every unit begins with
  int pieces;       // of a page
  int head_groups;  // units of a row and KV head
  int blocks;       // that have work: a warp or more each
  int each, more;   // items of a block; blocks that have one more, the first ones

  __device__ static Schedule make(const EstimateScoresParams& p, int warps) {
    Schedule made;
    made.residents = max(1, ceil_div(p.num_sink + p.window_rows, kResidentTokens));
    made.pieces = ceil_div(p.page_size, kPieceTokens);
    made.head_groups = ceil_div(p.group, kHeads);
    const int total = made.find(p, INT_MAX).start;
    made.blocks = min(int(gridDim.x), ceil_div(total, warps));
    made.each = total / made.blocks;
    made.more = total % made.blocks;
    return made;
  }

  // Where a block's items begin.
  __device__ int begin(int block) const { return block * each + min(block, more); }

  // The block that an item falls to.
  __device__ int owner(int item) const {
    const int longer = more * (each + 1);  // items of the blocks with one more
    return item < longer ? item / (each + 1) : more + (item - longer) / each;
  }

  // The segment that begins at an item and ends with its unit, or at item `stop`.
  __device__ Segment segment(const EstimateScoresParams& p, int item, int stop) const {
    const Row row = find(p, item);
    const int unit = (item - row.start) / row.items;
    Segment s;
    s.n = row.n;
    s.unit = row.n * units_per_row(p) + unit;
    s.kv_head = unit / head_groups;
    const int skipped = unit % head_groups * kHeads;
    s.first_head = s.kv_head * p.group + skipped;
    s.heads = min(kHeads, p.group - skipped);
    s.unit_begin = row.start + unit * row.items;
    s.unit_end = s.unit_begin + row.items;
    s.begin = item - s.unit_begin;
    s.end = min(stop, s.unit_end) - s.unit_begin;
    see(p, row.n, s);
    s.first_page = s.first / p.page_size;
    return s;
  }

 private:
  struct Row {
    int n;
    int items;  // of each of its units
    int start;  // items of the rows before it
  };

  __device__ int units_per_row(const EstimateScoresParams& p) const {
    return p.num_kv_heads * head_groups;
  }

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
  __device__ Row find(const EstimateScoresParams& p, int item) const {
    const int lane = threadIdx.x % 32;
    int before = 0;
    for (int base = 0; base < p.num_rows; base += 32) {
      const int mine = base + lane < p.num_rows ? items(p, base + lane) : 0;
      int upto = mine * units_per_row(p);
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const int below = __shfl_up_sync(0xffffffffu, upto, offset);
        if (lane >= offset) upto += below;
      }
      const unsigned past = __ballot_sync(0xffffffffu, before + upto > item);
      if (past != 0) {
        const int found = __ffs(past) - 1;
        const int count = __shfl_sync(0xffffffffu, mine, found);
        const int end = before + __shfl_sync(0xffffffffu, upto, found);
        return {base + found, count, end - count * units_per_row(p)};
      }
      before += __shfl_sync(0xffffffffu, upto, 31);
    }
    return {p.num_rows, 0, before};
  }
};

}  // namespace twilight
