// Quantises one full page of one KV head (docs/index_format.md); what csrc/index_pages.cu does for
// every page of a prefill, and csrc/append_rows.cu for a page that a decode step completes.
//
//   min = fp16 down(lo), scale = fp16 up((hi - min) / 15) raised until min + 15 scale >= hi,
//   code = clamp(rint((x - min) / scale), 0, 15)
//
// A block works on it. Its threads form groups of `width` = 8, 16 or 32 lanes, one token a group
// at a time, 8 channels (16 bytes of 16-bit rows) a lane; lanes beyond D / 8 idle. Grids over D
// (V; K int4_token) close inside a group by shuffles, and codes come from registers. Grids over
// the page (K int4_channel) close through shared memory, then the block reads its K a second time,
// from L1 or L2. Every float step is pinned (no contraction), so codes equal the reference's bit
// for bit.
#pragma once

#include "csrc/common.cuh"
#include "csrc/index_pages.h"

namespace twilight {

constexpr int kPageThreads = 256;                     // of a block
constexpr int kVector = 8;                            // channels a lane owns
constexpr int kMaxPartials = kPageThreads * kVector;  // groups * D at most
constexpr int kMaxHeadDim = 256;
constexpr float kHalfMax = 65504.0f;

// Both saturate at +-65504 and give +0 for zeros.
__device__ inline __half half_down(float x) {
  return __float2half_rd(fminf(fmaxf(x, -kHalfMax), kHalfMax) + 0.0f);
}

__device__ inline __half half_up(float x) {
  const __half up = __float2half_ru(fminf(fmaxf(x, -kHalfMax), kHalfMax) + 0.0f);
  return __half_as_ushort(up) == 0x8000 ? __ushort_as_half(0) : up;
}

struct Grid {
  __half scale, minimum;
};

__device__ inline Grid make_grid(float lo, float hi) {
  hi = fminf(fmaxf(hi, -kHalfMax), kHalfMax);
  const __half minimum = half_down(lo);
  const float low = __half2float(minimum);
  __half scale = half_up(__fdiv_rn(__fsub_rn(hi, low), 15.0f));
  const double top = static_cast<double>(low) + 15.0 * static_cast<double>(__half2float(scale));
  if (top < static_cast<double>(hi)) scale = __ushort_as_half(__half_as_ushort(scale) + 1);
  return {scale, minimum};
}

__device__ __forceinline__ uint32_t encode(float x, float scale, float minimum) {
  if (scale == 0.0f) return 0;
  const float code = rintf(__fdiv_rn(__fsub_rn(x, minimum), scale));
  return static_cast<uint32_t>(fminf(fmaxf(code, 0.0f), 15.0f));
}

template <typename T>
__device__ __forceinline__ void load_vector(const T* p, float (&x)[kVector]) {
  constexpr int kLoads = kVector * sizeof(T) / sizeof(uint4);
  union {
    uint4 words[kLoads];
    T values[kVector];
  } raw;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) raw.words[i] = reinterpret_cast<const uint4*>(p)[i];
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = to_float(raw.values[i]);
}

// One (page, head)'s rows of K or of V.
template <typename T>
struct Rows {
  const T* first;
  int64_t stride;  // elements from a token to the next

  __device__ const T* at(int token, int vec) const {
    return first + token * stride + vec * kVector;
  }
};

struct Lanes {
  int width, vec, group, groups;
  bool active;

  __device__ explicit Lanes(int head_dim) {
    const int vectors = head_dim / kVector;
    width = vectors <= 8 ? 8 : vectors <= 16 ? 16 : 32;
    vec = threadIdx.x % width;
    group = threadIdx.x / width;
    groups = kPageThreads / width;
    active = vec < vectors;
  }
};

// Codes of every token over its own grid and, if wanted, the sums of each channel over the lane's
// tokens. All lanes of a warp walk the same number of steps, as the shuffles need them.
template <typename T>
__device__ void encode_tokens(const Rows<T>& rows, const Lanes& lanes, int page_size, int head_dim,
                              uint8_t* codes, __half2* grids, float (&sums)[kVector]) {
  for (int base = 0; base < page_size; base += lanes.groups) {
    const int token = base + lanes.group;
    const bool mine = lanes.active && token < page_size;
    float x[kVector];
    float lo = INFINITY, hi = -INFINITY;
    if (mine) {
      load_vector(rows.at(token, lanes.vec), x);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        lo = fminf(lo, x[i]);
        hi = fmaxf(hi, x[i]);
        sums[i] += x[i];
      }
    }
    if (codes == nullptr) continue;
    for (int offset = lanes.width / 2; offset > 0; offset /= 2) {
      lo = fminf(lo, __shfl_xor_sync(0xffffffffu, lo, offset));
      hi = fmaxf(hi, __shfl_xor_sync(0xffffffffu, hi, offset));
    }
    if (!mine) continue;
    const Grid grid = make_grid(lo, hi);
    const float scale = __half2float(grid.scale), minimum = __half2float(grid.minimum);
    uint32_t packed = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) packed |= encode(x[i], scale, minimum) << (4 * i);
    const int64_t byte = static_cast<int64_t>(token) * (head_dim / 2) + lanes.vec * (kVector / 2);
    *reinterpret_cast<uint32_t*>(codes + byte) = packed;
    if (lanes.vec == 0) grids[token] = __half2(grid.scale, grid.minimum);
  }
}

// Codes of every token over its channels' grids, which span the page.
template <typename T>
__device__ void encode_channels(const Rows<T>& rows, const Lanes& lanes, int page_size,
                                int head_dim, uint8_t* codes, __half* grids,
                                float (&partial_lo)[kMaxPartials],
                                float (&partial_hi)[kMaxPartials]) {
  __shared__ float scales[kMaxHeadDim];
  __shared__ float minima[kMaxHeadDim];
  float x[kVector], lo[kVector], hi[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    lo[i] = INFINITY;
    hi[i] = -INFINITY;
  }
  const int end = lanes.active ? page_size : 0;
#pragma unroll 4
  for (int token = lanes.group; token < end; token += lanes.groups) {
    load_vector(rows.at(token, lanes.vec), x);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      lo[i] = fminf(lo[i], x[i]);
      hi[i] = fmaxf(hi[i], x[i]);
    }
  }
  if (lanes.active) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      partial_lo[lanes.group * head_dim + lanes.vec * kVector + i] = lo[i];
      partial_hi[lanes.group * head_dim + lanes.vec * kVector + i] = hi[i];
    }
  }
  __syncthreads();
  for (int d = threadIdx.x; d < head_dim; d += kPageThreads) {
    float low = INFINITY, high = -INFINITY;
    for (int g = 0; g < lanes.groups; ++g) {
      low = fminf(low, partial_lo[g * head_dim + d]);
      high = fmaxf(high, partial_hi[g * head_dim + d]);
    }
    const Grid grid = make_grid(low, high);
    grids[d] = grid.scale;
    grids[head_dim + d] = grid.minimum;
    scales[d] = __half2float(grid.scale);
    minima[d] = __half2float(grid.minimum);
  }
  __syncthreads();
  for (int token = lanes.group; token < end; token += lanes.groups) {
    load_vector(rows.at(token, lanes.vec), x);
    uint32_t packed = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const int d = lanes.vec * kVector + i;
      packed |= encode(x[i], scales[d], minima[d]) << (4 * i);
    }
    const int64_t byte = static_cast<int64_t>(token) * (head_dim / 2) + lanes.vec * (kVector / 2);
    *reinterpret_cast<uint32_t*>(codes + byte) = packed;
  }
}

// Bounds of each channel over runs of kQuestBlock tokens; a thread owns 8 channels of a run.
template <typename T>
__device__ void bound_runs(const Rows<T>& rows, int page_size, int head_dim, __half* bounds) {
  const int vectors = head_dim / kVector;
  const int runs = (page_size + kQuestBlock - 1) / kQuestBlock;
  for (int i = threadIdx.x; i < runs * vectors; i += kPageThreads) {
    const int run = i / vectors, vec = i % vectors;
    float x[kVector], lo[kVector], hi[kVector];
    load_vector(rows.at(run * kQuestBlock, vec), x);
#pragma unroll
    for (int j = 0; j < kVector; ++j) lo[j] = hi[j] = x[j];
    const int end = min((run + 1) * kQuestBlock, page_size);
    for (int token = run * kQuestBlock + 1; token < end; ++token) {
      load_vector(rows.at(token, vec), x);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        lo[j] = fminf(lo[j], x[j]);
        hi[j] = fmaxf(hi[j], x[j]);
      }
    }
    __half* record = bounds + static_cast<int64_t>(run) * 2 * head_dim + vec * kVector;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      record[j] = half_down(lo[j]);
      record[head_dim + j] = half_up(hi[j]);
    }
  }
}

// All threads of a block call it; before they call it again, they must meet at a barrier.
template <typename T>
__device__ void index_page(const Rows<T>& k, const Rows<T>& v, int page, int head,
                           const IndexPagesParams& p) {
  __shared__ float partial_lo[kMaxPartials];
  __shared__ float partial_hi[kMaxPartials];
  const int size = p.page_size, dim = p.head_dim;
  const int64_t record = static_cast<int64_t>(page) * p.num_kv_heads + head;
  const int64_t codes = record * size * (dim / 2);
  const Lanes lanes(dim);

  __half* k_scale = static_cast<__half*>(p.k_scale);
  if (p.k_bounds == nullptr) {
    encode_channels(k, lanes, size, dim, p.k_codes + codes, k_scale + record * 2 * dim, partial_lo,
                    partial_hi);
  } else {
    float unused[kVector] = {};
    __half2* grids = reinterpret_cast<__half2*>(k_scale) + record * size;
    encode_tokens(k, lanes, size, dim, p.k_codes + codes, grids, unused);
    const int64_t runs = (size + kQuestBlock - 1) / kQuestBlock;
    bound_runs(k, size, dim, static_cast<__half*>(p.k_bounds) + record * runs * 2 * dim);
  }

  float sums[kVector] = {};
  const bool with_codes = p.v_codes != nullptr;
  encode_tokens(v, lanes, size, dim, with_codes ? p.v_codes + codes : nullptr,
                with_codes ? static_cast<__half2*>(p.v_scale) + record * size : nullptr, sums);
  // K's partials were last read before the barrier that ends their reduction.
  if (lanes.active) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      partial_lo[lanes.group * dim + lanes.vec * kVector + i] = sums[i];
    }
  }
  __syncthreads();
  for (int d = threadIdx.x; d < dim; d += kPageThreads) {
    float sum = 0.0f;
    for (int g = 0; g < lanes.groups; ++g) sum += partial_lo[g * dim + d];
    const float mean = fminf(fmaxf(sum / size, -kHalfMax), kHalfMax);
    static_cast<__half*>(p.v_mean)[record * dim + d] = __float2half_rn(mean);
  }
}

}  // namespace twilight
