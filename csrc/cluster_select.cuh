// Radix select over non-negative floats that the warps of a cluster of blocks hold, by count or by
// mass; what csrc/prune.cu finds its thresholds with.
//
// A threshold is found on the floats' bits, whose order is theirs, by histograms of 10 bits each,
// from the top: two for a mass, whose threshold is the least value with these 20 leading bits (its
// ties lie within 2^-13 of it), three for a count. The loop is bounded and ties stay together. It
// ends early where a bin's values are all wanted or only one. Bins add mantissas in 32 bits,
// rounded so that they cannot overflow: to 19 bits for 8,192 tokens a block, whose errors average
// out. All sums are whole numbers, those of masses in units of 2^-44: nothing depends on the order
// of additions, so a result repeats. In a pass a block sends its sums of 32 bins each (coarse) to
// all blocks, then the bins of the group that the threshold is in (fine), and all reach the same
// threshold: a warp for each target and receiver, since one warp's sends to all in turn would take
// as long as a message does.
#pragma once

#include <cstdint>

#include "csrc/block_scan.cuh"
#include "csrc/cluster_exchange.cuh"
#include "csrc/common.cuh"
#include "csrc/ranks.cuh"
#include "csrc/weight_histogram.cuh"

namespace twilight {

constexpr int kMostWarps = 32;        // of a block
constexpr int kMostRanks = 16;        // blocks of a cluster, where a few clusters are all there are
constexpr float kMostMass = 0.9999f;  // the most that a margin raises a mass to

// What tokens add up to beside their weights' histogram. Floats, added in an order that does not
// change: what they are rounded by is far below a mass target's steps.
struct alignas(uint64_t) Masses {
  float resident = 0.0f;  // of resident tokens
  float variance = 0.0f;  // of the list tokens' weights, by their standard errors

  __device__ __forceinline__ void add_error(float square) {
    if (square > 0.0f) variance += square;
  }
  __device__ void add(const Masses& other) {
    resident += other.resident;
    variance += other.variance;
  }
  // Summed over a warp's lanes; the same in all of them.
  __device__ Masses over_warp() const {
    Masses all = *this;
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
      all.add({__shfl_xor_sync(kAllLanes, all.resident, mask),
               __shfl_xor_sync(kAllLanes, all.variance, mask)});
    }
    return all;
  }
  __device__ uint64_t word() const {
    return uint64_t(__float_as_uint(variance)) << 32 | __float_as_uint(resident);
  }
};

// What a target's exchanges bring of a block. Coarse sums come by turns: a block that has got all
// fine ones may send the next while a warp of another still reads.
struct BlockSums {
  struct Coarse {
    uint64_t sums[kGroups];
    Masses masses;
  };
  Coarse coarse[2];
  uint64_t fine[32];
};

// A target's exchanges.
struct Exchanges {
  Mailbox coarse, fine;
};

constexpr int kBlockWords = sizeof(BlockSums) / sizeof(uint64_t);

// What a block's warps share.
struct SelectShared {
  uint4 histograms[2][kBins];   // by pass parity; a bin's kParts parts, two a target but in `one`
  uint64_t coarse[2][kGroups];  // this block's sums, by target
  Masses warp_masses[kMostWarps];
  Target targets[2];
  Exchanges exchanges[2];  // by target
};

// Where a row's select stands; the same in all threads of a cluster.
struct SelectState {
  int drop;           // bits of a mantissa that a histogram rounds off, lest a part overflow
  int num_passes;     // of all rules so far
  unsigned round;     // passes so far of the target that this warp narrows
  BlockSums* blocks;  // shared memory: by target, by block
};

// Before the first weights, and before the cluster's blocks have all started.
__device__ inline void prepare(SelectShared& shared) {
  for (int i = threadIdx.x; i < kBins; i += blockDim.x) {
    shared.histograms[0][i] = make_uint4(0, 0, 0, 0);
  }
  if (threadIdx.x > 0) return;
  for (Exchanges& own : shared.exchanges) {
    own.coarse.open();
    own.fine.open();
  }
}

// A warp's sum of values below 2^63, of which it is below 2^63 too.
__device__ inline uint64_t warp_sum(uint64_t value) {
  constexpr unsigned kMask = (1u << 21) - 1;
  const uint64_t low = __reduce_add_sync(kAllLanes, unsigned(value) & kMask);
  const uint64_t middle = __reduce_add_sync(kAllLanes, unsigned(value >> 21) & kMask);
  const uint64_t high = __reduce_add_sync(kAllLanes, unsigned(value >> 42));
  return (high << 42) + (middle << 21) + low;
}

// Leaves the sums of a histogram's groups in shared.coarse, and the other histogram empty. one: a
// histogram of both targets.
template <bool kPlain>
__device__ __forceinline__ void sum_groups(SelectShared& shared, const uint4* histogram,
                                           uint4* other, int pass, bool one, int drop) {
  const Target targets[2] = {shared.targets[0], shared.targets[1]};  // read once
#pragma unroll 1
  for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) {
    const uint4 parts = histogram[bin];
    other[bin] = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (one ? i > 0 : !targets[i].open) continue;
      const int bits = bits_of(one ? 0 : targets[i].least, bin, pass);
      const uint64_t sum =
          warp_sum(sum_of_bin(parts, i, one, !kPlain && !one && targets[i].by_count, bits, drop));
      if (threadIdx.x % 32 == 0) shared.coarse[i][bin / 32] = sum;
    }
  }
}

// Where, of 32 sums and from the last down, what is wanted is reached.
struct Crossing {
  int at;           // -1: nowhere
  uint64_t before;  // the sums above
  uint64_t inside;
};

// Run by one warp; mine: the sum of number 31 - lane.
__device__ inline Crossing find_crossing(uint64_t mine, uint64_t want) {
  const uint64_t sum = warp_inclusive_sum(mine);
  const unsigned reached = __ballot_sync(kAllLanes, sum >= want);
  const int first = reached == 0 ? 31 : __ffs(reached) - 1;
  const uint64_t inside = __shfl_sync(kAllLanes, mine, first);
  return {reached == 0 ? -1 : 31 - first, __shfl_sync(kAllLanes, sum, first) - inside, inside};
}

// Narrows a target to the bin that it is reached in, and closes it where that is enough.
__device__ inline void settle(Target& target, int pass, bool by_count, const Crossing& group,
                              const Crossing& bin) {
  target.want -= group.before + bin.before;
  target.least = target.least << kBinBits | 32 * group.at + bin.at;
  const int bits = target.least << shift_of(pass);
  const uint64_t one = sum_of_bin(by_count ? 1 : Rounding(0).mantissa(bits), by_count, bits, 0);
  if (pass + 1 == kPasses) {
    target.open = false;
    if (by_count) target.ties = int(target.want);
  } else if ((!by_count && pass + 1 == kMassPasses) || 2 * bin.inside < 3 * one ||
             2 * target.want + one > 2 * bin.inside) {
    target.open = false;  // the bin is a mass's last or holds one value, or all of it is wanted
    target.least = bits;
  }
}

// A mass raised by standard errors whose squares' sum is `variance`: half the weights lie on either
// side of a set's edge at worst, so an error of the weights moves a set of mass p by
// sqrt(p * (1 - p)) of it.
__device__ inline float with_margin(float p, float variance) {
  float raise;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(raise) : "f"(p * (1.0f - p) * variance));
  return fmaxf(p, fminf(kMostMass, p + raise));
}

// What a mass target wants beyond the resident tokens, or that it wants nothing.
__device__ inline void want_mass(Target& target, const Masses& masses) {
  float mass = target.top;
  if (target.margin > 0.f) {
    mass = with_margin(mass, target.margin * target.margin * masses.variance);
  }
  const float missing = mass - masses.resident;
  if (missing <= 0) {
    target.least = kNothing, target.open = false;
  } else {
    target.want = __float2ull_ru(missing * float(uint64_t(1) << kMassBits));
  }
}

// The target that a warp narrows, and the first block that it sends to: the warps of a target share
// the blocks out.
__device__ inline int target_of_warp() { return threadIdx.x / 32 % 2; }
__device__ inline int first_receiver() { return threadIdx.x / 64; }
// The one of a target's warps that settles it.
__device__ inline bool leads() { return threadIdx.x < 64; }

// Sends each lane's word to slot [of this block][lane] of this warp's receivers.
__device__ __forceinline__ void send_words(Mailbox& box, uint64_t* slots, uint64_t word,
                                           const Ranks& ranks) {
  uint64_t* to = slots + ranks.rank() * kBlockWords + threadIdx.x % 32;
#pragma unroll 1
  for (int r = first_receiver(); r < ranks.count(); r += blockDim.x / 64) box.send(to, r, word);
}

// Each lane's words of all blocks, added up.
__device__ __forceinline__ uint64_t sum_words(const uint64_t* slots, const Ranks& ranks) {
  const uint64_t* from = slots + threadIdx.x % 32;
  uint64_t sum = 0;
#pragma unroll 8
  for (int r = 0; r < ranks.count(); ++r) sum += from[r * kBlockWords];
  return sum;
}

// A group's sum over the cluster, of which `mine` is this block's. of_warps: the block's masses, by
// warp, whose sum over the cluster `masses` gets; null: not wanted.
__device__ __forceinline__ uint64_t exchange_coarse(Exchanges& own, BlockSums* blocks,
                                                    uint64_t mine, const Masses* of_warps,
                                                    Masses& masses, unsigned round,
                                                    const Ranks& ranks) {
  const int count = ranks.count(), lane = threadIdx.x % 32, turn = round & 1;
  const bool alone = count == 1;
  if (!alone) {
    if (leads() && lane == 0) {
      own.coarse.expect(count * (32 * 8 + (of_warps ? sizeof(Masses) : 0)));
    }
    send_words(own.coarse, blocks->coarse[turn].sums, mine, ranks);
  }
  if (of_warps != nullptr && leads()) {  // added up while the groups' sums are on their way
    if (lane < blockDim.x / 32) masses = of_warps[lane];
    masses = masses.over_warp();
    if (!alone && lane < count) {
      Masses& to = blocks[ranks.rank()].coarse[turn].masses;
      own.coarse.send(reinterpret_cast<uint64_t*>(&to), lane, masses.word());
    }
  }
  if (alone) return mine;
  own.coarse.wait(round);
  if (of_warps != nullptr) {
    masses = Masses{};
#pragma unroll 4
    for (int r = 0; r < count; ++r) masses.add(blocks[r].coarse[turn].masses);
  }
  return sum_words(blocks->coarse[turn].sums, ranks);
}

// Narrows a target by one histogram, over all blocks; run by its warps, of which the first one gets
// the outcome. Both exchanges take place even where the first one settles it: they tell that all
// blocks have read what came before.
template <bool kPlain>
__device__ __forceinline__ void narrow(Target& target, SelectShared& shared,
                                       const SelectState& state, const uint4* histogram, int i,
                                       int pass, bool one, const Ranks& ranks) {
  Exchanges& own = shared.exchanges[i];
  BlockSums* blocks = state.blocks + i * ranks.count();
  const int from_top = 31 - threadIdx.x % 32;
  const bool by_count = !kPlain && target.by_count;
  Masses masses;
  const uint64_t in_group =
      exchange_coarse(own, blocks, shared.coarse[one ? 0 : i][from_top],
                      pass == 0 ? shared.warp_masses : nullptr, masses, state.round, ranks);
  if (pass == 0 && !by_count) want_mass(target, masses);
  const Crossing group = find_crossing(in_group, target.want);
  const int bin = 32 * max(group.at, 0) + from_top;
  uint64_t in_bin =
      sum_of_bin(histogram[bin], i, one, by_count, bits_of(target.least, bin, pass), state.drop);
  if (ranks.count() > 1) {
    if (leads() && threadIdx.x % 32 == 0) own.fine.expect(ranks.count() * 32 * 8);
    send_words(own.fine, blocks->fine, in_bin, ranks);
    if (!leads()) return;
    own.fine.wait(state.round);
    in_bin = sum_words(blocks->fine, ranks);
  }
  if (!target.open) return;  // the resident tokens are enough
  if (group.at < 0) {        // all that have these bits do not reach it, up to rounding
    target.least <<= shift_of(pass) + kBinBits;
    target.open = false;
    return;
  }
  settle(target, pass, by_count, group, find_crossing(in_bin, target.want - group.before));
}

// Adds the run's weights that begin with an open target's bits to its histogram.
template <bool kPlain>
__device__ __forceinline__ void add_matching(const Run& run, const Adder<kPlain>& adder) {
#pragma unroll 1
  for (int t = run.first(); t < run.stop; t += kTile) {
    const int4 bits = run.load(t);
    adder.add(bits.x);
    adder.add(bits.y);
    adder.add(bits.z);
    adder.add(bits.w);
  }
}

// Narrows both targets to their thresholds. The first histograms hold the run's weights already;
// shared.targets and warp_masses are set, and visible at the block's next barrier.
template <bool kPlain>
__device__ __forceinline__ void select(const Run& run, SelectState& state, const Ranks& ranks,
                                       SelectShared& shared) {
  const Target(&targets)[2] = shared.targets;
  const int mine = target_of_warp();
  __syncthreads();
#pragma unroll 1
  for (int pass = 0; targets[0].open || targets[1].open; ++pass) {
    const bool one = pass == 0 && (kPlain || share_first(targets));
    uint4* histogram = shared.histograms[state.num_passes & 1];
    uint4* other = shared.histograms[++state.num_passes & 1];
    if (pass > 0) {
      add_matching(run, Adder<kPlain>(targets, histogram, pass, state.drop));
      __syncthreads();
    }
    Target target = targets[mine];  // read before the first of its warps may be done
    sum_groups<kPlain>(shared, histogram, other, pass, one, state.drop);
    __syncthreads();
    if (target.open && first_receiver() < ranks.count()) {
      narrow<kPlain>(target, shared, state, histogram, mine, pass, one, ranks);
      __syncwarp();
      if (leads() && threadIdx.x % 32 == 0) shared.targets[mine] = target;
      ++state.round;
    }
    __syncthreads();
  }
}

}  // namespace twilight
