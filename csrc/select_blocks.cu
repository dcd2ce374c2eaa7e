// select_blocks: candidates[n, h, j] = 1 if block j is among the k best of any query head of KV
// head h, k = ceil(budget tokens / block); equal scores: the lower block first.
//
// A thread block owns a (query row, KV head) or, on sm_90, a few query heads of one: the blocks of
// a cluster share the group out. Keys of scores are read once and stay in shared memory, as many as
// fit. Radix select finds the k-th largest in up to three passes of 11 bits, each a histogram and a
// search that every warp does by itself, so a pass costs one barrier; it ends early where all keys
// that share the bits found are wanted, after the second pass for most scores. Of a group of
// one, the thread that holds a key writes its byte; in larger ones the bytes are zeroed first, and
// heads only ever store 1 over zeros, so their order does not matter. Bytes moved: 4 * NB a query
// head, NB a KV head.
// Source: radix select (Alabi et al., 2012).
#include <algorithm>

#include "csrc/block_scan.cuh"
#include "csrc/common.cuh"
#include "csrc/dependent_launch.cuh"
#include "csrc/ptx.cuh"
#include "csrc/ranks.cuh"
#include "csrc/select_blocks.h"

namespace twilight {
namespace {

constexpr int kFewThreads = 512, kMostThreads = 1024;
constexpr int kFewBlocks = 4 * kFewThreads;  // blocks of tokens for which few threads are enough
constexpr int kMostKept = 16384;  // keys in shared memory; beyond: read from scores in each pass
constexpr int kMostRanks = 8;
constexpr int kBatch = 8;  // scores a thread loads before it uses the first: 8192 in one go
constexpr int kPasses = 3;
constexpr int kPassBits = 11;
constexpr int kBins = 1 << kPassBits;
constexpr int kSlots = 32;  // of bins: a lane's each
constexpr int kBinsPerSlot = kBins / kSlots;
constexpr uint32_t kMinusInfinity = 0x007fffffu;  // ordered_key(-inf)
constexpr uint32_t kNothing = 0xffffffffu;        // a threshold that no key is above

// Larger scores have larger keys; -0 and +0 the same one.
__device__ __forceinline__ uint32_t ordered_key(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Histogram {
  int bins[kBins];
  int slots[kSlots];  // sums of kBinsPerSlot bins
};

struct Scratch {
  Histogram passes[kPasses];
  BlockScan ties[2];  // of this round and the one before

  __device__ void clear() {
    int* words = reinterpret_cast<int*>(passes);
    for (int i = threadIdx.x; i < int(sizeof(passes) / sizeof(int)); i += blockDim.x) words[i] = 0;
  }
};

// The keys of a query head. A thread uses those of blocks threadIdx.x + i * blockDim.x alone.
struct Keys {
  const float* scores;
  uint32_t* kept;  // in shared memory, the first kMostKept
  int count;

  __device__ uint32_t load(int j) const { return j < kMostKept ? kept[j] : ordered_key(scores[j]); }
};

// Where the wanted-th largest key of a histogram lies.
struct Cut {
  int bin;
  int wanted;  // of the keys in that bin
  int in_bin;
  int total;  // in the histogram
};

// Sums over this and higher lanes.
__device__ __forceinline__ int sum_from_lane(int value, int lane) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int above = __shfl_down_sync(kAllLanes, value, offset);
    if (lane + offset < 32) value += above;
  }
  return value;
}

// By all lanes of a warp; wanted >= 1. If there are fewer keys, only the total is right.
__device__ __forceinline__ Cut find_cut(const Histogram& histogram, int wanted) {
  static_assert(kBinsPerSlot == 2 * 32);
  const int lane = threadIdx.x % 32;
  const int in_slot = histogram.slots[lane];
  int from = sum_from_lane(in_slot, lane);
  const int total = __shfl_sync(kAllLanes, from, 0);
  const int slot = 31 - __clz(__ballot_sync(kAllLanes, from >= wanted) | 1);
  wanted -= __shfl_sync(kAllLanes, from - in_slot, slot);
  const int first = slot * kBinsPerSlot + 2 * lane;
  const int low = histogram.bins[first], high = histogram.bins[first + 1];
  from = sum_from_lane(low + high, lane);
  const int owner = 31 - __clz(__ballot_sync(kAllLanes, from >= wanted) | 1);
  const int above = from - low - high;
  const bool in_high = above + high >= wanted;
  const Cut own{first + in_high, wanted - above - (in_high ? 0 : high), in_high ? high : low,
                total};
  return {__shfl_sync(kAllLanes, own.bin, owner), __shfl_sync(kAllLanes, own.wanted, owner),
          __shfl_sync(kAllLanes, own.in_bin, owner), total};
}

__device__ __forceinline__ void count_key(Histogram& histogram, int bin) {
  atomicAdd(&histogram.bins[bin], 1);
  atomicAdd(&histogram.slots[bin / kBinsPerSlot], 1);
}

// Reads the keys and counts them by their leading bits; those of -inf in no bin.
__device__ void read_keys(const Keys& keys, Histogram& histogram) {
  for (int base = threadIdx.x; base < keys.count; base += kBatch * blockDim.x) {
    float scores[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int j = base + i * blockDim.x;
      scores[i] = j < keys.count ? keys.scores[j] : -INFINITY;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int j = base + i * blockDim.x;
      if (j >= keys.count) break;
      const uint32_t key = ordered_key(scores[i]);
      if (j < kMostKept) keys.kept[j] = key;
      if (key > kMinusInfinity) count_key(histogram, key >> (32 - kPassBits));
    }
  }
}

// Which keys are kept: those above a threshold, and of the keys equal to it the first `ties`.
struct Kept {
  uint32_t threshold;
  int ties;
};

// The wanted best keys. Every warp comes to the same result.
__device__ Kept find_kept(const Keys& keys, int wanted, Scratch& scratch) {
  read_keys(keys, scratch.passes[0]);
  __syncthreads();
  Cut cut = find_cut(scratch.passes[0], wanted);
  if (cut.total <= wanted) return {kMinusInfinity, 0};  // every valid block is kept
  uint32_t prefix = cut.bin;
  int shift = 32 - kPassBits;
  for (int pass = 1; pass < kPasses && cut.wanted < cut.in_bin; ++pass) {
    const int bits = min(kPassBits, shift), known = shift;
    shift -= bits;
    for (int j = threadIdx.x; j < keys.count; j += blockDim.x) {
      const uint32_t key = keys.load(j);
      if (key >> known != prefix) continue;
      count_key(scratch.passes[pass], (key >> shift) & ((1 << bits) - 1));
    }
    __syncthreads();
    cut = find_cut(scratch.passes[pass], cut.wanted);
    prefix = prefix << bits | cut.bin;
  }
  if (cut.wanted == cut.in_bin) return {(prefix << shift) - 1, 0};
  return {prefix, cut.wanted};
}

// Sets the bytes of kept keys, and with kAlone, where nobody else does, zeroes the others.
template <bool kAlone>
__device__ void set_bytes(const Keys& keys, Kept kept, BlockScan (&scans)[2], uint8_t* candidates) {
  int seen = 0;  // ties
  for (int base = 0, round = 0; base < keys.count; base += blockDim.x, ++round) {
    const int j = base + threadIdx.x;
    const uint32_t key = j < keys.count ? keys.load(j) : 0;
    bool chosen = key > kept.threshold;
    if (seen < kept.ties) {
      const bool equal = key == kept.threshold;
      unsigned total;
      const int rank = seen + block_exclusive_sum(equal, scans[round % 2], &total);
      chosen = chosen || (equal && rank < kept.ties);
      seen += total;
    }
    if (j < keys.count && (kAlone || chosen)) candidates[j] = chosen;
  }
}

// Blocks of tokens that a query head may keep. From metadata alone.
__device__ int count_wanted(const SelectBlocksParams& p, int n) {
  double tokens = p.budget;
  if (p.budget_is_share) {
    const int end = min(p.positions[n] + 1, p.window_starts[p.query_seq[n]]);
    tokens *= max(end - max(p.ctx_starts[n], p.num_sink), 0);
  }
  const double keep = ceil(tokens / p.block);
  return keep < p.num_blocks ? static_cast<int>(keep) : p.num_blocks;
}

// kAlone: a group of one.
template <bool kAlone>
__global__ void __launch_bounds__(kMostThreads, 1) select_blocks_kernel(SelectBlocksParams p) {
  extern __shared__ uint32_t kept_keys[];
  __shared__ Scratch scratch;
  let_next_start();
  const Ranks ranks;
  const int h = blockIdx.y, n = blockIdx.z, group = p.num_q_heads / p.num_kv_heads;
  const int64_t head = static_cast<int64_t>(n) * p.num_q_heads + h * group;
  uint8_t* candidates =
      p.candidates + (static_cast<int64_t>(n) * p.num_kv_heads + h) * p.num_blocks;
  const int wanted = count_wanted(p, n);
  scratch.clear();
  __syncthreads();
  wait_for_inputs();
  if (!kAlone) {
    const int stride = ranks.count() * blockDim.x;
    for (int j = ranks.rank() * blockDim.x + threadIdx.x; j < p.num_blocks; j += stride) {
      candidates[j] = 0;
    }
  }
  for (int g = ranks.rank(); g < group; g += ranks.count()) {
    const bool first = g == ranks.rank();
    if (!first) {
      __syncthreads();  // all warps have read the histograms
      scratch.clear();
      __syncthreads();
    }
    const Keys keys{p.scores + (head + g) * p.num_blocks, kept_keys, p.num_blocks};
    const Kept kept = wanted > 0 ? find_kept(keys, wanted, scratch) : Kept{kNothing, 0};
    if (!kAlone && first) {
      __threadfence();  // the zeros; they have long been on their way
      ranks.arrive();
      ranks.wait();
    }
    set_bytes<kAlone>(keys, kept, scratch.ties, candidates);
  }
}

template <bool kAlone>
cudaError_t launch(const SelectBlocksParams& p, int ranks, cudaStream_t stream) {
  const auto kernel = select_blocks_kernel<kAlone>;
  const int most_bytes = kMostKept * sizeof(uint32_t);
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes);
  if (status != cudaSuccess) return status;
  const int bytes = std::min(p.num_blocks, kMostKept) * sizeof(uint32_t);
  const int threads = p.num_blocks <= kFewBlocks ? kFewThreads : kMostThreads;
  return launch_dependent(kernel, dim3(ranks, p.num_kv_heads, p.num_queries), dim3(threads), bytes,
                          stream, ranks, p);
}

}  // namespace

cudaError_t launch_select_blocks(const SelectBlocksParams& p, cudaStream_t stream) {
  const int group = p.num_q_heads / p.num_kv_heads;
  if (group == 1) return launch<true>(p, 1, stream);
  const int most = can_launch_dependent() ? std::min(group, kMostRanks) : 1;
  int ranks = 1;
  while (2 * ranks <= most) ranks *= 2;
  return launch<false>(p, ranks, stream);
}

}  // namespace twilight
