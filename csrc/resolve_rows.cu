// resolve_rows: the place of each exact row in the hot slots; victims and fetches for the misses.
//
// A block owns one (sequence, KV head): the work is latency, and blocks of a cluster would spend
// more on their barriers than they save. It lists the chunks that the head owns, finds the order in
// which their slots may go and counts the slots of each order. Then it looks the list up: token ->
// page table (staged in shared memory) -> map, kEach entries a thread at once; hits mark their
// slot and leave the counts, misses are noted in shared memory, in list order. The counts and the
// number of misses give the order at which enough slots are free or old; the chosen slots lie in
// shared memory, and a thread a miss puts it into its own, while the marks are written as stamps.
// Lists of more than kKeptMisses misses to place, as when a sequence starts, are walked a second
// time for them. Bytes: 12 an entry, 8 a slot owned.
//
// What may be read before wait_for_inputs, while prune still runs: the step's metadata, the page
// table, the owners of chunks and the step counter, which plain kernels and copies alone write
// (torch's, hot_quotas): whatever may still run was launched after their end. Of the slots' keys
// and stamps and the means the same holds, but that resolve_rows writes them, too: **between two
// calls for the same hot rows a plain kernel must run**, as the one that counts the step does.
// Where sequences share pages, stamp_hits_kernel writes stamps; those are read after the wait.
//
// The misses are announced as soon as they are known, so that gather_rows, which is there already,
// can ask the host for their rows while their slots are chosen (announced_misses.cuh).
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
  int listed, longest, missing;
  unsigned found;  // of this thread's placed misses, those whose row another sequence brought
};

// Looks a list up, writes its locations, notes its first misses and, if this kernel is to, takes
// its hits. Returns the number of misses.
template <bool kTakesHits>
__device__ int mark(const ResolveRowsParams& p, const Segment& s, List& list, Shared& shared) {
  int missing = 0;
#pragma unroll 1
  for (int tile = 0; tile < list.tiles; ++tile) {
    const Entries entries = look_up(p, s, list, tile);
    int* const locations = p.locations + list.first + tile * kTile;
    entries.for_each([&](int j) {
      if (entries.listed(j)) locations[j * kThreads] = entries.location(j);
    });
    if (kTakesHits) use_hits(p, s, entries, shared);
    int total;
    const int ranks = rank_misses(entries, shared.misses, tile, &total);
    note_misses(p, s, entries, tile, ranks, missing, shared);
    missing += total;
  }
  return missing;
}

// Finds slots for a query row's misses; with those of the last row all slots in use are stamped.
template <bool kShared>
__device__ void place_list(const ResolveRowsParams& p, Segment& s, const List& list, int missing,
                           bool is_last, Shared& shared, Totals& totals) {
  const int at = threadIdx.x, wanted = min(missing, p.fetch_capacity - s.fetched);
  if (p.announced != nullptr && at == 0) {
    announce(p.announced, blockIdx.x, 0, s.tag, s.num_owned > 0 ? wanted : 0);
  }
  int placed = 0;
  if (wanted > 0 && s.num_owned > 0) placed = find_threshold(wanted, shared);
  if (placed > 0) choose_victims(p, s, placed, !is_last, shared);
  const bool places = at < placed && placed <= kKeptMisses;
  Victim victim{};
  if (places) victim = read_victim(p, s, at, shared);  // on its way while stamps are written
  if (is_last) stamp_used(p, s);
  if (places) totals.found += install<kShared>(p, s, list, shared.missing[at], at, victim);
  if (placed > kKeptMisses) totals.found += place_misses<kShared>(p, s, list, placed, shared);
  s.fetched += placed;
  totals.listed += list.count;
  totals.longest = max(totals.longest, list.count);
  totals.missing += missing;
}

__device__ void count_rows(const ResolveRowsParams& p, int counter, unsigned long long rows) {
  if (rows != 0) atomicAdd(reinterpret_cast<unsigned long long*>(p.counters + counter), rows);
}

// One thread writes what is known of the whole segment.
__device__ void finish(const ResolveRowsParams& p, const Segment& s, const Mean& mean,
                       const Totals& totals) {
  p.fetch_counts[blockIdx.x] = s.fetched;
  p.fetch_direct[blockIdx.x] = totals.missing - s.fetched;
  if (mean.at != nullptr) {
    *mean.at = mean.old > 0.f ? 0.9f * mean.old + 0.1f * totals.longest : totals.longest;
  }
  if (p.counters == nullptr) return;
  count_rows(p, kCounterHitRows, totals.listed - totals.missing);
  count_rows(p, kCounterMissedRows, s.fetched);
  count_rows(p, kCounterDirectRows, totals.missing - s.fetched);
}

// What is known of a segment before its lists are. Shared memory has the orders of its slots, the
// page table, if it fits, the places of chunks and the owned chunks.
__device__ Segment open_segment(const ResolveRowsParams& p, int seq_slot, Shared& shared) {
  const int b = blockIdx.x / p.num_kv_heads, h = blockIdx.x % p.num_kv_heads;
  Segment s{h, 0, inverse_of(p.page_size)};
  if (p.slot_map == nullptr) return s;
  s.step = *p.step;
  s.tag = announcement_tag(s.step, p.layer);
  s.map = p.slot_map + h * p.keys_per_head;
  const int table_at = kept_orders(p) * static_cast<int>(sizeof(uint16_t));
  s.places_at = table_at + staged_pages(p) * static_cast<int>(sizeof(int));
  s.owned_at = s.places_at + place_words(p) * static_cast<int>(sizeof(unsigned));
  s.table = stage_table(p, b, table_at);
  __pipeline_commit();
  shared.histogram[threadIdx.x] = shared.used[threadIdx.x] = 0;
  const int owner = seq_slot < 0 ? kNobody : seq_slot * p.num_kv_heads + h;
  s.num_owned = list_owned_chunks(p, s, owner, shared.scans[0]);
  return s;
}

// Reads the running mean of the segment's list lengths, if it has one; returns how many entries of
// a list are to be read before its count is known.
__device__ __forceinline__ int read_mean(const ResolveRowsParams& p, const Segment& s, int seq_slot,
                                         Mean& mean) {
  float* at = nullptr;
  if (p.set_mean != nullptr && seq_slot >= 0) {
    at = p.set_mean + static_cast<int64_t>(seq_slot) * p.num_kv_heads + s.h;
  }
  const float old = at == nullptr ? 0.f : *at;
  if (threadIdx.x == 0) mean = {at, old};
  return min(p.capacity, early_entries(old));
}

// kShared: sequences may share pages, and the hits of all have been stamped.
template <bool kShared>
__global__ void __launch_bounds__(kThreads, 1) resolve_rows_kernel(ResolveRowsParams p) {
  __shared__ Shared shared;
  let_next_start();
  const int b = blockIdx.x / p.num_kv_heads;
  const int seq_slot = p.seq_slots[b];
  const int first = p.cu_seqlens_q[b], rows = p.cu_seqlens_q[b + 1] - first;
  Segment s = open_segment(p, seq_slot, shared);
  if (kShared) {
    prefetch_slots(p, s);
  } else {
    count_orders(p, s, shared);
  }
  const int early = read_mean(p, s, rows > 0 ? seq_slot : kNoRow, shared.mean);
  __pipeline_wait_prior(0);
  __syncthreads();
  wait_for_inputs();

  List list = rows > 0 ? open_list(p, s, first, early) : List{};
  if (kShared) {
    count_orders(p, s, shared);
    __syncthreads();
  }
  // Hits of later rows are in use, too: those rows are marked once before the first is resolved.
  Totals totals{};
#pragma unroll 1
  for (int turn = kShared ? 0 : 1 - rows; turn < rows; ++turn) {
    const int row = abs(turn);
    if (rows > 1) list = open_list(p, s, first + row, early);
    const int missing = mark<!kShared>(p, s, list, shared);
    if (turn >= 0) place_list<kShared>(p, s, list, missing, turn + 1 == rows, shared, totals);
    if (turn + 1 < rows) __syncthreads();  // the next row looks up what this one installs
  }
  if (threadIdx.x == 0) finish(p, s, shared.mean, totals);
  if (kShared && p.counters != nullptr) {
    count_rows(p, kCounterHitRows, totals.found);
    count_rows(p, kCounterMissedRows, 0ull - totals.found);
  }
}

template <bool kShared>
cudaError_t launch(const ResolveRowsParams& p, cudaStream_t stream) {
  const size_t shared_bytes = (kept_orders(p) + p.num_chunks) * sizeof(uint16_t) +
                              staged_pages(p) * sizeof(int) + place_words(p) * sizeof(unsigned);
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
