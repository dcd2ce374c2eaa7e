// What a warp of estimate_scores knows of its pieces before it comes to them: of 32 turns at once.
#pragma once

#include "csrc/estimate_schedule.cuh"

namespace twilight {

// What is known of a piece, in bits.
constexpr unsigned kAllRuns = 15;     // bits 0-3: the runs of 16 tokens that are candidates
constexpr unsigned kWhole = 1 << 4;   // all of kPieceTokens tokens are to be scored, and written
constexpr unsigned kFirst = 1 << 5;   // the piece is its page's first
constexpr unsigned kScales = 1 << 6;  // its scales are read
constexpr unsigned kAll = 1 << 7;     // all of kPieceTokens tokens are read, in vectors
constexpr int kTokensAt = 8;          // bits 8-15: tokens, hidden ones included
constexpr int kNumberAt = 16;         // bits 16-: the piece's number within its page

struct Known {
  unsigned bits;

  __device__ bool is(unsigned bit) const { return bits & bit; }
  __device__ unsigned kept() const { return bits & kAllRuns; }
  __device__ int tokens() const { return bits >> kTokensAt & 255; }
  __device__ int number() const { return bits >> kNumberAt; }
};

struct Piece : Known {
  int page_index, origin;  // page and first token, counted from the sequence's first
};

// A warp's pieces of one segment, turn by turn; a lane holds what is known of one.
template <bool kPerToken>
class Turns {
 public:
  // The segment's items `first`, `first` + step .. are the warp's.
  __device__ Turns(const EstimateScoresParams& p, const Schedule& schedule, const Segment& s,
                   int first, int step, int lane)
      : p_(p), s_(s), pieces_(schedule.pieces), step_(step), lane_(lane) {
    const int residents = schedule.residents;
    const int skipped = first < residents ? ceil_div(residents - first, step) : 0;
    first_ = first + skipped * step - residents;
    const int stop = s.end - residents;
    count_ = first_ < stop ? ceil_div(stop - first_, step) : 0;
  }

  __device__ int count() const { return count_; }

  // Whether a turn's piece is still to be looked up.
  __device__ bool lack(int turn) const { return turn >= looked_up_ + 32; }

  // Looks up the pieces of this turn and the 31 after it.
  __device__ void look_up(int turn) {
    looked_up_ = turn;
    const bool mine = turn + lane_ < count_;
    const int i = first_ + (turn + lane_) * step_;
    const int number = pieces_ == 1 ? 0 : i % pieces_;
    const int tokens = min(kPieceTokens, p_.page_size - number * kPieceTokens);
    page_index_ = s_.first_page + (pieces_ == 1 ? i : i / pieces_);
    page_ = mine ? p_.page_table[int64_t(s_.seq) * p_.table_stride + page_index_] : 0;
    const int origin = page_index_ * p_.page_size + number * kPieceTokens;
    const unsigned kept = kept_runs(mine, number);
    const bool full = tokens == kPieceTokens;
    const bool whole = kept == kAllRuns && full && p_.vector_scores && !(p_.by_token && p_.drop) &&
                       origin >= s_.first && origin + kPieceTokens <= s_.last;
    const bool scales = kept || (!kPerToken && (!p_.drop || p_.errors != nullptr));
    const bool all = kept && full && p_.vector_codes;
    known_ = kept | (whole ? kWhole : 0) | (number == 0 ? kFirst : 0) | (scales ? kScales : 0) |
             (all ? kAll : 0) | tokens << kTokensAt | number << kNumberAt;
  }

  __device__ Known known(int turn) const { return {of_turn(known_, turn)}; }
  __device__ unsigned page(int turn) const { return of_turn(page_, turn); }  // in the index
  __device__ Piece piece(int turn) const {
    const Known known = this->known(turn);
    const int page_index = of_turn(page_index_, turn);
    return {known, page_index, page_index * p_.page_size + known.number() * kPieceTokens};
  }

 private:
  // Which runs of 16 tokens are candidates: a bit each.
  __device__ unsigned kept_runs(bool mine, int number) const {
    if (!mine || p_.candidates == nullptr || p_.by_token) return kAllRuns;
    const uint8_t* candidates = s_.candidates(p_);
    if constexpr (!kPerToken) return candidates[page_index_] ? kAllRuns : 0;
    const int runs = ceil_div(p_.page_size, kQuestBlock);
    unsigned kept = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int run = number * 4 + i;
      if (run < runs && candidates[int64_t(page_index_) * runs + run]) kept |= 1u << i;
    }
    return kept;
  }

  template <typename T>
  __device__ T of_turn(T value, int turn) const {
    return __shfl_sync(0xffffffffu, value, turn - looked_up_);
  }

  const EstimateScoresParams& p_;
  const Segment& s_;
  const int pieces_, step_, lane_;
  int first_, count_;  // pieces of the unit: the warp's first one, and how many it has
  int looked_up_ = 0;  // the turn of lane 0; of a lane's own:
  unsigned known_ = 0, page_ = 0;
  int page_index_ = 0;
};

}  // namespace twilight
