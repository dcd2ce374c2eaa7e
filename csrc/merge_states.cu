// out[n, hq] = sum_i 2^(max_i - top) out_i / sum;  lse = (top + log2(sum)) * ln 2,
// sum = sum_i 2^(max_i - top) sum_i, i over the partial states of (n, hq) that up to three kernels
// on split_attend.cuh left.
//
// A block owns one (query row, query head). D / 4 threads own four channels each of a partial, so
// that 512 threads read 8 to 32 partials at once, and a thread has kLoads of them in flight: the
// 80 or so of a head at batch 1 are one round of loads. Each thread weighs what it read by its own
// maximum; shared memory joins the threads. Bytes: 4 * (D + 2) a partial and head read (from L2),
// D * itemsize written.
//
// Source: Flash-Decoding.
#include "csrc/merge_states.h"
#include "csrc/split_attend.cuh"

namespace twilight {
namespace {

constexpr int kThreads = 512;
constexpr int kLoads = 8;
static_assert(kMaxStates == 3, "a partial is of the first, the second or the third");

// What a thread knows of one query head: four channels of out, relative to its own maximum.
struct Joined {
  float top = kNegInf, sum = 0.f;
  float4 out = {0.f, 0.f, 0.f, 0.f};

  __device__ void add(const float2 (&states)[kLoads], const float4 (&outs)[kLoads]) {
    float next = top;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) next = fmaxf(next, states[i].x);
    const float factor = state_weight(top, next);
    top = next;
    sum *= factor;
    out = {out.x * factor, out.y * factor, out.z * factor, out.w * factor};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const float weight = state_weight(states[i].x, top);
      sum += weight * states[i].y;
      out.x += weight * outs[i].x;
      out.y += weight * outs[i].y;
      out.z += weight * outs[i].z;
      out.w += weight * outs[i].w;
    }
  }
};

template <typename T, int kD>
__global__ void __launch_bounds__(kThreads) merge_states_kernel(MergeStatesParams params) {
  constexpr int kQuads = kD / 4, kAtOnce = kThreads / kQuads;
  __shared__ float4 outs[kAtOnce][kQuads];
  __shared__ float2 states[kAtOnce];
  let_next_start();
  const SplitWork& sizes = params.works[0];
  const int num_q_heads = sizes.num_kv_heads * sizes.group;
  const int n = blockIdx.x / num_q_heads, q_head = blockIdx.x % num_q_heads;
  const int in_group = q_head % sizes.group, head = in_group % kHeadTile;
  const int segment =
      (n * sizes.num_kv_heads + q_head / sizes.group) * head_tiles(sizes) + in_group / kHeadTile;
  const int place = threadIdx.x / kQuads, quad = threadIdx.x % kQuads;
  const int2* slots[kMaxStates];
  const float2* state_from[kMaxStates];  // slot 0's, of this head
  const float4* out_from[kMaxStates];
#pragma unroll
  for (int s = 0; s < kMaxStates; ++s) {
    const SplitWork& work = params.works[s];
    slots[s] = segment_slots(work, kD) + segment;
    state_from[s] = slot_state(work, 0, kD) + head;
    out_from[s] = reinterpret_cast<const float4*>(slot_out(work, 0, kD) + head * kD) + quad;
    if (s < params.num_states) prefetch(slots[s]);  // its address is there when the wait ends
  }
  wait_for_inputs();

  int shift[kMaxStates], ends[kMaxStates];  // slot of partial 0; partials up to a state's end
#pragma unroll
  for (int s = 0; s < kMaxStates; ++s) {
    const int2 mine = s < params.num_states ? *slots[s] : make_int2(0, 0);
    const int before = s > 0 ? ends[s - 1] : 0;
    shift[s] = mine.x - before;
    ends[s] = before + mine.y;
  }
  const int count = ends[kMaxStates - 1];
  Joined joined;
  for (int begin = place; place < kAtOnce && begin < count; begin += kLoads * kAtOnce) {
    float2 state[kLoads];
    float4 out[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int at = begin + i * kAtOnce;
      state[i] = make_float2(kNegInf, 0.f);
      out[i] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (at >= count) continue;
      const bool in_first = at < ends[0], in_second = at < ends[1];
      const int slot = at + (in_first ? shift[0] : in_second ? shift[1] : shift[2]);
      const float2* state_at = in_first ? state_from[0] : in_second ? state_from[1] : state_from[2];
      const float4* out_at = in_first ? out_from[0] : in_second ? out_from[1] : out_from[2];
      state[i] = state_at[slot * kHeadTile];
      out[i] = out_at[slot * kHeadTile * kQuads];
    }
    joined.add(state, out);
  }
  if (place < kAtOnce) {
    outs[place][quad] = joined.out;
    if (quad == 0) states[place] = make_float2(joined.top, joined.sum);
  }
  __syncthreads();
  if (threadIdx.x >= kD) return;

  float top = kNegInf, sum = 0.f, out = 0.f;
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) top = fmaxf(top, states[i].x);
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    const float weight = state_weight(states[i].x, top);
    sum += weight * states[i].y;
    out += weight * reinterpret_cast<const float*>(outs[i])[threadIdx.x];
  }
  const float norm = sum > 0.f ? 1.f / sum : 0.f;
  static_cast<T*>(params.out)[int64_t{blockIdx.x} * kD + threadIdx.x] = from_float<T>(out * norm);
  if (threadIdx.x == 0) {
    params.lse[blockIdx.x] = sum > 0.f ? (top + log2f(sum)) * kLn2 : kNegInf;
  }
}

}  // namespace

cudaError_t launch_merge_states(const MergeStatesParams& params, cudaStream_t stream) {
  if (params.num_states < 1 || params.num_states > kMaxStates) return cudaErrorInvalidValue;
  const SplitWork& sizes = params.works[0];
  const int rows = sizes.num_queries * sizes.num_kv_heads * sizes.group;
  return TWILIGHT_DISPATCH_ROW(params.row_dtype, T, {
    return TWILIGHT_DISPATCH_HEAD_DIM(params.head_dim, {
      return launch_dependent(merge_states_kernel<T, kD>, dim3(rows), dim3(kThreads), 0, stream, 1,
                              params);
    });
  });
}

}  // namespace twilight
