// Scores of list tokens of estimate_scores, by a warp that reads its pages through a ring.
#pragma once

#include "csrc/estimate_query.cuh"
#include "csrc/estimate_turns.cuh"
#include "csrc/page_ring.cuh"
#include "csrc/running_softmax.cuh"

namespace twilight {

constexpr int kBatch = 32;  // tokens whose scores are written at once: two tiles
constexpr int kStages = 2;  // pages of a warp: one in use, one under way
constexpr unsigned kAllSeen = 15;

// Four floats at once, which the compiler makes four stores of.
__device__ __forceinline__ void store_vector(float* to, const float (&x)[4]) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x[0]), "f"(x[1]),
               "f"(x[2]), "f"(x[3])
               : "memory");
}

template <int D>
using Ring = PageRing<D, kPieceTokens, kStages>;

// A warp's pieces of one segment.
template <int D, bool kPerToken>
class ListWarp {
  using L = Lanes<D>;

 public:
  // The segment's items `first`, `first` + step .. are the warp's.
  __device__ ListWarp(const EstimateScoresParams& p, const Schedule& schedule, const Segment& s,
                      const Ring<D>& ring, int first, int step, int lane)
      : p_(p), s_(s), ring_(ring), lane_(ring.lane()), turns_(p, schedule, s, first, step, lane) {
    const int64_t tokens = int64_t(s.kv_head) * p.page_size;
    codes_ = held(p.k_codes + tokens * (D / 2));
    codes_stride_ = held(uint32_t(p.codes_page_stride));
    scale_stride_ = held(uint32_t(p.scale_page_stride));
    codes_begin_ = held(L::begin(lane_ / 4 * 4, lane_ % 4));
    scales_ = held(p.k_scale + (kPerToken ? tokens * 2 : int64_t(s.kv_head) * 2 * D));
  }

  // Brings the first piece under way, and fill() the others of the ring.
  __device__ void start() {
    turns_.look_up(0);
    copy(0);
  }
  __device__ void fill() {
#pragma unroll 1
    for (int turn = 1; turn < kStages; ++turn) copy(turn);
  }

  // q: 16 times the scaled queries, as load_query reads them. state: of heads 2 * (lane % 4) and
  // the next.
  __device__ void run(const float* q, Softmax (&state)[2]) {
    if (turns_.count() == 0) return;
    if (s_.heads <= 4) {
      // Lane 4 * r + j takes over head j, and gives it back.
      const int quad = lane_ / 4 * 4, j = lane_ % 4;
      const Softmax first = of_lane(state[0], quad + j / 2), next = of_lane(state[1], quad + j / 2);
      Softmax mine[1] = {j % 2 == 0 ? first : next};
      run_heads<true>(q, mine);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Softmax of_head = of_lane(mine[0], quad + (j * 2 + i) % 4);
        state[i] = j < 2 ? of_head : Softmax();
      }
    } else {
      run_heads<false>(q, state);
    }
  }

 private:
  __device__ static Softmax of_lane(const Softmax& softmax, int lane) {
    Softmax other;
    other.max = __shfl_sync(0xffffffffu, softmax.max, lane);
    other.sum = __shfl_sync(0xffffffffu, softmax.sum, lane);
    return other;
  }

  template <bool kPaired>
  using Query = FoldedQuery<D, kPaired>;

  __device__ void copy(int turn) const {
    if (turn < turns_.count()) {
      const Known piece = turns_.known(turn);
      const uint64_t page = turns_.page(turn);
      const int skipped = piece.number() * kPieceTokens;
      const uint8_t* codes = codes_ + page * codes_stride_ + skipped * (D / 2);
      const uint16_t* scales = scales_ + page * scale_stride_;
      if constexpr (kPerToken) scales += skipped * 2;
      if (piece.is(kAll)) {
        ring_.copy_all_codes(turn, codes);
        copy_scales(turn, scales, piece);
      } else {
        if (piece.kept()) ring_.copy_codes(turn, codes, piece.tokens(), p_.vector_codes);
        if (piece.is(kScales)) copy_scales(turn, scales, piece);
      }
    }
    ring_.commit();
  }
  __device__ void copy_scales(int turn, const uint16_t* scales, const Known& piece) const {
    if constexpr (kPerToken) {
      ring_.template copy_scales<4>(turn, scales, piece.tokens() * 4);
    } else {
      ring_.template copy_scales<16>(turn, scales, 4 * D);
    }
  }

  template <bool kPaired>
  __device__ void run_heads(const float* q, Softmax (&state)[Query<kPaired>::kOwn]) {
    Query<kPaired> query(q, lane_);
    if constexpr (kPerToken) query.fold_alone();
    row_ = held(p_.scores + s_.q_head(p_, query.own_head(0)) * p_.capacity + lane_ / 4 * 4);
    heads_ = held(s_.heads);
    const int head = lane_ / query.kFoldLanes;
    errors_ = nullptr;
    if (p_.errors != nullptr && head < s_.heads && lane_ % query.kFoldLanes == 0) {
      errors_ = p_.errors + s_.q_head(p_, head) * p_.num_pages;
    }
    errors_ = held(errors_);
#pragma unroll 1
    for (int turn = 0; turn < turns_.count(); ++turn) {
      const Piece piece = turns_.piece(turn);
      ring_.wait();
      score(turn, piece, query, state);
      __syncwarp();
      if (turns_.lack(turn + kStages)) turns_.look_up(turn + 1);
      copy(turn + kStages);
    }
  }

  template <bool kPaired>
  __device__ void score(int turn, const Piece& piece, Query<kPaired>& query,
                        Softmax (&state)[Query<kPaired>::kOwn]) {
    if constexpr (kPerToken) {
      if (p_.errors != nullptr && piece.is(kFirst)) {
        write_error(piece, query.norm * mean_step(turn));
      }
      if (piece.kept() != kAllRuns) fill_runs(turn, query, piece, state);
    } else {
      if (piece.kept()) {
        query.fold_page(ring_.scales(turn));
      } else {
        float value = -INFINITY;
        if (piece.is(kScales)) {
          const float middle = query.skim_page(ring_.scales(turn));
          if (!p_.drop) value = middle;
        }
        fill(query, begin(piece), end(piece), value, state);
      }
      write_error(piece, query.norm);
    }
    if (piece.is(kWhole)) {
      whole(turn, query, piece, state);
    } else if (piece.kept()) {
#pragma unroll 1
      for (int offset = 0; offset < piece.tokens(); offset += kBatch) {
        const int t = piece.origin + offset;
        if (t < end(piece) && t + kBatch > begin(piece)) batch(turn, query, piece, offset, state);
      }
    }
  }

  // int4_token: the root of the mean square of a page's steps.
  __device__ float mean_step(int turn) const {
    const uint16_t* steps = scales_ + int64_t(turns_.page(turn)) * p_.scale_page_stride;
    float sum = 0.0f;
    for (int t = lane_; t < p_.page_size; t += 32) {
      const float step = __half2float(reinterpret_cast<const __half*>(steps)[2 * t]);
      sum += step * step;
    }
    return sqrtf(warp_sum(sum) / p_.page_size);
  }

  // From the norm of 16 q step: a code is off by step / sqrt(12).
  __device__ void write_error(const Piece& piece, float norm) const {
    constexpr float kPerNorm = 0.0625f * 0.28867513f;
    if (errors_ != nullptr && piece.is(kFirst)) {
      __stcg(errors_ + piece.page_index, norm * kPerNorm);
    }
  }

  // The tokens of a piece that are to be scored.
  __device__ int begin(const Piece& piece) const { return max(s_.first, piece.origin); }
  __device__ int end(const Piece& piece) const {
    return min(s_.last, piece.origin + piece.tokens());
  }

  // Gives tokens [begin, end) one score a head: value, of the head that a lane folds.
  template <bool kPaired>
  __device__ void fill(const Query<kPaired>& query, int begin, int end, float value,
                       Softmax (&state)[Query<kPaired>::kOwn]) const {
    if (begin >= end) return;
#pragma unroll 1
    for (int head = 0; head < s_.heads; ++head) {
      const float v = __shfl_sync(0xffffffffu, value, head * query.kFoldLanes);
      float* out = p_.scores + s_.q_head(p_, head) * p_.capacity;
#pragma unroll 1
      for (int t = begin + lane_; t < end; t += 32) out[t] = v;
    }
#pragma unroll
    for (int i = 0; i < query.kOwn; ++i) {
      const float v = query.of_own_head(value, i);
      if (lane_ < 4) state[i].add(v, float(end - begin));
    }
  }

  // int4_token: fills the runs of a piece that are no candidates.
  template <bool kPaired>
  __device__ void fill_runs(int turn, const Query<kPaired>& query, const Piece& piece,
                            Softmax (&state)[Query<kPaired>::kOwn]) const {
    const int64_t page = turns_.page(turn);
    const int runs = ceil_div(p_.page_size, kQuestBlock);
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
      const int from = max(begin(piece), piece.origin + i * kQuestBlock);
      const int to = min(end(piece), piece.origin + (i + 1) * kQuestBlock);
      if ((piece.bits >> i & 1) || from >= to) continue;
      float value = -INFINITY;
      if (!p_.drop) {
        const int64_t at = int64_t(s_.kv_head) * runs + piece.number() * 4 + i;
        value = query.middle_of_bounds(p_.k_bounds + page * p_.bounds_page_stride + at * 2 * D);
      }
      fill(query, from, to, value, state);
    }
  }

  // Scores of a piece of kPieceTokens tokens, all of which are visible.
  template <bool kPaired>
  __device__ void whole(int turn, const Query<kPaired>& query, const Piece& piece,
                        Softmax (&state)[Query<kPaired>::kOwn]) const {
    float scores[kPieceTokens / kBatch][query.kOwn][4];
#pragma unroll
    for (int i = 0; i < kPieceTokens / kBatch; ++i) {
      multiply(turn, query, i * kBatch, scores[i]);
      write<true>(query, piece.origin + i * kBatch, kAllSeen, scores[i]);
    }
#pragma unroll
    for (int h = 0; h < query.kOwn; ++h) {
      float top = state[h].max;
#pragma unroll
      for (const auto& batch : scores) {
        const float (&x)[4] = batch[h];
        top = fmaxf(top, fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])));
      }
      const float shift = -kLog2e * top;
      float sum = state[h].sum * exp2_approx(fmaf(state[h].max, kLog2e, shift));
#pragma unroll
      for (const auto& batch : scores) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const float first = exp2_approx(fmaf(batch[h][i], kLog2e, shift));
          sum += first + exp2_approx(fmaf(batch[h][i + 1], kLog2e, shift));
        }
      }
      state[h].sum = sum;
      state[h].max = top;
    }
  }

  // Scores of kBatch tokens of a piece, not all of which are to be scored.
  template <bool kPaired>
  __device__ void batch(int turn, const Query<kPaired>& query, const Piece& piece, int offset,
                        Softmax (&state)[Query<kPaired>::kOwn]) const {
    const int first = offset + lane_ / 4 * 4;
    float scores[query.kOwn][4];
    multiply(turn, query, offset, scores);
    unsigned seen = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int t = piece.origin + first + i;
      if (t >= begin(piece) && t < end(piece)) seen |= 1u << i;
    }
    if (kPerToken && !(piece.bits >> first / kQuestBlock & 1)) seen = 0;
    if (p_.by_token && p_.drop) {
      const uint8_t* candidates = s_.candidates(p_) + piece.origin + first;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!(seen >> i & 1) || candidates[i]) continue;
#pragma unroll
        for (auto& of_head : scores) of_head[i] = -INFINITY;
      }
    }
    write<false>(query, piece.origin + offset, seen, scores);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!(seen >> i & 1)) continue;
#pragma unroll
      for (int h = 0; h < query.kOwn; ++h) state[h].add(scores[h][i]);
    }
  }

  // Multiplies two tiles: scores [head][token] of the lane's four tokens of a batch.
  template <bool kPaired>
  __device__ void multiply(int turn, const Query<kPaired>& query, int offset,
                           float (&scores)[Query<kPaired>::kOwn][4]) const {
    const uint8_t* codes = ring_.codes(turn) + offset * (D / 2);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      uint32_t words[2][L::kRegs];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        L::load(codes, codes_begin_, tile * 2 + half, lane_ % 4, words[half]);
      }
      int c[query.folded.kPlanes][4];
      query.folded.multiply(words[0], words[1], c);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = tile * 2 + half, at = half * 2;
        if constexpr (kPaired) {
          scores[0][token] = query.score(c[0][at], c[0][at + 1], 0);
        } else {
          scores[0][token] = query.score(c[0][at], c[1][at], 0);
          scores[1][token] = query.score(c[0][at + 1], c[1][at + 1], 1);
        }
      }
    }
    if constexpr (kPerToken) {
      const __half2* pairs = reinterpret_cast<const __half2*>(ring_.scales(turn));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 scale = __half22float2(pairs[offset + lane_ / 4 * 4 + i]);
#pragma unroll
        for (int h = 0; h < query.kOwn; ++h) {
          scores[h][i] = scale.x * scores[h][i] + scale.y * query.base[h];
        }
      }
    }
  }

  // Writes the lane's scores of a batch from token t on; seen: a bit for each that is to be
  // written.
  template <bool kVectors, bool kPaired>
  __device__ void write(const Query<kPaired>& query, int t, unsigned seen,
                        const float (&scores)[Query<kPaired>::kOwn][4]) const {
#pragma unroll
    for (int h = 0; h < query.kOwn; ++h) {
      if (query.own_head(h) >= heads_) continue;
      float* out = row_ + h * int64_t(p_.capacity) + t;
      if constexpr (kVectors) {
        store_vector(out, scores[h]);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (seen >> i & 1) out[i] = scores[h][i];
        }
      }
    }
  }

  const EstimateScoresParams& p_;
  const Segment& s_;
  const Ring<D>& ring_;
  const int lane_;
  Turns<kPerToken> turns_;
  const uint8_t* codes_;    // of the KV head, in a page of number zero
  const uint16_t* scales_;  // the same
  // Elements from a page to the next: held in 32 bits, which multiply in one instruction.
  uint32_t codes_stride_, scale_stride_;
  int codes_begin_;          // the lane's first words in a stage
  int heads_ = 0;            // of the segment
  float* row_ = nullptr;     // scores of the first of the lane's heads, from its first token on
  float* errors_ = nullptr;  // of the head whose error the lane writes, if any
};

}  // namespace twilight
