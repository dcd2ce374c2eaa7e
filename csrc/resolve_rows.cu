// resolve_rows: the place of each exact row in the hot slots; victims and fetches for the misses.
//
// A block owns one (sequence, KV head): the work is latency, and blocks of a cluster would spend
// more on their barriers than they save. It lists the chunks that the head owns, finds the order in
// which their slots may go and counts the slots of each order. Then it looks the list up: token ->
// page table (staged in shared memory) -> map, kEach entries a thread at once; hits stamp their
// slot and leave the counts, misses are noted in shared memory, in list order. The counts and the
// number of misses give the order at which enough slots are free or old; the chosen slots lie in
// shared memory, and a thread a miss puts it into its own. Lists of more than kTile entries or
// kKeptMisses misses, as when a sequence starts, are walked a second time for their misses. Bytes:
// 12 an entry, 8 a slot owned.
//
// What may be read before wait_for_inputs, while prune still runs: the step's metadata, the page
// table, the owners of chunks and the step counter, which plain kernels and copies alone write
// (torch's, hot_quotas): whatever may still run was launched after their end. Of the slots' keys
// and stamps the same holds, but that resolve_rows writes them, too: **between two calls for the
// same hot rows a plain kernel must run**, as the one that counts the step does. Where sequences
// share pages, stamp_hits_kernel writes stamps; those are read after the wait.
//
// Whatever any sequence wants must be known to be in use before a victim is chosen. A sequence
// whose pages are its own needs only its block for that: its rows lie in chunks that its head owns,
// since a chunk that changes hands is emptied. Where several may share pages (p.shared_pages),
// stamp_hits_kernel first stamps the hits of all of them. Sequences that share pages share rows: an
// installation is then a compare-and-swap on the map, whoever comes second leaves its slot free and
// uses the other's row. Keys that leave the map were listed by nobody in this step, so no block
// looks at them.
#include "csrc/common.cuh"
#include "csrc/dependent_launch.cuh"
#include "csrc/resolve_lists.cuh"
#include "csrc/resolve_rows.h"
#include "csrc/resolve_slots.cuh"

namespace twilight {
namespace {

constexpr int kStampThreads = 256;
constexpr int kMaxStampBlocks = 16;  // a list; those of 8 sequences of 8 heads run at once
constexpr int kBlocksPerSm = 2;      // room beside prune's blocks, for an early start
constexpr int kNobody = -2;  // beside kNoRow: owns no chunk, not even those that nobody owns
constexpr int kOptInBytes = 48 << 10;  // above so much shared memory a kernel needs the opt-in

__global__ void __launch_bounds__(kStampThreads) stamp_hits_kernel(ResolveRowsParams p) {
  let_next_start();
  const int n = blockIdx.x / p.num_kv_heads, h = blockIdx.x % p.num_kv_heads;
  const int* table = p.page_table + p.query_seq[n] * p.table_stride;
  const int step = *p.step;
  const unsigned inverse = inverse_of(p.page_size);
  const int first = blockIdx.y * kStampThreads + threadIdx.x;
  const int64_t list = static_cast<int64_t>(blockIdx.x) * p.capacity;
  wait_for_inputs();
  int token = first < p.capacity ? p.tokens[list + first] : 0;
  const int count = min(p.counts[blockIdx.x], p.capacity);
  for (int i = first; i < count; i += gridDim.y * kStampThreads) {
    if (i > first) token = p.tokens[list + i];
    const int key = key_of(table, p.page_size, inverse, token);
    const int row = p.slot_map[h * p.keys_per_head + key];
    if (row >= 0) p.slot_stamp[row - p.first_row] = step;
  }
}

// What the lists of a segment add up to; the same in all threads, but for `found`.
struct Totals {
  int listed, longest, missing, placed;
  unsigned found;  // of this thread's placed misses, those whose row another sequence brought
};

// Looks a list up, writes its locations, notes its misses if it is of one tile and, if this kernel
// is to, stamps its hits. Returns the number of misses.
template <bool kStamps>
__device__ int mark(const ResolveRowsParams& p, const Segment& s, const List& list,
                    Shared& shared) {
  int missing = 0;
#pragma unroll 1
  for (int tile = 0; tile < list.tiles; ++tile) {
    const Entries entries = look_up(p, s, list, tile);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int i = List::entry(tile, j);
      if (i < list.count) p.locations[list.start + i] = entries.location(j);
    }
    if (kStamps) stamp_hits(p, s, entries, shared);
    int total;
    const int ranks = rank_misses(entries, shared.misses, tile, &total);
    if (list.tiles == 1) note_misses(entries, tile, ranks, 0, shared);
    missing += total;
  }
  return missing;
}

// Finds slots for a query row's misses.
template <bool kShared>
__device__ void place_list(const ResolveRowsParams& p, Segment& s, const List& list, int missing,
                           bool is_last, Shared& shared, Totals& totals) {
  const int wanted = min(missing, p.fetch_capacity - s.fetched);
  int placed = 0;
  if (wanted > 0 && s.num_owned > 0) placed = find_threshold(wanted, shared);
  if (placed > 0) {
    choose_victims(p, s, placed, !is_last, shared);
    if (list.tiles == 1 && placed <= kKeptMisses) {
      totals.found += place_noted<kShared>(p, s, list, 0, placed, shared);
    } else {
      totals.found += place_misses<kShared>(p, s, list, placed, shared);
    }
  }
  s.fetched += placed;
  totals.listed += list.count;
  totals.longest = max(totals.longest, list.count);
  totals.missing += missing;
  totals.placed += placed;
}

__device__ void count_rows(const ResolveRowsParams& p, int counter, unsigned long long rows) {
  if (rows != 0) atomicAdd(reinterpret_cast<unsigned long long*>(p.counters + counter), rows);
}

// One thread writes what is known of the whole segment. mean: where its running mean is kept, or
// null, and what it was.
__device__ void finish(const ResolveRowsParams& p, const Segment& s, float* mean, float old_mean,
                       const Totals& totals) {
  const int64_t segment = static_cast<int64_t>(s.b) * p.num_kv_heads + s.h;
  p.fetch_counts[segment] = s.fetched;
  p.fetch_direct[segment] = totals.missing - totals.placed;
  if (mean != nullptr) {
    *mean = old_mean > 0.f ? 0.9f * old_mean + 0.1f * totals.longest : totals.longest;
  }
  if (p.counters == nullptr) return;
  count_rows(p, kCounterHitRows, totals.listed - totals.missing);
  count_rows(p, kCounterMissedRows, totals.placed);
  count_rows(p, kCounterDirectRows, totals.missing - totals.placed);
}

// What is known of a segment before its lists are: owned, in shared memory, becomes its chunks.
__device__ Segment open_segment(const ResolveRowsParams& p, int seq_slot, int* table,
                                Shared& shared) {
  const int b = blockIdx.x / p.num_kv_heads, h = blockIdx.x % p.num_kv_heads;
  const int64_t fetch_list = static_cast<int64_t>(blockIdx.x) * p.fetch_capacity;
  Segment s{b, h, 0, inverse_of(p.page_size), nullptr, nullptr};
  s.src = p.fetch_src + fetch_list;
  s.dst = p.fetch_dst + fetch_list;
  if (p.slot_map == nullptr) return s;
  s.step = *p.step;
  s.map = p.slot_map + h * p.keys_per_head;
  s.table = stage_table(p, b, table);
  __pipeline_commit();
  auto* const places = reinterpret_cast<unsigned*>(table + staged_pages(p));
  auto* const owned = reinterpret_cast<uint16_t*>(places + place_words(p));
  s.places = places;
  s.owned = owned;
  shared.histogram[threadIdx.x] = shared.used[threadIdx.x] = {};
  const int owner = seq_slot < 0 ? kNobody : seq_slot * p.num_kv_heads + h;
  s.num_owned = list_owned_chunks(p, owner, owned, places, shared.scans[0]);
  return s;
}

// kShared: sequences may share pages, and the hits of all have been stamped.
template <bool kShared>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) resolve_rows_kernel(ResolveRowsParams p) {
  extern __shared__ int dynamic[];  // b's page table, if it fits; places; owned
  __shared__ Shared shared;
  let_next_start();
  const int b = blockIdx.x / p.num_kv_heads;
  const int seq_slot = p.seq_slots[b];
  const int first = p.cu_seqlens_q[b], rows = p.cu_seqlens_q[b + 1] - first;
  Segment s = open_segment(p, seq_slot, dynamic, shared);
  if (kShared) {
    prefetch_slots(p, s);
  } else {
    count_orders(p, s, shared);
  }
  __pipeline_wait_prior(0);
  __syncthreads();
  wait_for_inputs();

  List list = rows > 0 ? open_list(p, s, first) : List{};
  float* mean = nullptr;
  if (p.set_mean != nullptr && seq_slot >= 0 && rows > 0) {
    mean = p.set_mean + static_cast<int64_t>(seq_slot) * p.num_kv_heads + s.h;
  }
  const float old_mean = mean == nullptr ? 0.f : *mean;  // long before it is needed
  if (kShared) {
    count_orders(p, s, shared);
    __syncthreads();
  }
  // Hits of later rows are in use, too: those rows are marked once before the first is resolved.
  Totals totals{};
#pragma unroll 1
  for (int turn = kShared ? 0 : 1 - rows; turn < rows; ++turn) {
    const int row = abs(turn);
    if (rows > 1) list = open_list(p, s, first + row);
    const int missing = mark<!kShared>(p, s, list, shared);
    if (turn >= 0) place_list<kShared>(p, s, list, missing, turn + 1 == rows, shared, totals);
    if (turn + 1 < rows) __syncthreads();  // the next row looks up what this one installs
  }
  if (threadIdx.x == 0) finish(p, s, mean, old_mean, totals);
  if (kShared && p.counters != nullptr) {
    count_rows(p, kCounterHitRows, totals.found);
    count_rows(p, kCounterMissedRows, 0ull - totals.found);
  }
}

template <bool kShared>
cudaError_t launch(const ResolveRowsParams& p, cudaStream_t stream) {
  const size_t shared_bytes = staged_pages(p) * sizeof(int) + place_words(p) * sizeof(unsigned) +
                              p.num_chunks * sizeof(uint16_t);
  if (sizeof(Shared) + shared_bytes > kOptInBytes) {
    const cudaError_t status = cudaFuncSetAttribute(
        resolve_rows_kernel<kShared>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (status != cudaSuccess) return status;
  }
  return launch_dependent(resolve_rows_kernel<kShared>, dim3(p.num_seqs * p.num_kv_heads),
                          dim3(kThreads), shared_bytes, stream, 1, p);
}

}  // namespace

cudaError_t launch_resolve_rows(const ResolveRowsParams& p, cudaStream_t stream) {
  if (p.num_seqs == 0 || p.num_kv_heads == 0) return cudaSuccess;
  if (p.num_seqs == 1 || !p.shared_pages) return launch<false>(p, stream);
  if (p.slot_map != nullptr && p.num_queries > 0 && p.capacity > 0) {
    const int tiles = (p.capacity + kStampThreads - 1) / kStampThreads;
    const dim3 grid(p.num_queries * p.num_kv_heads, min(tiles, kMaxStampBlocks));
    const cudaError_t status =
        launch_dependent(stamp_hits_kernel, grid, dim3(kStampThreads), 0, stream, 1, p);
    if (status != cudaSuccess) return status;
  }
  return launch<true>(p, stream);
}

}  // namespace twilight
