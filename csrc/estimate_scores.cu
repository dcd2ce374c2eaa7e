// scores[n, h, t] = softmax_scale * q[n, h] . k[t] over the visible tokens of each query row, and
// their log-sum-exp. k[t] is the row's own K where t is resident, else min + scale * code (INT4).
//
// A block owns (query row, KV head and up to 8 of its query heads, chunk): a chunk of some 512 list
// tokens, or 64 resident ones. A warp owns a page at a time. It reads the page's codes once for all
// heads, in 16-byte loads (8, 4 or 2 where D / 8 bytes demand), and multiplies them on the tensor
// cores (m16n8k16, bf16 in, float accumulate): tokens are the rows of A, heads the columns of B.
// Channel order inside a dot is free, so lane (token, j) loads the j-th quarter of the token's
// bytes and unpacks them into A with no exchange; B is built in the same order.
//   A: a nibble c goes to bits 3-6 of a bf16 one, 1 + c / 16, exact, in a shift and a lop3 a pair.
//   B: 16 * q * softmax_scale * scale, folded once a page, as a sum of two bf16 (hi + lo).
//   C starts at q . min - sum of 16 * q * scale, which takes the ones out again.
// Precision: hi + lo are off by at most 2^-18 of each q * scale, and A is at most 31 / 16, so a
// channel's term is off by at most 2^-17 of the widest term that its scale allows, at any
// magnitude: bf16 has float's exponents, where float16 could overflow on models with a large K
// bias. q . min, where such a bias lands, is summed in float. int4_token: B is 16 * q alone; a
// token's scale and min are applied to C's rows.
//
// Each chunk leaves (max, sum of exp) a head, merged by a second small kernel: no second pass.
// Bytes moved at D 128: 72 a list token and KV head (64 codes, 8 scales) read, 4 a query head
// written. Source: the SpGEMV of Twilight (arXiv 2502.02770); packing after Marlin (2408.11743).
#include <cuda_fp16.h>

#include "csrc/common.cuh"
#include "csrc/estimate_scores.h"
#include "csrc/int4_tiles.cuh"
#include "csrc/running_softmax.cuh"

namespace twilight {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kHeads = 8;            // query heads a block: the columns of an m16n8k16 tile
constexpr int kTile = 16;            // tokens of a tile: its rows, and a run of int4_token's bounds
constexpr int kChunkTokens = 512;    // list tokens a block: 2,048 blocks at 128K and 8 heads
constexpr int kResidentTokens = 64;  // resident tokens a block
constexpr int kLanesPerToken = 8;    // of a resident token's dot

static_assert(kTile == kQuestBlock);

// What a block works on, from its place in the grid and the step's arrays.
struct Work {
  int n, kv_head, first_head, heads, seq;
  int start, stop;  // visible tokens
  int first, last;  // list tokens

  __device__ explicit Work(const EstimateScoresParams& p) {
    const int head_groups = ceil_div(p.group, kHeads);
    n = blockIdx.z;
    kv_head = blockIdx.y / head_groups;
    const int skipped = blockIdx.y % head_groups * kHeads;
    first_head = kv_head * p.group + skipped;
    heads = min(kHeads, p.group - skipped);
    seq = p.query_seq[n];
    start = p.ctx_starts[n];
    stop = p.positions[n] + 1;
    first = max(start, p.num_sink);
    last = min(stop, p.window_starts[seq]);
  }
  __device__ float* row(const EstimateScoresParams& p, int head) const {
    const int64_t q_head = int64_t(n) * p.num_kv_heads * p.group + first_head + head;
    return p.scores + q_head * p.capacity;
  }
};

// Gives tokens [begin, end) one score a head: value, valid in lanes 4 * head.
__device__ void fill(const EstimateScoresParams& p, const Work& work, int begin, int end,
                     float value, int lane, Softmax (&state)[2]) {
  for (int head = 0; head < work.heads; ++head) {
    const float v = __shfl_sync(0xffffffffu, value, head * 4);
    float* out = work.row(p, head);
    for (int t = begin + lane; t < end; t += 32) out[t] = v;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float v = __shfl_sync(0xffffffffu, value, (lane % 4 * 2 + i) * 4);
    if (lane < 4) state[i].add(v, float(end - begin));
  }
}

// One page of list tokens [begin, end), by one warp.
template <int D, bool kPerToken>
struct PageWarp {
  using L = Lanes<D>;
  const EstimateScoresParams& p;
  const Work& work;
  QueryPart q;
  int lane;
  Folded<D> folded;
  float base = 0.0f;   // what C starts at, of head lane / 4
  float q_sum = 0.0f;  // per token: sum of q, likewise

  __device__ PageWarp(const EstimateScoresParams& p, const Work& work, const float* q, int lane)
      : p(p), work(work), q{q, lane}, lane(lane) {
    if constexpr (kPerToken) {
      float values[L::kChannels];
      float sum = 0.0f;
#pragma unroll
      for (int e = 0; e < L::kChannels; ++e) sum += values[e] = this->q[e];
      folded.set(values);
      base = -quad_sum(sum);
      q_sum = -base * 0.0625f;
    }
  }

  __device__ void fold(const uint16_t* scale_and_min) {
    float values[L::kChannels];
    float sum = 0.0f;
    for_channels<D>(scale_and_min, lane % 4, [&](int e, float scale, float low) {
      const float query = q[e];
      values[e] = query * scale;
      sum += query * (low * 0.0625f - scale);
    });
    folded.set(values);
    base = quad_sum(sum);
  }

  // q . (x * row0 + y * row1) for head lane / 4.
  __device__ float midpoint(const uint16_t* rows, float x, float y) const {
    float sum = 0.0f;
    for_channels<D>(rows, lane % 4,
                    [&](int e, float row0, float row1) { sum += q[e] * (x * row0 + y * row1); });
    return quad_sum(sum) * 0.0625f;
  }

  // Whether a page (or a run of one) is to be scored; if not, fills it.
  __device__ bool kept(int64_t page, int page_index, int run, int begin, int end,
                       Softmax (&state)[2]) const {
    if (p.candidates == nullptr || p.by_token) return true;
    const int runs = kPerToken ? ceil_div(p.page_size, kTile) : 1;
    const int64_t row = int64_t(work.n) * p.num_kv_heads + work.kv_head;
    if (p.candidates[row * p.num_blocks + int64_t(page_index) * runs + run]) return true;
    float value = -INFINITY;
    if (!p.drop && kPerToken) {
      const int64_t at = int64_t(work.kv_head) * runs + run;
      value = midpoint(p.k_bounds + page * p.bounds_page_stride + at * 2 * D, 0.5f, 0.5f);
    } else if (!p.drop) {
      value = midpoint(scales(page), 7.5f, 1.0f);
    }
    fill(p, work, begin, end, value, lane, state);
    return false;
  }

  __device__ const uint16_t* scales(int64_t page) const {
    const int per_head = kPerToken ? 2 * p.page_size : 2 * D;
    return p.k_scale + page * p.scale_page_stride + int64_t(work.kv_head) * per_head;
  }

  __device__ void run(int page_index, int begin, int end, Softmax (&state)[2]) {
    const int64_t page = p.page_table[int64_t(work.seq) * p.table_stride + page_index];
    const int origin = page_index * p.page_size;
    if constexpr (!kPerToken) {
      if (!kept(page, page_index, 0, begin, end, state)) return;
    }
    const uint8_t* codes =
        p.k_codes + page * p.codes_page_stride + int64_t(work.kv_head) * p.page_size * (D / 2);
    bool folded_page = kPerToken;
    constexpr int kBatch = L::kTiles * kTile;
    for (int at = (begin - origin) / kBatch * kBatch; at < end - origin; at += kBatch) {
      uint32_t words[L::kTiles][2][L::kRegs];
      bool wanted[L::kTiles];
#pragma unroll
      for (int i = 0; i < L::kTiles; ++i) {
        const int from = max(begin, origin + at + i * kTile);
        const int to = min(end, origin + at + (i + 1) * kTile);
        wanted[i] = from < to;
        if constexpr (kPerToken) {
          if (wanted[i]) wanted[i] = kept(page, page_index, at / kTile + i, from, to, state);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int offset = at + i * kTile + half * 8 + lane / 4;
#pragma unroll
          for (int w = 0; w < L::kRegs; ++w) words[i][half][w] = 0;
          if (wanted[i] && offset < p.page_size) {
            L::load(codes + offset * (D / 2), lane % 4, words[i][half]);
          }
        }
      }
      if (!folded_page) fold(scales(page));  // after the loads of codes are under way
      folded_page = true;
#pragma unroll
      for (int i = 0; i < L::kTiles; ++i) {
        if (wanted[i]) tile(page, origin, at + i * kTile, begin, end, words[i], state);
      }
    }
  }

  // Multiplies one tile and writes its scores.
  __device__ void tile(int64_t page, int origin, int offset, int begin, int end,
                       const uint32_t (&words)[2][L::kRegs], Softmax (&state)[2]) const {
    const int column = lane % 4 * 2;
    float c[4];
    c[0] = c[2] = __shfl_sync(0xffffffffu, base, column * 4);
    c[1] = c[3] = __shfl_sync(0xffffffffu, base, column * 4 + 4);
    folded.multiply(words[0], words[1], c);
    if constexpr (kPerToken) {
      const float sums[2] = {__shfl_sync(0xffffffffu, q_sum, column * 4),
                             __shfl_sync(0xffffffffu, q_sum, column * 4 + 4)};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = min(offset + half * 8 + lane / 4, p.page_size - 1);
        const __half2* pairs = reinterpret_cast<const __half2*>(scales(page));
        const float2 scale = __half22float2(pairs[token]);
        c[half * 2] = scale.x * c[half * 2] + scale.y * sums[0];
        c[half * 2 + 1] = scale.x * c[half * 2 + 1] + scale.y * sums[1];
      }
    }
    const int t0 = origin + offset + lane / 4, t1 = t0 + 8;
    const bool in0 = t0 >= begin && t0 < end, in1 = t1 >= begin && t1 < end;
    if (p.by_token && p.drop) {
      const int64_t row = int64_t(work.n) * p.num_kv_heads + work.kv_head;
      const uint8_t* kept = p.candidates + row * p.num_blocks;
      if (in0 && !kept[t0]) c[0] = c[1] = -INFINITY;
      if (in1 && !kept[t1]) c[2] = c[3] = -INFINITY;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (column + i >= work.heads) continue;
      float* out = work.row(p, column + i);
      if (in0) out[t0] = c[i];
      if (in1) out[t1] = c[i + 2];
      const float x = in0 ? c[i] : -INFINITY, y = in1 ? c[i + 2] : -INFINITY;
      const float top = fmaxf(state[i].max, fmaxf(x, y));
      state[i].sum = state[i].sum * __expf(state[i].max - top) + __expf(x - top) + __expf(y - top);
      state[i].max = top;
    }
  }
};

// Exact dots of up to 64 resident tokens: 8 lanes a token, whose lane i ends up with head i.
template <int D>
__device__ Softmax resident_scores(const EstimateScoresParams& p, const Work& work, int chunk,
                                   const float* q) {
  const int lane = threadIdx.x % kLanesPerToken;
  const int slots = p.num_sink + p.window_rows;
  const int64_t head = int64_t(p.seq_slots[work.seq]) * p.num_kv_heads + work.kv_head;
  const int window_start = max(p.window_starts[work.seq], p.num_sink);
  Softmax state;
  for (int i = threadIdx.x / kLanesPerToken; i < kResidentTokens; i += kThreads / kLanesPerToken) {
    const int slot = chunk * kResidentTokens + i;
    const int t = slot < p.num_sink ? slot : window_start + slot - p.num_sink;
    const bool visible = slot < slots && t >= work.start && t < work.stop;
    float dots[kHeads] = {};
    if (visible) {
      const int place = t < p.num_sink ? t : p.num_sink + t % p.window_rows;
      const int64_t pair = (head * slots + place) * D;
#pragma unroll
      for (int k = lane; k < D / 2; k += kLanesPerToken) {
        const float2 key = load_pair(p.rows, pair + k, p.row_dtype);
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          const float2 query = reinterpret_cast<const float2*>(q + h * D)[k];
          dots[h] += query.x * key.x + query.y * key.y;
        }
      }
    }
    float mine = 0.0f;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int mask = 1; mask < kLanesPerToken; mask *= 2) {
        dots[h] += __shfl_xor_sync(0xffffffffu, dots[h], mask);
      }
      if (lane == h) mine = dots[h];
    }
    if (visible && lane < work.heads) {
      work.row(p, lane)[t] = mine;
      state.add(mine);
    }
  }
  state.merge_lanes(8);
  state.merge_lanes(16);
  return state;
}

// Queries of the block's heads, scaled, zero beyond them. Plain [kHeads, D] for resident tokens;
// for list tokens 16 times that, in the order in which QueryPart reads.
template <int D>
__device__ void stage_queries(const EstimateScoresParams& p, const Work& work, bool plain,
                              float* q) {
  const int64_t row = int64_t(work.n) * p.num_kv_heads * p.group + work.first_head;
  for (int i = threadIdx.x; i < kHeads * D; i += kThreads) {
    int head = i / D, channel = i % D;
    if (!plain) {
      const int lane = i / 4 % 32, e = i / 128 * 4 + i % 4;
      head = lane / 4;
      channel = 2 * Lanes<D>::byte(e / 8, lane % 4) + e % 8;
    }
    const float factor = p.softmax_scale * (plain ? 1.0f : 16.0f);
    q[i] = head < work.heads ? load_row(p.q, (row + head) * D + channel, p.row_dtype) * factor : 0;
  }
  __syncthreads();
}

template <int D, bool kPerToken>
__global__ void __launch_bounds__(kThreads, D > 128 ? 3 : 4)
    estimate_scores_kernel(const EstimateScoresParams p, int resident_chunks, int chunk_pages) {
  __shared__ __align__(16) float q[kHeads * D];
  __shared__ float maxima[kWarps][kHeads], sums[kWarps][kHeads];
  const Work work(p);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool resident = blockIdx.x < resident_chunks;
  const int chunk = resident ? blockIdx.x : blockIdx.x - resident_chunks;
  const int first_page = max(chunk * chunk_pages, work.first / p.page_size);
  const int last_page = min((chunk + 1) * chunk_pages, ceil_div(work.last, p.page_size));
  const bool busy =
      work.start < work.stop && (resident || (work.first < work.last && first_page < last_page));
  if (busy) stage_queries<D>(p, work, resident, q);
  if (resident) {
    Softmax state;
    if (busy) state = resident_scores<D>(p, work, chunk, q);
    if (lane < kHeads) maxima[warp][lane] = state.max, sums[warp][lane] = state.sum;
  } else {
    Softmax state[2];
    if (busy) {
      PageWarp<D, kPerToken> pages(p, work, q, lane);
      for (int page = first_page + warp; page < last_page; page += kWarps) {
        const int begin = max(work.first, page * p.page_size);
        const int end = min(work.last, (page + 1) * p.page_size);
        pages.run(page, begin, end, state);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) state[i].merge_lanes(mask);
      if (lane < 4) {
        maxima[warp][lane * 2 + i] = state[i].max;
        sums[warp][lane * 2 + i] = state[i].sum;
      }
    }
  }
  __syncthreads();
  if (threadIdx.x < work.heads) {
    Softmax total;
    for (int w = 0; w < kWarps; ++w) total.merge(maxima[w][threadIdx.x], sums[w][threadIdx.x]);
    const int64_t row = int64_t(work.n) * p.num_kv_heads * p.group + work.first_head + threadIdx.x;
    reinterpret_cast<float2*>(p.partials)[row * gridDim.x + blockIdx.x] =
        make_float2(total.max, total.sum);
  }
}

// lse of a (query row, head) from its chunks, a warp each.
__global__ void estimate_lse_kernel(const float2* partials, float* lse, int num, int chunks) {
  const int row = blockIdx.x * kWarps + threadIdx.x / 32;
  if (row >= num) return;
  Softmax state;
  for (int i = threadIdx.x % 32; i < chunks; i += 32) {
    const float2 part = partials[int64_t(row) * chunks + i];
    state.merge(part.x, part.y);
  }
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) state.merge_lanes(mask);
  if (threadIdx.x % 32 == 0) lse[row] = state.sum > 0 ? state.max + logf(state.sum) : -INFINITY;
}

int chunk_pages_of(int page_size) { return max(1, kChunkTokens / page_size); }
int resident_chunks_of(int num_sink, int window_rows) {
  return ceil_div(num_sink + window_rows, kResidentTokens);
}

template <int D>
void launch(const EstimateScoresParams& p, dim3 grid, cudaStream_t stream) {
  const int resident = resident_chunks_of(p.num_sink, p.window_rows);
  const int pages = chunk_pages_of(p.page_size);
  if (p.per_token) {
    estimate_scores_kernel<D, true><<<grid, kThreads, 0, stream>>>(p, resident, pages);
  } else {
    estimate_scores_kernel<D, false><<<grid, kThreads, 0, stream>>>(p, resident, pages);
  }
}

template <int... kHeadDims>
bool launch_any(const EstimateScoresParams& p, dim3 grid, cudaStream_t stream) {
  return ((p.head_dim == kHeadDims && (launch<kHeadDims>(p, grid, stream), true)) || ...);
}

}  // namespace

int estimate_scores_chunks(int max_len, int page_size, int num_sink, int window_rows) {
  return resident_chunks_of(num_sink, window_rows) +
         ceil_div(ceil_div(max_len, page_size), chunk_pages_of(page_size));
}

cudaError_t launch_estimate_scores(const EstimateScoresParams& p, cudaStream_t stream) {
  if (p.num_rows == 0) return cudaSuccess;
  const int chunks = estimate_scores_chunks(p.max_len, p.page_size, p.num_sink, p.window_rows);
  const dim3 grid(chunks, p.num_kv_heads * ceil_div(p.group, kHeads), p.num_rows);
  if (!launch_any<64, 80, 96, 128, 256>(p, grid, stream)) return cudaErrorInvalidValue;
  const int num = p.num_rows * p.num_kv_heads * p.group;
  estimate_lse_kernel<<<ceil_div(num, kWarps), kThreads, 0, stream>>>(
      reinterpret_cast<const float2*>(p.partials), p.lse, num, chunks);
  return cudaGetLastError();
}

}  // namespace twilight
