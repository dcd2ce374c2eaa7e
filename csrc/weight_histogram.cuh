// What csrc/cluster_select.cuh narrows a threshold by: a warp's run of weights, and histograms over
// 10 of their bits. Device code only.
#pragma once

#include <climits>
#include <cstdint>

#include "csrc/cluster_exchange.cuh"

namespace twilight {

constexpr int kBins = 1024;
constexpr int kBinBits = 10;
constexpr int kPasses = 3;  // 30 bits: those of a float in [0, 1]
constexpr int kMassPasses = 2;
constexpr unsigned kIndexPart = 2 * sizeof(unsigned);  // bytes to a bin's parts of that target
constexpr int kParts = 4;            // of a bin, by lane: equal weights of a warp queue less
constexpr int kGroups = kBins / 32;  // of bins
constexpr int kTile = 128;           // tokens that a warp takes at once, four a lane
constexpr int kMassBits = 44;        // 2^17 tokens rounded down lose less than 1e-8
constexpr int kNotCandidate = -1;    // in place of a weight's bits: below every threshold
constexpr int kNothing = INT_MAX;    // a threshold that no weight's bits reach
constexpr int kEverything = 0;       // one that each candidate's do
constexpr int kExactTarget = 0;
constexpr int kIndexTarget = 1;

// A warp's tokens and the bits of their weights, by tile; those of no candidate are negative. A
// tile's lanes agree on whatever compares one of its tokens with a tile's bounds.
struct Run {
  int begin, end;  // tokens
  int origin;      // where its tiles begin: `begin`, rounded down to four tokens
  int stop;        // where they end
  int rest;        // where those begin that are kept in global memory
  unsigned kept;   // address in shared memory, a multiple of 16, of token 0 if it were kept there
  int* rests;      // the row's kept in global memory, likewise
  unsigned rest_from;  // where in it this warp's are

  __device__ bool holds(int t) const { return t >= begin && t < end; }
  // This lane's four tokens of the first tile.
  __device__ int first() const { return origin + threadIdx.x % 32 * 4; }

  // The word of token t, from origin on.
  __device__ int word(int t) const {
    if (t >= rest) return *in_rest(t);
    int word;
    asm volatile("ld.shared.s32 %0, [%1];" : "=r"(word) : "r"(kept + t * 4) : "memory");
    return word;
  }
  __device__ void put(int t, int word) const {
    if (t >= rest) {
      *in_rest(t) = word;
    } else {
      asm volatile("st.shared.s32 [%0], %1;" ::"r"(kept + t * 4), "r"(word) : "memory");
    }
  }
  // A lane's four tokens of a tile, from t on.
  __device__ int4 load(int t) const {
    if (t >= rest) {
      __syncwarp();  // a branch, where predicates would cost the other tiles
      return *reinterpret_cast<const int4*>(in_rest(t));
    }
    int4 bits;
    asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "r"(kept + t * 4)
                 : "memory");
    return bits;
  }
  __device__ void store(int t, const int4& bits) const {
    if (t >= rest) {
      __syncwarp();  // as above
      *reinterpret_cast<int4*>(in_rest(t)) = bits;
      return;
    }
    asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(kept + t * 4), "r"(bits.x),
                 "r"(bits.y), "r"(bits.z), "r"(bits.w)
                 : "memory");
  }

 private:
  __device__ int* in_rest(int t) const { return rests + held(rest_from + unsigned(t - rest)); }
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

// Whether both targets' first histograms are one: that of all weights.
__device__ inline bool share_first(const Target (&targets)[2]) {
  return !(targets[kExactTarget].open && targets[kExactTarget].by_count);
}

// The bits to round off where a part of a bin may take `tokens` mantissas of 24 bits.
__device__ inline int bits_to_drop(int tokens) { return max(0, 32 - __clz(tokens) - 8); }

__device__ inline int shift_of(int pass) { return (kPasses - 1 - pass) * kBinBits; }

// How a histogram adds a weight up: by its mantissa, whose exponent the bin tells. What a weight
// below 2^-126 adds in excess is less than a mass unit.
struct Rounding {
  int drop;       // bits to round off
  unsigned bias;  // the leading bit, and half a step

  __device__ explicit Rounding(int drop) : drop(drop), bias(held(0x800000 + (1u << drop >> 1))) {}
  __device__ unsigned mantissa(int bits) const { return ((bits & 0x7fffff) + bias) >> drop; }
};

// The address of the first bin's part for this lane, of `parts` parts a target.
__device__ inline unsigned part_of(const uint4* histogram, int parts) {
  return held(shared_address(histogram) + threadIdx.x % parts * unsigned(sizeof(unsigned)));
}

__device__ __forceinline__ void add_shared(unsigned address, unsigned value) {
  asm volatile("red.shared.add.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

// Adds a candidate's weight to the first histogram that both targets share.
__device__ __forceinline__ void add_first(unsigned part, int bits, const Rounding& rounding) {
  add_shared(part + (bits >> shift_of(0)) * unsigned(sizeof(uint4)), rounding.mantissa(bits));
}

// What a pass adds to the histograms of the targets that are open.
template <bool kPlain>
struct Adder {
  unsigned part;  // this lane's of the exact target's
  int shift;
  Rounding rounding;
  int leading[2];  // bits that a target's weights begin with; none has those of a closed one
  bool by_count[2];

  __device__ Adder(const Target (&targets)[2], const uint4* histogram, int pass, int drop)
      : part(part_of(histogram, 2)), shift(shift_of(pass)), rounding(drop) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      leading[i] = targets[i].open ? targets[i].least : kNothing;
      by_count[i] = targets[i].by_count;
    }
  }
  // Few of a run's weights have the bits, so what follows the first branch is rare.
  __device__ __forceinline__ void add(int bits) const {
    const int high = bits >> (shift + kBinBits);
    const bool first = high == leading[0];
    if (!first && high != leading[1]) return;
    const unsigned bin = part + (bits >> shift & (kBins - 1)) * unsigned(sizeof(uint4));
    const unsigned whole = rounding.mantissa(bits);
    add_shared(bin + (first ? 0 : kIndexPart), !kPlain && by_count[first ? 0 : 1] ? 1 : whole);
    if (leading[0] != leading[1]) return;
    add_shared(bin + kIndexPart, !kPlain && by_count[1] ? 1 : whole);
  }
};

// The bits of a bin's least value.
__device__ inline int bits_of(int leading, int bin, int pass) {
  return (leading << kBinBits | bin) << shift_of(pass);
}

// What a bin's parts add up to: a count, or mass units, of mantissas at the exponent of `bits`.
__device__ inline uint64_t sum_of_bin(uint64_t parts, bool by_count, int bits, int drop) {
  if (by_count) return parts;
  const int left = max(bits >> 23, 1) - 150 + kMassBits + drop;
  return left >= 0 ? parts << left : parts >> min(-left, 63);
}

// Of a bin whose values begin with `least`, the sum over a target's parts; by one histogram of
// both, over all.
__device__ inline uint64_t sum_of_bin(const uint4& parts, int i, bool one, bool by_count, int bits,
                                      int drop) {
  const uint64_t exact = uint64_t(parts.x) + parts.y, index = uint64_t(parts.z) + parts.w;
  return sum_of_bin(one ? exact + index : i == 0 ? exact : index, by_count, bits, drop);
}

}  // namespace twilight
