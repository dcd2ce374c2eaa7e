// resolve_rows: the place of each exact row in the hot slots; victims and fetches for the misses.
//
// Two kernels. mark_hits_kernel looks every list entry up and stamps its slot with the step, so
// that whatever any sequence wants is known to be in use before a victim is chosen.
// install_misses_kernel has one block for each (sequence, KV head): it walks the sequence's query
// rows, compacts the misses in list order straight into the fetch list, finds the age at which
// enough of its slots are free or old (a histogram over the slots of the chunks it owns), gives
// those slots, by rising slot, to the misses, and reads the locations back from the map.
// A list that is in the map already costs two reads an entry. Bytes: 8 an entry and 8 a slot owned
// and pass over the slots.
//
// Sequences that share pages share rows: an installation is a compare-and-swap on the map, whoever
// comes second leaves its slot free and uses the other's row. Keys that leave the map were listed
// by nobody in this step, so no block looks at them.
#include "csrc/block_scan.cuh"
#include "csrc/common.cuh"
#include "csrc/resolve_rows.h"

namespace twilight {
namespace {

constexpr int kMarkThreads = 256;
constexpr int kMaxMarkBlocks = 32;  // a list; a list of 128K rows still takes 16 entries a thread
constexpr int kThreads = 1024;      // of an installing block: one slot age each in the histogram
constexpr int kWarps = kThreads / 32;
constexpr int kMaxAge = 1023;  // must match layout.MAX_AGE
constexpr int kInUse = kMaxAge + 1;
constexpr unsigned kAllLanes = 0xffffffffu;
// Above this much dynamic shared memory a kernel needs the opt-in (48 KB with the static part).
constexpr int kOptInBytes = 40 << 10;
static_assert(kThreads == kMaxAge + 1, "a thread sums one age");
static_assert(kSlotsPerChunk == 32, "a warp reads a chunk");

__device__ __forceinline__ int key_of(const ResolveRowsParams& p, int b, int token) {
  const int page = p.page_table[b * p.table_stride + token / p.page_size];
  return page * p.page_size + token % p.page_size;
}

__global__ void __launch_bounds__(kMarkThreads) mark_hits_kernel(ResolveRowsParams p) {
  const int n = blockIdx.x / p.num_kv_heads, h = blockIdx.x % p.num_kv_heads;
  const int count = min(p.counts[blockIdx.x], p.capacity);
  const int first = blockIdx.y * kMarkThreads + threadIdx.x;
  if (first >= count) return;
  const int b = p.query_seq[n];
  const int64_t list = static_cast<int64_t>(blockIdx.x) * p.capacity;
  const int step = p.slot_map == nullptr ? 0 : *p.step;
  for (int i = first; i < count; i += gridDim.y * kMarkThreads) {
    int row = kNoRow;
    if (p.slot_map != nullptr) {
      row = p.slot_map[h * p.keys_per_head + key_of(p, b, p.tokens[list + i])];
      if (row >= 0) p.slot_stamp[row - p.first_row] = step;
    }
    p.locations[list + i] = row;
  }
}

// 0 for a free slot, then rising with recency up to kMaxAge; kInUse for one of this step.
__device__ __forceinline__ int eviction_order(const ResolveRowsParams& p, int slot, int step) {
  if (p.slot_key[slot] == kNoRow) return 0;
  return kInUse - min(max(step - p.slot_stamp[slot], 0), kMaxAge);
}

struct InstallShared {
  BlockScan scan;
  int histogram[kInUse + 1];
  int threshold;
  int ties;
};

// One (sequence, KV head) of the step, and what its block knows of it; the same in all threads.
struct Segment {
  int b, h, step;
  int num_owned;          // chunks
  const uint16_t* owned;  // shared, ascending
  int* map;               // [keys_per_head]
  int* src;               // [fetch_capacity]
  int* dst;               // [fetch_capacity]
  int fetched;            // entries of src and dst so far
};

// Lists the chunks lent to this owner; returns their number.
__device__ int list_owned_chunks(const ResolveRowsParams& p, int owner, uint16_t* owned,
                                 BlockScan& scan) {
  int num_owned = 0;
  for (int start = 0; start < p.num_chunks; start += kThreads) {
    const int chunk = start + threadIdx.x;
    const bool mine = chunk < p.num_chunks && p.chunk_owner[chunk] == owner;
    unsigned total;
    const unsigned before = block_exclusive_sum(mine, scan, &total);
    if (mine) owned[num_owned + before] = static_cast<uint16_t>(chunk);
    num_owned += total;
  }
  __syncthreads();
  return num_owned;
}

// Sets threshold and ties so that the slots with order < threshold and the first `ties` slots with
// order == threshold are `wanted` in number, or all that may go; returns how many that are.
__device__ int find_threshold(const ResolveRowsParams& p, const Segment& s, int wanted,
                              InstallShared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  shared.histogram[threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    shared.histogram[kInUse] = 0;
    shared.threshold = kInUse;
    shared.ties = 0;
  }
  __syncthreads();
  for (int j = warp; j < s.num_owned; j += kWarps) {
    const int order = eviction_order(p, s.owned[j] * kSlotsPerChunk + lane, s.step);
    const unsigned peers = __match_any_sync(kAllLanes, order);
    if (__ffs(peers) - 1 == lane) atomicAdd(&shared.histogram[order], __popc(peers));
  }
  __syncthreads();
  const int here = shared.histogram[threadIdx.x];
  unsigned total;
  const int before = static_cast<int>(block_exclusive_sum(here, shared.scan, &total));
  if (before < wanted && wanted <= before + here) {  // true of one thread at most
    shared.threshold = threadIdx.x;
    shared.ties = wanted - before;
  }
  __syncthreads();
  return min(wanted, static_cast<int>(total));
}

// Puts the key of fetch entry `entry` into a slot; returns whether this block was the first to.
__device__ bool install(const ResolveRowsParams& p, const Segment& s, int entry, int slot) {
  const int old = p.slot_key[slot];
  if (old != kNoRow) s.map[old] = kNoRow;
  const int key = s.src[entry], row = p.first_row + slot;
  const bool first = atomicCAS(&s.map[key], kNoRow, row) == kNoRow;
  p.slot_key[slot] = first ? key : kNoRow;
  p.slot_stamp[slot] = s.step;
  s.dst[entry] = first ? row : kNoRow;
  return first;
}

// Gives the oldest slots to the misses in src[fetched .. fetched + wanted), in slot order. Adds to
// `missed` those this thread installed; returns how many entries of src got a slot.
__device__ int place_misses(const ResolveRowsParams& p, const Segment& s, int wanted,
                            InstallShared& shared, unsigned* missed) {
  const int placed = find_threshold(p, s, wanted, shared);
  const int threshold = shared.threshold, ties = shared.ties;
  int below = 0, tied = 0;  // slots before this round
  for (int j = threadIdx.x / 32; j - threadIdx.x / 32 < s.num_owned; j += kWarps) {
    if (below + min(tied, ties) >= placed) break;  // the same in all threads
    int order = kInUse;
    int slot = 0;
    if (j < s.num_owned) {
      slot = s.owned[j] * kSlotsPerChunk + threadIdx.x % 32;
      order = eviction_order(p, slot, s.step);
    }
    const bool is_below = order < threshold, is_tied = ties > 0 && order == threshold;
    unsigned total;  // two counts in one word: neither exceeds kThreads
    const unsigned before = block_exclusive_sum(is_below | is_tied << 16, shared.scan, &total);
    const int below_before = below + (before & 0xffff), tied_before = tied + (before >> 16);
    if (is_below || (is_tied && tied_before < ties)) {
      const int entry = s.fetched + below_before + min(tied_before, ties);
      *missed += install(p, s, entry, slot);
    }
    below += total & 0xffff;
    tied += total >> 16;
  }
  __syncthreads();
  return placed;
}

// Compacts the keys of one list that have no row into src, as many as fit; returns their number.
// A key that an earlier query row or another sequence has installed meanwhile gets its location.
__device__ int compact_misses(const ResolveRowsParams& p, const Segment& s, int64_t list, int count,
                              BlockScan& scan) {
  int missing = 0;
  for (int start = 0; start < count; start += kThreads) {
    const int i = start + threadIdx.x;
    bool miss = i < count && p.locations[list + i] == kNoRow;
    int key = 0;
    if (miss && s.map != nullptr) {
      key = key_of(p, s.b, p.tokens[list + i]);
      const int row = __ldcg(&s.map[key]);
      if (row >= 0) p.locations[list + i] = row;
      miss = row < 0;
    }
    unsigned total;
    const int entry = s.fetched + missing + block_exclusive_sum(miss, scan, &total);
    if (miss && s.map != nullptr && entry < p.fetch_capacity) s.src[entry] = key;
    missing += total;
  }
  __syncthreads();
  return missing;
}

// Reads the locations of a list's misses back from the map; returns how many of this thread's
// entries stay without a row.
__device__ unsigned locate_misses(const ResolveRowsParams& p, const Segment& s, int64_t list,
                                  int count) {
  unsigned direct = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    if (p.locations[list + i] != kNoRow) continue;
    const int row = __ldcg(&s.map[key_of(p, s.b, p.tokens[list + i])]);
    p.locations[list + i] = row;
    direct += row < 0;
  }
  return direct;
}

__device__ void finish(const ResolveRowsParams& p, const Segment& s, unsigned listed,
                       unsigned missed, unsigned direct, int longest) {
  p.fetch_counts[blockIdx.x] = s.fetched;
  p.fetch_direct[blockIdx.x] = direct;
  const int seq_slot = p.seq_slots[s.b];
  if (p.set_mean != nullptr && seq_slot >= 0 && p.cu_seqlens_q[s.b + 1] > p.cu_seqlens_q[s.b]) {
    float& mean = p.set_mean[static_cast<int64_t>(seq_slot) * p.num_kv_heads + s.h];
    mean = mean > 0.f ? 0.9f * mean + 0.1f * longest : longest;
  }
  if (p.counters != nullptr) {
    const auto add = [&](int counter, unsigned rows) {
      auto* const at = reinterpret_cast<unsigned long long*>(p.counters + counter);
      if (rows > 0) atomicAdd(at, static_cast<unsigned long long>(rows));
    };
    add(kCounterHitRows, listed - missed - direct);
    add(kCounterMissedRows, missed);
    add(kCounterDirectRows, direct);
  }
}

__global__ void __launch_bounds__(kThreads, 1) install_misses_kernel(ResolveRowsParams p) {
  extern __shared__ uint16_t owned_chunks[];  // [num_chunks]
  __shared__ InstallShared shared;
  const int b = blockIdx.x / p.num_kv_heads, h = blockIdx.x % p.num_kv_heads;
  const int64_t fetch_list = static_cast<int64_t>(blockIdx.x) * p.fetch_capacity;
  Segment s{b, h, 0, 0, owned_chunks, nullptr, p.fetch_src + fetch_list, p.fetch_dst + fetch_list,
            0};
  const int seq_slot = p.seq_slots[b];
  if (p.slot_map != nullptr) {
    s.step = *p.step;
    s.map = p.slot_map + h * p.keys_per_head;
    if (seq_slot >= 0) {
      s.num_owned = list_owned_chunks(p, seq_slot * p.num_kv_heads + h, owned_chunks, shared.scan);
    }
  }
  unsigned listed = 0, missed = 0, direct = 0;  // missed and direct: of this thread
  int longest = 0;
  for (int n = p.cu_seqlens_q[b]; n < p.cu_seqlens_q[b + 1]; ++n) {
    const int64_t row_list = static_cast<int64_t>(n) * p.num_kv_heads + h;
    const int count = min(p.counts[row_list], p.capacity);
    listed += count;
    longest = max(longest, count);
    const int missing = compact_misses(p, s, row_list * p.capacity, count, shared.scan);
    const int wanted = min(missing, p.fetch_capacity - s.fetched);
    if (wanted > 0 && s.num_owned > 0) {
      s.fetched += place_misses(p, s, wanted, shared, &missed);
      direct += locate_misses(p, s, row_list * p.capacity, count);
    } else if (threadIdx.x == 0) {
      direct += missing;
    }
  }
  unsigned all_missed, all_direct;
  block_exclusive_sum(missed, shared.scan, &all_missed);
  block_exclusive_sum(direct, shared.scan, &all_direct);
  if (threadIdx.x == 0) finish(p, s, listed, all_missed, all_direct, longest);
}

}  // namespace

cudaError_t launch_resolve_rows(const ResolveRowsParams& p, cudaStream_t stream) {
  if (p.num_seqs == 0 || p.num_kv_heads == 0) return cudaSuccess;
  if (p.num_queries > 0 && p.capacity > 0) {
    const int tiles = (p.capacity + kMarkThreads - 1) / kMarkThreads;
    const dim3 grid(p.num_queries * p.num_kv_heads, min(tiles, kMaxMarkBlocks));
    mark_hits_kernel<<<grid, kMarkThreads, 0, stream>>>(p);
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess) return status;
  }
  const int owned_bytes = p.num_chunks * static_cast<int>(sizeof(uint16_t));
  if (owned_bytes > kOptInBytes) {
    const cudaError_t status = cudaFuncSetAttribute(
        install_misses_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, owned_bytes);
    if (status != cudaSuccess) return status;
  }
  install_misses_kernel<<<p.num_seqs * p.num_kv_heads, kThreads, owned_bytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace twilight
