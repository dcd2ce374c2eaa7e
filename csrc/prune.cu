// Grades of a query row's tokens: exact = the smallest {w >= tau} over the candidates whose mass,
// with the resident tokens', reaches top_p (or the top_k largest); index = the same with
// index_top_p, less exact; w = exp(score - lse), the group's mean or each head's own.
//
// A cluster of 1 to 16 blocks of 512 threads owns a (query row, KV head); a warp of it owns a run
// of tokens and keeps it through every phase, so that only sums cross warps. Scores are read once,
// with up to 8 loads of 16 bytes in flight a lane; the weights then stay in shared memory (what
// does not fit, in the workspace), where csrc/cluster_select.cuh narrows tau and one sweep each
// counts and lists what is chosen. With `errors` the exact mass aimed at is top_p plus `margin`
// standard errors of a set's mass, sqrt(p * (1 - p) * sum of the weights' variances).
//
// The plain case is one rule, top_p and all tokens candidates: a token's grade follows from its
// weight alone. Otherwise grades pass through memory, raised rule by rule.
//
// Bytes moved a visible token and KV head: 4 * G of scores, 1 of grades, 4 where listed. Source:
// Twilight (arXiv 2502.02770), Algorithm 1, its bisection replaced by a radix select (RadiK,
// 2501.14336).
#include "csrc/cluster_select.cuh"
#include "csrc/common.cuh"
#include "csrc/dependent_launch.cuh"
#include "csrc/prune.h"
#include "csrc/prune_lists.cuh"
#include "csrc/prune_weights.cuh"

namespace twilight {
namespace {

constexpr int kMostRanks = 16;        // blocks of a cluster, where a few clusters are all there are
constexpr int kPortableRanks = 8;     // that every device with clusters can schedule
constexpr int kTokensPerRank = 2048;  // a tile a warp; fewer are not worth another block
constexpr int kBlocksWanted = 264;    // two a multiprocessor of an H100; beyond, smaller clusters
constexpr bool kSpread = true;        // a grid of fewer blocks than multiprocessors: one on each

struct Shared {
  SelectShared select;
  Tallies ties[2];  // by rule parity
  Tallies lists;
};

constexpr int kSharedBytes = (sizeof(Shared) + 15) / 16 * 16;
constexpr int kBytesPerTile = kWarps * kTile * sizeof(float);  // a tile a warp

// Grades before any set is chosen.
__device__ void grade_all(const Share& s, const PruneParams& p, int lane) {
  for (int t = s.run.begin + lane; t < s.run.end; t += 32) {
    int grade = kGradeExact;
    if (s.lists(t)) {
      const bool dropped = !is_candidate(s, p, t) && s.scores[t] == -INFINITY;
      grade = dropped ? kGradeDropped : kGradeTail;
    }
    s.grades[t] = grade;
  }
}

// Raises the grades of the tokens at or above the thresholds.
__device__ void mark(const Share& s, const Target (&targets)[2], int rule, int lane,
                     const Ranks& ranks, Shared& shared) {
  const Target exact = targets[kExactTarget], index = targets[kIndexTarget];
  int ties_before = 0;
  if (exact.by_count && exact.ties != INT_MAX) {
    Tally ties{};
    for (int t = s.run.begin + lane; t < s.run.end; t += 32) {
      ties.exact += __float_as_int(s.run.at(t)) == exact.least;
    }
    ties_before = tally_in_front(ties, shared.ties[rule & 1], ranks).exact;
  }
  for (int at = s.run.begin; at < s.run.end; at += 32) {
    const int t = at + lane;
    const int bits = t < s.run.end ? __float_as_int(s.run.at(t)) : -1;
    const bool tie = bits >= 0 && bits == exact.least;
    const unsigned ties = __ballot_sync(kAllLanes, tie);
    const int place = ties_before + __popc(ties & ((1u << lane) - 1));
    ties_before += __popc(ties);
    if (bits < 0) continue;
    if (bits > exact.least || (tie && place < exact.ties)) {
      s.grades[t] = kGradeExact;
    } else if (bits >= index.least && s.grades[t] != kGradeExact) {
      s.grades[t] = kGradeIndex;
    }
  }
}

// Makes every list token of this warp's pages exact where one of the page is.
__device__ void expand(const Share& s, int page_size, int lane) {
  __syncwarp();
  for (int page = s.run.begin / page_size; page * page_size < s.run.end; ++page) {
    const int from = max(page * page_size, max(s.run.begin, s.first));
    const int to = min((page + 1) * page_size, min(s.run.end, s.list_end()));
    bool any = false;
    for (int t = from + lane; t < to; t += 32) any |= s.grades[t] == kGradeExact;
    if (!__any_sync(kAllLanes, any)) continue;
    for (int t = from + lane; t < to; t += 32) s.grades[t] = kGradeExact;
  }
}

// A rule's targets before anything is known of the weights.
__device__ void set_targets(const Share& s, const PruneParams& p, Target (&targets)[2]) {
  if (threadIdx.x >= 2) return;
  const bool exact = threadIdx.x == kExactTarget;
  const float* tops = exact ? p.top_p : p.index_top_p;
  const float top = tops == nullptr ? 0.f : tops[s.seq];
  Target target{
      top,    exact && s.errors != nullptr ? p.margin : 0.f, false, top < 1.f, 0, kEverything,
      INT_MAX};
  if (top <= 0.f) target.least = kNothing, target.open = false;
  const int k = exact && p.top_k != nullptr ? p.top_k[s.seq] : 0;
  if (k > 0) {
    const int residents = (s.stop - s.start) - (s.list_end() - s.first);
    target.by_count = true;
    target.open = k > residents;
    target.want = max(0, k - residents);
    target.least = k > residents ? 0 : kNothing;
  }
  targets[threadIdx.x] = target;
}

template <int kTiles, bool kPlain>
__global__ void __launch_bounds__(kThreads, 2)
    prune_kernel(const PruneParams p, const int kept_tiles) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  float* tiles = reinterpret_cast<float*>(memory + kSharedBytes);
  float* lses = tiles + kept_tiles * kWarps * kTile;
  clear(shared.select);
  let_next_start();
  wait_for_inputs();
  const Ranks ranks;
  // Whole pages where one exact token makes its page exact.
  const Share s(p, ranks, !kPlain && p.expand_pages ? p.page_size : kTile, tiles, kept_tiles);
  const int lane = threadIdx.x % 32;
  SelectState state{bits_to_drop(s.tokens), 0};
  LaneMasses masses;
  for (int rule = 0; rule < (!kPlain && p.unite ? p.group : 1); ++rule) {
    const int end = !kPlain && p.unite ? rule + 1 : p.group;
    Batch<kPlain> batches[kTiles];
#pragma unroll
    for (int u = 0; u < kTiles; ++u) batches[u].load(s, p, s.run.token(u), rule, end);
#pragma unroll 1
    for (int h = threadIdx.x; h < p.group; h += kThreads) lses[h] = __ldcg(s.lse + h);
    set_targets(s, p, shared.select.targets);
    if (!kPlain && rule == 0) grade_all(s, p, lane);
    __syncthreads();
    masses = take_weights(s, p, batches, rule, end, state.drop, lses, shared.select);
    const Masses all{warp_sum(masses.resident), warp_sum(masses.variance)};
    if (lane == 0) shared.select.warp_masses[threadIdx.x / 32] = all;
    select(s.run, rule, state, ranks, shared.select);
    if (!kPlain) mark(s, shared.select.targets, rule, lane, ranks, shared);
    if (!kPlain) __syncthreads();  // before the targets are set anew
  }
  if (!kPlain && p.expand_pages) expand(s, p.page_size, lane);
  if (!kPlain) __syncwarp();  // grades are read by other lanes than those that wrote them
  write_lists<kPlain>(s, p, shared.select.targets, masses.resident, ranks, shared.lists);
}

int attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, name, device);
  return value;
}

// Tiles that hold a warp's run at most.
int tiles_of_run(const PruneParams& p, int ranks) {
  const int unit = p.expand_pages ? p.page_size : kTile;
  const int units = (p.max_len + unit - 1) / unit, warps = ranks * kWarps;
  const int tokens = (units + warps - 1) / warps * unit + (unit % 4 ? 3 : 0);
  return (tokens + kTile - 1) / kTile;
}

// Clusters of kMostRanks blocks that the device runs at once, of `bytes` of shared memory a block.
template <typename Kernel>
int clusters_at_once(Kernel kernel, int bytes) {
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kMostRanks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kMostRanks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int count = 0;
  if (cudaOccupancyMaxActiveClusters(&count, kernel, &config) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

// Blocks of a cluster, tiles that a warp keeps in shared memory, and a block's bytes of it.
struct Plan {
  int ranks, kept_tiles, bytes;

  Plan(const PruneParams& p, int most_ranks, int most_bytes) : ranks(1) {
    const int half = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2 -
                     attribute(cudaDevAttrReservedSharedMemoryPerBlock);
    const int rows = p.num_rows * p.num_kv_heads;
    const int fixed = kSharedBytes + p.group * int(sizeof(float));
    while (ranks < most_ranks && ranks * kTokensPerRank < p.max_len &&
           (2 * ranks * rows <= kBlocksWanted ||
            fixed + int64_t(tiles_of_run(p, ranks)) * kBytesPerTile > half)) {
      ranks *= 2;
    }
    kept_tiles = min(tiles_of_run(p, ranks), (most_bytes - fixed) / kBytesPerTile);
    bytes = fixed + kept_tiles * kBytesPerTile;
    if (kSpread && rows * ranks <= attribute(cudaDevAttrMultiProcessorCount)) {
      bytes = max(bytes, min(half + 1, most_bytes));
    }
  }
};

template <int kTiles, bool kPlain>
cudaError_t launch(const PruneParams& p, cudaStream_t stream) {
  const auto kernel = prune_kernel<kTiles, kPlain>;
  const int most_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes);
  int most_ranks = 1;
  if (status == cudaSuccess && attribute(cudaDevAttrClusterLaunch)) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    static const int at_once = clusters_at_once(kernel, most_bytes);
    most_ranks = p.num_rows * p.num_kv_heads <= at_once ? kMostRanks : kPortableRanks;
  }
  if (status != cudaSuccess) return status;
  const Plan plan(p, most_ranks, most_bytes);
  return launch_dependent(kernel, dim3(p.num_rows * p.num_kv_heads * plan.ranks), dim3(kThreads),
                          plan.bytes, stream, plan.ranks, p, plan.kept_tiles);
}

}  // namespace

cudaError_t launch_prune(const PruneParams& p, cudaStream_t stream) {
  if (p.num_rows == 0) return cudaSuccess;
  const bool vectors =
      p.capacity % 4 == 0 && reinterpret_cast<uintptr_t>(p.scores) % (4 * sizeof(float)) == 0;
  const bool one_error = p.errors == nullptr || p.page_size % 4 == 0;  // for a lane's four tokens
  const bool plain = vectors && one_error && (!p.unite || p.group == 1) && p.top_k == nullptr &&
                     p.candidates == nullptr && !p.expand_pages;
  if (!plain) return launch<1, false>(p, stream);
  return p.group <= kHeads ? launch<2, true>(p, stream) : launch<1, true>(p, stream);
}

}  // namespace twilight
