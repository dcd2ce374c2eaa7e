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
constexpr uint32_t kAllLanes = 0xffffffffu;

__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to)), "l"(from),
                 "n"(kBytes)
                 : "memory");
  }
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until all but the kPending newest groups of this lane's copies are there.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Up to 64 tokens of a page.
template <int kHeads>
struct alignas(16) Slice {
  static constexpr uint32_t kWhole = kSliceTokens << 8;
  float scores[kHeads][kSliceTokens + 4];  // 4 more: heads in different banks
  uint32_t grades[kSliceTokens / 4];
  uint32_t bounds;  // tokens from .. to - 1 count: from + 256 * to
  uint32_t row;     // of V, that of token 0; 2^32 rows of at least 32 bytes would be 137 GB
};

// What is read once in 32 slices, so that it takes no registers.
struct Walk {
  const int* pages;
  int item, last_item;  // the warp's first; behind the stretch's last
  int first, last;      // the tokens that row n sees and that are not resident
  int first_page, slices_per_page;
};

template <int kD, int kHeads>
struct alignas(16) WarpRing {
  static constexpr int kRowBytes = kD / 2;
  static constexpr int kCopyBytes = kRowBytes % 16 == 0 ? 16 : 8;
  static constexpr int kCopies = kRowBytes / kCopyBytes;
  static constexpr int kChunks = (kD + 31) / 32;  // of 16 bytes, 32 channels

  Slice<kHeads> slices[kAhead];
  __half means[kMeanSlots][kD + 16];
  float masses[kMeanPages][36];  // 32 / kHeads terms a head
  char codes[kRingTokens * kChunks * 16];
  __half2 affine[kRingTokens];  // scale, min
  float weights[kHeads][kRingTokens + 8];
  uint8_t listed[kSliceTokens];  // index tokens of the slice at hand
  Walk walk;

  // What a row's chunk numbers are changed by, so that eight rows' same chunks lie in all banks.
  __device__ static int key(int row) { return kChunks == 3 ? 0 : row / (8 / kChunks) % kChunks; }

  // Asks for a row's codes and scale, to be the ring's `at`-th; of four lanes, each for a part.
  __device__ void copy_row(const uint8_t* v_codes, const __half2* v_scale, uint32_t row, int at) {
    const int j = threadIdx.x % 4;
    const uint8_t* from = v_codes + uint64_t{row} * kRowBytes;
#pragma unroll
    for (int c = 0; c < kCopies; c += 4) {
      if (c + j >= kCopies) continue;
      const int byte = (c + j) * kCopyBytes;
      char* to = codes + at * (kChunks * 16) + ((byte / 16) ^ key(at)) * 16 + byte % 16;
      copy_async<kCopyBytes>(to, from + byte);
    }
    if (j == 0) copy_async<4>(&affine[at], v_scale + row);
  }

  // Makes the ring's `at`-th token one without a weight.
  __device__ void clear_token(int at) {
    affine[at] = __half2{};
#pragma unroll
    for (int head = 0; head < kHeads; ++head) weights[head][at] = 0.f;
  }
};

// Of [N, Hq], the segment's first head.
__device__ __forceinline__ int64_t first_query_row(const SplitWork& work, const Segment& segment) {
  return int64_t{segment.n} * work.num_kv_heads * work.group + segment.first_head;
}

// The slices of a warp: every kSplitWarps-th of a stretch.
template <int kD, int kHeads>
struct SliceSource {
  using Ring = WarpRing<kD, kHeads>;
  static constexpr int kPairs = kHeads / 2;
  const float* scores;    // of the segment's first head
  const uint8_t* grades;  // of its KV head
  const __half* means;    // of its KV head's pages, or null
  int64_t score_capacity;
  int lane, num_heads, num_kv_heads, page_size;
  bool vectors;  // four tokens' scores or grades are one copy
  // Of 32 slices, one a lane: first token, bounds and row as in Slice, page.
  int token = 0, page = 0;
  uint32_t bounds = 0, row = 0;

  __device__ void start(const AttendLowerParams& params, const Segment& segment, int of_warp) {
    const SplitWork& work = params.work;
    const int64_t head = int64_t{segment.n} * work.num_kv_heads + segment.h;
    scores = params.scores + first_query_row(work, segment) * params.score_capacity;
    grades = params.grades + head * params.grade_capacity;
    means = static_cast<const __half*>(params.v_mean);
    if (means != nullptr) means += segment.h * kD;
    score_capacity = params.score_capacity;
    lane = of_warp;
    num_heads = segment.num_heads;
    num_kv_heads = work.num_kv_heads;
    page_size = params.step.page_size;
    vectors = (page_size | score_capacity | params.grade_capacity) % 4 == 0;
  }

  // The slices from this number on, a multiple of 32.
  __device__ void look_up(const Walk& walk, int head, int number) {
    const int at = min(walk.item + (number + lane) * kSplitWarps, walk.last_item - 1);
    const int of_stretch = walk.slices_per_page == 1 ? at : at / walk.slices_per_page;
    const int skip = (at - of_stretch * walk.slices_per_page) * kSliceTokens;
    const int of_sequence = walk.first_page + of_stretch;
    page = walk.pages[of_sequence];
    token = of_sequence * page_size + skip;
    const int end = min(walk.last, (of_sequence + 1) * page_size);
    const int from = min(max(walk.first - token, 0), kSliceTokens);
    bounds = from | min(max(end - token, 0), kSliceTokens) << 8;
    row = (static_cast<uint32_t>(page) * num_kv_heads + head) * page_size + skip;
  }

  // Asks for slice `number`'s scores and grades, and for its page's mean.
  __device__ void ask(Slice<kHeads>& slice, __half* mean, int number) const {
    const int at = __shfl_sync(kAllLanes, token, number);  // of lane number % 32
    const int to = __shfl_sync(kAllLanes, bounds, number) >> 8;
    const int64_t of_page = __shfl_sync(kAllLanes, page, number);
    if (lane == number % 32) slice.bounds = bounds, slice.row = row;
    if (means != nullptr && lane < kD / 8) {
      copy_async<16>(mean + lane * 8, means + of_page * (num_kv_heads * kD) + lane * 8);
    }
    if (!vectors) return ask_singly(slice, at, to);
    const int half = lane / 16, part = lane % 16 * 4;
    if (part >= to) return;
    const float* from = scores + half * score_capacity + part + at;
#pragma unroll
    for (int m = 0; m < kPairs; ++m, from += 2 * score_capacity) {
      if (2 * m + half < num_heads) copy_async<16>(&slice.scores[2 * m + half][part], from);
    }
    if (half == 0) copy_async<4>(&slice.grades[lane], grades + part + at);
  }

  // Where no four tokens are aligned. Grades, which are too small for cp.async, come at once.
  __device__ void ask_singly(Slice<kHeads>& slice, int at, int to) const {
#pragma unroll 1
    for (int t = lane; t < to; t += 32) {
      reinterpret_cast<uint8_t*>(slice.grades)[t] = grades[at + t];
      const float* from = scores + (at + t);
#pragma unroll 1
      for (int head = 0; head < num_heads; ++head, from += score_capacity) {
        copy_async<4>(&slice.scores[head][t], from);
      }
    }
  }
};

}  // namespace twilight
