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
// them, and zeroes the count of arrivals for the next launch; nobody waits for another block.
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

template <int D>
constexpr int kWarps = D > 128 ? 4 : 8;  // 16 warps an SM in 128 registers, or 8 in 255

template <int D>
constexpr int kSharedBytes = kWarps<D> * Ring<D>::kBytes + kHeads * D * int(sizeof(float));

// The queries of a segment's heads, 16 times scaled, zero beyond them, as load_query reads them.
template <int D>
__device__ void stage_queries(const EstimateScoresParams& p, const Segment& s, float* q) {
  for (int i = threadIdx.x; i < kHeads * D; i += kWarps<D> * 32) {
    const int lane = i / 4 % 32, e = i / 128 * 4 + i % 4, head = lane / 4;
    const int channel = 2 * Lanes<D>::byte(e / 8, lane % 4) + e % 8;
    float value = 0.0f;
    if (head < s.heads) value = load_row(p.q, s.q_head(p, head) * D + channel, p.row_dtype);
    q[i] = value * p.softmax_scale * 16.0f;
  }
}

// By one warp: merges the warps' parts, one a head, and, as the last of the unit's blocks, theirs.
template <int kWarps>
__device__ void finish(const EstimateScoresParams& p, const Schedule& schedule, const Segment& s,
                       const float2 (&parts)[kWarps][kHeads], int lane) {
  Softmax total;
  const int head = lane % kHeads;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total.merge(parts[w][head].x, parts[w][head].y);
  const int first_block = schedule.owner(s.unit_begin);
  const int blocks = schedule.owner(s.unit_end - 1) + 1 - first_block;
  if (blocks > 1) {
    unsigned* arrived = p.workspace + p.workspace_size - 1 - s.unit;
    float2* partials = reinterpret_cast<float2*>(p.workspace);
    const int64_t unit_slot = first_block + s.unit;
    if (lane < kHeads) {
      partials[(int64_t(blockIdx.x) + s.unit) * kHeads + head] = make_float2(total.max, total.sum);
    }
    __threadfence();
    __syncwarp();
    unsigned before = 0;
    if (lane == 0) before = atomicAdd(arrived, 1u);
    before = __shfl_sync(0xffffffffu, before, 0);
    if (before + 1 != unsigned(blocks)) return;
    __threadfence();
    if (lane == 0) *arrived = 0;
    total = Softmax();
    for (int i = lane / kHeads; i < blocks; i += 32 / kHeads) {
      const float2 part = __ldcg(partials + (unit_slot + i) * kHeads + head);
      total.merge(part.x, part.y);
    }
    total.merge_lanes(8);
    total.merge_lanes(16);
  }
  if (lane < s.heads) {
    p.lse[s.q_head(p, head)] = total.sum > 0 ? total.max + logf(total.sum) : -INFINITY;
  }
}

template <int D, bool kPerToken>
__global__ void __launch_bounds__(kWarps<D> * 32, kBlocksPerSm)
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
  wait_for_inputs();
  if (warp == 0) {
    const Schedule made = Schedule::make(p, kWarps<D>);
    if (lane == 0) schedule = made;
  }
  __syncthreads();
  if (blockIdx.x >= schedule.blocks) return;
  const int stop = schedule.begin(blockIdx.x + 1);
  for (int at = schedule.begin(blockIdx.x); at < stop;) {
    if (warp == 0) {
      const Segment next = schedule.segment(p, at, stop);
      if (lane == 0) s = next;
    }
    __syncthreads();
    at += s.end - s.begin;
    const int first = s.begin + warp;
    ListWarp<D, kPerToken> pages(p, schedule, s, ring, first, kWarps<D>, lane);
    pages.start();
    stage_queries<D>(p, s, q);
    __syncthreads();
    Softmax state[2];
    for (int i = first; i < min(s.end, schedule.residents); i += kWarps<D>) {
      resident_scores<D>(p, s, i, q, lane, state);
    }
    pages.run(q, state);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) state[i].merge_lanes(mask);
      if (lane < 4) parts[warp][lane * 2 + i] = make_float2(state[i].max, state[i].sum);
    }
    __syncthreads();
    if (warp == 0) finish<kWarps<D>>(p, schedule, s, parts, lane);
  }
}

template <int D, bool kPerToken>
cudaError_t launch(const EstimateScoresParams& p, int num_sms, cudaStream_t stream) {
  const auto kernel = estimate_scores_kernel<D, kPerToken>;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes<D>);
  if (status != cudaSuccess) return status;
  const int blocks = min(kMostBlocks, kBlocksPerSm * num_sms);
  return launch_dependent(kernel, blocks, kWarps<D> * 32, kSharedBytes<D>, stream, 1, p);
}

template <int... kHeadDims>
cudaError_t launch_any(const EstimateScoresParams& p, int num_sms, cudaStream_t stream) {
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

// Partials from the front, counts of arrivals from the back: steps of fewer rows, which use less of
// both, never put the one where the other is.
int64_t estimate_scores_workspace(int num_rows, int num_kv_heads, int group) {
  const int64_t units = int64_t(num_rows) * num_kv_heads * ceil_div(group, kHeads);
  return (kMostBlocks + units) * kHeads * 2 + units;
}

cudaError_t launch_estimate_scores(EstimateScoresParams p, cudaStream_t stream) {
  if (p.num_rows == 0) return cudaSuccess;
  int device = 0, num_sms = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  p.vector_codes = aligned(p.k_codes, p.codes_page_stride | p.page_size * (p.head_dim / 2));
  p.vector_scores = aligned(p.scores, 4 * (p.capacity | p.page_size));
  return launch_any<64, 80, 96, 128, 256>(p, num_sms, stream);
}

}  // namespace twilight
