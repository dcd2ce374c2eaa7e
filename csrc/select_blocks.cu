// select_blocks: candidates[n, h, j] = 1 if block j is among the k best of any query head of KV
// head h, k = ceil(budget tokens / block); equal scores: the lower block first.
//
// A thread block owns one (query row, query head). Radix select finds the k-th largest key in four
// passes of 8 bits over a histogram in shared memory; a last pass sets the bytes above it and, in
// order, as many equal to it as are wanted. Heads of a group set bytes of the same row: they only
// ever store 1 over zeros, so their order does not matter. Bytes moved: 4 * NB a query head from
// HBM, four more times from L1 or L2.
// Source: radix select (Alabi et al., 2012).
#include "csrc/common.cuh"
#include "csrc/select_blocks.h"

namespace twilight {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 256;
constexpr int kBinsPerLane = kBins / 32;
constexpr uint32_t kMinusInfinity = 0x007fffffu;  // ordered_key(-inf)

// Larger scores have larger keys; -0 and +0 the same one.
__device__ __forceinline__ uint32_t ordered_key(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Cut {
  uint32_t prefix;  // the bits found of the k-th largest key
  int wanted;       // how many of the keys with this prefix belong to the k best
  int total;        // keys counted in this pass
};

// Counts, into bins, the 8 bits below the known prefix of the keys that share it.
__device__ void count_keys(const float* scores, int num_blocks, int shift, uint32_t prefix,
                           int* bins) {
  const int lane = threadIdx.x % 32;
  for (int base = 0; base < num_blocks; base += kThreads) {
    const int j = base + threadIdx.x;
    const uint32_t key = j < num_blocks ? ordered_key(scores[j]) : 0;
    const bool counted = key > kMinusInfinity && (shift == 24 || key >> (shift + 8) == prefix);
    const int bin = counted ? (key >> shift) & (kBins - 1) : kBins;
    // Scores share their exponents, so lanes of a warp mostly hit the same bin: one adds for all.
    const unsigned peers = __match_any_sync(0xffffffffu, bin);
    if (counted && lane == __ffs(peers) - 1) atomicAdd(&bins[bin], __popc(peers));
  }
}

// Run by one warp: the bin in which the wanted-th largest key lies.
__device__ void cut_bins(const int* bins, Cut* cut) {
  const int lane = threadIdx.x;
  int sum = 0;
  for (int i = 0; i < kBinsPerLane; ++i) sum += bins[lane * kBinsPerLane + i];
  int at_or_above = sum;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_down_sync(0xffffffffu, at_or_above, offset);
    if (lane + offset < 32) at_or_above += other;
  }
  const int wanted = cut->wanted;
  int above = at_or_above - sum;
  __syncwarp();
  if (lane == 0) cut->total = at_or_above;
  if (above >= wanted || at_or_above < wanted) return;
  int bin = lane * kBinsPerLane + kBinsPerLane - 1;
  while (above + bins[bin] < wanted) above += bins[bin--];
  cut->prefix = cut->prefix << 8 | bin;
  cut->wanted = wanted - above;
}

// Sets the bytes of keys above the threshold, and of the first `ties` keys equal to it.
__device__ void set_bytes(const float* scores, int num_blocks, uint32_t threshold, int ties,
                          int* warp_counts, uint8_t* candidates) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int seen = 0;
  for (int base = 0; base < num_blocks; base += kThreads) {
    const int j = base + threadIdx.x;
    const uint32_t key = j < num_blocks ? ordered_key(scores[j]) : 0;
    bool kept = key > threshold;
    if (seen < ties) {
      const bool equal = key == threshold;
      const unsigned vote = __ballot_sync(0xffffffffu, equal);
      if (lane == 0) warp_counts[warp] = __popc(vote);
      __syncthreads();
      int rank = seen + __popc(vote & ((1u << lane) - 1));
      for (int w = 0; w < kWarps; ++w) {
        if (w < warp) rank += warp_counts[w];
        seen += warp_counts[w];
      }
      kept = kept || (equal && rank < ties);
      __syncthreads();  // warp_counts is written again in the next round
    }
    if (kept) candidates[j] = 1;
  }
}

__global__ void __launch_bounds__(kThreads) select_blocks_kernel(SelectBlocksParams p) {
  __shared__ int bins[kBins];
  __shared__ int warp_counts[kWarps];
  __shared__ Cut cut;
  const int hq = blockIdx.x, n = blockIdx.y;
  const int h = hq / (p.num_q_heads / p.num_kv_heads);
  const float* scores = p.scores + (static_cast<int64_t>(n) * p.num_q_heads + hq) * p.num_blocks;
  uint8_t* candidates =
      p.candidates + (static_cast<int64_t>(n) * p.num_kv_heads + h) * p.num_blocks;

  double tokens = p.budget;
  if (p.budget_is_share) {
    const int end = min(p.positions[n] + 1, p.window_starts[p.query_seq[n]]);
    tokens *= max(end - max(p.ctx_starts[n], p.num_sink), 0);
  }
  const double keep = ceil(tokens / p.block);
  const int wanted = keep < p.num_blocks ? static_cast<int>(keep) : p.num_blocks;
  if (wanted == 0) return;
  if (threadIdx.x == 0) cut = {0, wanted, 0};

  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < kBins; i += kThreads) bins[i] = 0;
    __syncthreads();
    count_keys(scores, p.num_blocks, shift, cut.prefix, bins);
    __syncthreads();
    if (threadIdx.x < 32) cut_bins(bins, &cut);
    __syncthreads();
    if (shift == 24 && cut.total <= wanted) {  // every valid block is kept
      set_bytes(scores, p.num_blocks, kMinusInfinity, 0, warp_counts, candidates);
      return;
    }
  }
  set_bytes(scores, p.num_blocks, cut.prefix, cut.wanted, warp_counts, candidates);
}

}  // namespace

cudaError_t launch_select_blocks(const SelectBlocksParams& p, cudaStream_t stream) {
  const size_t bytes = static_cast<size_t>(p.num_queries) * p.num_kv_heads * p.num_blocks;
  const cudaError_t cleared = cudaMemsetAsync(p.candidates, 0, bytes, stream);
  if (cleared != cudaSuccess) return cleared;
  const dim3 grid(p.num_q_heads, p.num_queries);
  select_blocks_kernel<<<grid, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace twilight
