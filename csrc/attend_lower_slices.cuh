// Slices of pages, and what a warp of csrc/attend_lower.cu keeps of them in shared memory: copies
// that are on their way or wait for their turn. How a slice's scores, grades and mean are asked
// for.
#pragma once

#include "csrc/attend_lower.h"
#include "csrc/row_tile.cuh"

namespace twilight {

constexpr int kSliceTokens = 64;
constexpr int kAhead = 3;        // slices on their way to a warp
constexpr int kCodeTokens = 16;  // of a tile
constexpr int kRingTokens = 48;  // index tokens whose codes are on their way, or wait: three tiles
constexpr int kMeanPages = 4;    // of a product
constexpr int kMeanSlots = kMeanPages + kAhead - 1;

// Up to 64 tokens of a page.
template <int kHeads>
struct alignas(16) Slice {
  static constexpr uint32_t kWhole = kSliceTokens << 8;
  static constexpr int kStride = kSliceTokens + 4;  // 4 more: heads in different banks
  float scores[kHeads][kStride];
  uint32_t grades[kSliceTokens / 4];
  uint32_t bounds;  // tokens from .. to - 1 count: from + 256 * to
  uint32_t row;     // of V, that of token 0; 2^32 rows of at least 32 bytes would be 137 GB

  // Of the four tokens from `first`, a multiple of four, on; those that do not count are dropped.
  __device__ __forceinline__ uint32_t grades_from(uint32_t first) const {
    uint32_t four = grades[first / 4];
    if (bounds == kWhole) return four;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const bool counts = first + c >= (bounds & 255) && first + c < bounds >> 8;
      if (!counts) four |= kGradeDropped << (8 * c);
    }
    return four;
  }
};

__device__ __forceinline__ int slices_per_page(const StepView& step) {
  return (step.page_size + kSliceTokens - 1) / kSliceTokens;
}

// What the step's metadata says of a query row. It is read before wait_for_inputs: plain kernels
// and copies alone write it, and whatever may still run was launched after their end.
struct Listed {
  int seq;
  int2 tokens;  // from and to: those that the row sees and that are not resident
  int first_page, slices;
};

__device__ inline Listed read_listed(const StepView& step, int n) {
  const int seq = step.query_seq[n], from = max(step.ctx_starts[n], step.num_sink);
  const int to = min(step.window_starts[seq], step.positions[n] + 1);
  const int first_page = from / step.page_size;
  const int pages = from < to ? (to - 1) / step.page_size - first_page + 1 : 0;
  return {seq, make_int2(from, to), first_page, pages * slices_per_page(step)};
}

constexpr int kKnown = 8;  // query rows

// Read once a block, to shared memory.
struct KnownRows {
  Listed rows[kKnown];

  __device__ void read(const StepView& step, int num_queries) {
    const int n = threadIdx.x;
    if (n < min(num_queries, kKnown)) rows[n] = read_listed(step, n);
  }
  __device__ Listed row(const StepView& step, int n) const {
    return n < kKnown ? rows[n] : read_listed(step, n);
  }
};

// How many of all slices lie in front of an item, where each item has an even share of them: the
// same wherever it is asked, whichever way it is rounded.
__device__ __forceinline__ int slices_before(int item, int items, int slices) {
  if (item >= items) return slices;
  return min(slices, static_cast<int>(__fmul_rn(item, __fdividef(slices, items))));
}

// The slices of a warp, every kSplitWarps-th of a stretch: what is read once in 32 of them, so that
// it takes no registers.
struct Walk {
  const int* pages;
  int2 tokens;
  int item, last_item;  // the warp's first; behind the stretch's last
  int first_page, slices;

  __device__ void start(const StepView& step, const Listed& listed, int first_item, int end_item) {
    pages = step.page_table + int64_t{listed.seq} * step.page_table_stride;
    tokens = listed.tokens;
    item = first_item;
    last_item = end_item;
    first_page = listed.first_page;
    slices = slices_per_page(step);
  }
};

template <int kD, int kHeads>
struct alignas(16) WarpRing {
  static constexpr int kRowBytes = kD / 2;
  static constexpr int kCopyBytes = kRowBytes % 16 == 0 ? 16 : 8;
  static constexpr int kCopies = kRowBytes / kCopyBytes;
  static constexpr int kChunks = (kD + 31) / 32;  // of 16 bytes, 32 channels

  Slice<kHeads> slices[kAhead];
  __half means[kMeanSlots][kD + 16];
  float masses[kMeanPages][20];  // 16 / kHeads terms a head
  char codes[kRingTokens * kChunks * 16];
  __half2 affine[kRingTokens];  // scale, min
  float weights[kHeads][kRingTokens + 8];
  uint8_t listed[kSliceTokens];  // index tokens of the slice at hand
  Walk walk;

  // What a row's chunk numbers are changed by, so that eight rows' same chunks lie in all banks.
  __device__ static uint32_t key(uint32_t row) {
    return kChunks == 3 ? 0 : row / (8 / kChunks) % kChunks;
  }

  // Asks for a row's codes, to be the ring's `at`-th: of four lanes, each (j) for a part, which
  // v_codes of row 0 points to.
  __device__ void copy_codes(const uint8_t* v_codes, uint32_t row, uint32_t at, uint32_t j) {
    const uint8_t* from = v_codes + uint64_t{row} * kRowBytes;
#pragma unroll
    for (uint32_t c = 0; c < kCopies; c += 4) {
      if (c + j >= kCopies) continue;
      const uint32_t byte = (c + j) * kCopyBytes;
      char* to = codes + at * (kChunks * 16) + ((byte / 16) ^ key(at)) * 16 + byte % 16;
      copy_async<kCopyBytes>(shared_address(to), from + c * kCopyBytes);
    }
  }

  // Makes `count` tokens, up to 32, from the ring's `first`-th on ones without a weight.
  __device__ void clear_tokens(uint32_t first, uint32_t count, uint32_t lane) {
    if (lane >= count) return;
    const uint32_t at = min(first + lane, first + lane - kRingTokens);
    affine[at] = __half2{};
#pragma unroll
    for (int head = 0; head < kHeads; ++head) weights[head][at] = 0.f;
  }
};

// Of [N, Hq], the segment's first head.
__device__ __forceinline__ int64_t first_query_row(const SplitWork& work, const Segment& segment) {
  return int64_t{segment.n} * work.num_kv_heads * work.group + segment.first_head;
}

// Asks for the slices of a walk.
template <int kD, int kHeads>
struct SliceSource {
  using Ring = WarpRing<kD, kHeads>;
  static constexpr int kPairs = kHeads / 2;
  // Of the lane: in a vector copy it has tokens lane % 16 * 4 .. + 3 of heads lane / 16 + 2 * ..
  const float* scores;    // of the segment's first head; of vectors, of the lane's first
  const uint8_t* grades;  // of the segment's KV head; of vectors, the lane's first
  const __half* means;    // of the segment's KV head's pages, the lane's chunk; or null
  int64_t score_capacity;
  uint32_t lane, num_heads, num_kv_heads, page_size;
  uint32_t lane_at;  // scores in front of the lane's, in a vector copy
  uint32_t vectors;  // whether four tokens' scores or grades are one copy
  // Of 32 slices, one a lane: first token, pages' first head, bounds and row as in Slice.
  int token = 0;
  uint32_t page_heads = 0, bounds = 0, row = 0;

  __device__ void start(const AttendLowerParams& params, const Segment& segment, uint32_t of_warp) {
    const SplitWork& work = params.work;
    const int64_t head = int64_t{segment.n} * work.num_kv_heads + segment.h;
    lane = of_warp;
    num_heads = segment.num_heads;
    num_kv_heads = work.num_kv_heads;
    page_size = params.step.page_size;
    score_capacity = params.score_capacity;
    vectors = (page_size | score_capacity | params.grade_capacity) % 4 == 0;
    scores = params.scores + first_query_row(work, segment) * score_capacity;
    grades = params.grades + head * params.grade_capacity;
    if (vectors) {
      scores += lane / 16 * score_capacity + lane % 16 * 4;
      grades += lane % 16 * 4;
    }
    const bool has_mean = params.v_mean != nullptr && lane < kD / 8;
    means = static_cast<const __half*>(params.v_mean);
    means = has_mean ? means + segment.h * kD + lane * 8 : nullptr;
    lane_at = lane / 16 * Slice<kHeads>::kStride + lane % 16 * 4;
    scores = held(scores), grades = held(grades), means = held(means), vectors = held(vectors),
    lane_at = held(lane_at);
  }

  // The slices from this number on, a multiple of 32: what takes no page id. find_rows does the
  // rest, and is the first to wait for page ids.
  __device__ void look_up(const Walk& walk, int number) {
    const int at =
        min(walk.item + (number + static_cast<int>(lane)) * kSplitWarps, walk.last_item - 1);
    const int of_stretch = walk.slices == 1 ? at : at / walk.slices;
    const int skip = (at - of_stretch * walk.slices) * kSliceTokens;
    const int of_sequence = walk.first_page + of_stretch, size = page_size;
    page_heads = walk.pages[of_sequence];
    token = of_sequence * size + skip;
    const int end = min(walk.tokens.y, (of_sequence + 1) * size);
    const int from = min(max(walk.tokens.x - token, 0), kSliceTokens);
    bounds = from | min(max(end - token, 0), kSliceTokens) << 8;
    row = skip;
  }
  __device__ void find_rows(int head) {
    page_heads *= num_kv_heads;
    row += (page_heads + head) * page_size;
  }

  // Asks for scores and grades of slice `number`.
  __device__ void ask_scores(Slice<kHeads>& slice, uint32_t number) const {
    const int at = __shfl_sync(kAllLanes, token, number);  // of lane number % 32
    const uint32_t to = __shfl_sync(kAllLanes, bounds, number) >> 8;
    if (!vectors) return ask_singly(slice, at, to);
    if (lane % 16 * 4 >= to) return;
    const float* from = scores + at;
    const uint8_t* from_grades = grades + at;
    float* to_scores = &slice.scores[0][0] + lane_at;
#pragma unroll
    for (uint32_t m = 0; m < kPairs; ++m) {
      if (2 * m + lane / 16 < num_heads) {
        copy_async<16>(shared_address(to_scores + 2 * m * Slice<kHeads>::kStride),
                       from + 2 * m * score_capacity);
      }
    }
    if (lane < 16) copy_async<4>(shared_address(&slice.grades[lane]), from_grades);
  }

  // Leaves what the page id tells of slice `number`, and asks for the page's mean.
  __device__ void ask_mean(Slice<kHeads>& slice, __half* mean, uint32_t number) const {
    const uint32_t of_page = __shfl_sync(kAllLanes, page_heads, number);
    if (lane == number % 32) slice.bounds = bounds, slice.row = row;
    const __half* from = means + uint64_t{of_page} * kD;
    __half* to = mean + lane * 8;
    if (means != nullptr) copy_async<16>(shared_address(to), from);
  }

  // Where no four tokens are aligned. Grades, which are too small for cp.async, come at once.
  __device__ void ask_singly(Slice<kHeads>& slice, int at, uint32_t to) const {
#pragma unroll 1
    for (uint32_t t = lane; t < to; t += 32) {
      reinterpret_cast<uint8_t*>(slice.grades)[t] = grades[at + t];
      const float* from = scores + (at + t);
#pragma unroll 1
      for (uint32_t head = 0; head < num_heads; ++head, from += score_capacity) {
        copy_async<4>(shared_address(&slice.scores[head][t]), from);
      }
    }
  }
};

}  // namespace twilight
