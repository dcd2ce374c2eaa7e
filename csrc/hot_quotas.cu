// hot_quotas: rebalance_quotas lends chunks of hot slots to heads in proportion to their running
// set means; release_sequence takes a sequence's chunks back and forgets its pages.
//
// rebalance_quotas is one block, for it runs once in many steps: all threads count, the first warp
// computes the targets and walks the chunks in order (from shared memory, a tile at a time), a warp
// empties each chunk that moves. Weights are whole numbers, so the targets are the reference's to
// the chunk. release_sequence has a warp for each chunk and a thread for each (head, token) of the
// pages. Bytes: 4 a chunk, 8 a slot that is emptied, 4 an entry of the map.
#include <algorithm>

#include "csrc/block_scan.cuh"
#include "csrc/common.cuh"
#include "csrc/hot_quotas.h"

namespace twilight {
namespace {

constexpr int kThreads = 1024;
constexpr int kReleaseThreads = 256;
constexpr int kMaxReleaseBlocks = 128;
constexpr int kStays = -2;  // of a chunk in a tile; kNoRow: nobody's
static_assert(kSlotsPerChunk == 32, "a warp empties a chunk");

struct RebalanceShared {
  unsigned long long known_sum;  // of the means of active owners that have one
  int known;
  int active;
  int owner[kThreads];      // of the chunks of a tile
  int new_owner[kThreads];  // or kStays
};

__device__ __forceinline__ int rounded_mean(const RebalanceQuotasParams& p, int owner) {
  return __float2int_rn(p.set_mean[owner]);
}

__device__ __forceinline__ bool is_active(const RebalanceQuotasParams& p, int owner) {
  return p.active[owner / p.num_kv_heads] != 0;
}

// One warp: targets[owner] = chunks it shall have.
__device__ void set_targets(const RebalanceQuotasParams& p, const RebalanceShared& shared,
                            int* targets) {
  const int lane = threadIdx.x;
  const int typical =
      shared.known > 0 ? max(1, static_cast<int>(shared.known_sum / shared.known)) : 1;
  const auto weight_of = [&](int owner) -> int64_t {
    if (owner >= p.num_owners || !is_active(p, owner)) return 0;
    const int mean = rounded_mean(p, owner);
    return mean > 0 ? mean : typical;
  };
  int64_t total = 0;
  for (int start = 0; start < p.num_owners; start += 32) {
    total += __shfl_sync(kAllLanes, warp_inclusive_sum(weight_of(start + lane)), 31);
  }
  total = max(total, static_cast<int64_t>(1));
  const int least = shared.active <= p.num_chunks ? 1 : 0;
  const int64_t extra = p.num_chunks - least * shared.active;
  int64_t before = 0;
  for (int start = 0; start < p.num_owners; start += 32) {
    const int owner = start + lane;
    const int64_t weight = weight_of(owner);
    const int64_t end = before + warp_inclusive_sum(weight);
    if (owner < p.num_owners) {
      const int64_t share = extra * end / total - extra * (end - weight) / total;
      targets[owner] = static_cast<int>(share) + (is_active(p, owner) ? least : 0);
    }
    before = __shfl_sync(kAllLanes, end, 31);
  }
}

// One warp: grant_ends[owner] = chunks that owners 0 .. owner lack; owned[] becomes 0.
__device__ int set_grants(const RebalanceQuotasParams& p, const int* targets, int* owned,
                          int* grant_ends) {
  int64_t before = 0;
  for (int start = 0; start < p.num_owners; start += 32) {
    const int owner = start + threadIdx.x;
    int lacking = 0;
    if (owner < p.num_owners) {
      lacking = max(0, targets[owner] - owned[owner]);
      owned[owner] = 0;
    }
    const int64_t end = before + warp_inclusive_sum(int64_t{lacking});
    if (owner < p.num_owners) grant_ends[owner] = static_cast<int>(end);
    before = __shfl_sync(kAllLanes, end, 31);
  }
  __syncwarp();
  return static_cast<int>(before);
}

// Whom the spare chunk number `spare` goes to.
__device__ int granted_to(const int* grant_ends, int num_owners, int num_grants, int spare) {
  if (spare >= num_grants) return kNoRow;
  int low = 0, high = num_owners - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (grant_ends[middle] > spare) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// One warp: decides each chunk of a tile; returns the number of spare chunks so far.
__device__ int walk_tile(const RebalanceQuotasParams& p, int tile_chunks, const int* targets,
                         int* owned, const int* grant_ends, int num_grants, int spare,
                         RebalanceShared& shared) {
  const int lane = threadIdx.x;
  const unsigned below = (1u << lane) - 1;
  for (int start = 0; start < tile_chunks; start += 32) {
    const bool valid = start + lane < tile_chunks;
    const int owner = valid ? shared.owner[start + lane] : kStays;
    const unsigned peers = __match_any_sync(kAllLanes, owner);
    bool keeps = !valid;
    if (owner >= 0) keeps = owned[owner] + __popc(peers & below) < targets[owner];
    __syncwarp();
    if (owner >= 0 && __ffs(peers) - 1 == lane) owned[owner] += __popc(peers);
    __syncwarp();
    const unsigned given = __ballot_sync(kAllLanes, !keeps);
    if (valid) {
      shared.new_owner[start + lane] =
          keeps ? kStays
                : granted_to(grant_ends, p.num_owners, num_grants, spare + __popc(given & below));
    }
    spare += __popc(given);
  }
  return spare;
}

// One warp: empties a chunk of this owner.
__device__ void evict_chunk(int* slot_map, int* slot_key, int64_t keys_per_head, int num_kv_heads,
                            int chunk, int owner) {
  const int slot = chunk * kSlotsPerChunk + threadIdx.x % 32;
  const int key = slot_key[slot];
  if (key == kNoRow) return;
  slot_map[owner % num_kv_heads * keys_per_head + key] = kNoRow;
  slot_key[slot] = kNoRow;
}

__global__ void __launch_bounds__(kThreads) rebalance_quotas_kernel(RebalanceQuotasParams p) {
  extern __shared__ int per_owner[];  // [3, num_owners]
  __shared__ RebalanceShared shared;
  int* const targets = per_owner;
  int* const owned = targets + p.num_owners;
  int* const grant_ends = owned + p.num_owners;
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    shared.known_sum = 0;
    shared.known = 0;
    shared.active = 0;
  }
  __syncthreads();
  for (int owner = threadIdx.x; owner < p.num_owners; owner += kThreads) {
    owned[owner] = 0;
    if (!is_active(p, owner)) continue;
    atomicAdd(&shared.active, 1);
    const int mean = rounded_mean(p, owner);
    if (mean > 0) {
      atomicAdd(&shared.known, 1);
      atomicAdd(&shared.known_sum, static_cast<unsigned long long>(mean));
    }
  }
  __syncthreads();
  for (int chunk = threadIdx.x; chunk < p.num_chunks; chunk += kThreads) {
    const int owner = p.chunk_owner[chunk];
    if (owner >= 0) atomicAdd(&owned[owner], 1);
  }
  if (warp == 0) set_targets(p, shared, targets);
  __syncthreads();
  int num_grants = 0, spare = 0;  // of the first warp
  if (warp == 0) num_grants = set_grants(p, targets, owned, grant_ends);
  for (int start = 0; start < p.num_chunks; start += kThreads) {
    const int tile_chunks = min(kThreads, p.num_chunks - start);
    if (threadIdx.x < tile_chunks) shared.owner[threadIdx.x] = p.chunk_owner[start + threadIdx.x];
    __syncthreads();
    if (warp == 0) {
      spare = walk_tile(p, tile_chunks, targets, owned, grant_ends, num_grants, spare, shared);
    }
    __syncthreads();
    for (int i = warp; i < tile_chunks; i += kThreads / 32) {
      if (shared.new_owner[i] == kStays) continue;
      if (shared.owner[i] >= 0) {
        evict_chunk(p.slot_map, p.slot_key, p.keys_per_head, p.num_kv_heads, start + i,
                    shared.owner[i]);
      }
      if (threadIdx.x % 32 == 0) p.chunk_owner[start + i] = shared.new_owner[i];
    }
    __syncthreads();
  }
}

// Everything that is written becomes kNoRow (or 0), so it does not matter whether a slot is emptied
// through its chunk or through its page first.
__global__ void __launch_bounds__(kReleaseThreads)
    release_sequence_kernel(ReleaseSequenceParams p) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kReleaseThreads + threadIdx.x;
  const int64_t num_threads = static_cast<int64_t>(gridDim.x) * kReleaseThreads;
  for (int64_t chunk = thread / 32; chunk < p.num_chunks; chunk += num_threads / 32) {
    const int owner = p.chunk_owner[chunk];
    if (owner < 0 || owner / p.num_kv_heads != p.seq_slot) continue;
    evict_chunk(p.slot_map, p.slot_key, p.keys_per_head, p.num_kv_heads, static_cast<int>(chunk),
                owner);
    __syncwarp();
    if (threadIdx.x % 32 == 0) p.chunk_owner[chunk] = kNoRow;
  }
  const int64_t tokens = static_cast<int64_t>(p.num_pages) * p.page_size;
  for (int64_t i = thread; i < tokens * p.num_kv_heads; i += num_threads) {
    const int page = p.page_ids[i % tokens / p.page_size];
    if (page < 0) continue;
    int& row = p.slot_map[i / tokens * p.keys_per_head + static_cast<int64_t>(page) * p.page_size +
                          i % tokens % p.page_size];
    if (row < 0) continue;
    p.slot_key[row - p.first_row] = kNoRow;
    row = kNoRow;
  }
  if (thread < p.num_kv_heads) {
    p.set_mean[static_cast<int64_t>(p.seq_slot) * p.num_kv_heads + thread] = 0.f;
  }
}

}  // namespace

cudaError_t launch_rebalance_quotas(const RebalanceQuotasParams& p, cudaStream_t stream) {
  if (p.num_chunks == 0) return cudaSuccess;
  const size_t shared_bytes = 3 * p.num_owners * sizeof(int);
  rebalance_quotas_kernel<<<1, kThreads, shared_bytes, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t launch_release_sequence(const ReleaseSequenceParams& p, cudaStream_t stream) {
  const int64_t entries = static_cast<int64_t>(p.num_pages) * p.page_size * p.num_kv_heads;
  const int64_t threads = std::max<int64_t>({p.num_chunks * 32ll, entries, p.num_kv_heads});
  const int64_t blocks = (threads + kReleaseThreads - 1) / kReleaseThreads;
  const unsigned grid = static_cast<unsigned>(std::min<int64_t>(blocks, kMaxReleaseBlocks));
  release_sequence_kernel<<<grid, kReleaseThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace twilight
