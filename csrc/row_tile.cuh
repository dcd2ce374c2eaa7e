// Attention of up to 8 query heads to a tile of 16 rows in shared memory, by one warp.
//
// A row is K then V; rows lie kStride bytes apart (16 more than a row, so that eight rows' chunks
// fall in different banks). State: max and sum by head, and out^T. Two implementations:
// half types on tensor cores, S^T = K q^T and out^T += V^T P^T with the heads as the n = 8 of
// m16n8k16, P split into two halves' sum so that its rounding is 2^-17 or less; float32 on FMA.
#pragma once

#include "csrc/split_attend.cuh"

namespace twilight {

constexpr int kTileRows = 16;

template <typename T, int kD>
struct RowBytes {
  static constexpr int kRow = 2 * kD * static_cast<int>(sizeof(T));
  static constexpr int kStride = kRow + 16;
  static constexpr int kTile = kTileRows * kStride;
};

__device__ __forceinline__ uint32_t pack2(float a, float b, __nv_bfloat16) {
  const __nv_bfloat162 x = __floats2bfloat162_rn(a, b);
  return reinterpret_cast<const uint32_t&>(x);
}
__device__ __forceinline__ uint32_t pack2(float a, float b, __half) {
  const __half2 x = __floats2half2_rn(a, b);
  return reinterpret_cast<const uint32_t&>(x);
}

__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1, __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1, __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void load_matrices(uint32_t (&a)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&a)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t a) {
  uint32_t d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}

// A lane holds heads 2 * (lane % 4) + {0, 1}, and of a tile rows lane / 4 + {0, 8}; of out^T,
// channels 16 * i + lane / 4 + {0, 8}: the accumulator layout of m16n8k16.
template <typename T, int kD>
struct RowTile {
  using Bytes = RowBytes<T, kD>;
  static constexpr int kSteps = kD / 16;
  uint32_t q[kSteps][2];
  float out[kSteps][4];
  float max[2], sum[2];

  // queries: [num_heads, D]; heads beyond num_heads are zero.
  __device__ void start(const T* queries, int num_heads) {
    const int lane = threadIdx.x % 32, head = lane / 4;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const T* at = queries + head * kD + i * 16 + lane % 4 * 2;
      q[i][0] = head < num_heads ? *reinterpret_cast<const uint32_t*>(at) : 0;
      q[i][1] = head < num_heads ? *reinterpret_cast<const uint32_t*>(at + 8) : 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) out[i][j] = 0.f;
    }
    max[0] = max[1] = kNegInf;
    sum[0] = sum[1] = 0.f;
  }

  // rows: the tile; valid: a bit for each of its rows; scale: softmax_scale * log2(e).
  __device__ void add(const char* rows, uint32_t valid, float scale) {
    const int lane = threadIdx.x % 32, matrix = lane / 8;
    const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(rows));
    const uint32_t k_at = base + (matrix % 2 * 8 + lane % 8) * Bytes::kStride + matrix / 2 * 16;
    float s[2][4] = {};
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      uint32_t a[4];
      load_matrices(a, k_at + i * 32);
      mma_m16n8k16(s[i % 2], a, q[i][0], q[i][1], T{});
    }
    float p[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const bool seen = valid >> (lane / 4 + j / 2 * 8) & 1;
      p[j] = seen ? (s[0][j] + s[1][j]) * scale : kNegInf;
    }
    rescale(fmaxf(p[0], p[2]), fmaxf(p[1], p[3]));
#pragma unroll
    for (int j = 0; j < 4; ++j) p[j] = state_weight(p[j], max[j % 2]);
    sum[0] += p[0] + p[2];
    sum[1] += p[1] + p[3];

    uint32_t high[2], low[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float a = p[2 * j], b = p[2 * j + 1];
      high[j] = transpose_matrix(pack2(a, b, T{}));
      low[j] = transpose_matrix(
          pack2(a - to_float(from_float<T>(a)), b - to_float(from_float<T>(b)), T{}));
    }
    const uint32_t v_at = base + (matrix / 2 * 8 + lane % 8) * Bytes::kStride +
                          kD * static_cast<int>(sizeof(T)) + matrix % 2 * 16;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      uint32_t a[4];
      load_matrices_transposed(a, v_at + i * 32);
      mma_m16n8k16(out[i], a, high[0], high[1], T{});
      mma_m16n8k16(out[i], a, low[0], low[1], T{});
    }
  }

  // Raises the maxima to those of the lane's new scores and of the lanes that share its heads.
  __device__ void rescale(float top0, float top1) {
#pragma unroll
    for (int offset = 4; offset < 32; offset <<= 1) {
      top0 = fmaxf(top0, __shfl_xor_sync(0xffffffffu, top0, offset));
      top1 = fmaxf(top1, __shfl_xor_sync(0xffffffffu, top1, offset));
    }
    top0 = fmaxf(top0, max[0]);
    top1 = fmaxf(top1, max[1]);
    if (!__any_sync(0xffffffffu, top0 > max[0] || top1 > max[1])) return;
    const float weight0 = state_weight(max[0], top0), weight1 = state_weight(max[1], top1);
    max[0] = top0;
    max[1] = top1;
    sum[0] *= weight0;
    sum[1] *= weight1;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      out[i][0] *= weight0;
      out[i][1] *= weight1;
      out[i][2] *= weight0;
      out[i][3] *= weight1;
    }
  }

  __device__ void store_state(float* max_to, float* sum_to) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int offset = 4; offset < 32; offset <<= 1) {
        sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], offset);
      }
      if (lane < 4) {
        max_to[lane * 2 + j] = max[j];
        sum_to[lane * 2 + j] = sum[j];
      }
    }
  }

  // to: [kHeadTile][D + 4].
  __device__ void store_out(float* to) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int head = lane % 4 * 2 + j % 2, channel = i * 16 + lane / 4 + j / 2 * 8;
        to[head * (kD + 4) + channel] = out[i][j];
      }
    }
  }
};

// A lane scores row lane % 16 for heads lane / 16 * 4 + {0..3}, and owns channels lane + 32 * j.
template <int kD>
struct RowTile<float, kD> {
  using Bytes = RowBytes<float, kD>;
  static constexpr int kOwn = (kD + 31) / 32;
  const float* queries;
  int num_heads;
  float out[kHeadTile][kOwn];
  float max[4], sum[4];

  __device__ void start(const float* from, int heads) {
    queries = from;
    num_heads = heads;
#pragma unroll
    for (int head = 0; head < kHeadTile; ++head) {
#pragma unroll
      for (int j = 0; j < kOwn; ++j) out[head][j] = 0.f;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      max[k] = kNegInf;
      sum[k] = 0.f;
    }
  }

  __device__ float score(const float* row, int head) const {
    float dot = 0.f;
    if (head >= num_heads) return dot;
    const float4* q = reinterpret_cast<const float4*>(queries + head * kD);
#pragma unroll 4
    for (int d = 0; d < kD / 4; ++d) {
      const float4 a = q[d], b = reinterpret_cast<const float4*>(row)[d];
      dot += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
    }
    return dot;
  }

  __device__ void add(const char* rows, uint32_t valid, float scale) {
    const int lane = threadIdx.x % 32, mine = lane % kTileRows;
    float p[4], weight[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float* row = reinterpret_cast<const float*>(rows + mine * Bytes::kStride);
      p[k] = valid >> mine & 1 ? score(row, lane / kTileRows * 4 + k) * scale : kNegInf;
      float top = p[k];
#pragma unroll
      for (int offset = 1; offset < kTileRows; offset <<= 1) {
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
      }
      top = fmaxf(top, max[k]);
      weight[k] = state_weight(max[k], top);
      max[k] = top;
      p[k] = state_weight(p[k], top);
      sum[k] = sum[k] * weight[k] + p[k];
    }
#pragma unroll
    for (int head = 0; head < kHeadTile; ++head) {
      const int from = head / 4 * kTileRows;
      const float factor = __shfl_sync(0xffffffffu, weight[head % 4], from);
#pragma unroll
      for (int j = 0; j < kOwn; ++j) out[head][j] *= factor;
    }
    for (int r = 0; r < kTileRows; ++r) {
      const float* v = reinterpret_cast<const float*>(rows + r * Bytes::kStride) + kD;
      float x[kOwn];
#pragma unroll
      for (int j = 0; j < kOwn; ++j) x[j] = lane + 32 * j < kD ? v[lane + 32 * j] : 0.f;
#pragma unroll
      for (int head = 0; head < kHeadTile; ++head) {
        const float w = __shfl_sync(0xffffffffu, p[head % 4], head / 4 * kTileRows + r);
#pragma unroll
        for (int j = 0; j < kOwn; ++j) out[head][j] += w * x[j];
      }
    }
  }

  __device__ void store_state(float* max_to, float* sum_to) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int offset = 1; offset < kTileRows; offset <<= 1) {
        sum[k] += __shfl_xor_sync(0xffffffffu, sum[k], offset);
      }
      if (lane % kTileRows == 0) {
        max_to[lane / kTileRows * 4 + k] = max[k];
        sum_to[lane / kTileRows * 4 + k] = sum[k];
      }
    }
  }

  __device__ void store_out(float* to) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int head = 0; head < kHeadTile; ++head) {
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        if (lane + 32 * j < kD) to[head * (kD + 4) + lane + 32 * j] = out[head][j];
      }
    }
  }
};

}  // namespace twilight
