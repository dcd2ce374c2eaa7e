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
#include "csrc/prune_weights.cuh"

namespace twilight {
namespace {

constexpr int kMostRanks = 16;        // blocks of a cluster, where a few clusters are all there are
constexpr int kPortableRanks = 8;     // that every device with clusters can schedule
constexpr int kTokensPerRank = 2048;  // a tile a warp; fewer are not worth another block
constexpr int kBlocksWanted = 264;    // two a multiprocessor of an H100; beyond, smaller clusters
constexpr bool kSpread = true;        // a grid of fewer blocks than multiprocessors: one on each

// Counts and exact mass of tokens.
struct Tally {
  int exact, index;
  float mass;

  __device__ Tally over_warp() const {
    return {__reduce_add_sync(kAllLanes, exact), __reduce_add_sync(kAllLanes, index),
            warp_sum(mass)};
  }
};

// Where the blocks of a cluster and a block's warps read each other's tallies.
struct Tallies {
  Tally warps[kWarps];
  Tally block;
};

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

// The sum of the warps' tallies in front of this one, in this block and the ones before.
__device__ Tally tally_in_front(const Tally& of_lane, Tallies& tallies, const Ranks& ranks) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Tally none{}, mine = of_lane.over_warp();
  if (lane == 0) tallies.warps[warp] = mine;
  __syncthreads();
  const Tally other = lane < kWarps ? tallies.warps[lane] : none;
  if (warp == 0) {
    const Tally all = other.over_warp();
    if (lane == 0) tallies.block = all;
  }
  ranks.sync();
  Tally before = lane < warp ? other : none;
  if (lane < ranks.rank()) {
    const Tally* block = ranks.of(&tallies.block, lane);
    before.exact += block->exact;
    before.index += block->index;
  }
  return before.over_warp();
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

// What becomes of a lane's four tokens of a tile: a bit each where it is listed, a byte of grades.
struct Marks {
  unsigned exact = 0, index = 0, grades = 0;
  float mass = 0.0f;  // of the listed exact ones

  // By their weights.
  __device__ Marks(const float4& weights, const int (&least)[2]) {
    const float w[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int bits = __float_as_int(w[i]);
      const bool is_exact = bits >= least[kExactTarget];
      const bool is_index = !is_exact && bits >= least[kIndexTarget];
      exact |= unsigned(is_exact) << i;
      index |= unsigned(is_index) << i;
      const unsigned grade = is_exact || bits < 0 ? kGradeExact
                             : is_index           ? kGradeIndex
                                                  : kGradeTail;
      grades |= grade << (8 * i);
      mass += is_exact ? w[i] : 0.0f;
    }
  }
  // By their grades in memory.
  __device__ Marks(const Share& s, int t) {
    for (int i = 0; i < 4; ++i) {
      if (!s.run.holds(t + i) || !s.lists(t + i)) continue;
      const int grade = s.grades[t + i];
      exact |= unsigned(grade == kGradeExact) << i;
      index |= unsigned(grade == kGradeIndex) << i;
    }
  }
};

template <bool kPlain>
__device__ __forceinline__ Marks marks_of(const Share& s, const int (&least)[2], int tile) {
  if constexpr (kPlain) return Marks(s.run.load(tile), least);
  return Marks(s, s.run.token(tile));
}

// What a lane's tokens add to the lists, and the exact mass of them all: of the weights, or of the
// heads' mean where a set need not have been chosen by it.
template <bool kPlain>
__device__ Tally tally_lane(const Share& s, const PruneParams& p, const int (&least)[2],
                            float resident) {
  Tally mine{};
  if (kPlain) mine.mass = resident;
  for (int tile = 0; tile < s.run.tiles; ++tile) {
    const Marks marks = marks_of<kPlain>(s, least, tile);
    mine.exact += __popc(marks.exact);
    mine.index += __popc(marks.index);
    mine.mass += marks.mass;
    if (kPlain) continue;
    const int t = s.run.token(tile);
    for (int i = 0; i < 4; ++i) {
      if (!s.run.holds(t + i)) continue;
      if (!s.lists(t + i) || (marks.exact >> i & 1)) mine.mass += mean_weight(s, p, t + i);
    }
  }
  return mine;
}

// Appends a warp's chosen tokens to a list; returns the place behind them.
__device__ __forceinline__ int append(int* list, int place, int t, unsigned chosen) {
  if (!__any_sync(kAllLanes, chosen != 0)) return place;
  const unsigned below = (1u << threadIdx.x % 32) - 1;
  int mine = place;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const unsigned lanes = __ballot_sync(kAllLanes, chosen >> i & 1);
    mine += __popc(lanes & below);
    place += __popc(lanes);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (chosen >> i & 1) list[mine++] = t + i;
  }
  return place;
}

__device__ __forceinline__ void store_grades(const Share& s, int t, unsigned grades) {
  uint8_t* to = s.grades + t;
  if (s.run.holds(t) && s.run.holds(t + 3) && reinterpret_cast<uintptr_t>(to) % 4 == 0) {
    *reinterpret_cast<unsigned*>(to) = grades;
    return;
  }
  for (int i = 0; i < 4; ++i) {
    if (s.run.holds(t + i)) to[i] = grades >> (8 * i) & 255;
  }
}

// Writes the lists, counts and mass, and in the plain case the grades.
template <bool kPlain>
__device__ void write_lists(const Share& s, const PruneParams& p, float resident,
                            const Ranks& ranks, Shared& shared) {
  const int least[2] = {shared.select.targets[kExactTarget].least,
                        shared.select.targets[kIndexTarget].least};
  const Tally mine = tally_lane<kPlain>(s, p, least, resident);
  Tally place = tally_in_front(mine, shared.lists, ranks);
  if (ranks.rank() == 0 && threadIdx.x < 32) {
    const Tally none{};
    const int lane = threadIdx.x;
    const Tally all =
        (lane < ranks.count() ? *ranks.of(&shared.lists.block, lane) : none).over_warp();
    if (lane == 0) {
      p.exact_counts[s.row] = all.exact;
      p.index_counts[s.row] = all.index;
      p.mass[s.row] = all.mass;
    }
  }
  ranks.arrive();  // this block has read the others'
  int* exact = p.exact_tokens + s.row * p.exact_capacity;
  int* index = p.index_tokens + s.row * p.index_capacity;
  for (int tile = 0; tile < s.run.tiles; ++tile) {
    const Marks marks = marks_of<kPlain>(s, least, tile);
    const int t = s.run.token(tile);
    if (kPlain) store_grades(s, t, marks.grades);
    place.exact = append(exact, place.exact, t, marks.exact);
    place.index = append(index, place.index, t, marks.index);
  }
  ranks.wait();  // no block leaves while another reads its shared memory
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

template <int kTiles, int kHeads, bool kPlain>
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
  const Share s(p, ranks, tiles, kept_tiles);
  const int lane = threadIdx.x % 32;
  SelectState state{bits_to_drop(s.tokens), 0};
  LaneMasses masses;
  for (int rule = 0; rule < (!kPlain && p.unite ? p.group : 1); ++rule) {
    const int end = !kPlain && p.unite ? rule + 1 : p.group;
    Batch<kHeads, kPlain> batches[kTiles];
#pragma unroll
    for (int u = 0; u < kTiles; ++u) batches[u].load(s, p, s.run.token(u), rule, end);
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
  write_lists<kPlain>(s, p, masses.resident, ranks, shared);
}

// Blocks of a cluster, tiles that a warp keeps in shared memory, and a block's bytes of it.
struct Plan {
  int ranks, kept_tiles, bytes;
};

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

// Clusters of kMostRanks blocks that the device runs at once with a multiprocessor for each block.
template <typename Kernel>
int clusters_of_most(Kernel kernel, int bytes) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
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

template <typename Kernel>
Plan plan_of(const PruneParams& p, Kernel kernel, int most_bytes) {
  const int reserved = attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  const int half = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2 - reserved;
  const int rows = p.num_rows * p.num_kv_heads;
  const int fixed = kSharedBytes + p.group * int(sizeof(float));
  const auto bytes_of = [&](int ranks) {
    return fixed + int64_t(tiles_of_run(p, ranks)) * kBytesPerTile;
  };
  int limit = 1;
  if (attribute(cudaDevAttrClusterLaunch)) {
    static const int most = clusters_of_most(kernel, most_bytes);
    limit = rows <= most ? kMostRanks : kPortableRanks;
  }
  int ranks = 1;
  while (ranks < limit && ranks * kTokensPerRank < p.max_len &&
         (2 * ranks * rows <= kBlocksWanted || bytes_of(ranks) > half)) {
    ranks *= 2;
  }
  const int kept = min(tiles_of_run(p, ranks), (most_bytes - fixed) / kBytesPerTile);
  int bytes = fixed + kept * kBytesPerTile;
  if (kSpread && rows * ranks <= attribute(cudaDevAttrMultiProcessorCount)) {
    bytes = max(bytes, min(half + 1, most_bytes));
  }
  return {ranks, kept, bytes};
}

template <int kTiles, int kHeads, bool kPlain>
cudaError_t launch(const PruneParams& p, cudaStream_t stream) {
  const auto kernel = prune_kernel<kTiles, kHeads, kPlain>;
  const int most_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes);
  if (status != cudaSuccess) return status;
  const Plan plan = plan_of(p, kernel, most_bytes);
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
  if (!plain) return launch<1, 4, false>(p, stream);
  return p.group <= 4 ? launch<2, 4, true>(p, stream) : launch<1, 8, true>(p, stream);
}

}  // namespace twilight
