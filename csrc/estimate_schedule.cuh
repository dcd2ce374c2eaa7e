// How estimate_scores shares its work: one list of items, an equal run of it for every block.
//
// A unit is a query row, a KV head and up to kHeads of its query heads. Its items are chunks of
// kResidentTokens resident tokens, as many items of nothing, since a chunk takes a warp longer than
// a page, then pieces of up to kPieceTokens tokens of the pages that hold its list tokens: some
// 4 KB each, a warp's work. Units follow each other by row, then by head. Runs begin at multiples
// of total / blocks, rounded: where the blocks are a multiple of equal units none has parts of two.
// A segment is a block's part of a unit; blocks meet in the workspace, at slot block + unit, which
// is another for every segment, since from one to the next the block or the unit moves on.
//
// One warp of a block works it out for all, from one round of loads where a step has up to 32 rows.
#pragma once

#include "csrc/block_scan.cuh"
#include "csrc/common.cuh"
#include "csrc/estimate_scores.h"
#include "csrc/int4_tiles.cuh"

namespace twilight {

constexpr int kHeads = 8;            // query heads of a unit: the columns of an m16n8k16 tile
constexpr int kPieceTokens = 64;     // four runs of int4_token's bounds
constexpr int kResidentTokens = 16;  // of an item, exact dots
constexpr int kResidentWeight = 2;   // items that a chunk of them counts for

static_assert(kPieceTokens == 4 * kQuestBlock);

struct Segment {
  int unit, n, kv_head, first_head, heads, seq;
  int slot;                  // of the sequence's windows
  int start, stop;           // visible tokens
  int window;                // first token of the window
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
  __device__ bool is_whole_unit() const { return begin == 0 && end == unit_end - unit_begin; }
};

// 32 bits are enough: an item stands for 256 bytes of scores or more.
struct Schedule {
  int residents;   // items of resident tokens that every unit begins with
  int pieces;      // of a page
  int total;       // items
  int each, more;  // of a block: `each` items and more / blocks of another

  // Every warp of a block that has work gets some.
  __device__ static Schedule make(const EstimateScoresParams& p, int total, int warps) {
    Schedule made{p.residents, p.pieces, total, p.by_blocks.divide(total)};
    made.more = total - made.each * int(p.by_blocks.by);
    if (made.each < warps) made.each = warps, made.more = 0;
    return made;
  }

  // Where a block's items begin.
  __device__ int begin(const EstimateScoresParams& p, int block) const {
    return min(total, block * each + p.by_blocks.divide(block * more));
  }

  // The block that an item falls to: a guess, put right.
  __device__ int owner(const EstimateScoresParams& p, int item) const {
    int block = int(float(item) / (float(each) + float(more) / float(p.by_blocks.by)));
    while (begin(p, block) > item) --block;
    while (begin(p, block + 1) <= item) ++block;
    return block;
  }
};

// The query rows of a step, 32 at a time, one a lane.
class Rows {
 public:
  // Items of all rows. Leaves the first 32 loaded.
  __device__ int count_items(const EstimateScoresParams& p) {
    int total = 0;
#pragma unroll 1
    for (int base = (p.num_rows - 1) / 32 * 32; base >= 0; base -= 32) {
      load(p, base);
      total += __shfl_sync(0xffffffffu, upto_, 31);
    }
    return total;
  }

  // Sets the segment, in shared memory, that begins at an item and ends with its unit, or at item
  // `stop`; an empty one if that is no later.
  __device__ void find(const EstimateScoresParams& p, int item, int stop, Segment& segment) {
    const int lane = threadIdx.x % 32;
    if (item >= stop) {
      if (lane == 0) segment.begin = segment.end = 0;
      return;
    }
    int before = 0;  // items of the rows before those that are loaded
    unsigned past = 0;
#pragma unroll 1
    for (int base = 0;; base += 32) {
      if (base_ != base) load(p, base);
      past = __ballot_sync(0xffffffffu, before + upto_ > item);
      if (past != 0) break;
      before += __shfl_sync(0xffffffffu, upto_, 31);
    }
    const int found = __ffs(past) - 1;
    const int items = __shfl_sync(0xffffffffu, items_, found);
    const int end = before + __shfl_sync(0xffffffffu, upto_, found);
    const int start = end - items * p.num_kv_heads * p.head_groups;
    const int unit = units_within(item - start, items);
    if (lane == found) {
      Segment s;
      s.n = base_ + found;
      s.unit = s.n * p.num_kv_heads * p.head_groups + unit;
      s.kv_head = p.by_groups.divide(unit);
      const int skipped = (unit - s.kv_head * p.head_groups) * kHeads;
      s.first_head = s.kv_head * p.group + skipped;
      s.heads = min(kHeads, p.group - skipped);
      s.unit_begin = start + unit * items;
      s.unit_end = s.unit_begin + items;
      s.begin = item - s.unit_begin;
      s.end = min(stop, s.unit_end) - s.unit_begin;
      s.seq = seq_, s.slot = slot_, s.start = start_, s.stop = stop_, s.window = window_;
      s.first = first(p);
      s.last = last();
      s.first_page = p.by_page.divide(s.first);
      segment = s;
    }
  }

 private:
  __device__ int first(const EstimateScoresParams& p) const { return max(start_, p.num_sink); }
  __device__ int last() const { return min(stop_, window_); }

  // How many units of so many items lie before an item; with no division.
  __device__ static int units_within(int item, int items) {
    int units = 0, count = 0;
#pragma unroll 1
    do {
      count =
          __popc(__ballot_sync(0xffffffffu, (units + int(threadIdx.x % 32) + 1) * items <= item));
      units += count;
    } while (count == 32);
    return units;
  }

  __device__ void load(const EstimateScoresParams& p, int base) {
    base_ = base;
    const int lane = threadIdx.x % 32, n = base + lane;
    items_ = 0;
    if (n < p.num_rows) {
      const int guess =
          p.early ? n : 0;  // one row a sequence, or at least one sequence: in one round
      window_ = p.window_starts[guess];
      slot_ = p.seq_slots[guess];
      seq_ = p.query_seq[n];
      start_ = p.ctx_starts[n];
      stop_ = p.positions[n] + 1;
      if (seq_ != guess) {
        window_ = p.window_starts[seq_];
        slot_ = p.seq_slots[seq_];
      }
      const int first = this->first(p), last = this->last();
      const int pages = p.by_page.divide(last + p.page_size - 1) - p.by_page.divide(first);
      items_ = p.residents + (first < last ? pages * p.pieces : 0);
    }
    upto_ = warp_inclusive_sum(items_ * p.num_kv_heads * p.head_groups);
  }

  int base_ = -1;  // the first row, or nothing is loaded
  int seq_ = 0, slot_ = 0, start_ = 0, stop_ = 0, window_ = 0;  // as in Segment
  int items_ = 0;                                               // of each unit of the row
  int upto_ = 0;  // of all units of the rows that are loaded, up to this one
};

}  // namespace twilight
