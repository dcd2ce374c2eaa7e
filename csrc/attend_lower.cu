// sum = sum_t w[t];  out = sum_t w[t] v[t];  w[t] = exp(score[n, hq, t] - lse[n, hq]), where
// v[t] = min[t] + scale[t] * code[t] for tokens of kGradeIndex and v_mean[page of t] for those of
// kGradeTail, t over the tokens that row n sees and that are neither sinks nor in the window.
//
// One walk over all pages serves both grades, because scores and grades then cross the bus once: at
// 128K the scores of index tokens, a fifth of all, lie in 83 % of all 32-byte sectors. It reads 39
// MB a layer (8 heads, G 4, D 128), where a kernel by list and one by page read 54.
//
// Persistent blocks share all slices evenly (split_attend.cuh). A slice is up to 64 tokens of a
// page; a warp takes one at a time. Few warps run, because they leave room for the fetch and the
// exact rows beside them, so none may wait: all that a slice asks for is copied to shared memory
// (cp.async) ahead of its turn: scores, grades and mean three slices, codes and scales of its index
// tokens, which its grades tell, one to two. lse is known, so a weight needs no running maximum: it
// is at most 1, and partial states need no rescaling.
//   Tail: half a warp a pair of heads (or four), four tokens a lane; two shuffles leave four sums a
//   head, added up for four pages at once: means and masses are one product (m16n8k8, tf32).
//   Index: tokens and their weights wait in a ring for their codes and until they are 16, whichever
//   slices they are of, then out^T += V^T P^T (m16n8k16, bf16; csrc/attend_lower_tile.cuh). A
//   nibble c enters as 1 + c / 16, exact, in a shift and a lop3 a pair; P holds 16 * scale * w as
//   the sum of two bf16, off by 2^-17 at most; the ones are taken out again, in float, at the end,
//   together with w * min, which is the same for all channels.
//
// Bytes: 1 of grades and 4 G of scores a token, D / 2 + 4 an index token, 2 D a page.
#include "csrc/attend_lower.h"
#include "csrc/attend_lower_tile.cuh"

namespace twilight {
namespace {

// kHeads: 4 or 8, at least the heads of a segment.
template <int kD, int kHeads>
struct LowerWorker {
  using Ring = WarpRing<kD, kHeads>;
  using Products = LowerProducts<kD, kHeads>;
  static constexpr int kHeadDim = kD;
  static constexpr int kUnitItems = kSplitWarps;
  static constexpr int kPairs = kHeads / 2;  // heads of half a warp, in the tail
  static constexpr int kFours = kHeads / 4;
  static_assert(sizeof(Ring) >= 8 * (kD + 4) * sizeof(float));  // write_partial

  const AttendLowerParams& params;
  const KnownRows& known;
  Ring& ring;  // of the warp
  const uint32_t lane, g, j;
  SliceSource<kD, kHeads> source;
  const uint8_t* v_codes;         // the lane's part of row 0
  uint32_t tile_at;               // bytes of a tile's codes in front of the lane's, for ldmatrix
  uint32_t tail_at;               // scores of a slice in front of the lane's, in the tail
  float tail_reference[kPairs];   // -lse, log2 units, heads lane / 16 * kPairs + ..
  float index_reference[kFours];  // heads j + 4 * ..
  float tail_sum = 0.f;           // head g (kHeads 4: g % 4)
  float index_sum[kFours];        // of the lane's tokens, heads j + 4 * ..
  float low_ends = 0.f;           // sum of w * min of column g's head (g % kHeads)
  float ones = 0.f;               // column g's sum of scale * w, as the products take it
  uint32_t take = 0;              // the ring's first index token
  int live = 0;                   // and their number
  int waiting = 0, mean_at = 0;   // pages whose means are to be added, and the first one's slot
  Products products;

  __device__ LowerWorker(const AttendLowerParams& params, const KnownRows& known, Ring& ring,
                         uint32_t lane)
      : params(params), known(known), ring(ring), lane(lane), g(lane / 4), j(lane % 4) {}

  // Shares of work: a slice, and a tile of index tokens, which costs the same.
  __device__ int num_items(int n, int h) const {
    const int slices = known.row(params.step, n).slices;
    if (slices == 0 || params.index_counts == nullptr) return slices;
    return slices + params.index_counts[n * params.work.num_kv_heads + h] / kCodeTokens;
  }

  __device__ void start(const Segment& segment, const Listed& row, int first_item, int last_item) {
    if (lane == 0) ring.walk.start(params.step, row, first_item, last_item);
    source.start(params, segment, lane);
    v_codes = held(params.v_codes + j * Ring::kCopyBytes);
    tile_at = held(Products::row_at(lane));
    tail_at = held(lane / 16 * kPairs * Slice<kHeads>::kStride + lane % 16 * 4);
    __syncwarp();
  }

  // Asked for ahead of the copies, behind which lse would wait; clear() makes references of it.
  __device__ void load_lse(const Segment& segment) {
    const float* lse = params.lse + first_query_row(params.work, segment);
    const int last = segment.num_heads - 1;
#pragma unroll
    for (int m = 0; m < kPairs; ++m) tail_reference[m] = lse[min(lane / 16 * kPairs + m, last)];
#pragma unroll
    for (int m = 0; m < kFours; ++m) index_reference[m] = lse[min(j + 4 * m, last)];
  }

  __device__ void clear() {
    const auto reference = [](float lse) {  // without any mass every weight is 0
      return lse > kNegInf ? lse * -kLog2e : 0.f;
    };
#pragma unroll
    for (float& x : tail_reference) x = reference(x);
#pragma unroll
    for (int m = 0; m < kFours; ++m)
      index_reference[m] = reference(index_reference[m]), index_sum[m] = 0;
    tail_sum = low_ends = ones = 0.f;
    take = live = waiting = mean_at = 0;
    products.clear();
  }

  // Copies are committed twice a step: codes of index tokens, then what the slice kAhead further
  // asks for. So when all but the last kAhead groups are there, the slice at hand is, and so are
  // the codes of all slices but the one before it.
  __device__ void attend(const Segment& segment, int first_item, int last_item) {
    const Listed row = known.row(params.step, segment.n);
    const int items = num_items(segment.n, segment.h);
    first_item = slices_before(first_item, items, row.slices);
    last_item = slices_before(last_item, items, row.slices);
    first_item += __shfl_sync(kAllLanes, threadIdx.x / 32, 0);
    int steps = max(last_item - first_item + kSplitWarps - 1, 0) / kSplitWarps;  // yet to be added
    start(segment, row, first_item, last_item);
    load_lse(segment);
    if (steps > 0) {
      source.look_up(ring.walk, 0);
      source.ask_scores(ring.slices[0], 0);
      source.find_rows(segment.h);  // waits for page ids: the first scores do not queue with others
    }
#pragma unroll 1
    for (int k = 0; k < kAhead; ++k) {
      commit_copies();
      if (k > 0 && k < steps) source.ask_scores(ring.slices[k], k);
      if (k < steps) source.ask_mean(ring.slices[k], ring.means[k], k);
      commit_copies();
    }
    clear();
    if (steps == 0) return;
    uint32_t slot = 0, mean_slot = kAhead, next = kAhead;  // of slice at hand; next asked for
    int left = 0;             // index tokens of the slice at hand that are yet to join the ring
    int last = 0, fresh = 0;  // tokens of the last push; of all whose codes may not be there
#pragma unroll 1
    while (true) {
      Slice<kHeads>& slice = ring.slices[slot];
      const bool rest = left > 0;  // the ring was full
      if (steps == 0) fill_tile();
      if (rest && live - last >= kCodeTokens) {
        wait_copies<1>();  // all but what the last push asked for
        fresh = last;
      } else if (rest || steps == 0) {
        wait_copies<0>();
        fresh = last = 0;
      }
      wait_copies<kAhead>();
      __syncwarp();
#pragma unroll 1
      for (; live - fresh >= kCodeTokens; live -= kCodeTokens) add_tile();
      if (steps > 0 && left == 0) left = add_slice(slice);
      __syncwarp();
      if (waiting == kMeanPages || (steps == 0 && waiting > 0)) add_means();
      if (steps == 0) return;
      fresh = rest ? last : 0;
      last = min(left, kRingTokens - live);
      fresh += last, left -= last;
      push(slice, ring.listed + left, last), live += last;
      commit_copies();
      if (left > 0) continue;  // the ring is full
      __syncwarp();
      if (steps > kAhead) {
        if (next % 32 == 0) source.look_up(ring.walk, next), source.find_rows(segment.h);
        source.ask_scores(slice, next);
        source.ask_mean(slice, ring.means[mean_slot], next);
      }
      commit_copies();
      slot = slot + 1 == kAhead ? 0 : slot + 1;
      mean_slot = mean_slot + 1 == kMeanSlots ? 0 : mean_slot + 1;
      ++next, --steps;
    }
  }

  // The masses of a slice's tail tokens, and a list of its index tokens; returns how many.
  __device__ int add_slice(const Slice<kHeads>& slice) {
    float4 scores[kPairs];  // read together with the grades: one latency for two
#pragma unroll
    for (int m = 0; m < kPairs; ++m)
      scores[m] = *reinterpret_cast<const float4*>(&slice.scores[m][tail_at]);
    const uint32_t part = lane % 16 * 4, four = slice.grades_from(part);
    if (params.v_mean != nullptr) add_tail(scores, four | four << 1);  // bits 1, 9, 17 and 25 tell
    if (params.v_codes == nullptr) return 0;
    const uint32_t two = (four << 1 & ~four) >> (lane & 16), below = (1u << lane) - 1;
    const uint32_t one = held(two & 2), other = held(two & 512);
    const uint32_t ones = __ballot_sync(kAllLanes, one), others = __ballot_sync(kAllLanes, other);
    const int count = __popc(ones), token = part + lane / 16 * 2;  // half a warp takes two of four
    uint8_t* one_at = ring.listed + __popc(ones & below);
    uint8_t* other_at = ring.listed + count + __popc(others & below);
    if (one != 0) *one_at = token;
    if (other != 0) *other_at = token + 1;
    return count + __popc(others);
  }

  __device__ void add_tail(const float4 (&scores)[kPairs], uint32_t others) {
    float sums[kPairs];
#pragma unroll
    for (int m = 0; m < kPairs; ++m) {
      const float four[4] = {scores[m].x, scores[m].y, scores[m].z, scores[m].w};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float weight = exp2_approx(fmaf(four[c], kLog2e, tail_reference[m]));
        if (c == 0) sums[m] = 0.f;
        if ((others & 2 << 8 * c) == 0) sums[m] = c == 0 ? weight : sums[m] + weight;
      }
    }
    const float sum = sum_by_head(sums, lane);
    if (lane % 2 == 0) ring.masses[waiting][lane / 2] = sum;
    if (__all_sync(kAllLanes, (others & 0x02020202) == 0x02020202)) {  // the page may have no mean
      const int at = mean_at + waiting, slot = at < kMeanSlots ? at : at - kMeanSlots;
      for (uint32_t d = lane; d < kD; d += 32) ring.means[slot][d] = __half{};
    }
    ++waiting;
  }

  __device__ void add_means() {
    constexpr int kTerms = 16 / kHeads;                    // 4 or 2
    const bool mine = j < static_cast<uint32_t>(waiting);  // else the first page's, and no mass
    const int page = mine ? j : 0;
    const float* terms = &ring.masses[page][g % kHeads * kTerms];
    float mass = terms[0] + terms[1];
    if constexpr (kTerms == 4) mass += terms[2] + terms[3];
    mass = mine ? mass : 0.f;
    tail_sum += mass;
    int at = mean_at + page;
    at = at < kMeanSlots ? at : at - kMeanSlots;
    products.add_mean(ring.means[at], g < kHeads ? mass : 0.f);
    mean_at += kMeanPages;
    if (mean_at >= kMeanSlots) mean_at -= kMeanSlots;
    waiting = 0;
  }

  // Puts `count` listed tokens of the slice into the ring: their weights, and copies of their codes
  // and scales. Four lanes a token, each for every fourth head and copy.
  __device__ void push(const Slice<kHeads>& slice, const uint8_t* tokens, int count) {
    const __half2* v_scale = static_cast<const __half2*>(params.v_scale);
    const uint32_t first_row = slice.row, put = take + live;
#pragma unroll 1
    for (int i = g; i < count; i += 16) {
      const bool two = i + 8 < count;  // else the first stands in for the second, unkept
      uint32_t row[2], at[2];
      float score[kFours][2];  // read ahead of the copies, behind which their latency passes
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int mine = u == 0 || two ? i + 8 * u : i;
        const uint32_t token = tokens[mine];
        row[u] = first_row + token;
        at[u] = min(put + mine, put + mine - kRingTokens);
#pragma unroll
        for (int m = 0; m < kFours; ++m) score[m][u] = slice.scores[j + 4 * m][token];
      }
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        if (u == 1 && !two) continue;
        ring.copy_codes(v_codes, row[u], at[u], j);
        if (j == 0) copy_async<4>(shared_address(&ring.affine[at[u]]), v_scale + row[u]);
      }
#pragma unroll
      for (int m = 0; m < kFours; ++m) {
        float* weights = ring.weights[j + 4 * m];
        const float weight = exp2_approx(fmaf(score[m][0], kLog2e, index_reference[m]));
        const float other = exp2_approx(fmaf(score[m][1], kLog2e, index_reference[m]));
        weights[at[0]] = weight, index_sum[m] += weight;
        if (two) weights[at[1]] = other, index_sum[m] += other;
      }
    }
  }

  // Makes what is left in the ring whole tiles, by tokens without a weight.
  __device__ void fill_tile() {
    const uint32_t rest = -live & (kCodeTokens - 1);
    ring.clear_tokens(take + live, rest, lane);
    live += rest;
  }

  // The ring's first 16 tokens.
  __device__ void add_tile() {
    const uint32_t at = take + 2 * j;
    const float* weights = &ring.weights[g % kHeads][at];
    const float2 w[2] = {*reinterpret_cast<const float2*>(weights),
                         *reinterpret_cast<const float2*>(weights + 8)};
    const uint2 affine[2] = {*reinterpret_cast<const uint2*>(&ring.affine[at]),
                             *reinterpret_cast<const uint2*>(&ring.affine[at + 8])};
    float scaled[4];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float2 x = __half22float2(reinterpret_cast<const __half2&>(affine[k].x));
      const float2 y = __half22float2(reinterpret_cast<const __half2&>(affine[k].y));
      low_ends = fmaf(w[k].x, x.y, fmaf(w[k].y, y.y, low_ends));
      scaled[2 * k] = x.x * w[k].x;
      scaled[2 * k + 1] = y.x * w[k].y;
    }
    uint32_t high[2], low[2];
    split_weights(scaled, high, low);
    if constexpr (Products::kLowColumns) {
      high[0] = g < kHeads ? high[0] : low[0];
      high[1] = g < kHeads ? high[1] : low[1];
      ones += sum_pairs(high);
    } else {
      ones += sum_pairs(high) + sum_pairs(low);
    }
    products.add_codes(ring, take, tile_at, high, low);
    take = take + kCodeTokens == kRingTokens ? 0 : take + kCodeTokens;
  }

  // Sum of head g, and what is to be added to all channels of column g.
  __device__ float2 column_sums() {
#pragma unroll
    for (int mask = 1; mask < 4; mask <<= 1) {
      tail_sum += __shfl_xor_sync(kAllLanes, tail_sum, mask);
      low_ends += __shfl_xor_sync(kAllLanes, low_ends, mask);
      ones += __shfl_xor_sync(kAllLanes, ones, mask);
    }
    float sum = tail_sum;
#pragma unroll
    for (int m = 0; m < kFours; ++m) {
#pragma unroll
      for (int mask = 4; mask < 32; mask <<= 1) {
        index_sum[m] += __shfl_xor_sync(kAllLanes, index_sum[m], mask);
      }
      const float index = __shfl_sync(kAllLanes, index_sum[m], g % 4);
      if (g / 4 % kFours == m) sum += index;
    }
    return make_float2(sum, (g < kHeads ? low_ends : 0.f) - kCodeSteps * ones);
  }

  __device__ void write_partial(const Segment& segment, int64_t slot) {
    __shared__ float2 sums[kSplitWarps][8];
    __shared__ float references[kHeads];
    constexpr int kQuads = kD / 4, kColumns = 8 / kHeads;  // of a head
    const int warp = threadIdx.x / 32;
    const float2 of_column = column_sums();
    if (j == 0) sums[warp][g] = of_column;
#pragma unroll
    for (int m = 0; m < kFours; ++m)
      if (threadIdx.x < 4) references[j + 4 * m] = -index_reference[m];
    __syncwarp();
    products.write(reinterpret_cast<float*>(&ring));
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < segment.num_heads * kQuads; i += kSplitThreads) {
      const int head = i / kQuads, quad = i % kQuads;
      float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
      float total = 0.f, same = 0.f;
#pragma unroll
      for (int w = 0; w < kSplitWarps; ++w) {
        const float* parts = reinterpret_cast<const float*>(&ring - warp + w) + quad * 4;
        total += sums[w][head].x;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int column = head + c * kHeads;
          const float4 y = *reinterpret_cast<const float4*>(parts + column * (kD + 4));
          x = {x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w};
          same += sums[w][column].y;
        }
      }
      x = {fmaf(kCodeSteps, x.x, same), fmaf(kCodeSteps, x.y, same), fmaf(kCodeSteps, x.z, same),
           fmaf(kCodeSteps, x.w, same)};
      reinterpret_cast<float4*>(slot_out(params.work, slot, kD))[i] = x;
      if (quad == 0) {
        slot_state(params.work, slot, kD)[head] =
            make_float2(total > 0.f ? references[head] : kNegInf, total);
      }
    }
    __syncthreads();
  }
};

// Up to 96 registers for the usual shape: three blocks leave a multiprocessor 44 % of them.
constexpr int blocks_an_sm(int size) { return size > 1024 ? 3 : size > 512 ? 4 : 5; }

template <int kD, int kHeads>
__global__ void __launch_bounds__(kSplitThreads, blocks_an_sm(kD* kHeads))
    attend_lower_kernel(AttendLowerParams params) {
  extern __shared__ __align__(16) char shared[];
  __shared__ KnownRows known;
  let_next_start();
  known.read(params.step, params.work.num_queries);
  __syncthreads();
  constexpr uint32_t kRingBytes = sizeof(WarpRing<kD, kHeads>);
  const uint32_t ring = held(shared_address(shared) + threadIdx.x / 32 * kRingBytes);
  LowerWorker<kD, kHeads> worker(
      params, known, *static_cast<WarpRing<kD, kHeads>*>(__cvta_shared_to_generic(ring)),
      held(threadIdx.x % 32));
  wait_for_inputs();
  split_attend(worker, params.work);
}

template <int kD, int kHeads>
cudaError_t launch(const AttendLowerParams& params, cudaStream_t stream) {
  return launch_split(attend_lower_kernel<kD, kHeads>, params, params.work,
                      kSplitWarps * sizeof(WarpRing<kD, kHeads>), stream);
}

}  // namespace

cudaError_t launch_attend_lower(const AttendLowerParams& params, cudaStream_t stream) {
  return TWILIGHT_DISPATCH_HEAD_DIM(params.head_dim, {
    return params.work.group > 4 ? launch<kD, 8>(params, stream) : launch<kD, 4>(params, stream);
  });
}

}  // namespace twilight
