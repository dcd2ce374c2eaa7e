// Grades of a query row's tokens: exact = the smallest {w >= tau} over the candidates whose mass,
// with the resident tokens', reaches top_p (or the top_k largest); index = the same with
// index_top_p, less exact; w = exp(score - lse), the group's mean or each head's own.
//
// A cluster of 1 to 8 blocks of 1,024 threads owns a (query row, KV head); a warp of it owns a run
// of whole pages and keeps it through every phase, so that only sums cross warps. tau is found on
// w's float bits, whose order is w's: three histograms, of 10 bits each, narrow it from the top
// (the row's maximum, wherever it is) to one value, so the loop is bounded, ties stay together and
// no tolerance enters. With `errors` the exact mass aimed at is top_p plus `margin` standard errors
// of a set's mass, sqrt(p * (1 - p) * sum of the weights' variances). A bin holds its mass as a
// 64-bit whole number of 2^-44: sums do not depend on their order, so a result repeats. Blocks read
// each other's bins through distributed shared memory and all reach the same tau.
//
// Bytes moved a visible token and KV head: 4 * G of scores, 4 of w written and read up to five
// times (from L2), 1 of grades. Source: Twilight (arXiv 2502.02770), Algorithm 1, its bisection
// replaced by a radix select (RadiK, 2501.14336).
#include "csrc/cluster_select.cuh"
#include "csrc/common.cuh"
#include "csrc/prune.h"

namespace twilight {
namespace {

constexpr int kMaxRanks = 8;           // blocks of a cluster every device can schedule
constexpr int kTokensPerRank = 4096;   // fewer are not worth another block's synchronisation
constexpr int kBlocksWanted = 264;     // two a multiprocessor of an H100; beyond, smaller clusters
constexpr float kNotCandidate = -1.f;  // its bits are below every threshold

// What the blocks of a cluster read of each other, and a block's warps of each other.
struct Shared {
  SelectShared select;
  int ties[2];    // of this block's tokens, by rule parity
  int counts[2];  // exact, index: of this block's tokens
  float mass;     // exact, of this block's tokens
  double warp_masses[kWarps];
  double warp_variances[kWarps];
  int warp_counts[2][kWarps];
};

// This block's and warp's share of a query row and KV head.
struct Share {
  int n, kv_head, seq;
  int start, stop;  // visible tokens of the row
  int first, last;  // its list tokens
  int begin, end;   // visible tokens of this warp: whole pages
  int64_t row;      // n * Hkv + kv_head
  const float* scores;
  const float* lse;
  const float* errors;  // null without a margin
  float* weights;
  uint8_t* grades;

  __device__ Share(const PruneParams& p, const Ranks& ranks) {
    row = blockIdx.x / ranks.count();
    n = row / p.num_kv_heads;
    kv_head = row % p.num_kv_heads;
    seq = p.query_seq[n];
    start = p.ctx_starts[n];
    stop = max(start, p.positions[n] + 1);
    first = min(max(start, p.num_sink), stop);
    last = max(first, min(stop, p.window_starts[seq]));
    const int first_page = start / p.page_size;
    const int pages = (stop + p.page_size - 1) / p.page_size - first_page;
    const int warps = ranks.count() * kWarps;
    const int each = (pages + warps - 1) / warps;
    const int mine = first_page + (ranks.rank() * kWarps + threadIdx.x / 32) * each;
    begin = min(stop, max(start, mine * p.page_size));
    end = min(stop, max(start, (mine + each) * p.page_size));
    scores = p.scores + row * p.group * p.capacity;
    lse = p.lse + row * p.group;
    errors = p.errors == nullptr ? nullptr : p.errors + row * p.group * p.num_pages;
    weights = p.weights + row * p.capacity;
    grades = p.grades + row * p.grades_capacity;
  }
  __device__ bool lists(int t) const { return t >= first && t < last; }
  __device__ Weights weights_of_warp() const { return {weights, begin, end}; }
};

__device__ float weight(const Share& s, int capacity, int head, int t) {
  return expf(s.scores[int64_t(head) * capacity + t] - s.lse[head]);
}

__device__ float mean_weight(const Share& s, const PruneParams& p, int t) {
  float sum = 0.0f;
#pragma unroll 4
  for (int g = 0; g < p.group; ++g) sum += weight(s, p.capacity, g, t);
  return sum / p.group;
}

// The standard error of a token's weight; a group's heads err together, since they share K's codes.
__device__ float weight_error(const Share& s, const PruneParams& p, int rule, int t) {
  const float* errors = s.errors + t / p.page_size;
  if (p.unite) return weight(s, p.capacity, rule, t) * errors[int64_t(rule) * p.num_pages];
  float sum = 0.0f;
  for (int g = 0; g < p.group; ++g) {
    sum += weight(s, p.capacity, g, t) * errors[int64_t(g) * p.num_pages];
  }
  return sum / p.group;
}

__device__ bool is_candidate(const Share& s, const PruneParams& p, int t) {
  if (!s.lists(t)) return false;
  if (p.candidates == nullptr) return true;
  const int blocks = (p.page_size + p.block - 1) / p.block;
  const int block = t / p.page_size * blocks + t % p.page_size / p.block;
  return p.candidates[s.row * p.num_blocks + block] != 0;
}

// Grades before any set is chosen.
__device__ void grade_all(const Share& s, const PruneParams& p, int lane) {
  for (int t = s.begin + lane; t < s.end; t += 32) {
    int grade = kGradeExact;
    if (s.lists(t)) {
      const bool dropped = !is_candidate(s, p, t) && s.scores[t] == -INFINITY;
      grade = dropped ? kGradeDropped : kGradeTail;
    }
    s.grades[t] = grade;
  }
}

// Writes a rule's weights; leaves the block's resident mass and its part of the variance that the
// margin follows from in `shared`.
__device__ void write_weights(const Share& s, const PruneParams& p, int rule, int lane,
                              Shared& shared) {
  double resident = 0.0, variance = 0.0;
  for (int t = s.begin + lane; t < s.end; t += 32) {
    const float w = p.unite ? weight(s, p.capacity, rule, t) : mean_weight(s, p, t);
    const float bounded = w > 0.0f ? fminf(w, 1.0f) : 0.0f;  // NaN counts as nothing
    if (!s.lists(t)) {
      resident += bounded;
    } else if (s.errors != nullptr) {
      const double error = weight_error(s, p, rule, t);
      variance += error > 0.0 ? error * error : 0.0;
    }
    s.weights[t] = is_candidate(s, p, t) ? bounded : kNotCandidate;
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    resident += __shfl_xor_sync(0xffffffffu, resident, mask);
    variance += __shfl_xor_sync(0xffffffffu, variance, mask);
  }
  if (lane == 0) {
    shared.warp_masses[threadIdx.x / 32] = resident;
    shared.warp_variances[threadIdx.x / 32] = variance;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    resident = variance = 0.0;
    for (int w = 0; w < kWarps; ++w) {
      resident += shared.warp_masses[w];
      variance += shared.warp_variances[w];
    }
    shared.select.resident_mass[rule & 1] = resident;
    shared.select.mass_variance[rule & 1] = double(p.margin) * p.margin * variance;
  }
  __syncthreads();  // before warp_masses is written again
}

// Exclusive sum of a warp's count over the warps in front of it, in this block and the ones before.
__device__ int count_in_front(int* rank_total, int (&warp_counts)[kWarps], int count, int lane,
                              const Ranks& ranks) {
  const int warp = threadIdx.x / 32;
  if (lane == 0) warp_counts[warp] = count;
  __syncthreads();
  int before = 0, total = 0;
  for (int w = 0; w < kWarps; ++w) {
    before += w < warp ? warp_counts[w] : 0;
    total += warp_counts[w];
  }
  if (threadIdx.x == 0) *rank_total = total;
  ranks.sync();
  for (int r = 0; r < ranks.rank(); ++r) before += *ranks.of(rank_total, r);
  return before;
}

// Raises the grades of the tokens at or above the thresholds.
__device__ void mark(const Share& s, const Target (&targets)[2], int rule, int lane,
                     const Ranks& ranks, Shared& shared) {
  const Target &exact = targets[kExactTarget], &index = targets[kIndexTarget];
  int ties_before = 0;
  if (exact.by_count && exact.ties != INT_MAX) {
    int count = 0;
    for (int t = s.begin + lane; t < s.end; t += 32) {
      count += __float_as_int(s.weights[t]) == exact.least;
    }
    count = __reduce_add_sync(0xffffffffu, count);
    ties_before = count_in_front(&shared.ties[rule & 1], shared.warp_counts[0], count, lane, ranks);
  }
  for (int at = s.begin; at < s.end; at += 32) {
    const int t = at + lane;
    const int bits = t < s.end ? __float_as_int(s.weights[t]) : -1;
    const bool tie = bits >= 0 && bits == exact.least;
    const unsigned ties = __ballot_sync(0xffffffffu, tie);
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
  for (int page = s.begin / page_size; page * page_size < s.end; ++page) {
    const int from = max(page * page_size, max(s.begin, s.first));
    const int to = min((page + 1) * page_size, min(s.end, s.last));
    bool any = false;
    for (int t = from + lane; t < to; t += 32) any |= s.grades[t] == kGradeExact;
    if (!__any_sync(0xffffffffu, any)) continue;
    for (int t = from + lane; t < to; t += 32) s.grades[t] = kGradeExact;
  }
  __syncwarp();
}

// Compacts the graded list tokens, and sums the exact mass.
__device__ void write_lists(const Share& s, const PruneParams& p, int lane, const Ranks& ranks,
                            Shared& shared) {
  int counts[2] = {0, 0};
  float mass = 0.0f;
  for (int t = s.begin + lane; t < s.end; t += 32) {
    const int grade = s.grades[t];
    counts[0] += grade == kGradeExact && s.lists(t);
    counts[1] += grade == kGradeIndex;
    if (grade == kGradeExact) mass += mean_weight(s, p, t);
  }
  mass = warp_sum(mass);
  if (lane == 0) shared.warp_masses[threadIdx.x / 32] = mass;
  __syncthreads();
  if (threadIdx.x == 0) {
    mass = 0.0f;
    for (int w = 0; w < kWarps; ++w) mass += shared.warp_masses[w];
    shared.mass = mass;
  }
  int place[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int count = __reduce_add_sync(0xffffffffu, counts[i]);
    place[i] = count_in_front(&shared.counts[i], shared.warp_counts[i], count, lane, ranks);
  }
  if (ranks.rank() == 0 && threadIdx.x == 0) {
    int totals[2] = {0, 0};
    mass = 0.0f;
    for (int r = 0; r < ranks.count(); ++r) {
      for (int i = 0; i < 2; ++i) totals[i] += ranks.of(shared.counts, r)[i];
      mass += *ranks.of(&shared.mass, r);
    }
    p.exact_counts[s.row] = totals[0];
    p.index_counts[s.row] = totals[1];
    p.mass[s.row] = mass;
  }
  for (int at = s.begin; at < s.end; at += 32) {
    const int t = at + lane;
    const int grade = t < s.end && s.lists(t) ? s.grades[t] : kGradeTail;
    const unsigned exact = __ballot_sync(0xffffffffu, grade == kGradeExact);
    const unsigned index = __ballot_sync(0xffffffffu, grade == kGradeIndex);
    const unsigned below = (1u << lane) - 1;
    if (grade == kGradeExact) {
      p.exact_tokens[s.row * p.exact_capacity + place[0] + __popc(exact & below)] = t;
    } else if (grade == kGradeIndex) {
      p.index_tokens[s.row * p.index_capacity + place[1] + __popc(index & below)] = t;
    }
    place[0] += __popc(exact);
    place[1] += __popc(index);
  }
}

__global__ void __launch_bounds__(kThreads) prune_kernel(const PruneParams p) {
  __shared__ Shared shared;
  const Ranks ranks;
  const Share s(p, ranks);
  const int lane = threadIdx.x % 32;
  const int residents = (s.stop - s.start) - (s.last - s.first);
  const int k = p.top_k == nullptr ? 0 : p.top_k[s.seq];
  const float tops[2] = {p.top_p[s.seq], p.index_top_p == nullptr ? 0.f : p.index_top_p[s.seq]};
  clear(shared.select.histograms[0]);
  grade_all(s, p, lane);
  int pass_count = 0;
  for (int rule = 0; rule < (p.unite ? p.group : 1); ++rule) {
    Target targets[2];
    for (int i = 0; i < 2; ++i) {
      targets[i] = Target{false, tops[i] < 1.f, 0, kEverything, INT_MAX};
      if (tops[i] <= 0.f) targets[i].least = kNothing, targets[i].open = false;
    }
    if (k > 0) {
      targets[kExactTarget] = Target{true, k > residents, uint64_t(max(0, k - residents)),
                                     k > residents ? 0 : kNothing, INT_MAX};
    }
    write_weights(s, p, rule, lane, shared);
    select(s.weights_of_warp(), tops, targets, rule, lane, pass_count, ranks, shared.select);
    mark(s, targets, rule, lane, ranks, shared);
  }
  if (p.expand_pages) expand(s, p.page_size, lane);
  write_lists(s, p, lane, ranks, shared);
  ranks.sync();  // no block leaves while another reads its counts
}

int ranks_of(const PruneParams& p) {
  int device = 0, clusters = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
  int ranks = 1;
  while (clusters && ranks < kMaxRanks && ranks * kTokensPerRank < p.max_len &&
         2 * ranks * p.num_rows * p.num_kv_heads <= kBlocksWanted) {
    ranks *= 2;
  }
  return ranks;
}

}  // namespace

cudaError_t launch_prune(const PruneParams& p, cudaStream_t stream) {
  if (p.num_rows == 0) return cudaSuccess;
  cudaLaunchConfig_t config{};
  const int ranks = ranks_of(p);
  config.gridDim = dim3(p.num_rows * p.num_kv_heads * ranks);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(ranks), 1, 1};
  config.attrs = &cluster;
  config.numAttrs = ranks > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, prune_kernel, p);
}

}  // namespace twilight
