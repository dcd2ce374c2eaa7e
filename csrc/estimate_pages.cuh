// Scores of list tokens of estimate_scores, by a warp that reads its pages through a ring.
#pragma once

#include "csrc/estimate_query.cuh"
#include "csrc/estimate_schedule.cuh"
#include "csrc/page_ring.cuh"
#include "csrc/running_softmax.cuh"

namespace twilight {

constexpr int kBatch = 32;  // tokens whose scores are written at once: two tiles
constexpr int kStages = 2;  // pages of a warp: one in use, one under way
constexpr unsigned kAllRuns = 15, kAllSeen = 15;
constexpr float kLog2E = 1.44269504f;

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float sqrt_approx(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <int D>
using Ring = PageRing<D, kPieceTokens, kStages>;

// A warp's pieces of one segment. Lane 4 * r + j multiplies row r of the tiles, and holds the
// scores of heads 2 * j and 2 * j + 1 of tokens 4 * r .. 4 * r + 3 of a batch.
template <int D, bool kPerToken>
class ListWarp {
  using L = Lanes<D>;

 public:
  // The segment's items `first`, `first` + step .. are the warp's.
  __device__ ListWarp(const EstimateScoresParams& p, const Schedule& schedule, const Segment& s,
                      const Ring<D>& ring, int first, int step, int lane)
      : p_(p),
        s_(s),
        ring_(ring),
        residents_(schedule.residents),
        pieces_(schedule.pieces),
        step_(step),
        lane_(lane) {
    const int skipped = first < residents_ ? ceil_div(residents_ - first, step) : 0;
    first_ = first + skipped * step - residents_;
    const int stop = s.end - residents_;
    count_ = first_ < stop ? ceil_div(stop - first_, step) : 0;
    row_ = p.scores + s.q_head(p, lane % 4 * 2) * p.capacity + lane / 4 * 4;
  }

  // Brings the first pieces under way.
  __device__ void start() {
    look_up(0);
#pragma unroll
    for (int turn = 0; turn < kStages; ++turn) copy(turn);
  }

  // q: 16 times the scaled queries, as load_query reads them.
  __device__ void run(const float* q, Softmax (&state)[2]) {
    q_ = q;
    if constexpr (kPerToken) query_.fold_alone(q, lane_);
    for (int turn = 0; turn < count_; ++turn) {
      ring_.wait();
      score(turn, state);
      __syncwarp();
      if (turn + kStages >= looked_up_ + 32) look_up(turn + 1);
      copy(turn + kStages);
    }
  }

 private:
  struct Piece {
    int page_index, origin, tokens;  // of the sequence; tokens of the piece, hidden ones included
    int number;                      // within its page
  };

  __device__ Piece piece(int turn) const {
    const int i = first_ + turn * step_;
    Piece piece;
    piece.number = pieces_ == 1 ? 0 : i % pieces_;
    piece.page_index = s_.first_page + (pieces_ == 1 ? i : i / pieces_);
    piece.origin = piece.page_index * p_.page_size + piece.number * kPieceTokens;
    piece.tokens = min(kPieceTokens, p_.page_size - piece.number * kPieceTokens);
    return piece;
  }

  // Reads the page ids of 32 turns, and which runs of 16 tokens are candidates: a bit each.
  __device__ void look_up(int turn) {
    looked_up_ = turn;
    const bool mine = turn + lane_ < count_;
    const Piece piece = this->piece(turn + lane_);
    page_ = mine ? p_.page_table[int64_t(s_.seq) * p_.table_stride + piece.page_index] : 0;
    kept_ = kAllRuns;
    if (!mine || p_.candidates == nullptr || p_.by_token) return;
    const uint8_t* candidates = s_.candidates(p_);
    if constexpr (kPerToken) {
      const int runs = ceil_div(p_.page_size, kQuestBlock);
      kept_ = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int run = piece.number * 4 + i;
        if (run < runs && candidates[int64_t(piece.page_index) * runs + run]) kept_ |= 1u << i;
      }
    } else if (!candidates[piece.page_index]) {
      kept_ = 0;
    }
  }
  __device__ int64_t page(int turn) const {
    return __shfl_sync(0xffffffffu, page_, turn - looked_up_);
  }
  __device__ unsigned kept(int turn) const {
    return __shfl_sync(0xffffffffu, kept_, turn - looked_up_);
  }

  __device__ void copy(int turn) const {
    if (turn < count_) {
      const int64_t page = this->page(turn);
      const unsigned kept = this->kept(turn);
      const Piece piece = this->piece(turn);
      const int64_t head = s_.kv_head;
      if (kept) {
        const int64_t token = head * p_.page_size + piece.number * kPieceTokens;
        const uint8_t* codes = p_.k_codes + page * p_.codes_page_stride + token * (D / 2);
        ring_.copy_codes(turn, codes, piece.tokens, p_.vector_codes);
      }
      const uint16_t* scales = p_.k_scale + page * p_.scale_page_stride;
      if constexpr (kPerToken) {
        if (kept) {
          scales += (head * p_.page_size + piece.number * kPieceTokens) * 2;
          ring_.template copy_scales<4>(turn, scales, piece.tokens * 4);
        }
      } else if (kept || !p_.drop || p_.errors != nullptr) {
        ring_.template copy_scales<16>(turn, scales + head * 2 * D, 4 * D);
      }
    }
    ring_.commit();
  }

  __device__ void score(int turn, Softmax (&state)[2]) {
    const Piece piece = this->piece(turn);
    const unsigned kept = this->kept(turn);
    const int begin = max(s_.first, piece.origin);
    const int end = min(s_.last, piece.origin + piece.tokens);
    if constexpr (kPerToken) {
      if (p_.errors != nullptr && piece.number == 0) write_error(piece, token_steps(turn));
      if (kept != kAllRuns) fill_runs(turn, piece, kept, begin, end, state);
    } else {
      if (kept || !p_.drop || p_.errors != nullptr) {
        query_.fold_page(q_, ring_.scales(turn), s_.heads, lane_, kept, p_.errors != nullptr);
      }
      if (p_.errors != nullptr && piece.number == 0) write_error(piece, query_.squares);
      if (!kept) fill(begin, end, p_.drop ? -INFINITY : query_.middle, state);
    }
    if (!kept) return;
    if (kept == kAllRuns && end - begin == kPieceTokens && p_.vector_scores &&
        !(p_.by_token && p_.drop)) {
      whole(turn, piece, state);
      return;
    }
    for (int offset = 0; offset < piece.tokens; offset += kBatch) {
      if (piece.origin + offset >= end || piece.origin + offset + kBatch <= begin) continue;
      batch(turn, piece, offset, begin, end, kept, state);
    }
  }

  // int4_token: |16 q|^2 times the mean square of a page's steps, for head lane / 4.
  __device__ float token_steps(int turn) const {
    const uint16_t* steps =
        p_.k_scale + page(turn) * p_.scale_page_stride + int64_t(s_.kv_head) * p_.page_size * 2;
    float sum = 0.0f;
    for (int t = lane_; t < p_.page_size; t += 32) {
      const float step = __half2float(reinterpret_cast<const __half*>(steps)[2 * t]);
      sum += step * step;
    }
    return query_.squares * warp_sum(sum) / p_.page_size;
  }

  // From sum over d of (16 q step)^2: a code is off by step / sqrt(12).
  __device__ void write_error(const Piece& piece, float squares) const {
    const int head = lane_ / 4;
    if (lane_ % 4 != 0 || head >= s_.heads) return;
    const float error = sqrt_approx(squares * (1.0f / 12)) * 0.0625f;
    p_.errors[s_.q_head(p_, head) * p_.num_pages + piece.page_index] = error;
  }

  // Gives tokens [begin, end) one score a head: value, of head lane / 4.
  __device__ void fill(int begin, int end, float value, Softmax (&state)[2]) const {
    if (begin >= end) return;
    for (int head = 0; head < s_.heads; ++head) {
      const float v = __shfl_sync(0xffffffffu, value, head * 4);
      float* out = p_.scores + s_.q_head(p_, head) * p_.capacity;
      for (int t = begin + lane_; t < end; t += 32) out[t] = v;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float v = of_head(value, i);
      if (lane_ < 4) state[i].add(v, float(end - begin));
    }
  }

  // int4_token: fills the runs of a piece that are no candidates.
  __device__ void fill_runs(int turn, const Piece& piece, unsigned kept, int begin, int end,
                            Softmax (&state)[2]) const {
    const int64_t page = this->page(turn);
    const int runs = ceil_div(p_.page_size, kQuestBlock);
    for (int i = 0; i < 4; ++i) {
      const int from = max(begin, piece.origin + i * kQuestBlock);
      const int to = min(end, piece.origin + (i + 1) * kQuestBlock);
      if ((kept >> i & 1) || from >= to) continue;
      float value = -INFINITY;
      if (!p_.drop) {
        const int64_t at = int64_t(s_.kv_head) * runs + piece.number * 4 + i;
        float values[L::kChannels];
        load_query(q_, lane_ / 4, lane_ % 4, values);
        float sum = 0.0f;
        for_channels<D>(p_.k_bounds + page * p_.bounds_page_stride + at * 2 * D, lane_ % 4,
                        [&](int e, float low, float high) { sum += values[e] * (low + high); });
        value = quad_sum(sum) * (0.5f * 0.0625f);
      }
      fill(from, to, value, state);
    }
  }

  // What head 2 * (lane % 4) + i has in a lane of its own.
  __device__ float of_head(float value, int i) const {
    return __shfl_sync(0xffffffffu, value, (lane_ % 4 * 2 + i) * 4);
  }

  // Scores of a piece of kPieceTokens tokens, all of which are visible.
  __device__ void whole(int turn, const Piece& piece, Softmax (&state)[2]) const {
    const float bases[2] = {of_head(query_.base, 0), of_head(query_.base, 1)};
    float scores[kPieceTokens / kBatch][2][4];
#pragma unroll
    for (int i = 0; i < kPieceTokens / kBatch; ++i) {
      const int first = i * kBatch + lane_ / 4 * 4;
      multiply(turn, first, bases, scores[i]);
      write<true>(piece.origin + i * kBatch, kAllSeen, scores[i]);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = state[h].max;
#pragma unroll
      for (const auto& batch : scores) {
#pragma unroll
        for (float score : batch[h]) top = fmaxf(top, score);
      }
      float sum = state[h].sum * __expf(state[h].max - top);
      const float shift = -kLog2E * top;
#pragma unroll
      for (const auto& batch : scores) {
#pragma unroll
        for (float score : batch[h]) sum += exp2_approx(fmaf(score, kLog2E, shift));
      }
      state[h].sum = sum;
      state[h].max = top;
    }
  }

  // Scores of kBatch tokens of a piece, not all of which are to be scored.
  __device__ void batch(int turn, const Piece& piece, int offset, int begin, int end, unsigned kept,
                        Softmax (&state)[2]) const {
    const int first = offset + lane_ / 4 * 4;
    const float bases[2] = {of_head(query_.base, 0), of_head(query_.base, 1)};
    float scores[2][4];
    multiply(turn, first, bases, scores);
    unsigned seen = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int t = piece.origin + first + i;
      if (t >= begin && t < end) seen |= 1u << i;
    }
    if (kPerToken && !(kept >> first / kQuestBlock & 1)) seen = 0;
    if (p_.by_token && p_.drop) {
      const uint8_t* candidates = s_.candidates(p_) + piece.origin + first;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if ((seen >> i & 1) && !candidates[i]) scores[0][i] = scores[1][i] = -INFINITY;
      }
    }
    write<false>(piece.origin + offset, seen, scores);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!(seen >> i & 1)) continue;
      state[0].add(scores[0][i]);
      state[1].add(scores[1][i]);
    }
  }

  // Multiplies two tiles: scores [head][token] of the lane's four tokens, from `first` of a piece.
  __device__ void multiply(int turn, int first, const float (&bases)[2],
                           float (&scores)[2][4]) const {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      uint32_t words[2][L::kRegs];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        L::load(ring_.codes(turn), first + tile * 2 + half, lane_ % 4, words[half]);
      }
      float c[4] = {bases[0], bases[1], bases[0], bases[1]};
      query_.folded.multiply(words[0], words[1], c);
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[i % 2][tile * 2 + i / 2] = c[i];
    }
    if constexpr (kPerToken) apply_token_scales(turn, first, bases, scores);
  }

  // int4_token: from 16 q . code, the sum of which with the base is c, to scale * that + min * q.
  __device__ void apply_token_scales(int turn, int first, const float (&bases)[2],
                                     float (&scores)[2][4]) const {
    const __half2* pairs = reinterpret_cast<const __half2*>(ring_.scales(turn));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 scale = __half22float2(pairs[first + i]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        scores[h][i] = scale.x * scores[h][i] - scale.y * 0.0625f * bases[h];
      }
    }
  }

  // Writes the lane's scores of a batch from token t on; seen: a bit for each that is to be
  // written.
  template <bool kVectors>
  __device__ void write(int t, unsigned seen, const float (&scores)[2][4]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (lane_ % 4 * 2 + h >= s_.heads) continue;
      float* out = row_ + h * int64_t(p_.capacity) + t;
      if constexpr (kVectors) {
        *reinterpret_cast<float4*>(out) =
            make_float4(scores[h][0], scores[h][1], scores[h][2], scores[h][3]);
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
  const int residents_, pieces_, step_, lane_;
  int first_, count_;  // pieces of the unit: the warp's first one, and how many it has
  float* row_;         // scores of the first of the lane's two heads, from its first token on
  const float* q_ = nullptr;
  int looked_up_ = 0;  // the turn that lane 0 has looked up
  int page_ = 0;
  unsigned kept_ = 0;
  FoldedQuery<D> query_;
};

}  // namespace twilight
