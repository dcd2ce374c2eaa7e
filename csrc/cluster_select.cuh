// Radix select over non-negative floats that the warps of a cluster of blocks hold, by count or by
// mass; what csrc/prune.cu finds its thresholds with.
//
// A threshold is found on the floats' bits, whose order is theirs: three histograms, of 10 bits
// each, narrow it from the top to one value, so the loop is bounded and ties stay together. It ends
// early where a bin's values are all wanted or only one. Bins add mantissas in 32 bits, rounded so
// that they cannot overflow: to 19 bits for 8,192 tokens a block, whose errors average out. Sums
// within a block are whole numbers and blocks are added in order: nothing depends on the order of
// additions, so a result repeats. A pass has one barrier of the cluster: each block then reads the
// others' sums of 32 bins (coarse) and of the bins of one such group (fine), and all reach the same
// threshold.
#pragma once

#include <climits>
#include <cstdint>

#include "csrc/common.cuh"
#include "csrc/ranks.cuh"

namespace twilight {

constexpr int kLogWarps = 4;
constexpr int kWarps = 1 << kLogWarps;
constexpr int kThreads = 32 * kWarps;  // two blocks a multiprocessor, of 64 registers a thread
constexpr int kBins = 1024;
constexpr int kBinBits = 10;
constexpr int kPasses = 3;             // 30 bits: those of a float in [0, 1]
constexpr int kParts = 4;              // of a bin, by lane: equal weights of a warp queue less
constexpr int kGroups = kBins / 32;    // of bins
constexpr int kTile = 128;             // tokens that a warp takes at once, four a lane
constexpr float kMassUnit = 0x1p44f;   // 2^17 tokens rounded down lose less than 1e-8
constexpr double kMostMass = 0.9999;   // the most that a margin raises a mass to
constexpr float kNotCandidate = -1.f;  // its bits are below every threshold
constexpr int kNothing = INT_MAX;      // a threshold that no weight's bits reach
constexpr int kEverything = 0;         // one that each candidate's do
constexpr int kExactTarget = 0;
constexpr int kIndexTarget = 1;
constexpr unsigned kAllLanes = 0xffffffffu;

// A warp's tokens and their weights, by tile; those of no candidate are negative.
struct Run {
  int begin, end;  // tokens
  int origin;      // begin, rounded down to four tokens
  int tiles;       // from origin on
  int kept_tiles;
  float* kept;  // shared memory, 16-byte aligned: the first kept_tiles tiles
  float* rest;  // global memory, likewise: the others

  __device__ bool holds(int t) const { return t >= begin && t < end; }
  __device__ int token(int tile) const { return origin + tile * kTile + threadIdx.x % 32 * 4; }

  __device__ float at(int t) const {
    const int i = t - origin, in_rest = i - kept_tiles * kTile;
    return in_rest < 0 ? kept[i] : rest[in_rest];
  }
  // This lane's four tokens of a tile.
  __device__ float4 load(int tile) const {
    const int lane = threadIdx.x % 32, in_rest = tile - kept_tiles;
    if (in_rest < 0) return reinterpret_cast<const float4*>(kept)[tile * 32 + lane];
    return reinterpret_cast<const float4*>(rest)[in_rest * 32 + lane];
  }
  __device__ void store(int tile, const float4& weights) const {
    const int lane = threadIdx.x % 32, in_rest = tile - kept_tiles;
    if (in_rest < 0) {
      reinterpret_cast<float4*>(kept)[tile * 32 + lane] = weights;
    } else {
      reinterpret_cast<float4*>(rest)[in_rest * 32 + lane] = weights;
    }
  }
};

// One threshold on its way: bits chosen so far, and what is still wanted among those that match.
struct Target {
  float top;      // the mass wanted of the whole context
  float margin;   // standard errors that it is raised by
  bool by_count;  // tokens are wanted instead
  bool open;      // still to be narrowed
  uint64_t want;  // tokens, or mass units
  int least;      // the threshold; while open, its leading bits
  int ties;       // tokens with exactly these bits to take, the first by position
};

// A block's sums of a histogram, as the other blocks read them.
struct Sums {
  float fine[kBins];         // masses, or counts
  uint64_t coarse[kGroups];  // mass units, or counts
};

// What tokens add up to beside their weights' histogram.
struct Masses {
  double resident;  // of resident tokens
  double variance;  // of the list tokens' weights, by their standard errors

  // Summed over a warp's lanes.
  __device__ Masses over_warp() const {
    Masses all = *this;
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
      all.resident += __shfl_xor_sync(kAllLanes, all.resident, mask);
      all.variance += __shfl_xor_sync(kAllLanes, all.variance, mask);
    }
    return all;
  }
};

// What the blocks of a cluster read of each other, and a block's warps of each other.
struct SelectShared {
  uint4 histogram[kBins];  // a bin's kParts parts; two a target where each has its own
  Sums sums[2][2];         // by pass parity, by target
  Masses masses[2];        // of this block's tokens, by rule parity
  Masses warp_masses[kWarps];
  Target targets[2];
};

// Where a row's select stands; the same in all threads of a cluster.
struct SelectState {
  int drop;        // bits of a mantissa that a histogram rounds off, lest a part overflow
  int num_passes;  // of all rules so far
};

// The bits to round off where a part of a bin may take `tokens` mantissas of 24 bits.
__device__ inline int bits_to_drop(int tokens) { return max(0, 32 - __clz(tokens) - 8); }

__device__ inline int shift_of(int pass) { return (kPasses - 1 - pass) * kBinBits; }

// Whether both targets' first histograms are one: that of all weights.
__device__ inline bool share_first(const Target (&targets)[2]) {
  return !(targets[kExactTarget].open && targets[kExactTarget].by_count);
}

__device__ inline void clear(SelectShared& shared) {
  for (int i = threadIdx.x; i < kBins; i += kThreads) shared.histogram[i] = make_uint4(0, 0, 0, 0);
}

__device__ inline void add_to_bin(SelectShared& shared, int bin, int part, unsigned value) {
  if (value != 0) atomicAdd(reinterpret_cast<unsigned*>(&shared.histogram[bin]) + part, value);
}

// A weight as its histogram adds it up: its mantissa, whose exponent the bin tells.
__device__ inline unsigned mantissa(int bits, int drop) {
  const unsigned whole = (bits & 0x7fffff) | (bits >> 23 != 0 ? 0x800000 : 0);
  return (whole + (1u << drop >> 1)) >> drop;
}

// Adds a candidate's weight to the first histogram that both targets share.
__device__ inline void add_first(SelectShared& shared, int bits, int drop) {
  add_to_bin(shared, bits >> shift_of(0), threadIdx.x % kParts, mantissa(bits, drop));
}

// Adds a candidate's weight to the histogram of each open target whose leading bits it has.
__device__ inline void add(SelectShared& shared, const Target (&targets)[2], int pass, int bits,
                           int drop) {
  const int shift = shift_of(pass);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Target& target = targets[i];
    if (!target.open || bits >> (shift + kBinBits) != target.least) continue;
    add_to_bin(shared, bits >> shift & (kBins - 1), 2 * i + threadIdx.x % 2,
               target.by_count ? 1 : mantissa(bits, drop));
  }
}

__device__ inline uint64_t whole_units(float value, bool by_count) {
  return __float2ull_rz(by_count ? value : value * kMassUnit);
}

// What a bin's parts add up to: a count, or the mass of mantissas at the exponent of `bits`.
__device__ inline float sum_of_bin(uint64_t parts, bool by_count, int bits, int drop) {
  if (by_count || parts == 0) return float(parts);
  const int exponent = max(bits >> 23, 1);  // 0 counts like 1
  return ldexpf(float(parts), exponent - 150 + drop);
}

// Hands this block's histograms to the cluster and clears them. one: a histogram of both targets.
__device__ inline void publish(SelectShared& shared, Sums (&sums)[2], int pass, bool one,
                               int drop) {
  const Target(&targets)[2] = shared.targets;
#pragma unroll
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
    const uint4 parts = shared.histogram[bin];
    shared.histogram[bin] = make_uint4(0, 0, 0, 0);
    const uint64_t halves[2] = {uint64_t(parts.x) + parts.y, uint64_t(parts.z) + parts.w};
    if (one) {
      const int bits = bin << shift_of(pass);
      sums[0].fine[bin] = sum_of_bin(halves[0] + halves[1], false, bits, drop);
      continue;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!targets[i].open) continue;
      const int bits = (targets[i].least << kBinBits | bin) << shift_of(pass);
      sums[i].fine[bin] = sum_of_bin(halves[i], targets[i].by_count, bits, drop);
    }
  }
  __syncthreads();
  constexpr int kShare = kThreads / 2 / kGroups;  // threads a group of bins and target
  const int i = threadIdx.x / (kThreads / 2), group = threadIdx.x / kShare % kGroups;
  if (one ? i > 0 : !targets[i].open) return;
  const bool by_count = !one && targets[i].by_count;
  const float* fine = sums[i].fine + 32 * group + 32 / kShare * (threadIdx.x % kShare);
  uint64_t sum = 0;
#pragma unroll
  for (int j = 0; j < 32 / kShare; ++j) sum += whole_units(fine[j], by_count);
#pragma unroll
  for (int mask = 1; mask < kShare; mask *= 2) sum += __shfl_xor_sync(kAllLanes, sum, mask);
  if (threadIdx.x % kShare == 0) sums[i].coarse[group] = sum;
}

// Where, of 32 sums and from the last down, what is wanted is reached.
struct Crossing {
  int at;           // -1: nowhere
  uint64_t before;  // the sums above
  uint64_t inside;
};

// Run by one warp; mine: the sum of number 31 - lane.
__device__ inline Crossing find_crossing(uint64_t mine, uint64_t want) {
  const int lane = threadIdx.x % 32;
  uint64_t sum = mine;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint64_t other = __shfl_up_sync(kAllLanes, sum, offset);
    if (lane >= offset) sum += other;
  }
  const unsigned reached = __ballot_sync(kAllLanes, sum >= want);
  const int first = reached == 0 ? 31 : __ffs(reached) - 1;
  const uint64_t inside = __shfl_sync(kAllLanes, mine, first);
  return {reached == 0 ? -1 : 31 - first, __shfl_sync(kAllLanes, sum, first) - inside, inside};
}

// Run by one warp: narrows a target by one histogram, over all blocks.
__device__ inline void narrow(Target& target, int pass, const Sums& sums, const Ranks& ranks) {
  const int from_top = 31 - threadIdx.x % 32;
  uint64_t mine = 0;
#pragma unroll 8
  for (int r = 0; r < ranks.count(); ++r) mine += *ranks.of(&sums.coarse[from_top], r);
  const Crossing group = find_crossing(mine, target.want);
  if (group.at < 0) {  // all that have these bits do not reach it, up to rounding
    target.least <<= shift_of(pass) + kBinBits;
    target.open = false;
    return;
  }
  mine = 0;
#pragma unroll 8
  for (int r = 0; r < ranks.count(); ++r) {
    mine += whole_units(*ranks.of(&sums.fine[32 * group.at + from_top], r), target.by_count);
  }
  const Crossing bin = find_crossing(mine, target.want - group.before);
  target.want -= group.before + bin.before;
  target.least = target.least << kBinBits | 32 * group.at + bin.at;
  const int bits = target.least << shift_of(pass);
  const uint64_t one = target.by_count ? 1 : whole_units(__int_as_float(bits), false);
  if (pass + 1 == kPasses) {
    target.open = false;
    if (target.by_count) target.ties = int(target.want);
  } else if (2 * bin.inside < 3 * one || 2 * target.want + one > 2 * bin.inside) {
    target.open = false;  // the bin holds one value, or all of it is wanted
    target.least = bits;
  }
}

// A mass with its margin: half the weights lie on either side of a set's edge at worst, so an error
// of the weights moves a set of mass p by sqrt(p * (1 - p)) of it.
__device__ inline double with_margin(double p, double variance) {
  return fmax(p, fmin(kMostMass, p + sqrtf(float(p * (1.0 - p) * variance))));
}

// Run by one warp: what a mass target wants beyond the resident tokens, or that it wants nothing.
__device__ inline void want_mass(Target& target, int rule, const Ranks& ranks,
                                 const SelectShared& shared) {
  const int lane = threadIdx.x % 32;
  Masses masses{};
  if (lane < ranks.count()) masses = *ranks.of(&shared.masses[rule & 1], lane);
  masses = masses.over_warp();
  double mass = target.top;
  if (target.margin > 0.f) {
    mass = with_margin(mass, double(target.margin) * target.margin * masses.variance);
  }
  const double missing = mass - masses.resident;
  if (missing <= 0) {
    target.least = kNothing, target.open = false;
  } else {
    target.want = uint64_t(ceil(missing * kMassUnit));
  }
}

// Narrows both targets to their thresholds. The first histograms hold the run's weights already;
// shared.targets and warp_masses are set, and visible at the block's next barrier.
__device__ inline void select(const Run& run, int rule, SelectState& state, const Ranks& ranks,
                              SelectShared& shared) {
  const Target(&targets)[2] = shared.targets;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncthreads();
#pragma unroll 1
  for (int pass = 0; pass < kPasses && (targets[0].open || targets[1].open); ++pass) {
    const bool one = pass == 0 && share_first(targets);
    Sums(&sums)[2] = shared.sums[state.num_passes++ & 1];
    if (pass > 0) {
      const Target copies[2] = {targets[0], targets[1]};
#pragma unroll 1
      for (int tile = 0; tile < run.tiles; ++tile) {
        const float4 w = run.load(tile);
        const float values[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (const float value : values) {
          if (value >= 0) add(shared, copies, pass, __float_as_int(value), state.drop);
        }
      }
      __syncthreads();
    }
    publish(shared, sums, pass, one, state.drop);
    if (pass == 0 && warp == kWarps - 1) {
      Masses masses{};
      if (lane < kWarps) masses = shared.warp_masses[lane];
      masses = masses.over_warp();
      if (lane == 0) shared.masses[rule & 1] = masses;
    }
    ranks.sync();
    if (warp < 2 && targets[warp].open) {
      Target target = targets[warp];
      if (pass == 0 && !target.by_count) want_mass(target, rule, ranks, shared);
      if (target.open) narrow(target, pass, sums[one ? 0 : warp], ranks);
      __syncwarp();
      if (lane == 0) shared.targets[warp] = target;
    }
    __syncthreads();
  }
}

}  // namespace twilight
