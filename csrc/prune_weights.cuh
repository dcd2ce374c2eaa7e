// A warp's share of a query row and KV head in csrc/prune.cu, and the one pass over its scores:
// weights into the run, the first histogram, resident mass, the variance behind the margin.
#pragma once

#include "csrc/cluster_select.cuh"
#include "csrc/prune.h"

namespace twilight {

constexpr int kHeads = 4;      // whose scores for a tile are on their way together
constexpr int kNoErrors = -2;  // in place of a page size's log2

// How many heads a mean is over: any number, some batches of kHeads, one batch, or one head.
enum class Heads { kAny, kFullBatches, kOneBatch, kOne };

// How a launch is laid out.
struct Plan {
  int ranks;         // blocks of a cluster, which owns a query row and KV head
  unsigned inverse;  // the whole number above 2^32 / ranks; not of one rank
  int threads;       // of a block
  int kept_tiles;    // that a warp keeps in shared memory
  int bytes;         // of shared memory, a block
  int page_shift;    // log2 of the page size; -1 where it is no power of two
};

// The tokens that a warp is dealt.
struct alignas(16) Dealt {
  int first, list_end;           // of the row's list tokens, and where they end
  int whole_from, whole_tokens;  // of the tiles that hold list tokens of this warp only
  Run run;                       // visible tokens of this warp
};

// This block's and warp's share of a query row and KV head.
struct Share : Dealt {
  int64_t row;  // n * Hkv + the KV head
  int seq;
  int start, stop;  // visible tokens of the row
  int tokens;       // bounds those of a block that one part of a histogram's bin may take
  int page_shift;   // log2 of the page size; -1 where it is no power of two
  const float* scores;
  const float* lse;
  const float* errors;  // null without a margin
  uint8_t* grades;

  // Asks for the step's metadata, which is there before the kernel begins.
  __device__ __forceinline__ Share(const PruneParams& p, const Plan& plan) {
    const int n = blockIdx.z;  // blockIdx.x is the block's rank
    row = int64_t(n) * p.num_kv_heads + blockIdx.y;
    scores = p.scores + row * p.group * p.capacity;
    lse = p.lse + row * p.group;
    errors = p.errors == nullptr ? nullptr : p.errors + row * p.group * p.num_pages;
    grades = p.grades + row * p.grades_capacity;
    page_shift = plan.page_shift;
    seq = p.query_seq[n];
    start = p.ctx_starts[n];
    stop = p.positions[n] + 1;
  }
  // The visible tokens, and this warp's. unit: tokens that are dealt out to a warp together.
  __device__ __forceinline__ void find_run(const PruneParams& p, const Ranks& ranks, unsigned unit,
                                           int* tiles, const Plan& plan) {
    const int window = p.window_starts[seq];
    stop = max(start, stop);
    first = min(max(start, p.num_sink), stop);
    deal(p, ranks, unit, tiles, plan);
    list_end = max(first, min(stop, window));
    const int begin = (max(run.begin, first) - run.origin + kTile - 1) / kTile;
    const int end = (min(run.end, list_end) - run.origin) / kTile;
    whole_from = run.origin + begin * kTile;
    whole_tokens = max(0, end - begin) * kTile;
  }
  // By way of shared memory, so that it is all done when the inputs come: the compiler would put it
  // off until it is used.
  __device__ __forceinline__ void find_by_now(Dealt& mine) {
    if (threadIdx.x % 32 == 0) mine = *this;
    __syncthreads();
    int* const rests = run.rests;  // found without memory
    static_cast<Dealt&>(*this) = mine;
    run.rests = rests;
  }
  __device__ bool lists(int t) const { return t >= first && t < list_end; }
  __device__ int page_of(int t, int page_size) const {
    return page_shift >= 0 ? t >> page_shift : t / page_size;
  }
  // Whether all of token t's tile are list tokens of this warp.
  __device__ bool lists_tile(int t) const {
    return unsigned(t - whole_from) < unsigned(whole_tokens);
  }

 private:
  // Deals the row's tokens out to the cluster's warps.
  __device__ __forceinline__ void deal(const PruneParams& p, const Ranks& ranks, unsigned unit,
                                       int* tiles, const Plan& plan) {
    const unsigned from = start / unit;
    const unsigned units = (stop + unit - 1) / unit - from;
    const unsigned count = ranks.count(), rank = ranks.rank();
    // By block; exact below 2^28 units.
    const unsigned each = count == 1 ? units : __umulhi(units, plan.inverse);
    const unsigned more = units - each * count;
    const unsigned in_block = threadIdx.x / 32, block_warps = blockDim.x / 32;
    const unsigned log_warps = __ffs(block_warps) - 1, block_units = each + (rank < more);
    const unsigned block_from = from + rank * each + min(rank, more);
    const unsigned warp_from = in_block * block_units >> log_warps;
    const unsigned warp_to = (in_block + 1) * block_units >> log_warps;
    run.begin = min(stop, max(start, int((block_from + warp_from) * unit)));
    run.end = min(stop, max(start, int((block_from + warp_to) * unit)));
    run.origin = run.begin / 4 * 4;
    run.stop = run.origin + (run.end - run.origin + kTile - 1) / kTile * kTile;
    const int most =
        ((each + (more > 0) + block_warps - 1) >> log_warps) * unit;  // tokens of a warp
    tokens = min(stop - start, int(block_warps) * (most / 2 + 4));
    run.rest = run.origin + plan.kept_tiles * kTile;
    run.kept = shared_address(tiles + in_block * plan.kept_tiles * kTile) - run.origin * 4;
    // Rounded up to tiles the rest of a row still fits its C floats, for what is kept is more.
    const int rest = max(0, (most + 3 + kTile - 1) / kTile - plan.kept_tiles) * kTile;
    run.rests = reinterpret_cast<int*>(p.weights) + (row * p.capacity + 3) / 4 * 4;
    run.rest_from = (rank * block_warps + in_block) * rest;
  }
};

// A head's share of a mean weight is 2^(score * log2(e) + offset) * factor.
struct HeadScale {
  float offset, factor;

  // Of the mean over `heads`. The factor mends what the offset, which may be far larger than the
  // sum, is rounded by.
  __device__ __forceinline__ HeadScale(float lse, float heads) {
    const float product = lse * kLog2e;
    offset = -product;
    factor = __fdividef(exp2_approx(-fmaf(lse, kLog2e, -product)), heads);
  }
  __device__ __forceinline__ explicit HeadScale(unsigned shared) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(offset), "=f"(factor)
                 : "r"(shared)
                 : "memory");
  }
  // But for the factor.
  __device__ __forceinline__ float weight(float score) const {
    return exp2_approx(fmaf(score, kLog2e, offset));
  }
};

__device__ inline float mean_weight(const Share& s, const PruneParams& p, int t) {
  float sum = 0.0f;
#pragma unroll 4
  for (int g = 0; g < p.group; ++g) {
    const HeadScale scale(s.lse[g], p.group);
    sum += scale.weight(s.scores[int64_t(g) * p.capacity + t]) * scale.factor;
  }
  return sum;
}

__device__ inline bool is_candidate(const Share& s, const PruneParams& p, int t) {
  if (!s.lists(t)) return false;
  if (p.candidates == nullptr) return true;
  const int blocks = (p.page_size + p.block - 1) / p.block;
  const int block = t / p.page_size * blocks + t % p.page_size / p.block;
  return p.candidates[s.row * p.num_blocks + block] != 0;
}

// What tokens have in memory from some head on.
struct Source {
  const float* scores;  // of token 0
  const float* errors;  // of page 0; null without a margin
  int page_shift;       // the share's, or kNoErrors

  __device__ __forceinline__ Source(const Share& s, const PruneParams& p, int head)
      : scores(held(s.scores + int64_t(head) * p.capacity)),
        errors(s.errors == nullptr ? nullptr : s.errors + int64_t(head) * p.num_pages),
        page_shift(held(s.errors == nullptr ? kNoErrors : s.page_shift)) {}
};

// Heads for a lane's four tokens of a tile, kMost at most: their scores, and in the plain case the
// errors of the tokens' page, on their way.
template <bool kPlain, Heads kCount>
struct Batch {
  static constexpr bool kWhole = kCount != Heads::kAny;  // always kMost
  static constexpr int kMost = kCount == Heads::kOne ? 1 : kHeads;
  float4 scores[kMost];
  float errors[kMost] = {};

  // skip: heads from the source's first on.
  __device__ __forceinline__ void load(const Share& s, const PruneParams& p, const Source& source,
                                       int t, int skip, int heads) {
    if (t >= s.run.end) return;
    const float* from = source.scores + t;
    if (skip > 0) from += int64_t(skip) * p.capacity;
#pragma unroll
    for (int h = 0; h < kMost; ++h, from += p.capacity) {
      if (!kWhole && skip + h >= heads) break;
      if (kPlain) {
        scores[h] = __ldcg(reinterpret_cast<const float4*>(from));
      } else {
        scores[h].x = __ldcg(from);
        scores[h].y = t + 1 < s.run.end ? __ldcg(from + 1) : 0.f;
        scores[h].z = t + 2 < s.run.end ? __ldcg(from + 2) : 0.f;
        scores[h].w = t + 3 < s.run.end ? __ldcg(from + 3) : 0.f;
      }
    }
    if (!kPlain) return;
    int page;
    if (source.page_shift >= 0) {
      page = t >> source.page_shift;
    } else if (source.page_shift == kNoErrors) {
      return;
    } else {
      page = t / p.page_size;
    }
    const float* of_page = source.errors + page;
    if (skip > 0) of_page += int64_t(skip) * p.num_pages;
#pragma unroll
    for (int h = 0; h < kMost; ++h, of_page += p.num_pages) {
      if (!kWhole && skip + h >= heads) break;
      errors[h] = __ldcg(of_page);
    }
  }
};

// Sums over heads of a lane's four tokens.
struct TokenSums {
  float weights[4] = {0.f, 0.f, 0.f, 0.f};
  float errors[4] = {0.f, 0.f, 0.f, 0.f};  // of the weights

  // Adds a batch's heads, `skip` from the source's first on. scales: address of that one's.
  template <bool kPlain, Heads kCount>
  __device__ __forceinline__ void add(const Share& s, const PruneParams& p, const Source& source,
                                      unsigned scales, int t, int skip, int heads,
                                      const Batch<kPlain, kCount>& batch) {
#pragma unroll
    for (int h = 0; h < batch.kMost; ++h) {
      if (!batch.kWhole && skip + h >= heads) break;
      const float4& x = batch.scores[h];
      const HeadScale scale(scales + (skip + h) * unsigned(sizeof(HeadScale)));
      const float w[4] = {scale.weight(x.x), scale.weight(x.y), scale.weight(x.z),
                          scale.weight(x.w)};
      const float error = kPlain ? batch.errors[h] * scale.factor : 0.f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights[i] += w[i] * scale.factor;
        if (kPlain) {
          errors[i] += w[i] * error;  // not used without a margin
        } else if (source.errors != nullptr && s.run.holds(t + i)) {
          const int64_t page = s.page_of(t + i, p.page_size);
          errors[i] +=
              w[i] * scale.factor * __ldcg(source.errors + int64_t(skip + h) * p.num_pages + page);
        }
      }
    }
#pragma unroll
    for (float& w : weights) w = __saturatef(w);  // NaN counts as nothing
  }

  // Those whose score is -inf, in any one head, are no candidates.
  __device__ __forceinline__ void leave_out_dropped(const float4& score) {
    const float x[4] = {score.x, score.y, score.z, score.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (x[i] == -INFINITY) weights[i] = __int_as_float(kNotCandidate);
    }
  }
};

// Keeps the weights of a tile of list tokens of this warp, all candidates, and adds them to the
// first histogram.
__device__ __forceinline__ void keep_listed(const Share& s, int t, const TokenSums& sums,
                                            const Rounding& rounding, unsigned part,
                                            Masses& masses) {
  const float (&e)[4] = sums.errors;
  masses.add_error(e[0] * e[0] + e[1] * e[1] + e[2] * e[2] + e[3] * e[3]);
  int bits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    bits[i] = __float_as_int(sums.weights[i]);
    add_first(part, bits[i], rounding);
  }
  s.run.store(t, make_int4(bits[0], bits[1], bits[2], bits[3]));
}

// The same for any tile and rule, token by token. adder: null where one histogram serves both
// targets.
template <bool kPlain>
__device__ __forceinline__ void keep_any(const Share& s, const PruneParams& p, int from,
                                         const TokenSums& sums, const Rounding& rounding,
                                         unsigned part, const Adder<kPlain>* adder,
                                         Masses& masses) {
  int kept[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int t = from + i, bits = __float_as_int(sums.weights[i]);
    kept[i] = kNotCandidate;
    if (!s.run.holds(t) || (kPlain && bits < 0)) continue;
    if (!s.lists(t)) {
      masses.resident += sums.weights[i];
      continue;
    }
    masses.add_error(sums.errors[i] * sums.errors[i]);
    if (!kPlain && !is_candidate(s, p, t)) continue;
    kept[i] = bits;
    if (kPlain || adder == nullptr) {
      add_first(part, bits, rounding);
    } else {
      adder->add(bits);
    }
  }
  s.run.store(from, make_int4(kept[0], kept[1], kept[2], kept[3]));
}

// The pass over the scores of `heads` heads, whose weights' mean it takes: leaves the weights in
// the run and in the first histogram. `batch` holds the first tile's first heads, from `source`;
// scales: theirs, in shared memory.
template <bool kPlain, Heads kCount>
__device__ __forceinline__ Masses take_weights(const Share& s, const PruneParams& p,
                                               const Source& source, Batch<kPlain, kCount>& batch,
                                               int heads, const HeadScale* scales,
                                               const SelectState& state, SelectShared& shared) {
  Masses masses;
  const uint4* histogram = shared.histograms[state.num_passes & 1];
  const unsigned part = part_of(histogram, kParts), first_scale = held(shared_address(scales));
  const Rounding rounding(state.drop);
  const Adder<kPlain> adder(shared.targets, histogram, 0, state.drop);
  const Adder<kPlain>* by_target = kPlain || share_first(shared.targets) ? nullptr : &adder;
  const unsigned easy_tokens = held(kPlain && !p.dropped ? s.whole_tokens : 0);
#pragma unroll 1
  for (int t = s.run.first(); t < s.run.stop; t += kTile) {
    const bool easy = kPlain && unsigned(t - s.whole_from) < easy_tokens;
    TokenSums sums;
    int skip = 0;
#pragma unroll 1
    while (true) {
      sums.add(s, p, source, first_scale, t, skip, heads, batch);
      skip += batch.kMost;
      if (kCount == Heads::kOneBatch || kCount == Heads::kOne || skip >= heads) break;
      batch.load(s, p, source, t, skip, heads);
    }
    if (kPlain && !easy && p.dropped) {
      __syncwarp();  // a branch, where predicates would cost all tiles
      sums.leave_out_dropped(batch.scores[batch.kWhole ? batch.kMost - 1 : 0]);
    }
    batch.load(s, p, source, t + kTile, 0, heads);  // on their way while these are kept
    if (easy) {
      keep_listed(s, t, sums, rounding, part, masses);
    } else {
      keep_any<kPlain>(s, p, t, sums, rounding, part, by_target, masses);
    }
  }
  return masses;
}

}  // namespace twilight
