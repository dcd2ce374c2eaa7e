// sum = sum_t w[t];  out = sum_t w[t] v[t];  w[t] = exp(score[n, hq, t] - lse[n, hq]), where
// v[t] = min[t] + scale[t] * code[t] for tokens of kGradeIndex and v_mean[page of t] for those of
// kGradeTail, t over the tokens that row n sees and that are neither sinks nor in the window.
//
// One walk over all pages serves both grades, because scores and grades then cross the bus once. A
// fifth of the tokens are index grade at 128K: their scores, 4 bytes each, lie in 83 % of all
// 32-byte sectors, and the tail's in all of them. In MB a layer (8 heads, G 4, D 128): a kernel by
// list reads 14 of scores, 13.5 of codes, 3.5 of scales, 0.8 of list; one by page 17 of scores, 1
// of grades, 4 of means; together 54. The walk reads 39, and needs no list.
//
// Persistent blocks share all slices evenly (split_attend.cuh). A slice is up to 64 tokens of a
// page; half a warp takes one at a time, four tokens a lane. Grades and page ids are read two steps
// early, and what they ask for comes into the L2 one step early, so that few warps (they leave room
// for the fetch and the exact rows, which run beside them) wait for no HBM. lse is known, so a
// weight needs no running maximum: it is at most 1, and partial states need no rescaling.
//   Tail: a lane sums its tokens' weights, head by head; five shuffles add them up for four heads
//   and both slices. Eight pages' masses and means are one product on tensor cores (m16n8k8, tf32).
//   Index: tokens wait in a ring until they are 16, whichever slices they are of, then out^T += V^T
//   P^T (m16n8k16, bf16; csrc/attend_lower_tile.cuh). A nibble c enters as 1 + c / 16, exact, in a
//   shift and a lop3 a pair; P holds 16 * scale * w as the sum of two bf16, off by 2^-17 at most;
//   the ones are taken out again, in float, at the end, together with w * min, which is the same
//   for all channels.
//
// Bytes: 1 of grades and 4 G of scores a token, D / 2 + 4 an index token, 2 D a page.
#include "csrc/attend_lower.h"
#include "csrc/attend_lower_tile.cuh"

namespace twilight {
namespace {

template <int kD>
struct LowerWorker {
  using Pairs = LanePairs<kD>;
  static constexpr int kHeadDim = kD;
  static constexpr int kUnitItems = 2 * kSplitWarps;
  static constexpr uint32_t kNoGrades = 0x01010101u * kGradeDropped;

  const AttendLowerParams& params;
  float* parts;        // [kSplitWarps][min(G, 8)][D + 4] of the block
  WarpShared& shared;  // of the warp
  const int lane, g, j;
  int first = 0, last = 0;  // the tokens that row n sees and that are not resident
  int h = 0, num_heads = 0, first_page = 0, slices = 1;
  const int* pages = nullptr;
  const uint8_t* grades = nullptr;
  const float* scores = nullptr;  // of the segment's first head
  bool vectors = false;           // four tokens' scores or grades are one load
  bool has_head = false;
  float reference = 0.f;     // -lse of head g, log2 units
  float sum = 0.f;           // of the lane's index tokens, head g
  float tail_sums[2];        // of the half warp's slices, heads lane / 4 % 4 and that + 4
  float offset = 0.f;        // what all channels of head g still get
  int filled = 0, used = 0;  // index tokens put into the ring, and taken out
  int waiting = 0;           // pages whose means are to be added
  // Of tile i, rows g (twice) and g + 8 (twice), heads 2 * j and 2 * j + 1.
  float out[Pairs::kPairs][4];

  __device__ LowerWorker(const AttendLowerParams& params, float* parts, WarpShared& shared)
      : params(params),
        parts(parts),
        shared(shared),
        lane(threadIdx.x % 32),
        g(lane / 4),
        j(lane % 4) {}

  __device__ int slices_per_page() const {
    return (params.step.page_size + kSliceTokens - 1) / kSliceTokens;
  }

  __device__ void listed(int n, int& from, int& to) const {
    const StepView& step = params.step;
    from = max(step.ctx_starts[n], step.num_sink);
    to = min(step.window_starts[step.query_seq[n]], step.positions[n] + 1);
  }

  __device__ int num_items(int n, int) const {
    int from, to;
    listed(n, from, to);
    if (from >= to) return 0;
    const int page_size = params.step.page_size;
    return ((to - 1) / page_size - from / page_size + 1) * slices_per_page();
  }

  __device__ void start(const Segment& segment) {
    const StepView& step = params.step;
    const SplitWork& work = params.work;
    const int64_t hkv = work.num_kv_heads, head = segment.n * hkv * work.group + segment.first_head;
    h = segment.h;
    num_heads = segment.num_heads;
    listed(segment.n, first, last);
    first_page = first / step.page_size;
    slices = slices_per_page();
    pages = step.page_table + int64_t{step.query_seq[segment.n]} * step.page_table_stride;
    scores = params.scores + head * params.score_capacity;
    grades = params.grades + (segment.n * hkv + h) * params.grade_capacity;
    vectors = (step.page_size | params.score_capacity | params.grade_capacity) % 4 == 0;
    has_head = g < num_heads;
    const float lse = params.lse[head + (has_head ? g : 0)];
    reference = lse > kNegInf ? lse * -kLog2e : 0.f;  // without any mass every weight is 0
    if (j == 0) shared.references[g] = reference;
    __syncwarp();
    sum = offset = tail_sums[0] = tail_sums[1] = 0.f;
    filled = used = waiting = 0;
#pragma unroll
    for (int i = 0; i < Pairs::kPairs; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) out[i][c] = 0.f;
    }
  }

  // Items beyond the last one show its page, and no token.
  __device__ Slice peek(int item, int last_item) const {
    const int mine = item + lane / 16, at = min(mine, last_item - 1), size = params.step.page_size;
    const int in_pages = slices == 1 ? at : at / slices;
    const int index = first_page + in_pages;
    Slice slice;
    slice.page = pages[index];
    slice.skip = (at - in_pages * slices) * kSliceTokens + lane % 16 * 4;
    slice.token = index * size + slice.skip;
    slice.grades = kNoGrades;
    const int end = min(last, (index + 1) * size);
    if (mine >= last_item || slice.token >= end || slice.token + 3 < first) return slice;
    if (vectors && slice.token >= first && slice.token + 3 < end) {
      slice.grades = *reinterpret_cast<const uint32_t*>(grades + slice.token);
      return slice;
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int token = slice.token + c;
      if (token < first || token >= end) continue;
      slice.grades &= ~(255u << (8 * c));
      slice.grades |= static_cast<uint32_t>(grades[token]) << (8 * c);
    }
    return slice;
  }

  __device__ void attend(const Segment& segment, int first_item, int last_item) {
    start(segment);
    int item = first_item + threadIdx.x / 32 * 2;
    if (item >= last_item) return;
    Slice next = peek(item, last_item), after = peek(item + kUnitItems, last_item);
    for (; item < last_item; item += kUnitItems) {
      const Slice slice = next;
      next = after;
      after = peek(item + 2 * kUnitItems, last_item);
      fetch_ahead(next);
      add_slice(slice);
    }
    finish();
  }

  __device__ uint32_t head_page(const Slice& slice) const {
    return static_cast<uint32_t>(slice.page) * params.work.num_kv_heads + h;
  }

  // Of V codes, the lane's first token. 2^32 rows of at least 32 bytes would be 137 GB.
  __device__ uint32_t row_of(const Slice& slice) const {
    return head_page(slice) * params.step.page_size + slice.skip;
  }

  // Brings what the slice will be asked for into the L2, a step early and in no register.
  __device__ void fetch_ahead(const Slice& slice) const {
    if (slice.grades == kNoGrades) return;
    if (params.v_codes != nullptr) {
      const uint32_t row = row_of(slice);
      const uint8_t* codes = params.v_codes + uint64_t{row} * (kD / 2);
      bool any = false;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (grade_of(slice.grades, c) != kGradeIndex) continue;
        any = true;
#pragma unroll
        for (int b = 0; b < kD / 2; b += kSectorBytes) prefetch(codes + c * (kD / 2) + b);
      }
      if (any) prefetch(static_cast<const __half2*>(params.v_scale) + row);
    }
    if (lane % 2 == 0) {  // two lanes' scores are a sector
      const float* from = scores + slice.token;
#pragma unroll 1
      for (int head = 0; head < num_heads; ++head, from += params.score_capacity) prefetch(from);
    }
    if (params.v_mean != nullptr && lane % 16 < 2 * kD / kSectorBytes) {
      const char* means = static_cast<const char*>(params.v_mean);
      prefetch(means + uint64_t{head_page(slice)} * (2 * kD) + lane % 16 * kSectorBytes);
    }
  }

  // 16 index tokens: what this lane needs of tokens 4 * j .. 4 * j + 3 of them.
  struct Tile {
    uint32_t codes[4][Pairs::kWords];
    __half2 affine[4];  // scale, min
    float score[4];
  };

  __device__ void load_tile(Tile& tile, int begin) const {
    const uint4* entries =
        reinterpret_cast<const uint4*>(shared.ring + begin % kRingTokens + 4 * j);
    const uint4 x = entries[0], y = entries[1];
    const uint32_t rows[4] = {x.x, x.z, y.x, y.z}, tokens[4] = {x.y, x.w, y.y, y.w};
    const uint8_t* codes = params.v_codes + Pairs::at(0, g);
    const float* of_head = scores + (has_head ? g : 0) * params.score_capacity;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      Pairs::load_codes(codes + uint64_t{rows[t]} * (kD / 2), g, tile.codes[t]);
      tile.affine[t] = __ldcg(static_cast<const __half2*>(params.v_scale) + rows[t]);
      tile.score[t] = of_head[tokens[t]];
    }
  }

  __device__ void add_slice(const Slice& slice) {
    if (params.v_codes != nullptr) {
      const uint32_t row = row_of(slice), below = (1u << lane) - 1;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const bool indexed = grade_of(slice.grades, c) == kGradeIndex;
        const uint32_t all = __ballot_sync(0xffffffffu, indexed);
        if (indexed) {
          shared.ring[(filled + __popc(all & below)) % kRingTokens] =
              make_uint2(row + c, slice.token + c);
        }
        filled += __popc(all);
      }
      __syncwarp();
    }
    Tile tile;
    if (filled - used >= kCodeTileTokens) load_tile(tile, used);
    if (params.v_mean != nullptr) add_tail(slice);
    while (filled - used >= kCodeTileTokens) {
      Tile next;
      if (filled - used >= 2 * kCodeTileTokens) load_tile(next, used + kCodeTileTokens);
      add_tile(tile, kCodeTileTokens);
      used += kCodeTileTokens;
      tile = next;
    }
  }

  // What is left of index tokens and of page means at the end of a stretch.
  __device__ void finish() {
    const int count = filled - used;
    if (count > 0) {
      uint2* from = shared.ring + used % kRingTokens;
      if (lane >= count && lane < kCodeTileTokens) from[lane] = from[0];  // any indexed token
      __syncwarp();
      Tile tile;
      load_tile(tile, used);
      add_tile(tile, count);
      __syncwarp();
    }
    if (waiting > 0) add_means();
  }

  // The masses of the tail tokens of both slices.
  __device__ void add_tail(const Slice& slice) {
    bool tail[4], any = false;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      tail[c] = grade_of(slice.grades, c) == kGradeTail;
      any |= tail[c];
    }
    if (!__any_sync(0xffffffffu, any)) return;
    const int half = lane / 16, of_four = g % 4;
    const float* from = scores + slice.token;
#pragma unroll
    for (int four = 0; four < 2; ++four) {
      if (4 * four >= num_heads) break;
      float score[4][4];
#pragma unroll
      for (int k = 0; k < 4; ++k, from += params.score_capacity) {
        load_scores(from, any && 4 * four + k < num_heads, vectors, tail, score[k]);
      }
      const float4 minus = reinterpret_cast<const float4*>(shared.references)[four];
      const float lses[4] = {minus.x, minus.y, minus.z, minus.w};
      float masses[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        masses[k] = 0.f;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float weight = exp2_fast(fmaf(score[k][c], kLog2e, lses[k]));
          masses[k] += tail[c] ? weight : 0.f;
        }
      }
      const float mass = sum_by_head(masses);
      tail_sums[four] += mass;
      if (j == 0) shared.masses[waiting + half][4 * four + of_four] = mass;
    }
    if (lane % 16 == 0) shared.pages[waiting + half] = head_page(slice);
    waiting += 2;
    if (waiting == kMeanTilePages) add_means();
  }

  __device__ void add_means() {
    __syncwarp();
    __half2 means[2][Pairs::kPairs];
    float masses[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int slot = j + 4 * k;  // those that stay empty take the first one's page, a mass of 0
      const uint32_t page = shared.pages[slot < waiting ? slot : 0];
      masses[k] = slot < waiting ? shared.masses[slot][g] : 0.f;
      const __half* mean = static_cast<const __half*>(params.v_mean) + uint64_t{page} * kD;
      Pairs::load_means(mean, g, means[k]);
    }
    Pairs::multiply(means, masses, out);
    waiting = 0;
    __syncwarp();
  }

  // The first `count` tokens of a tile.
  __device__ void add_tile(const Tile& tile, int count) {
    float weight[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const float x = has_head && 4 * j + t < count ? tile.score[t] : kNegInf;
      const float p = exp2_fast(fmaf(x, kLog2e, reference));
      const float2 affine = __half22float2(tile.affine[t]);
      sum += p;
      offset += p * affine.y;
      weight[t] = 16.f * affine.x * p;
    }
    uint32_t high[2], low[2];
    offset -= split_weights(weight, high, low);
    Pairs::multiply(tile.codes, high, low, out);
  }

  __device__ void write_partial(const Segment& segment, int64_t slot) {
    __shared__ float sums[kSplitWarps][kHeadTile], references[kHeadTile];
    constexpr int kQuads = kD / 4;
    const int warp = threadIdx.x / 32, heads = segment.num_heads;
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    offset += __shfl_xor_sync(0xffffffffu, offset, 1);
    offset += __shfl_xor_sync(0xffffffffu, offset, 2);
#pragma unroll
    for (int four = 0; four < 2; ++four) {
      tail_sums[four] += __shfl_xor_sync(0xffffffffu, tail_sums[four], 16);
      const float tail = __shfl_sync(0xffffffffu, tail_sums[four], g % 4 * 4);
      if (g / 4 == four) sum += tail;
    }
    if (j == 0) sums[warp][g] = sum;
    if (j == 0 && warp == 0) references[g] = -reference;
    float* mine = parts + warp * heads * (kD + 4);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float same = __shfl_sync(0xffffffffu, offset, 8 * j + 4 * k);
      if (2 * j + k >= heads) continue;
#pragma unroll
      for (int i = 0; i < Pairs::kPairs; ++i) {
        float* to = mine + (2 * j + k) * (kD + 4) + 2 * Pairs::at(i, g);
        *reinterpret_cast<float2*>(to) = make_float2(out[i][k] + same, out[i][2 + k] + same);
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < heads * kQuads; i += kSplitThreads) {
      const int head = i / kQuads, quad = i % kQuads;
      float total = 0.f;
      float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int w = 0; w < kSplitWarps; ++w) {
        const float4 y =
            *reinterpret_cast<const float4*>(parts + (w * heads + head) * (kD + 4) + quad * 4);
        x = {x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w};
        total += sums[w][head];
      }
      reinterpret_cast<float4*>(slot_out(params.work, slot, kD))[i] = x;
      if (quad == 0) {
        slot_state(params.work, slot, kD)[head] =
            make_float2(total > 0.f ? references[head] : kNegInf, total);
      }
    }
    __syncthreads();
  }
};

// 128 registers up to D 128 (at 128 some 20 of them spill): two blocks leave a multiprocessor half
// of its registers, as many as a block of the fetch takes.
template <int kD>
__global__ void __launch_bounds__(kSplitThreads, kD > 128 ? 2 : 4)
    attend_lower_kernel(AttendLowerParams params) {
  extern __shared__ __align__(16) char shared[];
  __shared__ __align__(16) WarpShared warps[kSplitWarps];
  let_next_start();
  LowerWorker<kD> worker(params, reinterpret_cast<float*>(shared), warps[threadIdx.x / 32]);
  wait_for_inputs();
  split_attend(worker, params.work);
}

}  // namespace

cudaError_t launch_attend_lower(const AttendLowerParams& params, cudaStream_t stream) {
  const int heads = params.work.group < kHeadTile ? params.work.group : kHeadTile;
  return TWILIGHT_DISPATCH_HEAD_DIM(params.head_dim, {
    const int shared_bytes = kSplitWarps * heads * (kD + 4) * 4;
    return launch_split(attend_lower_kernel<kD>, params, params.work, shared_bytes, stream);
  });
}

}  // namespace twilight
