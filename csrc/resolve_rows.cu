// resolve_rows: the place of each exact row in the hot slots; victims and fetches for the misses.
//
// A cluster of blocks (ranks) owns one (sequence, KV head). Each rank takes a part of the list and
// looks its entries up: token -> page table (staged in shared memory) -> map; hits stamp their
// slot. Meanwhile the ranks list the chunks that the head owns, each those of its part of the pool,
// and divide them evenly, so that slots rise with the rank. With everybody's counts of misses a
// rank writes its own into the fetch list, in list order, and counts the ages of its slots in a
// histogram, which it sends to all; their sum gives the age at which enough slots are free or old,
// and those of the ranks before tell which misses a rank's victims serve. The list place of a miss
// waits in fetch_dst until its slot is known. Three barriers of the cluster; the path is six loads
// that wait for each other, since each thread has one entry and one or two slots at the usual
// sizes. Bytes: 12 an entry, 8 a slot owned.
//
// Whatever any sequence wants must be known to be in use before a victim is chosen. One sequence
// needs only its cluster for that; several may share pages, so stamp_hits_kernel first stamps the
// hits of all of them. Sequences that share pages share rows: an installation is then a
// compare-and-swap on the map, whoever comes second leaves its slot free and uses the other's row.
// Keys that leave the map were listed by nobody in this step, so no block looks at them.
#include "csrc/block_scan.cuh"
#include "csrc/common.cuh"
#include "csrc/dependent_launch.cuh"
#include "csrc/ranks.cuh"
#include "csrc/resolve_lists.cuh"
#include "csrc/resolve_rows.h"
#include "csrc/resolve_slots.cuh"

namespace twilight {
namespace {

constexpr int kStampThreads = 256;
constexpr int kMaxStampBlocks = 16;  // a list; those of 8 sequences of 8 heads run at once
constexpr int kSms = 128;  // of the device, or a little fewer: all blocks are to run at once
// One sequence is latency: registers for many loads on their way at once. More are throughput.
constexpr int blocks_an_sm(bool shared) { return shared ? 2 : 1; }
constexpr int kNobody = -2;  // beside kNoRow: owns no chunk, not even those that nobody owns
constexpr int kOptInBytes = 48 << 10;  // above so much shared memory a kernel needs the opt-in

__global__ void __launch_bounds__(kStampThreads) stamp_hits_kernel(ResolveRowsParams p) {
  let_next_start();
  wait_for_inputs();
  const int n = blockIdx.x / p.num_kv_heads, h = blockIdx.x % p.num_kv_heads;
  const int count = min(p.counts[blockIdx.x], p.capacity);
  const int first = blockIdx.y * kStampThreads + threadIdx.x;
  if (first >= count) return;
  const int64_t list = static_cast<int64_t>(blockIdx.x) * p.capacity;
  const int* table = p.page_table + p.query_seq[n] * p.table_stride;
  const int step = *p.step;
  for (int i = first; i < count; i += gridDim.y * kStampThreads) {
    const int key = key_of(table, p.page_size, p.tokens[list + i]);
    const int row = p.slot_map[h * p.keys_per_head + key];
    if (row >= 0) p.slot_stamp[row - p.first_row] = step;
  }
}

// What the lists of a segment add up to; the same in all threads of all ranks, but for `found`.
struct Totals {
  int listed, longest, missing, placed;
  unsigned found;  // of this thread's placed misses, those whose row another sequence brought
};

// Resolves one query row's list, whose first tile has been looked up. After the last barrier of the
// last list nobody looks at another rank's memory.
template <bool kShared>
__device__ void resolve_list(const ResolveRowsParams& p, Segment& s, const List& list,
                             Entries& looked_up, bool is_last, const Ranks& ranks, Shared& shared,
                             Totals& totals) {
  shared.histogram[threadIdx.x] = {};
  const int misses = mark<!kShared>(p, s, list, looked_up);
  unsigned here;
  const unsigned before = block_exclusive_sum(misses, shared.scan, &here);
  if (threadIdx.x < ranks.count()) *ranks.of(&shared.missing[ranks.rank()], threadIdx.x) = here;
  ranks.sync();  // all stamps are there, and the counts of misses
  int missing = 0, missing_before = 0;
#pragma unroll
  for (int r = 0; r < kMaxRanks; ++r) {
    const int there = r < ranks.count() ? shared.missing[r] : 0;
    missing += there;
    missing_before += r < ranks.rank() ? there : 0;
  }
  const int wanted = min(missing, p.fetch_capacity - s.fetched);
  int placed = 0, below = 0;
  if (wanted > 0 && s.num_owned > 0) {
    list_misses(p, s, list, looked_up, before, s.fetched + missing_before, s.fetched + wanted,
                shared.scan);
    count_orders(p, s, ranks, shared);
    ranks.sync();  // the histograms and the fetch list are complete
    placed = find_threshold(wanted, ranks, shared, &below);
  }
  if (placed > 0) totals.found += place_misses<kShared>(p, s, list, placed, below, shared);
  if (!is_last) ranks.sync();  // the next row looks up what this one installs
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

// kShared: sequences may share pages, and the hits of all have been stamped.
template <bool kShared>
__global__ void __launch_bounds__(kThreads, blocks_an_sm(kShared))
    resolve_rows_kernel(ResolveRowsParams p) {
  extern __shared__ int dynamic[];  // b's page table, if it fits; owned chunks; share of them
  __shared__ Shared shared;
  const Ranks ranks;
  const int segment = blockIdx.x / ranks.count();
  const int b = segment / p.num_kv_heads, h = segment % p.num_kv_heads;
  const int part = (p.num_chunks + ranks.count() - 1) / ranks.count();
  auto* const owned = reinterpret_cast<uint16_t*>(dynamic + staged_pages(p));
  let_next_start();
  wait_for_inputs();

  const Early early = read_early(p, b, h, ranks.rank());
  const int64_t fetch_list = static_cast<int64_t>(segment) * p.fetch_capacity;
  Segment s{b, h, 0, nullptr, nullptr, p.fetch_src + fetch_list, p.fetch_dst + fetch_list};
  if (threadIdx.x < 4) {  // by a copy, like the table's: a load would be put off until after it
    const int* from = p.cu_seqlens_q + b + threadIdx.x - 1;
    if (threadIdx.x == 0) from = p.seq_slots + b;
    if (threadIdx.x == 3) from = p.step;
    if (from != nullptr) __pipeline_memcpy_async(&shared.about[threadIdx.x], from, sizeof(int));
  }
  if (p.slot_map != nullptr) {
    s.map = p.slot_map + h * p.keys_per_head;
    s.table = stage_table(p, b, dynamic);
    prefetch_owners(p, ranks.rank() * part, part);
  }
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
  const int seq_slot = shared.about[0], first = shared.about[1], end = shared.about[2];
  s.step = shared.about[3];

  List list = first < end ? open_list(p, s, first, early, ranks) : List{};
  const bool is_early = first == b && list.each == 1 && list.tiles == 1;
  Entries looked_up = look_up(p, s, list, 0, is_early ? &early.token : nullptr);
  if (s.map != nullptr) {
    const int owner = seq_slot < 0 ? kNobody : seq_slot * p.num_kv_heads + h;
    list_owned_chunks(p, owner, ranks, owned, shared);
  }
  ranks.sync();  // all ranks run, and have listed their chunks
  if (s.map != nullptr) take_share(p, ranks, owned, owned + part, shared, s);
  for (int n = first + 1; !kShared && n < end; ++n) {  // hits of later rows are in use, too
    const List later = open_list(p, s, n, early, ranks);
    Entries found = look_up(p, s, later, 0, nullptr);
    mark<true>(p, s, later, found);
  }
  float* mean = nullptr;
  if (p.set_mean != nullptr && seq_slot >= 0 && first < end) {
    mean = p.set_mean + static_cast<int64_t>(seq_slot) * p.num_kv_heads + h;
  }
  const float old_mean = mean == nullptr ? 0.f : *mean;  // long before it is needed
  Totals totals{};
  for (int n = first; n < end; ++n) {
    if (n > first) {
      list = open_list(p, s, n, early, ranks);
      looked_up = look_up(p, s, list, 0, nullptr);
    }
    resolve_list<kShared>(p, s, list, looked_up, n + 1 == end, ranks, shared, totals);
  }
  if (first == end) ranks.sync();  // the ranks read each other's lists of chunks
  if (ranks.rank() == 0 && threadIdx.x == 0) finish(p, s, mean, old_mean, totals);
  if (kShared && p.counters != nullptr) {
    unsigned found;
    block_exclusive_sum(totals.found, shared.scan, &found);
    if (threadIdx.x == 0) {
      count_rows(p, kCounterHitRows, found);
      count_rows(p, kCounterMissedRows, 0ull - found);
    }
  }
}

template <bool kShared>
cudaError_t launch(const ResolveRowsParams& p, cudaStream_t stream) {
  const int segments = p.num_seqs * p.num_kv_heads;
  int ranks = can_launch_dependent() ? kMaxRanks : 1;
  while (ranks > 1 && segments * ranks > kSms * blocks_an_sm(kShared)) ranks /= 2;
  const int lists = ranks > 1 ? 2 : 1;  // of chunks: owned, and a share of them
  const size_t shared_bytes = staged_pages(p) * sizeof(int) +
                              lists * ((p.num_chunks + ranks - 1) / ranks) * sizeof(uint16_t);
  if (sizeof(Shared) + shared_bytes > kOptInBytes) {
    const cudaError_t status = cudaFuncSetAttribute(
        resolve_rows_kernel<kShared>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (status != cudaSuccess) return status;
  }
  return launch_dependent(resolve_rows_kernel<kShared>, dim3(segments * ranks), dim3(kThreads),
                          shared_bytes, stream, ranks, p);
}

}  // namespace

cudaError_t launch_resolve_rows(const ResolveRowsParams& p, cudaStream_t stream) {
  if (p.num_seqs == 0 || p.num_kv_heads == 0) return cudaSuccess;
  if (p.num_seqs == 1) return launch<false>(p, stream);
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
