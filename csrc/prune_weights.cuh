// A warp's share of a query row and KV head in csrc/prune.cu, and the one pass over its scores:
// weights into the run, the first histogram, resident mass, the variance behind the margin.
#pragma once

#include "csrc/cluster_select.cuh"
#include "csrc/prune.h"

namespace twilight {

constexpr int kHeads = 4;  // whose scores for a tile are on their way together

// This block's and warp's share of a query row and KV head.
struct Share {
  int64_t row;  // n * Hkv + the KV head
  int seq;
  int start, stop;  // visible tokens of the row
  int first;        // of its list tokens; they end at list_end()
  int window;       // where the sequence's resident window starts
  int tokens;       // bounds those of a block that one part of a histogram's bin may take
  Run run;          // visible tokens of this warp
  const float* scores;
  const float* lse;
  const float* errors;  // null without a margin
  uint8_t* grades;

  // unit: tokens that are dealt out to a warp together.
  __device__ __forceinline__ Share(const PruneParams& p, const Ranks& ranks, unsigned unit,
                                   float* tiles, int kept_tiles) {
    const int of_heads = blockIdx.x >> ranks.log_count(), n = of_heads / p.num_kv_heads;
    row = of_heads;
    seq = p.query_seq[n];
    start = p.ctx_starts[n];
    stop = max(start, p.positions[n] + 1);
    scores = p.scores + row * p.group * p.capacity;
    lse = p.lse + row * p.group;
    errors = p.errors == nullptr ? nullptr : p.errors + row * p.group * p.num_pages;
    grades = p.grades + row * p.grades_capacity;
    deal(p, ranks, unit, tiles, kept_tiles);
    first = min(max(start, p.num_sink), stop);
    window = p.window_starts[seq];
  }
  __device__ int list_end() const { return max(first, min(stop, window)); }
  __device__ bool lists(int t) const { return t >= first && t < list_end(); }

 private:
  // Deals the row's tokens out to the cluster's warps.
  __device__ __forceinline__ void deal(const PruneParams& p, const Ranks& ranks, unsigned unit,
                                       float* tiles, int kept_tiles) {
    const unsigned from = start / unit;
    const unsigned units = (stop + unit - 1) / unit - from;
    const unsigned in_block = threadIdx.x / 32, warp = ranks.rank() * kWarps + in_block;
    const unsigned log_warps = ranks.log_count() + kLogWarps, warps = 1u << log_warps;
    run.begin = min(stop, max(start, int((from + (warp * units >> log_warps)) * unit)));
    run.end = min(stop, max(start, int((from + ((warp + 1) * units >> log_warps)) * unit)));
    run.origin = run.begin / 4 * 4;
    run.tiles = (run.end - run.origin + kTile - 1) / kTile;
    const int most = ((units + warps - 1) >> log_warps) * unit;  // tokens of a warp
    tokens = min(stop - start, kWarps * (most / 2 + 4));
    run.kept_tiles = kept_tiles;
    run.kept = tiles + in_block * kept_tiles * kTile;
    // Rounded up to tiles the rest of a row still fits its C floats, for what is kept is more.
    const int rest = max(0, (most + 3 + kTile - 1) / kTile - kept_tiles) * kTile;
    run.rest = p.weights + (row * p.capacity + 3) / 4 * 4 + int64_t(warp) * rest;
  }
};

__device__ inline float weight(const Share& s, int capacity, int head, int t) {
  return expf(s.scores[int64_t(head) * capacity + t] - s.lse[head]);
}

__device__ inline float mean_weight(const Share& s, const PruneParams& p, int t) {
  float sum = 0.0f;
#pragma unroll 4
  for (int g = 0; g < p.group; ++g) sum += weight(s, p.capacity, g, t);
  return sum / p.group;
}

__device__ inline bool is_candidate(const Share& s, const PruneParams& p, int t) {
  if (!s.lists(t)) return false;
  if (p.candidates == nullptr) return true;
  const int blocks = (p.page_size + p.block - 1) / p.block;
  const int block = t / p.page_size * blocks + t % p.page_size / p.block;
  return p.candidates[s.row * p.num_blocks + block] != 0;
}

// Scores of kHeads heads for a lane's four tokens of a tile, on their way.
template <bool kPlain>
struct Batch {
  float4 scores[kHeads];

  __device__ __forceinline__ void load(const Share& s, const PruneParams& p, int t, int head,
                                       int head_end) {
    if (t >= s.run.end) return;
    const float* from = s.scores + int64_t(head) * p.capacity + t;
#pragma unroll
    for (int h = 0; h < kHeads; ++h, from += p.capacity) {
      if (head + h >= head_end) break;
      if (kPlain) {
        scores[h] = __ldcg(reinterpret_cast<const float4*>(from));
      } else {
        scores[h].x = __ldcg(from);
        scores[h].y = t + 1 < s.run.end ? __ldcg(from + 1) : 0.f;
        scores[h].z = t + 2 < s.run.end ? __ldcg(from + 2) : 0.f;
        scores[h].w = t + 3 < s.run.end ? __ldcg(from + 3) : 0.f;
      }
    }
  }
};

// Sums over heads of a lane's four tokens.
struct TokenSums {
  float weights[4] = {0.f, 0.f, 0.f, 0.f};
  float errors[4] = {0.f, 0.f, 0.f, 0.f};  // of the weights

  // Adds a batch's heads, from `head` on.
  template <bool kPlain>
  __device__ __forceinline__ void add(const Share& s, const PruneParams& p, const float* lses,
                                      int t, int head, int head_end, const Batch<kPlain>& batch) {
    float page_errors[kHeads];  // on their way while the weights are computed
    const float* from = s.errors + int64_t(head) * p.num_pages;
    if (kPlain && s.errors != nullptr && t < s.run.end) {
      const float* of_page = from + t / p.page_size;
#pragma unroll
      for (int h = 0; h < kHeads; ++h, of_page += p.num_pages) {
        if (head + h < head_end) page_errors[h] = __ldcg(of_page);
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h, from += p.num_pages) {
      if (head + h >= head_end) break;
      const float4& x = batch.scores[h];
      const float lse = lses[head + h];
      const float w[4] = {expf(x.x - lse), expf(x.y - lse), expf(x.z - lse), expf(x.w - lse)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights[i] += w[i];
        if (s.errors == nullptr) continue;
        if (!kPlain && s.run.holds(t + i)) page_errors[h] = __ldcg(from + (t + i) / p.page_size);
        errors[i] += w[i] * page_errors[h];
      }
    }
  }
};

// What a lane's tokens add up to; see Masses.
struct LaneMasses {
  float resident = 0.0f;
  float variance = 0.0f;
};

// A lane's four tokens of a tile: their bounded weights, and which of them are list tokens.
struct Tokens {
  float weights[4];
  unsigned listed = 0;

  __device__ __forceinline__ Tokens(const Share& s, int t, float share, const TokenSums& sums,
                                    LaneMasses& masses) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float w = sums.weights[i] * share, error = sums.errors[i] * share;
      weights[i] = w > 0.0f ? fminf(w, 1.0f) : 0.0f;  // NaN counts as nothing
      if (!s.run.holds(t + i)) continue;
      if (!s.lists(t + i)) {
        masses.resident += weights[i];
      } else {
        listed |= 1u << i;
        if (error > 0.0f) masses.variance += error * error;
      }
    }
  }
};

// Keeps the candidates' weights and adds them to the first histograms.
template <bool kPlain>
__device__ __forceinline__ void keep_weights(const Share& s, const PruneParams& p, int tile,
                                             const Tokens& tokens, int drop, SelectShared& shared) {
  float kept[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float w = tokens.weights[i];
    bool candidate = tokens.listed >> i & 1;
    if (!kPlain) candidate = candidate && is_candidate(s, p, s.run.token(tile) + i);
    kept[i] = candidate ? w : kNotCandidate;
    if (!candidate) continue;
    if (kPlain || share_first(shared.targets)) {
      add_first(shared, __float_as_int(w), drop);
    } else {
      add(shared, shared.targets, 0, __float_as_int(w), drop);
    }
  }
  s.run.store(tile, make_float4(kept[0], kept[1], kept[2], kept[3]));
}

// The pass over the scores of heads [head_begin, head_end), whose weights' mean it takes: leaves
// the weights in the run and in the first histograms. kTiles tiles of kHeads heads, all there are
// if kTiles > 1, are on their way at once; `batches` holds the first. `lses`: shared memory.
template <int kTiles, bool kPlain>
__device__ __forceinline__ LaneMasses take_weights(const Share& s, const PruneParams& p,
                                                   Batch<kPlain> (&batches)[kTiles], int head_begin,
                                                   int head_end, int drop, const float* lses,
                                                   SelectShared& shared) {
  const float share = 1.0f / (head_end - head_begin);
  LaneMasses masses;
#pragma unroll 1
  for (int at = 0; at < s.run.tiles; at += kTiles) {
#pragma unroll
    for (int u = 0; u < kTiles; ++u) {
      if (at + u >= s.run.tiles) break;
      const int t = s.run.token(at + u);
      TokenSums sums;
      int head = head_begin;
#pragma unroll 1
      while (true) {
        sums.add(s, p, lses, t, head, head_end, batches[u]);
        head += kHeads;
        if (kTiles > 1 || head >= head_end) break;
        batches[u].load(s, p, t, head, head_end);
      }
      const Tokens tokens(s, t, share, sums, masses);
      batches[u].load(s, p, t + kTiles * kTile, head_begin, head_end);  // while these are kept
      keep_weights<kPlain>(s, p, at + u, tokens, drop, shared);
    }
  }
  return masses;
}

}  // namespace twilight
