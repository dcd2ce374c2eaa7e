// A split_attend worker that streams rows into shared memory and attends to them.
//
// Each warp has its own ring of tiles, filled by cp.async 16 bytes at a time, so that warps never
// wait for each other and 8-16 KB a warp are in flight while a tile is computed. A Source says
// where the rows are: `num_items(n, h)`, `open(segment)`, `peek(i)`, which loads what is needed to
// find item i of the open segment a tile early and waits for nothing, and `row(peeked, direct)`,
// its address (null for a default Peeked), with direct set where it is read over the link.
#pragma once

#include "csrc/row_tile.cuh"

namespace twilight {

template <typename T, int kD, class Source, int kMostStages = 3>
struct RowStream {
  using Bytes = RowBytes<T, kD>;
  static constexpr int kHeadDim = kD;
  static constexpr int kUnitItems = kSplitWarps * kTileRows;
  // Up to kMostStages, and as many as leave two blocks of head_dim 128 on a Hopper multiprocessor
  // (101 KB each) and fit the 163 KB of an A100 at head_dim 256 (131 KB).
  static constexpr int kFitting = Bytes::kTile <= 8704 ? 3 : Bytes::kTile <= 17408 ? 2 : 1;
  static constexpr int kStages = kFitting < kMostStages ? kFitting : kMostStages;
  static constexpr int kRingBytes = kSplitWarps * kStages * Bytes::kTile;
  static constexpr int kPartBytes = kSplitWarps * kHeadTile * (kD + 4) * 4;
  static constexpr int kSharedBytes = kRingBytes > kPartBytes ? kRingBytes : kPartBytes;

  Source& source;
  const SplitWork& work;
  const T* q;                          // [N, Hq, D]
  float scale;                         // softmax_scale * log2(e)
  char* shared;                        // the block's: the warps' tiles, then their parts of out
  char* ring;                          // the warp's tiles
  unsigned long long direct_rows = 0;  // same in all lanes of the warp
  RowTile<T, kD> tile;

  __device__ RowStream(Source& source, const SplitWork& work, const void* q, float softmax_scale,
                       char* shared)
      : source(source),
        work(work),
        q(static_cast<const T*>(q)),
        scale(softmax_scale * kLog2e),
        shared(shared),
        ring(shared + threadIdx.x / 32 * kStages * Bytes::kTile) {}

  __device__ int num_items(int n, int h) const { return source.num_items(n, h); }

  // What a tile's rows need to be found, in lanes 0..15 and again in 16..31.
  __device__ typename Source::Peeked peek(int first, int last) const {
    const int item = first + threadIdx.x % kTileRows;
    return item < last ? source.peek(item) : typename Source::Peeked{};
  }

  // Starts the copy of a tile's rows; returns a bit for each row there is.
  __device__ uint32_t copy_tile(int stage, const typename Source::Peeked& peeked) {
    constexpr int kChunks = Bytes::kRow / 16;
    const int lane = threadIdx.x % 32;
    bool direct = false;
    const char* row = source.row(peeked, direct);
    direct_rows += __popc(__ballot_sync(0xffffffffu, direct) & 0xffffu);
    const uint32_t to =
        static_cast<uint32_t>(__cvta_generic_to_shared(ring + stage * Bytes::kTile));
#pragma unroll
    for (int j = 0; j < kTileRows * kChunks / 32; ++j) {
      const int r = (j * 32 + lane) / kChunks, chunk = (j * 32 + lane) % kChunks;
      const char* from = reinterpret_cast<const char*>(
          __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(row), r));
      const bool valid = from != nullptr;
      copy_async_or_zero(to + r * Bytes::kStride + chunk * 16,
                         valid ? from + chunk * 16 : reinterpret_cast<const char*>(q), valid);
    }
    return __ballot_sync(0xffffffffu, row != nullptr) & 0xffffu;
  }

  // Tile i is copied at turn i and computed kStages - 1 turns later: one copy of either's code.
  __device__ void attend(const Segment& segment, int first, int last) {
    source.open(segment);
    first += threadIdx.x / 32 * kTileRows;
    auto peeked = peek(first, last);  // before the queries, for which nothing waits
    const int64_t num_q_heads = int64_t{work.num_kv_heads} * work.group;
    tile.start(q + (segment.n * num_q_heads + segment.first_head) * kD, segment.num_heads);
    const int tiles = first < last ? (last - first + kUnitItems - 1) / kUnitItems : 0;
    const int turns = tiles > 0 ? tiles + kStages - 1 : 0;
    uint64_t valid = 0;  // 16 bits a tile in flight, the oldest lowest
    int fill = 0, use = 0;
#pragma unroll 1
    for (int turn = 0; turn < turns; ++turn) {
      if (turn < tiles) {
        valid |= uint64_t{copy_tile(fill, peeked)} << (16 * min(turn, kStages - 1));
        fill = fill + 1 == kStages ? 0 : fill + 1;
      }
      commit_copies();
      peeked = peek(first + (turn + 1) * kUnitItems, last);
      if (turn < kStages - 1) continue;
      wait_copies<kStages - 1>();
      __syncwarp();
      tile.add(ring + use * Bytes::kTile, static_cast<uint32_t>(valid) & 0xffffu, scale);
      __syncwarp();
      valid >>= 16;
      use = use + 1 == kStages ? 0 : use + 1;
    }
    wait_copies<0>();
  }

  // The warps leave out in `parts` [kSplitWarps][kHeadTile][D + 4], + 4 so that a column does not
  // hit one bank; then each thread weighs four channels of a head.
  __device__ void write_partial(const Segment& segment, int64_t slot) {
    __shared__ float maxima[kSplitWarps][kHeadTile], sums[kSplitWarps][kHeadTile];
    constexpr int kQuads = kD / 4;
    float* parts = reinterpret_cast<float*>(shared);
    const int warp = threadIdx.x / 32;
    tile.store_state(maxima[warp], sums[warp]);
    __syncthreads();  // `parts` may lie where the warps were still reading
    tile.store_out(parts + warp * kHeadTile * (kD + 4));
    __syncthreads();
    for (int i = threadIdx.x; i < segment.num_heads * kQuads; i += kSplitThreads) {
      const int head = i / kQuads, quad = i % kQuads;
      float top = kNegInf, sum = 0.f;
      float4 out = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int w = 0; w < kSplitWarps; ++w) top = fmaxf(top, maxima[w][head]);
#pragma unroll
      for (int w = 0; w < kSplitWarps; ++w) {
        const float weight = state_weight(maxima[w][head], top);
        const float4 x =
            *reinterpret_cast<const float4*>(parts + (w * kHeadTile + head) * (kD + 4) + quad * 4);
        sum += weight * sums[w][head];
        out.x += weight * x.x;
        out.y += weight * x.y;
        out.z += weight * x.z;
        out.w += weight * x.w;
      }
      reinterpret_cast<float4*>(slot_out(work, slot, kD))[i] = out;
      if (quad == 0) slot_state(work, slot, kD)[head] = make_float2(top, sum);
    }
    __syncthreads();
  }
};

}  // namespace twilight
