// Radix select over non-negative floats that a cluster of blocks holds, by count or by mass; what
// csrc/prune.cu finds its thresholds with.
#pragma once

#include <climits>
#include <cstdint>

#include "csrc/ranks.cuh"

namespace twilight {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 1024;
constexpr int kBinBits = 10;
constexpr int kPasses = 3;            // 30 bits: those of a float in [0, 1]
constexpr float kMassUnit = 0x1p44f;  // 2^17 tokens rounded down lose less than 1e-8
constexpr double kMostMass = 0.9999;  // the most that a margin raises a mass to
constexpr int kNothing = INT_MAX;     // a threshold that no weight's bits reach
constexpr int kEverything = 0;        // one that each candidate's do
constexpr int kExactTarget = 0;
constexpr int kIndexTarget = 1;

struct Histogram {
  unsigned low[kBins], high[kBins];  // a bin's 64-bit sum; shared memory adds 32 bits at a time

  __device__ void add(int bin, uint64_t value) {
    const unsigned low_part = unsigned(value);
    unsigned high_part = unsigned(value >> 32);
    if (low_part != 0) {
      const unsigned before = atomicAdd(&low[bin], low_part);
      high_part += before + low_part < before;
    }
    if (high_part != 0) atomicAdd(&high[bin], high_part);
  }
};

// What the blocks of a cluster read of each other, and a block's warps of each other.
struct SelectShared {
  Histogram histograms[2][2];  // by pass parity, by target
  double resident_mass[2];     // of this block's tokens, by rule parity
  double mass_variance[2];     // likewise: of the weights, by their standard errors
  uint64_t warp_sums[kWarps];
  int found_bin;
  uint64_t found_rest;
};

// The weights a warp adds to histograms; negative ones are not candidates.
struct Weights {
  const float* values;
  int begin, end;
};

// One threshold on its way: bits chosen so far, and what is still wanted among those that match.
struct Target {
  bool by_count;
  bool open;      // still to be narrowed
  uint64_t want;  // tokens, or mass units
  int least;      // the threshold; while open, its leading bits
  int ties;       // tokens with exactly these bits to take, the first by position
};

__device__ inline uint64_t value_of(const Target& target, float w) {
  return target.by_count ? 1 : __float2ull_rz(w * kMassUnit);
}

// Narrows a target by one histogram: finds the bin, from the top, in which the sum over all blocks
// reaches what is wanted. One bin a thread.
__device__ inline void narrow(Target& target, int pass, const Histogram& histogram,
                              const Ranks& ranks, SelectShared& shared) {
  const int bin = kBins - 1 - threadIdx.x, lane = threadIdx.x % 32;
  uint64_t mine = 0;
  for (int r = 0; r < ranks.count(); ++r) {
    const Histogram* h = ranks.of(&histogram, r);
    mine += uint64_t(h->high[bin]) << 32 | h->low[bin];
  }
  uint64_t sum = mine;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint64_t other = __shfl_up_sync(0xffffffffu, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == 31) shared.warp_sums[threadIdx.x / 32] = sum;
  if (threadIdx.x == 0) shared.found_bin = -1;
  __syncthreads();
  for (int w = 0; w < threadIdx.x / 32; ++w) sum += shared.warp_sums[w];
  if (sum >= target.want && sum - mine < target.want) {
    shared.found_bin = bin;
    shared.found_rest = target.want - (sum - mine);
  }
  __syncthreads();
  if (shared.found_bin < 0) {  // all candidates together do not reach it
    target.least = kEverything, target.ties = INT_MAX, target.open = false;
  } else {
    target.least = target.least << kBinBits | shared.found_bin;
    target.want = shared.found_rest;
    target.open = pass + 1 < kPasses;
    if (!target.open) target.ties = target.by_count ? int(target.want) : INT_MAX;
  }
  __syncthreads();  // before the next call writes shared
}

// Adds this warp's weights that match the open targets' leading bits to their histograms.
__device__ inline void fill(const Weights& s, const Target (&targets)[2], int pass, bool together,
                            int lane, Histogram (&histograms)[2]) {
  const int shift = (kPasses - 1 - pass) * kBinBits;
  for (int t = s.begin + lane; t < s.end; t += 32) {
    const float w = s.values[t];
    const int bits = __float_as_int(w);
    if (bits < 0) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!targets[i].open || (i == kIndexTarget && together)) continue;
      if (pass > 0 && bits >> (shift + kBinBits) != targets[i].least) continue;
      const uint64_t value = value_of(targets[i], w);
      if (value != 0) histograms[i].add(bits >> shift & (kBins - 1), value);
    }
  }
}

__device__ inline void clear(Histogram (&histograms)[2]) {
  for (Histogram& h : histograms) h.low[threadIdx.x] = h.high[threadIdx.x] = 0;
}

// What a mass target wants beyond the resident tokens, or that it wants nothing.
__device__ inline void want_mass(Target& target, double p, double resident) {
  const double missing = p - resident;
  if (missing <= 0) {
    target.least = kNothing, target.open = false;
  } else {
    target.want = uint64_t(ceil(missing * kMassUnit));
  }
}

// A mass with its margin: half the weights lie on either side of a set's edge at worst, so an error
// of the weights moves a set of mass p by sqrt(p * (1 - p)) of it.
__device__ inline double with_margin(double p, double variance) {
  return fmax(p, fmin(kMostMass, p + sqrt(p * (1.0 - p) * variance)));
}

// Narrows both targets to their thresholds. `pass_count` numbers the histograms of the whole
// kernel.
__device__ inline void select(const Weights& s, const float (&tops)[2], Target (&targets)[2],
                              int rule, int lane, int& pass_count, const Ranks& ranks,
                              SelectShared& shared) {
  const bool together = targets[0].open && targets[1].open && !targets[0].by_count;
  for (int pass = 0; pass < kPasses && (targets[0].open || targets[1].open); ++pass) {
    const int parity = pass_count++ & 1;
    const bool one = together && pass == 0;
    fill(s, targets, pass, one, lane, shared.histograms[parity]);
    ranks.sync();
    clear(shared.histograms[parity ^ 1]);  // every block is done with the pass before
    if (pass == 0) {
      double resident = 0.0, variance = 0.0;
      for (int r = 0; r < ranks.count(); ++r) {
        resident += ranks.of(shared.resident_mass, r)[rule & 1];
        variance += ranks.of(shared.mass_variance, r)[rule & 1];
      }
      const double masses[2] = {with_margin(tops[kExactTarget], variance), tops[kIndexTarget]};
      for (int i = 0; i < 2; ++i) {
        if (targets[i].open && !targets[i].by_count) want_mass(targets[i], masses[i], resident);
      }
    }
    for (int i = 0; i < 2; ++i) {
      if (targets[i].open) {
        narrow(targets[i], pass, shared.histograms[parity][one ? 0 : i], ranks, shared);
      }
    }
    __syncthreads();
  }
}

}  // namespace twilight
