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
// from L1 or L2. K and V have nothing in common, and may be two blocks' work. Every float step is
// pinned (no contraction) and a quotient is rounded as a division's is, so codes equal the
// reference's bit for bit.
#pragma once

#include "csrc/common.cuh"
#include "csrc/index_pages.h"

namespace twilight {

constexpr int kVector = 8;  // channels a lane owns
constexpr int kMaxHeadDim = 256;
constexpr float kHalfMax = 65504.0f;
constexpr float kBeyondGrid = 1 << 20;  // more than 15.5 of the largest scale, 65504 / 7.5
constexpr float kRound = 12582912.0f;   // 1.5 * 2^23: a sum with it ends in the nearest integer

// a / b, rounded to nearest, with inverse = 1 / b rounded to nearest: two corrections by exact
// remainders. Unlike __fdiv_rn it has no branch, which that takes for every a = 0; b and a / b are
// far from overflow here, and where a / b is denormal, any small value does.
__device__ __forceinline__ float divide(float a, float b, float inverse) {
  float quotient = __fmul_rn(a, inverse);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    quotient = __fmaf_rn(__fmaf_rn(-quotient, b, a), inverse, quotient);
  }
  return quotient;
}

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
  __half scale = half_up(divide(__fsub_rn(hi, low), 15.0f, 1.0f / 15.0f));
  // min + 15 scale < hi, exactly: rounding down does not move it past a float.
  const bool is_short = __fmaf_rd(15.0f, __half2float(scale), low) < hi;
  if (is_short) scale = __ushort_as_half(__half_as_ushort(scale) + 1);
  return {scale, minimum};
}

// What encodes the values of a grid.
struct Encoder {
  float minimum, scale, inverse;

  Encoder() = default;
  __device__ explicit Encoder(const Grid& grid)
      : minimum(__half2float(grid.minimum)), scale(__half2float(grid.scale)) {
    inverse = scale == 0.0f ? 0.0f : __frcp_rn(scale);
  }

  __device__ __forceinline__ uint32_t encode(float x) const {
    const float above = fminf(fmaxf(__fsub_rn(x, minimum), 0.0f), kBeyondGrid);
    const float code = fminf(divide(above, scale, inverse), 15.0f);
    return __float_as_uint(__fadd_rn(code, kRound)) & 15;
  }
};

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
    groups = blockDim.x / width;
    active = vec < vectors;
  }
};

// Shared memory of a block of up to kThreads threads.
template <int kThreads>
struct PageScratch {
  float partials[2][kThreads * kVector];  // by group and channel
  alignas(16) float minima[kMaxHeadDim], scales[kMaxHeadDim], inverses[kMaxHeadDim];
};

// Codes of every token over its own grid and, if wanted, the sums of each channel over the lane's
// tokens. All lanes of a warp walk the same number of steps, as the shuffles need them.
template <typename T>
__device__ void encode_tokens(const Rows<T>& rows, const Lanes& lanes, int page_size, int head_dim,
                              uint8_t* codes, __half2* grids, float (&sums)[kVector]) {
  constexpr int kAhead = 2;  // tokens a group asks for at once
  for (int base = lanes.group; base - lanes.group < page_size; base += kAhead * lanes.groups) {
    float x[kAhead][kVector], lo[kAhead], hi[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int token = base + i * lanes.groups;
      if (lanes.active && token < page_size) load_vector(rows.at(token, lanes.vec), x[i]);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      lo[i] = INFINITY, hi[i] = -INFINITY;
      if (!lanes.active || base + i * lanes.groups >= page_size) continue;
#pragma unroll
      for (const float value : x[i]) lo[i] = fminf(lo[i], value), hi[i] = fmaxf(hi[i], value);
#pragma unroll
      for (int j = 0; j < kVector; ++j) sums[j] += x[i][j];
    }
    if (codes == nullptr) continue;
#pragma unroll 1
    for (int offset = lanes.width / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        lo[i] = fminf(lo[i], __shfl_xor_sync(0xffffffffu, lo[i], offset));
        hi[i] = fmaxf(hi[i], __shfl_xor_sync(0xffffffffu, hi[i], offset));
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t token = base + i * lanes.groups;
      if (!lanes.active || token >= page_size) continue;
      const Grid grid = make_grid(lo[i], hi[i]);
      const Encoder encoder(grid);
      uint32_t packed = 0;
#pragma unroll
      for (int j = 0; j < kVector; ++j) packed |= encoder.encode(x[i][j]) << (4 * j);
      *reinterpret_cast<uint32_t*>(codes + token * (head_dim / 2) + lanes.vec * (kVector / 2)) =
          packed;
      if (lanes.vec == 0) grids[token] = __half2(grid.scale, grid.minimum);
    }
  }
}

// Codes of every token over its channels' grids, which span the page.
template <typename T, int kThreads>
__device__ void encode_channels(const Rows<T>& rows, const Lanes& lanes, int page_size,
                                int head_dim, uint8_t* codes, __half* grids,
                                PageScratch<kThreads>& scratch) {
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
    const int at = lanes.group * head_dim + lanes.vec * kVector;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      scratch.partials[0][at + i] = lo[i];
      scratch.partials[1][at + i] = hi[i];
    }
  }
  __syncthreads();
  for (int d = threadIdx.x; d < head_dim; d += blockDim.x) {
    float low = INFINITY, high = -INFINITY;
#pragma unroll 8
    for (int g = 0; g < lanes.groups; ++g) {
      low = fminf(low, scratch.partials[0][g * head_dim + d]);
      high = fmaxf(high, scratch.partials[1][g * head_dim + d]);
    }
    const Grid grid = make_grid(low, high);
    grids[d] = grid.scale;
    grids[head_dim + d] = grid.minimum;
    const Encoder encoder(grid);
    scratch.minima[d] = encoder.minimum;
    scratch.scales[d] = encoder.scale;
    scratch.inverses[d] = encoder.inverse;
  }
  __syncthreads();
  if (!lanes.active) return;
  Encoder encoders[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const int d = lanes.vec * kVector + i;
    encoders[i].minimum = scratch.minima[d];
    encoders[i].scale = scratch.scales[d];
    encoders[i].inverse = scratch.inverses[d];
  }
  for (int token = lanes.group; token < end; token += lanes.groups) {
    load_vector(rows.at(token, lanes.vec), x);
    uint32_t packed = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) packed |= encoders[i].encode(x[i]) << (4 * i);
    const int64_t byte = static_cast<int64_t>(token) * (head_dim / 2) + lanes.vec * (kVector / 2);
    *reinterpret_cast<uint32_t*>(codes + byte) = packed;
  }
}

// Bounds of each channel over runs of kQuestBlock tokens; a thread owns 8 channels of a run.
template <typename T>
__device__ void bound_runs(const Rows<T>& rows, int page_size, int head_dim, __half* bounds) {
  const int vectors = head_dim / kVector;
  const int runs = (page_size + kQuestBlock - 1) / kQuestBlock;
  for (int i = threadIdx.x; i < runs * vectors; i += blockDim.x) {
    const int run = i / vectors, vec = i % vectors;
    float x[kVector], lo[kVector], hi[kVector];
    load_vector(rows.at(run * kQuestBlock, vec), x);
#pragma unroll
    for (int j = 0; j < kVector; ++j) lo[j] = hi[j] = x[j];
    const int end = min((run + 1) * kQuestBlock, page_size);
#pragma unroll 4
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

// These two are called by all threads of a block, one after the other or one alone; before either
// is called again, the threads meet at a barrier.
template <typename T, int kThreads>
__device__ void index_keys(const Rows<T>& k, int page, int head, const IndexPagesParams& p,
                           PageScratch<kThreads>& scratch) {
  const int size = p.page_size, dim = p.head_dim;
  const int64_t record = static_cast<int64_t>(page) * p.num_kv_heads + head;
  uint8_t* codes = p.k_codes + record * size * (dim / 2);
  __half* k_scale = static_cast<__half*>(p.k_scale);
  const Lanes lanes(dim);
  if (p.k_bounds == nullptr) {
    encode_channels(k, lanes, size, dim, codes, k_scale + record * 2 * dim, scratch);
  } else {
    float unused[kVector] = {};
    __half2* grids = reinterpret_cast<__half2*>(k_scale) + record * size;
    encode_tokens(k, lanes, size, dim, codes, grids, unused);
    const int64_t runs = (size + kQuestBlock - 1) / kQuestBlock;
    bound_runs(k, size, dim, static_cast<__half*>(p.k_bounds) + record * runs * 2 * dim);
  }
}

template <typename T, int kThreads>
__device__ void index_values(const Rows<T>& v, int page, int head, const IndexPagesParams& p,
                             PageScratch<kThreads>& scratch) {
  const int size = p.page_size, dim = p.head_dim;
  const int64_t record = static_cast<int64_t>(page) * p.num_kv_heads + head;
  const Lanes lanes(dim);
  float sums[kVector] = {};
  const bool with_codes = p.v_codes != nullptr;
  encode_tokens(v, lanes, size, dim, with_codes ? p.v_codes + record * size * (dim / 2) : nullptr,
                with_codes ? static_cast<__half2*>(p.v_scale) + record * size : nullptr, sums);
  // K's partials were last read before the barrier that ends their reduction.
  float* partials = scratch.partials[0];
  if (lanes.active) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      partials[lanes.group * dim + lanes.vec * kVector + i] = sums[i];
    }
  }
  __syncthreads();
  for (int d = threadIdx.x; d < dim; d += blockDim.x) {
    float sum = 0.0f;
#pragma unroll 8
    for (int g = 0; g < lanes.groups; ++g) sum += partials[g * dim + d];
    const float mean = fminf(fmaxf(sum / size, -kHalfMax), kHalfMax);
    static_cast<__half*>(p.v_mean)[record * dim + d] = __float2half_rn(mean);
  }
}

}  // namespace twilight
