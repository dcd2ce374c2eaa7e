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

// What becomes of a lane's four tokens of a tile, a byte each. Only the lowest bit of `exact` and
// `index` counts.
struct Marks {
  unsigned exact = 0, index = 0;  // the listed ones of these grades
  unsigned grades = 0;

  Marks() = default;
  // By their weights; outside: the grades of those of no candidate.
  __device__ __forceinline__ Marks(const int4& bits, const int (&least)[2], unsigned outside) {
    const int a = least[kExactTarget], b = least[kIndexTarget];
    const unsigned below_exact = sign_bytes(bits.x - a, bits.y - a, bits.z - a, bits.w - a);
    const unsigned below_index = sign_bytes(bits.x - b, bits.y - b, bits.z - b, bits.w - b);
    exact = ~below_exact & kOnes;
    index = below_exact & ~below_index & kOnes;
    grades = (~below_exact & kGradeExact * kOnes) | (index & kGradeIndex * kOnes);
    if (outside != 0) grades |= sign_bytes(bits.x, bits.y, bits.z, bits.w) & outside;
  }
};
static_assert(kGradeTail == 0 && kGradeIndex == 1, "Marks adds grades up");

// In the plain case, the grades that a lane's four tokens of a tile have where they are no
// candidates: a list token is dropped, a resident one exact. 0: they all are candidates.
__device__ __forceinline__ unsigned grades_outside(const Share& s, const PruneParams& p, int t,
                                                   bool whole) {
  if (whole) return p.dropped ? kGradeDropped * kOnes : 0;
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

__device__ __forceinline__ float chosen_mass(const int4& bits, unsigned exact) {
  const float w[4] = {__int_as_float(bits.x), __int_as_float(bits.y), __int_as_float(bits.z),
                      __int_as_float(bits.w)};
  float mass = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) mass += exact >> (8 * i) & 1 ? w[i] : 0.0f;
  return mass;
}

__device__ __forceinline__ void store_grades(const Share& s, int t, unsigned grades, bool whole) {
  uint8_t* to = s.grades + t;
  if (whole && reinterpret_cast<uintptr_t>(to) % 4 == 0) {
    *reinterpret_cast<unsigned*>(to) = grades;
    return;
  }
  for (int i = 0; i < 4; ++i) {
    if (s.run.holds(t + i)) to[i] = grades >> (8 * i) & 255;
  }
}

// Appends a warp's chosen tokens of a tile to the words of its run, `count` so far: they take no
// more than this tile and those before had, which nobody reads again. Returns the new count.
__device__ __forceinline__ int append(const Run& run, int count, int t, unsigned chosen) {
  const unsigned below = (1u << threadIdx.x % 32) - 1;
  const int chosen_here = __popc(chosen);
  int mine = count;
#pragma unroll 1
  for (int n = 1; n <= 4; ++n) {  // lanes with n or more; hardly any has two
    const unsigned lanes = __ballot_sync(kAllLanes, chosen_here >= n);
    if (lanes == 0) break;
    mine += __popc(lanes & below);
    count += __popc(lanes);
  }
#pragma unroll 1
  for (; chosen != 0; chosen &= chosen - 1) run.put(mine++, t + unsigned(__ffs(chosen)) / 8);
  return count;
}

// The one look at a warp's tokens: leaves the exact ones at the front of its run, writes the grades
// in the plain case. `mine` gets what a lane's tokens add up to, but for the exact count, which is
// returned for the warp.
template <bool kPlain>
__device__ __forceinline__ int collect(const Share& s, const PruneParams& p, const int (&least)[2],
                                       Tally& mine) {
  int count = 0;
#pragma unroll 1
  for (int tile = 0, left = s.run.tiles; left > 0; ++tile, --left) {
    const int t = s.run.token(tile);
    int4 bits;
    Marks marks;
    if constexpr (kPlain) {
      const bool whole = s.lists_tile(tile);
      bits = s.run.load(tile);
      marks = Marks(bits, least, grades_outside(s, p, t, whole));
      store_grades(s, t, marks.grades, whole);
    } else {
      marks = marks_of_grades(s, t);
      mine.mass += mean_mass(s, p, t, marks.exact);
    }
    mine.index += __popc(marks.index);
    if (!__any_sync(kAllLanes, marks.exact != 0)) continue;
    if constexpr (kPlain) mine.mass += chosen_mass(bits, marks.exact);
    count = append(s.run, count, t, marks.exact);
  }
  return count;
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
  for (int i = lane; i < count; i += 32) list[i] = s.run.word(i);
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
