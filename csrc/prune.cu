// Grades of a query row's tokens: exact = the smallest {w >= tau} over the candidates whose mass,
// with the resident tokens', reaches top_p (or the top_k largest); index = the same with
// index_top_p, less exact; w = exp(score - lse), the group's mean or each head's own.
//
// A cluster of 1 to 16 blocks owns a (query row, KV head); a warp of it owns a run of tokens and
// keeps it through every phase, so that only sums cross warps. Scores are read once, with up to 5
// loads in flight a lane; the weights then stay in shared memory (what does not fit, in the
// workspace), where csrc/cluster_select.cuh narrows tau and one sweep grades and lists what is
// chosen. With `errors` the exact mass aimed at is top_p plus `margin` standard errors of a set's
// mass, sqrt(p * (1 - p) * sum of the weights' variances).
//
// The plain case is one rule, top_p and all tokens candidates but those whose score is -inf: a
// token's grade follows from its weight alone. Otherwise grades pass through memory, raised rule by
// rule.
//
// Bytes moved a visible token and KV head: 4 * G of scores, 1 of grades, 4 where exact. Source:
// Twilight (arXiv 2502.02770), Algorithm 1, its bisection replaced by a radix select (RadiK,
// 2501.14336).
//
// Before it waits for its inputs it reads the step's metadata (query_seq, positions, where contexts
// and windows start). The kernel just before it must not write that; in a step, torch's kernels do,
// in front of append and estimate (csrc/dependent_launch.cuh).
#include <bit>

#include "csrc/cluster_select.cuh"
#include "csrc/common.cuh"
#include "csrc/dependent_launch.cuh"
#include "csrc/prune.h"
#include "csrc/prune_lists.cuh"
#include "csrc/prune_weights.cuh"

namespace twilight {
namespace {

constexpr int kThreads = 512;         // two blocks a multiprocessor, of 64 registers a thread
constexpr int kMostThreads = 1024;    // where all clusters run at once, one block a multiprocessor
constexpr int kPortableRanks = 8;     // blocks of a cluster that every device can schedule
constexpr int kFewRanks = 4;          // fewer blocks of kMostThreads leave too much to each
constexpr int kTokensPerRank = 4096;  // a tile for each of 32 warps; fewer do not pay another block
constexpr int kBlocksWanted = 264;    // two a multiprocessor of an H100; beyond, smaller clusters

struct Shared {
  SelectShared select;
  Tallies ties[2];  // by turns
  Tallies lists;
};

constexpr int kSharedBytes = (sizeof(Shared) + 15) / 16 * 16;
constexpr int kBytesPerRank = 2 * sizeof(BlockSums);
static_assert(kBytesPerRank % 16 == 0, "tiles follow");

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

// Raises the grades of the tokens at or above the thresholds. tie_rounds: that took place so far.
__device__ void mark(const Share& s, const Target (&targets)[2], int lane, const Ranks& ranks,
                     Tallies (&tie_tallies)[2], int& tie_rounds) {
  const Target exact = targets[kExactTarget], index = targets[kIndexTarget];
  int ties_before = 0;
  if (exact.by_count && exact.ties != INT_MAX) {
    Tally ties{};
    for (int t = s.run.begin + lane; t < s.run.end; t += 32) {
      ties.exact += s.run.word(t) == exact.least;
    }
    ties_before = exact_in_front(ties, tie_tallies[tie_rounds & 1], tie_rounds / 2, ranks);
    ++tie_rounds;
  }
  for (int at = s.run.begin; at < s.run.end; at += 32) {
    const int t = at + lane;
    const int bits = t < s.run.end ? s.run.word(t) : kNotCandidate;
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
    const int to = min((page + 1) * page_size, min(s.run.end, s.list_end));
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
    const int residents = (s.stop - s.start) - (s.list_end - s.first);
    target.by_count = true;
    target.open = k > residents;
    target.want = max(0, k - residents);
    target.least = k > residents ? 0 : kNothing;
  }
  targets[threadIdx.x] = target;
}

// This warp's copy of the heads' scales for a mean over `heads`: no warp waits for another's.
// first_lse: of head number `lane`, loaded early.
__device__ void set_scales(const Share& s, const PruneParams& p, int heads, HeadScale* scales,
                           float first_lse, int lane) {
#pragma unroll 1
  for (int h = lane; h < p.group; h += 32) {
    scales[h] = HeadScale(h == lane ? first_lse : __ldcg(s.lse + h), heads);
  }
}

template <bool kPlain, Heads kCount>
__global__ void __launch_bounds__(kMostThreads, 1)
    prune_kernel(const PruneParams p, const Plan plan) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  BlockSums* blocks = reinterpret_cast<BlockSums*>(memory + kSharedBytes);
  int* tiles = reinterpret_cast<int*>(memory + kSharedBytes + plan.ranks * kBytesPerRank);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  HeadScale* scales =
      reinterpret_cast<HeadScale*>(tiles + plan.kept_tiles * (blockDim.x / 32) * kTile) +
      warp * p.group;
  const Ranks ranks;
  Share s(p, plan);
  prepare(shared.select);
  if (threadIdx.x == 0) {
    for (Tallies& ties : shared.ties) ties.box.open();
    shared.lists.box.open();
    Mailbox::announce();
  }
  __syncwarp();
  ranks.arrive();
  let_next_start();
  // Whole pages where one exact token makes its page exact.
  s.find_run(p, ranks, !kPlain && p.expand_pages ? p.page_size : kTile, tiles, plan);
  // In the second histogram, which comes later. A barrier: the block's own memory is prepared.
  s.find_by_now(reinterpret_cast<Dealt*>(shared.select.histograms[1])[warp]);
  wait_for_inputs();
  const float first_lse = lane < p.group ? __ldcg(s.lse + lane) : 0.0f;
  SelectState state{bits_to_drop(s.tokens), 0, 0, blocks};
  Masses masses;
  int tie_rounds = 0;
  for (int rule = 0; rule < (!kPlain && p.unite ? p.group : 1); ++rule) {
    const int heads = !kPlain && p.unite ? 1 : p.group;
    const Source source(s, p, rule);
    Batch<kPlain, kCount> batch;
    batch.load(s, p, source, s.run.first(), 0, heads);
    set_scales(s, p, heads, scales, first_lse, lane);
    set_targets(s, p, shared.select.targets);
    if (!kPlain && rule == 0) grade_all(s, p, lane);
    if (kPlain) {
      __syncwarp();
    } else {
      __syncthreads();  // the first histograms depend on the targets
    }
    masses = take_weights(s, p, source, batch, heads, scales + rule, state, shared.select);
    const Masses all = masses.over_warp();
    if (rule == 0) ranks.wait();  // all blocks' boxes are open
    if (lane == 0) shared.select.warp_masses[warp] = all;
    select<kPlain>(s.run, state, ranks, shared.select);
    if (!kPlain) mark(s, shared.select.targets, lane, ranks, shared.ties, tie_rounds);
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
int tiles_of_run(const PruneParams& p, int ranks, int threads) {
  const int unit = p.expand_pages ? p.page_size : kTile;
  const int units = (p.max_len + unit - 1) / unit, warps = ranks * threads / 32;
  const int tokens = (units + warps - 1) / warps * unit + (unit % 4 ? 3 : 0);
  return (tokens + kTile - 1) / kTile;
}

// Clusters that the device runs at once, by their blocks of kMostThreads.
struct AtOnce {
  int clusters[kMostRanks + 1] = {};

  template <typename Kernel>
  AtOnce(Kernel kernel, int bytes) {
    for (unsigned ranks = 1; ranks <= kMostRanks; ++ranks) {
      cudaLaunchAttribute cluster{};
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {ranks, 1, 1};
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(ranks);
      config.blockDim = dim3(kMostThreads);
      config.dynamicSmemBytes = bytes;
      config.attrs = &cluster;
      config.numAttrs = 1;
      int& count = clusters[ranks];
      if (cudaOccupancyMaxActiveClusters(&count, kernel, &config) != cudaSuccess) {
        count = 0;
        cudaGetLastError();
      }
    }
  }
};

// Shared memory of a block but for the tiles.
int fixed_bytes(const PruneParams& p, int ranks, int threads) {
  return kSharedBytes + ranks * kBytesPerRank + threads / 32 * p.group * int(sizeof(HeadScale));
}

int64_t bytes_of_tiles(int tiles, int threads) {
  return int64_t(tiles) * threads * (kTile / 32) * sizeof(int);
}

// The largest clusters that all run at once, if they are large enough; else 0.
int ranks_at_once(const PruneParams& p, const AtOnce& at_once) {
  const int useful = (p.max_len + kTokensPerRank - 1) / kTokensPerRank;
  int ranks = max(1, min(useful, kMostRanks));
  while (ranks > 0 && at_once.clusters[ranks] < p.num_rows * p.num_kv_heads) --ranks;
  return ranks >= min(useful, kFewRanks) ? ranks : 0;
}

Plan plan_launch(const PruneParams& p, const AtOnce* at_once, int most_bytes) {
  const int half = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2 -
                   attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  const int rows = p.num_rows * p.num_kv_heads;
  Plan plan{1, 0, kThreads, 0, 0, -1};
  const auto fits_half = [&] {
    const int tiles = tiles_of_run(p, plan.ranks, kThreads);
    return fixed_bytes(p, plan.ranks, kThreads) + bytes_of_tiles(tiles, kThreads) <= half;
  };
  const int single_wave = at_once == nullptr ? 0 : ranks_at_once(p, *at_once);
  if (single_wave > 0) {
    plan.ranks = single_wave;
    plan.threads = kMostThreads;
  } else if (at_once != nullptr) {
    while (plan.ranks < kPortableRanks && plan.ranks * kTokensPerRank < p.max_len &&
           (2 * plan.ranks * rows <= kBlocksWanted || !fits_half())) {
      plan.ranks *= 2;
    }
  }
  plan.inverse = unsigned((uint64_t{1} << 32) / plan.ranks + 1);
  const int fixed = fixed_bytes(p, plan.ranks, plan.threads);
  plan.kept_tiles = min(tiles_of_run(p, plan.ranks, plan.threads),
                        int((most_bytes - fixed) / bytes_of_tiles(1, plan.threads)));
  plan.bytes = fixed + int(bytes_of_tiles(plan.kept_tiles, plan.threads));
  const unsigned page_size = p.page_size;
  if (std::has_single_bit(page_size)) plan.page_shift = std::countr_zero(page_size);
  return plan;
}

template <bool kPlain, Heads kCount>
cudaError_t launch(const PruneParams& p, cudaStream_t stream) {
  const auto kernel = prune_kernel<kPlain, kCount>;
  const int most_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const bool clusters = attribute(cudaDevAttrClusterLaunch);
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes);
  if (status == cudaSuccess && clusters) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (status != cudaSuccess) return status;
  static const AtOnce at_once(kernel, most_bytes);
  const Plan plan = plan_launch(p, clusters ? &at_once : nullptr, most_bytes);
  return launch_dependent(kernel, dim3(plan.ranks, p.num_kv_heads, p.num_rows), dim3(plan.threads),
                          plan.bytes, stream, plan.ranks, p, plan);
}

}  // namespace

cudaError_t launch_prune(const PruneParams& p, cudaStream_t stream) {
  if (p.num_rows == 0) return cudaSuccess;
  const bool vectors =
      p.capacity % 4 == 0 && reinterpret_cast<uintptr_t>(p.scores) % (4 * sizeof(float)) == 0;
  const bool one_error = p.errors == nullptr || p.page_size % 4 == 0;  // for a lane's four tokens
  const bool plain = vectors && one_error && (!p.unite || p.group == 1) && p.top_k == nullptr &&
                     (p.candidates == nullptr || p.dropped) && !p.expand_pages;
  if (!plain) return launch<false, Heads::kAny>(p, stream);
  if (p.group == 1) return launch<true, Heads::kOne>(p, stream);
  if (p.group == kHeads) return launch<true, Heads::kOneBatch>(p, stream);
  return p.group % kHeads == 0 ? launch<true, Heads::kFullBatches>(p, stream)
                               : launch<true, Heads::kAny>(p, stream);
}

}  // namespace twilight
