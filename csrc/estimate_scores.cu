// scores[n, h, t] = softmax_scale * q[n, h] . k[t] over the visible tokens of each query row, and
// their log-sum-exp. k[t] is the row's own K where t is resident, else min + scale * code (INT4).
// Optionally errors[n, h, page], what the steps of a page's codes let its scores be off by.
//
// A grid of resident blocks, two an SM, shares one list of items evenly (estimate_schedule.cuh): a
// warp's item is 16 resident tokens, dotted exactly (estimate_residents.cuh), or up to 64 tokens
// of a page (estimate_pages.cuh). A warp copies its next page to shared memory by cp.async while
// it works on the one before (page_ring.cuh): at D 128 some 75 to 150 KB an SM are under way,
// several times what latency times bandwidth asks for (20 KB), and the queries are staged once for
// some 60 pages. (Marking the codes to leave the L2 first came out as an illegal instruction of
// nvcc 13.0 for sm_90.)
//
// A page's codes are read once for all heads and multiplied on the integer tensor cores (m16n8k32,
// u8 x s8 into int32): tokens are the rows of A, heads the columns of B. Row r of four half tiles
// holds tokens 4 * r .. 4 * r + 3, so that a lane ends up with four neighbours of a head and a
// warp writes 128 bytes a head at once. Channel order inside a dot is free, so lane (r, j) loads
// the j-th quarter of a token's bytes and makes A of them with no exchange; B likewise.
//   A: the codes themselves, a byte each: a word's even nibbles masked, then its odd ones, left
//      where they are as 16 times the code. The even ones' sum is multiplied by 16 in between.
//   B: x = 16 * q * softmax_scale * scale, folded once a page (estimate_query.cuh), in units of
//      |x| / 32600 over the channels of a (page, head), rounded to 16 bits: 256 * high + low, two
//      signed bytes. Up to four heads: they are neighbouring columns of one product, so that a
//      lane ends up with both sums of a head. More heads: two products.
//   A score is q . min and the two sums, exact int32, times the unit.
// Precision: an x is off by half a unit at most, a score thus by some 9e-4 * |x| (a standard
// deviation, D 128), 0.3 % of what the rounding of K to 4 bits does to it (0.29 * |x|): the range
// may be the norm, which the errors want anyway, where the largest |x| would take another pass.
// A page's largest channel sets no other's error apart from that, at any magnitude. q . min, where
// a large K bias lands, is summed in float. NaN and infinities make the unit, and so the scores,
// NaN. int4_token: B is 16 * q alone; a token's scale and min are applied to its scores.
//
// Each block leaves (max, sum of exp) a head and unit. The last of a unit's blocks to arrive merges
// them; nobody waits for a block that has not arrived. A part is a word of 64 bits that is never
// zero, and the merger leaves zeros: so it sees for itself which parts have landed, and no block
// has to fence its part off from its count.
// Bytes moved at D 128: 72 a list token and KV head (64 codes, 8 scales) read, 4 a query head
// written. Source: the SpGEMV of Twilight (arXiv 2502.02770); packing after Marlin (2408.11743).
#include "csrc/dependent_launch.cuh"
#include "csrc/estimate_pages.cuh"
#include "csrc/estimate_residents.cuh"
#include "csrc/estimate_scores.h"

namespace twilight {
namespace {

constexpr int kBlocksPerSm = 2;
constexpr int kMostBlocks = 1024;  // what the workspace has room for
constexpr int kFewLeftOver = 16;   // of so many blocks, one is not missed

template <int D>
constexpr int kWarps = D > 128 ? 4 : 8;  // 16 warps an SM in 128 registers, or 8 in 255

template <int D>
constexpr int kThreads = kWarps<D> * 32;

template <int D>
constexpr int kSharedBytes = kWarps<D> * Ring<D>::kBytes + kHeads * D * int(sizeof(float));

// What a thread stages of the queries of a segment's heads, four channels at a time: 16-bit ones
// first into registers, so that other loads can be sent after these before they are waited for.
template <int D>
class StagedQuery {
 public:
  __device__ void load(const EstimateScoresParams& p, const Segment& s) {
    if (p.row_dtype == kFloat32) return;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      raw_[i] = {};
      const int64_t at = place(p, s, i);
      if (at >= 0)
        raw_[i] = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(p.q) + at);
    }
  }

  // 16 times scaled, zero beyond the segment's heads, as load_query reads them.
  __device__ void store(const EstimateScoresParams& p, const Segment& s, float* q) const {
    const float scale = 16.0f * p.softmax_scale;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const int part = i * kThreads<D> + threadIdx.x;
      if (part >= kAll) break;
      float4 v = {};
      if (p.row_dtype == kBFloat16) {
        v = {__uint_as_float(raw_[i].x << 16), __uint_as_float(raw_[i].x & 0xffff0000u),
             __uint_as_float(raw_[i].y << 16), __uint_as_float(raw_[i].y & 0xffff0000u)};
      } else if (p.row_dtype == kFloat16) {
        v = {half(raw_[i].x), half(raw_[i].x >> 16), half(raw_[i].y), half(raw_[i].y >> 16)};
      } else {
        const int64_t at = place(p, s, i);
        if (at >= 0) v = *reinterpret_cast<const float4*>(static_cast<const float*>(p.q) + at);
      }
      reinterpret_cast<float4*>(q)[part] =
          make_float4(v.x * scale, v.y * scale, v.z * scale, v.w * scale);
    }
  }

 private:
  static constexpr int kAll = kHeads * D / 4, kParts = ceil_div(kAll, kThreads<D>);

  __device__ static float half(uint32_t bits) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
  }

  // Where the i-th four channels lie in q; -1 if there is nothing to load.
  __device__ static int64_t place(const EstimateScoresParams& p, const Segment& s, int i) {
    const int part = i * kThreads<D> + threadIdx.x, lane = part % 32, w = part / 32;
    if (part >= kAll || lane / 4 >= s.heads) return -1;
    return s.q_head(p, lane / 4) * D + 2 * Lanes<D>::byte(w / 2, lane % 4) + w % 2 * 4;
  }

  uint2 raw_[kParts];
};

// Leaves a head's part in each of the first lanes. As the last of the unit's blocks to arrive, then
// puts the sum of all blocks' parts in its place, and zeros in the workspace; returns whether.
__device__ bool merge_blocks(const EstimateScoresParams& p, const Segment& s, int first_block,
                             int blocks, int lane, Softmax& total) {
  using Part = unsigned long long;  // a float2: whole or not there at all, in any order
  const auto part_of = [](float2 v) {
    return Part(__float_as_uint(v.y)) << 32 | __float_as_uint(v.x);
  };
  constexpr int kRows = 32 / kHeads, kRound = 9;  // 36 blocks a round: 264 make 8 units of 33, 34
  const int head = lane % kHeads, row = lane / kHeads;
  volatile Part* parts = reinterpret_cast<volatile Part*>(p.workspace) +
                         (int64_t(first_block) + s.unit) * kHeads + head;
  unsigned* arrived = p.workspace + p.workspace_size - 1 - s.unit;
  if (lane < s.heads) {
    parts[(int(blockIdx.x) - first_block) * kHeads] = part_of({total.max, total.sum});
  }
  unsigned before = 0;
  if (lane == 0) before = atomicAdd(arrived, 1u);
  if (__shfl_sync(0xffffffffu, before, 0) + 1 != unsigned(blocks)) return false;
  if (lane == 0) *arrived = 0;
  total = Softmax();
#pragma unroll 1
  for (int base = row; base - row < blocks; base += kRound * kRows) {
    Part words[kRound];
    bool missing;
    do {
      missing = false;
#pragma unroll
      for (int i = 0; i < kRound; ++i) {
        const int block = base + i * kRows;
        words[i] = part_of({kLowest, 0.0f});
        if (block < blocks && head < s.heads) words[i] = parts[block * kHeads];
      }
#pragma unroll
      for (const Part word : words) missing |= word == 0;
    } while (missing);
    float2 values[kRound];
#pragma unroll
    for (int i = 0; i < kRound; ++i) {
      const int block = base + i * kRows;
      if (block < blocks && head < s.heads) parts[block * kHeads] = 0;
      values[i] = {__uint_as_float(unsigned(words[i])), __uint_as_float(unsigned(words[i] >> 32))};
    }
    total.merge(values);
  }
  total.merge_lanes<kHeads>();
  return true;
}

// By one warp: merges the warps' parts, one a head, and, as the last of the unit's blocks, theirs.
template <int kWarps>
__device__ void finish(const EstimateScoresParams& p, const Schedule& schedule, const Segment& s,
                       const float2 (&parts)[kWarps][kHeads], int lane) {
  constexpr int kRows = 32 / kHeads;
  const int head = lane % kHeads;
  float2 mine[kWarps / kRows];
#pragma unroll
  for (int i = 0; i < kWarps / kRows; ++i) mine[i] = parts[i * kRows + lane / kHeads][head];
  Softmax total;
  total.merge(mine);
  total.merge_lanes<kHeads>();
  bool last = true;
  if (!s.is_whole_unit()) {
    const int owner = schedule.owner(p, lane == 0 ? s.unit_begin : s.unit_end - 1);
    const int first_block = __shfl_sync(0xffffffffu, owner, 0);
    const int blocks = __shfl_sync(0xffffffffu, owner, 1) + 1 - first_block;
    last = merge_blocks(p, s, first_block, blocks, lane, total);
  }
  if (last && lane < s.heads) {
    p.lse[s.q_head(p, head)] = total.sum > 0 ? total.max + logf(total.sum) : -INFINITY;
  }
  __syncwarp();
}

template <int D, bool kPerToken>
__global__ void __launch_bounds__(kThreads<D>, kBlocksPerSm)
    estimate_scores_kernel(const __grid_constant__ EstimateScoresParams p) {
  extern __shared__ __align__(128) uint8_t memory[];
  __shared__ float2 parts[kWarps<D>][kHeads];
  __shared__ Schedule schedule;
  __shared__ Segment s;
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // one for all lanes: known so
  const int lane = threadIdx.x % 32;
  float* q = reinterpret_cast<float*>(memory + kWarps<D> * Ring<D>::kBytes);
  const Ring<D> ring(memory + warp * Ring<D>::kBytes, lane);
  let_next_start();
  if (!p.early) wait_for_inputs();
  if (warp == 0) {
    Rows rows;
    const Schedule made = Schedule::make(p, rows.count_items(p), kWarps<D>);
    rows.find(p, made.begin(p, blockIdx.x), made.begin(p, blockIdx.x + 1), s);
    if (lane == 0) schedule = made;
  }
  for (bool ready = !p.early;; ready = true) {
    __syncthreads();
    if (s.begin == s.end) break;
    const int first = s.begin + warp, residents = min(s.end, p.residents);
    StagedQuery<D> query;
    if (ready) query.load(p, s);
    for (int i = first; i < residents; i += kWarps<D>) prefetch_residents<D>(p, s, i, lane);
    const Schedule items{p.residents, p.pieces};  // all that pages need, and in no registers
    ListWarp<D, kPerToken> pages(p, items, s, ring, first, kWarps<D>, lane);
    pages.start();
    if (!ready) {  // until here: metadata, pages of list tokens and hints (dependent_launch.cuh)
      wait_for_inputs();
      query.load(p, s);
    }
    if (p.new_k != nullptr) {
      for (int i = first; i < residents; i += kWarps<D>) bring_new_row<D>(p, s, i, lane);
    }
    pages.fill();  // behind the queries, which would wait for all pages of the ring
    query.store(p, s, q);
    __syncthreads();
    Softmax state[2];
    pages.run(q, state);
    for (int i = first; i < residents; i += kWarps<D>) {
      resident_scores<D>(p, s, i, q, lane, state);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      state[i].template merge_lanes<4>();
      if (lane < 4) parts[warp][lane * 2 + i] = make_float2(state[i].max, state[i].sum);
    }
    __syncthreads();
    if (warp == 0) {
      finish<kWarps<D>>(p, schedule, s, parts, lane);
      Rows().find(p, s.unit_begin + s.end, schedule.begin(p, blockIdx.x + 1), s);
    }
  }
  wait_for_inputs();  // for blocks without work: the kernel ends no sooner than those before it
}

// Of the blocks there is room for, a multiple of the units where few are left over: no block then
// has parts of two equal units, with two starts and ends, and the next kernel, which wants whole
// multiprocessors, does not wait for a few late ones.
int count_blocks(int most, int units) {
  const int left_over = most % units;
  return units <= most && left_over <= most / kFewLeftOver ? most - left_over : most;
}

template <int D, bool kPerToken>
cudaError_t launch(EstimateScoresParams& p, int num_sms, cudaStream_t stream) {
  const auto kernel = estimate_scores_kernel<D, kPerToken>;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes<D>);
  if (status != cudaSuccess) return status;
  const int blocks = count_blocks(min(kMostBlocks, kBlocksPerSm * num_sms),
                                  p.num_rows * p.num_kv_heads * p.head_groups);
  p.by_blocks = Divisor::of(blocks);
  return launch_dependent(kernel, blocks, kThreads<D>, kSharedBytes<D>, stream, 1, p);
}

template <int... kHeadDims>
cudaError_t launch_any(EstimateScoresParams& p, int num_sms, cudaStream_t stream) {
  cudaError_t status = cudaErrorInvalidValue;
  ((p.head_dim == kHeadDims && (status = p.per_token ? launch<kHeadDims, true>(p, num_sms, stream)
                                                     : launch<kHeadDims, false>(p, num_sms, stream),
                                true)) ||
   ...);
  return status;
}

bool aligned(const void* at, int64_t bytes) {
  return (reinterpret_cast<uintptr_t>(at) | uintptr_t(bytes)) % 16 == 0;
}

}  // namespace

// Parts from the front, counts of arrivals from the back.
int64_t estimate_scores_workspace(int num_rows, int num_kv_heads, int group) {
  const int64_t units = int64_t(num_rows) * num_kv_heads * ceil_div(group, kHeads);
  return (kMostBlocks + units) * kHeads * 2 + units;
}

cudaError_t launch_estimate_scores(EstimateScoresParams p, cudaStream_t stream) {
  if (p.num_rows == 0) return cudaSuccess;
  int device = 0, num_sms = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  p.head_groups = ceil_div(p.group, kHeads);
  p.residents = kResidentWeight * max(1, ceil_div(p.num_sink + p.window_rows, kResidentTokens));
  p.pieces = ceil_div(p.page_size, kPieceTokens);
  p.by_page = Divisor::of(p.page_size);
  p.by_window = Divisor::of(max(1, p.window_rows));
  p.by_groups = Divisor::of(p.head_groups);
  p.vector_codes = aligned(p.k_codes, p.codes_page_stride | p.page_size * (p.head_dim / 2));
  p.vector_scores = aligned(p.scores, 4 * (p.capacity | p.page_size));
  return launch_any<64, 80, 96, 128, 256>(p, num_sms, stream);
}

}  // namespace twilight
