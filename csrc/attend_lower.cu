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
// Persistent blocks share all slices evenly (split_attend.cuh); a warp takes one slice of a page,
// up to 64 tokens, at a time; grades and page ids are read two slices early, and what they ask for
// comes into the L2 one slice early, so that few warps (they leave room for the fetch and the exact
// rows, which run beside them) wait for no HBM. lse is known, so a weight needs no running maximum:
// it is at most 1, and partial states need no rescaling. Lane 4 * g + j holds query head g of up to
// 8.
//   Tail: the lane sums the weights of 16 tokens, a quad of lanes has the mass of a head, and the
//   mean is added to the accumulators below in float.
//   Index: 16 tokens at a time on tensor cores (m16n8k16, bf16 in, float accumulate), out^T += V^T
//   P^T (csrc/attend_lower_tile.cuh). A nibble c enters as 1 + c / 16, exact, in a shift and a lop3
//   a pair; P holds 16 * scale * w as the sum of two bf16, off by 2^-17 at most; the ones are taken
//   out again, in float, at the end, together with w * min, which is the same for all channels.
//
// Bytes: 1 of grades and 4 G of scores a token, D / 2 + 4 an index token, 2 D a page.
#include "csrc/attend_lower.h"
#include "csrc/attend_lower_tile.cuh"

namespace twilight {
namespace {

constexpr int kSliceTokens = 64;
constexpr int kSectorBytes = 32;  // of the L2

__device__ __forceinline__ void prefetch(const void* at) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

// Up to 64 tokens of one page.
struct Slice {
  int token = 0;           // its first, wherever the visible ones begin
  int page = 0, skip = 0;  // page id; tokens of the page in front of the slice
  int grades[2];           // of tokens lane and lane + 32; kGradeDropped where there is none
};

template <int kD>
struct LowerWorker {
  using Pairs = LanePairs<kD>;
  static constexpr int kHeadDim = kD;
  static constexpr int kUnitItems = kSplitWarps;

  const AttendLowerParams& params;
  float* parts;   // [kSplitWarps][min(G, 8)][D + 4] of the block
  uint8_t* list;  // [kSliceTokens] of the warp: the slice's index tokens
  const int lane, g, j;
  int first = 0, last = 0;  // the tokens that row n sees and that are not resident
  int h = 0;
  const int* pages = nullptr;
  const float* scores = nullptr;  // of head g
  const uint8_t* grades = nullptr;
  bool has_head = false;
  float reference = 0.f;  // lse of head g, log2 units
  float sum = 0.f;        // of the lane's weights
  float offset = 0.f;     // what all channels of head g still get
  float out[Pairs::kPairs]
           [4];  // rows g (twice), g + 8 (twice) of tile i; heads 2 * j and 2 * j + 1

  __device__ LowerWorker(const AttendLowerParams& params, float* parts, uint8_t* list)
      : params(params),
        parts(parts),
        list(list),
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
    h = segment.h;
    listed(segment.n, first, last);
    pages = step.page_table + int64_t{step.query_seq[segment.n]} * step.page_table_stride;
    has_head = g < segment.num_heads;
    const int64_t head = int64_t{segment.n} * work.num_kv_heads * work.group + segment.first_head +
                         (has_head ? g : 0);
    scores = params.scores + head * params.score_capacity;
    const float lse = params.lse[head];
    reference = lse > kNegInf ? lse * kLog2e : 0.f;  // without any mass every weight is 0
    grades = params.grades + (int64_t{segment.n} * work.num_kv_heads + h) * params.grade_capacity;
    sum = offset = 0.f;
#pragma unroll
    for (int i = 0; i < Pairs::kPairs; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) out[i][c] = 0.f;
    }
  }

  __device__ Slice peek(int item, int last_item) const {
    Slice slice;
    slice.grades[0] = slice.grades[1] = kGradeDropped;
    if (item >= last_item) return slice;
    const int size = params.step.page_size, slices = slices_per_page();
    const int index = first / size + item / slices;
    slice.skip = item % slices * kSliceTokens;
    slice.token = index * size + slice.skip;
    slice.page = pages[index];
    const int end = min(last, (index + 1) * size);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = slice.token + lane + 32 * i;
      if (token >= first && token < end) slice.grades[i] = grades[token];
    }
    return slice;
  }

  __device__ void attend(const Segment& segment, int first_item, int last_item) {
    start(segment);
    int item = first_item + threadIdx.x / 32;
    Slice next = peek(item, last_item), after = peek(item + kUnitItems, last_item);
    for (; item < last_item; item += kUnitItems) {
      const Slice slice = next;
      next = after;
      after = peek(item + 2 * kUnitItems, last_item);
      if (item + kUnitItems < last_item) fetch_ahead(next);
      add_slice(slice);
    }
  }

  // Brings what the slice will be asked for into the L2, a slice early and in no register.
  __device__ void fetch_ahead(const Slice& slice) const {
    const int64_t head_page = int64_t{slice.page} * params.work.num_kv_heads + h;
    const int64_t row = head_page * params.step.page_size + slice.skip;
    bool any_tail = false;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      any_tail |= slice.grades[i] == kGradeTail;
      if (params.v_codes == nullptr || slice.grades[i] != kGradeIndex) continue;
      const int64_t at = row + lane + 32 * i;
      const uint8_t* codes = params.v_codes + at * (kD / 2);
#pragma unroll
      for (int b = 0; b < kD / 2; b += kSectorBytes) prefetch(codes + b);
      prefetch(static_cast<const __half2*>(params.v_scale) + at);
    }
    if (params.v_mean == nullptr || !__any_sync(0xffffffffu, any_tail)) return;
    const char* mean = static_cast<const char*>(params.v_mean) + head_page * (2 * kD);
    if (lane < 2 * kD / kSectorBytes) prefetch(mean + lane * kSectorBytes);
    const int token = slice.token + 16 * j;  // a quad of lanes: the 64 scores of a head
    if (!has_head || token < first || token + 15 >= last) return;
    prefetch(scores + token);
    prefetch(scores + token + 8);
  }

  // Up to 16 index tokens of a slice: what this lane needs of tokens 4 * j .. 4 * j + 3 of them.
  struct Tile {
    uint32_t codes[4][Pairs::kWords];
    __half2 affine[4];  // scale, min
    float score[4];
  };

  __device__ void load_tile(Tile& tile, const Slice& slice, int64_t row, int begin,
                            int count) const {
    const uint32_t places = *reinterpret_cast<const uint32_t*>(list + begin + 4 * j);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int place = begin + 4 * j + t;
      const int at = place < count ? places >> (8 * t) & 255 : list[0];  // none: the first again
      Pairs::load_codes(params.v_codes + (row + at) * (kD / 2), g, tile.codes[t]);
      tile.affine[t] = __ldg(static_cast<const __half2*>(params.v_scale) + row + at);
      tile.score[t] = place < count && has_head ? scores[slice.token + at] : kNegInf;
    }
  }

  __device__ void add_slice(const Slice& slice) {
    const bool with_index = params.v_codes != nullptr, with_tail = params.v_mean != nullptr;
    uint32_t tail[2], index[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      tail[i] = __ballot_sync(0xffffffffu, with_tail && slice.grades[i] == kGradeTail);
      index[i] = __ballot_sync(0xffffffffu, with_index && slice.grades[i] == kGradeIndex);
    }
    const uint32_t below = (1u << lane) - 1;
    const int half = __popc(index[0]), count = half + __popc(index[1]);
    if (index[0] >> lane & 1) list[__popc(index[0] & below)] = static_cast<uint8_t>(lane);
    if (index[1] >> lane & 1)
      list[half + __popc(index[1] & below)] = static_cast<uint8_t>(lane + 32);
    __syncwarp();
    const int64_t head_page = int64_t{slice.page} * params.work.num_kv_heads + h;
    const int64_t row = head_page * params.step.page_size + slice.skip;
    Tile tile;
    if (count > 0) load_tile(tile, slice, row, 0, count);
    if ((tail[0] | tail[1]) != 0) add_tail(slice, tail, head_page);
    for (int begin = 0; begin < count; begin += kCodeTileTokens) {
      Tile next;
      if (begin + kCodeTileTokens < count)
        load_tile(next, slice, row, begin + kCodeTileTokens, count);
      add_tile(tile);
      tile = next;
    }
    __syncwarp();  // before the list is written again
  }

  __device__ void add_tail(const Slice& slice, const uint32_t (&tail)[2], int64_t head_page) {
    uint32_t means[Pairs::kPairs];
    Pairs::load_means(static_cast<const __half*>(params.v_mean) + head_page * kD, g, means);
    // This lane's tokens: 16 * i + 4 * j + c.
    float score[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t mine = has_head ? tail[i / 2] >> (i % 2 * 16 + 4 * j) & 15u : 0u;
      load_scores(scores + slice.token + 16 * i + 4 * j, mine, score[i]);
    }
    float mass = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) mass += exp2_fast(fmaf(score[i][c], kLog2e, -reference));
    }
    sum += mass;
    mass += __shfl_xor_sync(0xffffffffu, mass, 1);
    mass += __shfl_xor_sync(0xffffffffu, mass, 2);
    const float mass0 = __shfl_sync(0xffffffffu, mass, 8 * j);
    const float mass1 = __shfl_sync(0xffffffffu, mass, 8 * j + 4);
#pragma unroll
    for (int i = 0; i < Pairs::kPairs; ++i) {
      const float2 v = __half22float2(reinterpret_cast<const __half2&>(means[i]));
      out[i][0] += v.x * mass0;
      out[i][1] += v.x * mass1;
      out[i][2] += v.y * mass0;
      out[i][3] += v.y * mass1;
    }
  }

  // Scores of the four tokens from `from` on whose bit is set, others -inf. One load where aligned:
  // 16 such bytes with a score in them never reach beyond the allocation.
  __device__ static void load_scores(const float* from, uint32_t bits, float (&to)[4]) {
#pragma unroll
    for (int c = 0; c < 4; ++c) to[c] = kNegInf;
    if (bits == 0) return;
    if (reinterpret_cast<uintptr_t>(from) % 16 == 0) {
      const float4 x = *reinterpret_cast<const float4*>(from);
      if (bits & 1) to[0] = x.x;
      if (bits & 2) to[1] = x.y;
      if (bits & 4) to[2] = x.z;
      if (bits & 8) to[3] = x.w;
    } else {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (bits >> c & 1) to[c] = from[c];
      }
    }
  }

  __device__ void add_tile(const Tile& tile) {
    float weight[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const float p = exp2_fast(fmaf(tile.score[t], kLog2e, -reference));
      const float2 affine = __half22float2(tile.affine[t]);
      sum += p;
      offset += p * affine.y;
      weight[t] = 16.f * affine.x * p;
    }
    uint32_t high[2], low[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float a = weight[2 * k], b = weight[2 * k + 1];
      const __nv_bfloat162 x = __floats2bfloat162_rn(a, b);
      const float2 rounded = __bfloat1622float2(x);
      const __nv_bfloat162 y = __floats2bfloat162_rn(a - rounded.x, b - rounded.y);
      const float2 rest = __bfloat1622float2(y);
      offset -= (rounded.x + rest.x) + (rounded.y + rest.y);
      high[k] = reinterpret_cast<const uint32_t&>(x);
      low[k] = reinterpret_cast<const uint32_t&>(y);
    }
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
    if (j == 0) sums[warp][g] = sum;
    if (j == 0 && warp == 0) references[g] = reference;
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

template <int kD>
__global__ void __launch_bounds__(kSplitThreads, kD > 128 ? 2 : 4)
    attend_lower_kernel(AttendLowerParams params) {
  extern __shared__ __align__(16) char shared[];
  __shared__ __align__(4) uint8_t lists[kSplitWarps][kSliceTokens];
  let_next_start();
  LowerWorker<kD> worker(params, reinterpret_cast<float*>(shared), lists[threadIdx.x / 32]);
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
