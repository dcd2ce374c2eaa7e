// lse = log sum_i exp(lses[i]);  out = sum_i exp(lses[i] - lse) outs[i]; empty states are skipped,
// so that what their out holds never matters.
//
// A warp owns a row (query row, query head), a lane every 32nd channel. Bytes: 4 * D a state read
// and D * itemsize written a row.
//
// Source: Flash-Decoding.
#include "csrc/common.cuh"
#include "csrc/merge_states.h"

namespace twilight {
namespace {

constexpr int kThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kThreads) merge_states_kernel(MergeStatesParams params) {
  const int row = blockIdx.x * (kThreads / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= params.rows) return;
  float top = -INFINITY;
  for (int i = 0; i < params.num_states; ++i) top = fmaxf(top, params.lses[i][row]);
  float sum = 0.f;
  for (int i = 0; i < params.num_states; ++i) {
    if (top > -INFINITY) sum += expf(params.lses[i][row] - top);
  }
  for (int c = lane; c < params.head_dim; c += 32) {
    const int64_t at = int64_t{row} * params.head_dim + c;
    float x = 0.f;
    for (int i = 0; i < params.num_states; ++i) {
      const float lse = params.lses[i][row];
      if (lse > -INFINITY) x += expf(lse - top) / sum * params.outs[i][at];
    }
    static_cast<T*>(params.out)[at] = from_float<T>(x);
  }
  if (lane == 0) params.lse[row] = top > -INFINITY ? top + logf(sum) : top;
}

}  // namespace

cudaError_t launch_merge_states(const MergeStatesParams& params, cudaStream_t stream) {
  if (params.num_states < 1 || params.num_states > kMaxStates) return cudaErrorInvalidValue;
  const int warps = kThreads / 32;
  return TWILIGHT_DISPATCH_ROW(params.row_dtype, T, {
    merge_states_kernel<T><<<(params.rows + warps - 1) / warps, kThreads, 0, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace twilight
