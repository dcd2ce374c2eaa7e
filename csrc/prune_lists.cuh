// What becomes of tokens whose thresholds are known in csrc/prune.cu: grades, lists, counts, mass.
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

// Where the blocks of a cluster and a block's warps read each other's tallies.
struct Tallies {
  Tally warps[kWarps];
  Tally block;
};

// The sum of the warps' tallies in front of this one, in this block and the ones before.
__device__ inline Tally tally_in_front(const Tally& of_lane, Tallies& tallies, const Ranks& ranks) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Tally mine = of_lane.over_warp();
  if (lane == 0) tallies.warps[warp] = mine;
  __syncthreads();
  Tally other{}, before{};
  if (lane < kWarps) other = tallies.warps[lane];
  if (warp == 0) {
    const Tally all = other.over_warp();
    if (lane == 0) tallies.block = all;
  }
  ranks.sync();
  if (lane < warp) before = other;
  if (lane < ranks.rank()) {
    const Tally* block = ranks.of(&tallies.block, lane);
    before.exact += block->exact;
    before.index += block->index;
  }
  return before.over_warp();
}

// What becomes of a lane's four tokens of a tile: a bit each where it is listed, a byte of grades.
struct Marks {
  unsigned exact = 0, index = 0, grades = 0;
  float mass = 0.0f;  // of the listed exact ones

  // By their weights.
  __device__ Marks(const float4& weights, const int (&least)[2]) {
    const float w[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int bits = __float_as_int(w[i]);
      const bool is_exact = bits >= least[kExactTarget];
      const bool is_index = !is_exact && bits >= least[kIndexTarget];
      exact |= unsigned(is_exact) << i;
      index |= unsigned(is_index) << i;
      const unsigned grade = is_exact || bits < 0 ? kGradeExact
                             : is_index           ? kGradeIndex
                                                  : kGradeTail;
      grades |= grade << (8 * i);
      mass += is_exact ? w[i] : 0.0f;
    }
  }
  // By their grades in memory.
  __device__ Marks(const Share& s, int t) {
    for (int i = 0; i < 4; ++i) {
      if (!s.run.holds(t + i) || !s.lists(t + i)) continue;
      const int grade = s.grades[t + i];
      exact |= unsigned(grade == kGradeExact) << i;
      index |= unsigned(grade == kGradeIndex) << i;
    }
  }
};

template <bool kPlain>
__device__ __forceinline__ Marks marks_of(const Share& s, const int (&least)[2], int tile) {
  if constexpr (kPlain) return Marks(s.run.load(tile), least);
  return Marks(s, s.run.token(tile));
}

// What a lane's tokens add to the lists, and the exact mass of them all: of the weights, or of the
// heads' mean where a set need not have been chosen by it.
template <bool kPlain>
__device__ Tally tally_lane(const Share& s, const PruneParams& p, const int (&least)[2],
                            float resident) {
  Tally mine{};
  if (kPlain) mine.mass = resident;
  for (int tile = 0; tile < s.run.tiles; ++tile) {
    const Marks marks = marks_of<kPlain>(s, least, tile);
    mine.exact += __popc(marks.exact);
    mine.index += __popc(marks.index);
    mine.mass += marks.mass;
    if (kPlain) continue;
    const int t = s.run.token(tile);
    for (int i = 0; i < 4; ++i) {
      if (!s.run.holds(t + i)) continue;
      if (!s.lists(t + i) || (marks.exact >> i & 1)) mine.mass += mean_weight(s, p, t + i);
    }
  }
  return mine;
}

// Appends a warp's chosen tokens to a list; returns the place behind them.
__device__ __forceinline__ int append(int* list, int place, int t, unsigned chosen) {
  if (!__any_sync(kAllLanes, chosen != 0)) return place;
  const unsigned below = (1u << threadIdx.x % 32) - 1;
  int mine = place;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const unsigned lanes = __ballot_sync(kAllLanes, chosen >> i & 1);
    mine += __popc(lanes & below);
    place += __popc(lanes);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (chosen >> i & 1) list[mine++] = t + i;
  }
  return place;
}

__device__ __forceinline__ void store_grades(const Share& s, int t, unsigned grades) {
  uint8_t* to = s.grades + t;
  if (s.run.holds(t) && s.run.holds(t + 3) && reinterpret_cast<uintptr_t>(to) % 4 == 0) {
    *reinterpret_cast<unsigned*>(to) = grades;
    return;
  }
  for (int i = 0; i < 4; ++i) {
    if (s.run.holds(t + i)) to[i] = grades >> (8 * i) & 255;
  }
}

// Writes the lists, counts and mass, and in the plain case the grades.
template <bool kPlain>
__device__ void write_lists(const Share& s, const PruneParams& p, const Target (&targets)[2],
                            float resident, const Ranks& ranks, Tallies& tallies) {
  const int least[2] = {targets[kExactTarget].least, targets[kIndexTarget].least};
  const Tally mine = tally_lane<kPlain>(s, p, least, resident);
  Tally place = tally_in_front(mine, tallies, ranks);
  if (ranks.rank() == 0 && threadIdx.x < 32) {
    Tally all{};
    if (threadIdx.x < ranks.count()) all = *ranks.of(&tallies.block, threadIdx.x);
    all = all.over_warp();
    if (threadIdx.x == 0) {
      p.exact_counts[s.row] = all.exact;
      p.index_counts[s.row] = all.index;
      p.mass[s.row] = all.mass;
    }
    __syncwarp();
  }
  ranks.arrive();  // this block has read the others'
  int* exact = p.exact_tokens + s.row * p.exact_capacity;
  int* index = p.index_tokens + s.row * p.index_capacity;
  for (int tile = 0; tile < s.run.tiles; ++tile) {
    const Marks marks = marks_of<kPlain>(s, least, tile);
    const int t = s.run.token(tile);
    if (kPlain) store_grades(s, t, marks.grades);
    place.exact = append(exact, place.exact, t, marks.exact);
    place.index = append(index, place.index, t, marks.index);
  }
  ranks.wait();  // no block leaves while another reads its shared memory
}

}  // namespace twilight
