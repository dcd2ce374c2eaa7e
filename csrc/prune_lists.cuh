// What becomes of tokens whose thresholds are known in csrc/prune.cu: grades, the list, counts,
// mass.
#pragma once

#include "csrc/cluster_select.cuh"
#include "csrc/common.cuh"
#include "csrc/prune.h"
#include "csrc/prune_weights.cuh"

namespace twilight {

// Counts and exact mass of tokens.
struct Tally {
  int exact, index;
  float mass;

  __device__ Tally over_warp() const {
    return {__reduce_add_sync(kAllLanes, exact), __reduce_add_sync(kAllLanes, index),
            warp_sum(mass)};
  }
};

// Where the blocks of a cluster and a block's warps leave each other their tallies.
struct Tallies {
  struct Block {
    uint64_t counts;  // exact; index from bit 32 on
    uint64_t mass;    // a float's bits
  };
  Tally warps[kMostWarps];
  Block blocks[kMostRanks];
  Mailbox box;

  __device__ Tally of_block(int r) const {
    return {int(blocks[r].counts), int(blocks[r].counts >> 32),
            __uint_as_float(unsigned(blocks[r].mass))};
  }
};

// Warp 0's part of an exchange: hands the block's tally to all blocks.
__device__ inline void hand_out(const Tally& all, Tallies& tallies, const Ranks& ranks) {
  const int lane = threadIdx.x % 32, count = ranks.count();
  const Tallies::Block block{uint64_t(all.index) << 32 | unsigned(all.exact),
                             __float_as_uint(all.mass)};
  if (count == 1) {
    if (lane == 0) tallies.blocks[0] = block;
    __syncwarp();
    return;
  }
  if (lane == 0) tallies.box.expect(count * sizeof(block));
  if (lane < count) {
    Tallies::Block& to = tallies.blocks[ranks.rank()];
    tallies.box.send(&to.counts, lane, block.counts);
    tallies.box.send(&to.mass, lane, block.mass);
  }
}

// The exact tokens of the warps in front of this one, in this block and the ones before; round:
// earlier uses of `tallies`.
__device__ inline int exact_in_front(const Tally& of_lane, Tallies& tallies, int round,
                                     const Ranks& ranks) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Tally mine = of_lane.over_warp();
  if (lane == 0) tallies.warps[warp] = mine;
  __syncthreads();
  Tally other{};
  if (lane < blockDim.x / 32) other = tallies.warps[lane];
  if (warp == 0) hand_out(other.over_warp(), tallies, ranks);
  int before = lane < warp ? other.exact : 0;
  if (ranks.count() > 1) tallies.box.wait(round);
  if (lane < ranks.rank()) before += tallies.of_block(lane).exact;
  return __reduce_add_sync(kAllLanes, before);
}

// A byte each of four words: all ones where the word is negative, else zero.
__device__ __forceinline__ unsigned sign_bytes(int a, int b, int c, int d) {
  unsigned front, back, all;
  asm("prmt.b32 %0, %1, %2, 0x00fb;" : "=r"(front) : "r"(a), "r"(b));
  asm("prmt.b32 %0, %1, %2, 0xfb00;" : "=r"(back) : "r"(c), "r"(d));
  asm("prmt.b32 %0, %1, %2, 0x7610;" : "=r"(all) : "r"(front), "r"(back));
  return all;
}

constexpr unsigned kOnes = 0x01010101u;

// What becomes of a lane's four tokens of a tile, a byte each; 1 or 0 in `exact` and `index`.
struct Marks {
  unsigned exact = 0, index = 0;  // the listed ones of these grades
  unsigned grades = 0;

  Marks() = default;
  // By their weights; those of no candidate are of none.
  __device__ __forceinline__ Marks(const int4& bits, const int (&least)[2]) {
    const int a = least[kExactTarget], b = least[kIndexTarget];
    const unsigned below_exact = sign_bytes(bits.x - a, bits.y - a, bits.z - a, bits.w - a);
    const unsigned below_index = sign_bytes(bits.x - b, bits.y - b, bits.z - b, bits.w - b);
    exact = ~below_exact & kOnes;
    index = below_exact & ~below_index & kOnes;
    grades = (~below_exact & kGradeExact * kOnes) | (index & kGradeIndex * kOnes);
  }
};
static_assert(kGradeTail == 0 && kGradeIndex == 1, "Marks adds grades up");

// In the plain case, the grades that a lane's four tokens of a tile have where they are no
// candidates: a list token is dropped, a resident one exact. whole: all are list tokens.
__device__ __forceinline__ unsigned grades_outside(const Share& s, int t, bool whole) {
  if (whole) return kGradeDropped * kOnes;
  unsigned grades = 0;
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    grades |= unsigned(s.lists(t + i) ? kGradeDropped : kGradeExact) << (8 * i);
  }
  return grades;
}

// By their grades in memory.
__device__ inline Marks marks_of_grades(const Share& s, int t) {
  Marks marks;
  for (int i = 0; i < 4; ++i) {
    if (!s.run.holds(t + i) || !s.lists(t + i)) continue;
    const int grade = s.grades[t + i];
    marks.exact |= unsigned(grade == kGradeExact) << (8 * i);
    marks.index |= unsigned(grade == kGradeIndex) << (8 * i);
  }
  return marks;
}

// The mass of a lane's exact tokens of a tile, resident ones too: of the heads' mean, where a set
// need not have been chosen by it.
__device__ inline float mean_mass(const Share& s, const PruneParams& p, int t, unsigned exact) {
  float mass = 0.0f;
  for (int i = 0; i < 4; ++i) {
    if (!s.run.holds(t + i)) continue;
    if (!s.lists(t + i) || (exact >> (8 * i) & 1)) mass += mean_weight(s, p, t + i);
  }
  return mass;
}

// Adds those weights of a lane's four tokens that reach `least`.
__device__ __forceinline__ void add_chosen(const int4& bits, int least, float& mass) {
  if (bits.x >= least) mass += __int_as_float(bits.x);
  if (bits.y >= least) mass += __int_as_float(bits.y);
  if (bits.z >= least) mass += __int_as_float(bits.z);
  if (bits.w >= least) mass += __int_as_float(bits.w);
}

__device__ __forceinline__ void store_four(const Share& s, int t, unsigned grades) {
  *reinterpret_cast<unsigned*>(s.grades + t) = grades;
}

// Writes the grades of a lane's four tokens of any tile, in the plain case. grades: of those that
// are candidates; aligned: whether a tile's can be stored as words.
__device__ __forceinline__ void store_grades(const Share& s, int t, const int4& bits,
                                             unsigned grades, bool aligned) {
  const bool whole = s.lists_tile(t);
  grades |= sign_bytes(bits.x, bits.y, bits.z, bits.w) & grades_outside(s, t, whole);
  if (whole && aligned) {
    store_four(s, t, grades);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    if (s.run.holds(t + i)) s.grades[t + i] = grades >> (8 * i) & 255;
  }
}

// Appends a warp's chosen tokens of a tile to the words of its run, of which those in front of
// token `next` are taken: they take no more than this tile and those before had, which nobody reads
// again. lanes: a bit each where a token is chosen. Returns the new `next`.
__device__ __forceinline__ int append(const Run& run, int next, int t, unsigned chosen,
                                      unsigned lanes) {
  const unsigned below = (1u << threadIdx.x % 32) - 1;
  unsigned more = chosen;
  int mine = next;
#pragma unroll 1
  do {
    mine += __popc(lanes & below);
    next += __popc(lanes);
    more &= more - 1;  // hardly any lane has two
    lanes = __ballot_sync(kAllLanes, more != 0);
  } while (lanes != 0);
#pragma unroll 1
  for (; chosen != 0; chosen &= chosen - 1) run.put(mine++, t + unsigned(__ffs(chosen)) / 8);
  return next;
}

// The one look at a warp's tokens: leaves the exact ones at the front of its run, writes the grades
// in the plain case. `mine` gets what a lane's tokens add up to, but for the exact count, which is
// returned for the warp.
template <bool kPlain>
__device__ __forceinline__ int collect(const Share& s, const PruneParams& p, const int (&least)[2],
                                       Tally& mine) {
  const bool aligned = reinterpret_cast<uintptr_t>(s.grades) % 4 == 0;
  const unsigned easy_tokens = held(kPlain && aligned && !p.dropped ? s.whole_tokens : 0);
  int next = s.run.origin;
#pragma unroll 1
  for (int t = s.run.first(); t < s.run.stop; t += kTile) {
    int4 bits;
    Marks marks;
    if constexpr (kPlain) {
      bits = s.run.load(t);
      marks = Marks(bits, least);
      if (unsigned(t - s.whole_from) < easy_tokens) {
        store_four(s, t, marks.grades);
      } else {
        store_grades(s, t, bits, marks.grades, aligned);
      }
    } else {
      marks = marks_of_grades(s, t);
      mine.mass += mean_mass(s, p, t, marks.exact);
    }
    mine.index = __dp4a(marks.index, kOnes, unsigned(mine.index));
    const unsigned lanes = __ballot_sync(kAllLanes, marks.exact != 0);
    if (lanes == 0) continue;
    if constexpr (kPlain) add_chosen(bits, least[kExactTarget], mine.mass);
    next = append(s.run, next, t, marks.exact, lanes);
  }
  return next - s.run.origin;
}

// Writes the list, counts and mass, and in the plain case the grades. resident: the mass of a
// lane's resident tokens.
template <bool kPlain>
__device__ __forceinline__ void write_lists(const Share& s, const PruneParams& p,
                                            const Target (&targets)[2], float resident,
                                            const Ranks& ranks, Tallies& tallies) {
  const int lane = threadIdx.x % 32;
  const int least[2] = {targets[kExactTarget].least, targets[kIndexTarget].least};
  Tally mine{0, 0, kPlain ? resident : 0.0f};
  const int count = collect<kPlain>(s, p, least, mine);
  if (lane == 0) mine.exact = count;
  const int place = exact_in_front(mine, tallies, 0, ranks);
  int* list = p.exact_tokens + s.row * p.exact_capacity + place;
#pragma unroll 1
  for (int i = lane; i < count; i += 32) list[i] = s.run.word(s.run.origin + i);
  if (ranks.rank() > 0 || threadIdx.x >= 32) return;
  Tally all{};
  if (lane < ranks.count()) all = tallies.of_block(lane);
  all = all.over_warp();
  if (lane == 0) {
    p.exact_counts[s.row] = all.exact;
    p.index_counts[s.row] = all.index;
    p.mass[s.row] = all.mass;
  }
}

}  // namespace twilight
