// A warp's products on tensor cores in csrc/attend_lower.cu: of 16 tokens' INT4 codes with their
// weights, and of 4 page means with their masses.
//
// Channels are the products' rows. Lane 4 * g + j holds channels 4 * (8 * u + g) + {0, 1, 2, 3} of
// every chunk u of 32 channels: rows g and g + 8 of tiles 2 * u and 2 * u + 1. Four channels are
// two bytes of codes, so ldmatrix.trans of 16-bit elements hands a lane two tokens' nibbles at
// once.
#pragma once

#include "csrc/attend_lower_slices.cuh"

namespace twilight {

constexpr float kCodeSteps = 16.f;          // a code c enters the products as 1 + c / 16
constexpr uint32_t kTf32Bits = 0xFFFFE000;  // of a float, what a tf32 keeps

// Adds up what half a warp has of each of its heads, 2 or 4, down to 16 terms of the warp's heads:
// lanes 2 * l and 2 * l + 1 get one of head l * heads / 16.
template <int kCount>
__device__ __forceinline__ float sum_by_head(const float (&x)[kCount], uint32_t lane) {
  const auto swap = [lane](float a, float b, uint32_t mask) {
    const bool second = lane & mask;
    return (second ? b : a) + __shfl_xor_sync(kAllLanes, second ? a : b, mask);
  };
  float sum;
  if constexpr (kCount == 2) sum = swap(x[0], x[1], 8);
  if constexpr (kCount == 4) sum = swap(swap(x[0], x[2], 8), swap(x[1], x[3], 8), 4);
  return sum + __shfl_xor_sync(kAllLanes, sum, 1);
}

// d += A B, m16n8k8: x and y are rows g and g + 8 of A in columns j and j + 4.
__device__ __forceinline__ void mma_tf32(float (&d)[4], float2 x, float2 y,
                                         const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(x.x)), "r"(__float_as_uint(x.y)), "r"(__float_as_uint(y.x)),
        "r"(__float_as_uint(y.y)), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void load_two_transposed(uint32_t (&a)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(a[0]), "=r"(a[1])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ uint32_t pair_of(float a, float b) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ float first_of(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float second_of(uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}

// Four weights as pairs of bf16 and of what those leave.
__device__ __forceinline__ void split_weights(const float (&weights)[4], uint32_t (&high)[2],
                                              uint32_t (&low)[2]) {
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const float a = weights[2 * k], b = weights[2 * k + 1];
    high[k] = pair_of(a, b);
    low[k] = pair_of(a - first_of(high[k]), b - second_of(high[k]));
  }
}

__device__ __forceinline__ float sum_pairs(const uint32_t (&pairs)[2]) {
  return (first_of(pairs[0]) + second_of(pairs[0])) + (first_of(pairs[1]) + second_of(pairs[1]));
}

// (x & mask) | ones in one instruction, which two constants would make two.
template <uint32_t kMask>
__device__ __forceinline__ uint32_t and_or(uint32_t x, uint32_t ones) {
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(y) : "r"(x), "n"(kMask), "r"(ones));
  return y;
}

// out^T of a warp over kCodeSteps: [2 * chunk + k] of row tiles, columns 2 * j and 2 * j + 1.
template <int kD, int kHeads>
struct LowerProducts {
  using Ring = WarpRing<kD, kHeads>;
  static constexpr int kChunks = Ring::kChunks;
  // Up to four heads leave half of the columns free: those take the weights' low halves.
  static constexpr bool kLowColumns = kHeads == 4;
  float out[2 * kChunks][4];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < 2 * kChunks; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) out[i][c] = 0.f;
    }
  }

  // Bytes of a tile's codes in front of those of which a lane gives ldmatrix the address.
  __device__ static uint32_t row_at(uint32_t lane) {
    const uint32_t row = lane % 16;
    return row * (kChunks * 16) + ((lane / 16) ^ Ring::key(row)) * 16;
  }

  // out += 1 + code / 16 of the 16 tokens from row `first` of the ring, times their weights: those
  // of tokens 2 * j, 2 * j + 1, 2 * j + 8, 2 * j + 9 for column g. lane_at: row_at of the lane.
  __device__ void add_codes(const Ring& ring, uint32_t first, uint32_t lane_at,
                            const uint32_t (&high)[2], const uint32_t (&low)[2]) {
    const uint32_t rows = shared_address(ring.codes) + first * (kChunks * 16);
    uint32_t ones = 0x3F803F80;  // two bf16
    ones = held(ones);
    uint32_t a[4];
#pragma unroll
    for (int u = 0; u < kChunks; u += 2) {
      const uint32_t at = rows + (kChunks == 3 ? lane_at + u * 16 : lane_at ^ u * 16);
      if (u + 1 == kChunks) {
        load_two_transposed(a, at);
        add_chunk(u, a[0], a[1], ones, high, low);
      } else {
        load_matrices_transposed(a, at);
        add_chunk(u, a[0], a[1], ones, high, low);
        add_chunk(u + 1, a[2], a[3], ones, high, low);
      }
    }
  }

  // x: two tokens' four nibbles, y: those of the tokens eight further.
  __device__ void add_chunk(int u, uint32_t x, uint32_t y, uint32_t ones, const uint32_t (&high)[2],
                            const uint32_t (&low)[2]) {
    constexpr uint32_t kNibbles = 0x00780078;  // bits 3-6 of both bf16
    const uint32_t a[4] = {and_or<kNibbles>(x << 3, ones), and_or<kNibbles>(x >> 1, ones),
                           and_or<kNibbles>(y << 3, ones), and_or<kNibbles>(y >> 1, ones)};
    const uint32_t b[4] = {and_or<kNibbles>(x >> 5, ones), and_or<kNibbles>(x >> 9, ones),
                           and_or<kNibbles>(y >> 5, ones), and_or<kNibbles>(y >> 9, ones)};
    mma_m16n8k16(out[2 * u], a, high[0], high[1], __nv_bfloat16{});
    mma_m16n8k16(out[2 * u + 1], b, high[0], high[1], __nv_bfloat16{});
    if constexpr (!kLowColumns) {
      mma_m16n8k16(out[2 * u], a, low[0], low[1], __nv_bfloat16{});
      mma_m16n8k16(out[2 * u + 1], b, low[0], low[1], __nv_bfloat16{});
    }
  }

  // out += 1 / kCodeSteps of the mean of page j times its mass for column g, over four pages.
  // float16 is exact in tf32; the mass is the sum of two, which take a column of the product each.
  __device__ void add_mean(const __half* mean, float mass) {
    const int g = threadIdx.x % 32 / 4;
    mass *= 1.f / kCodeSteps;
    const uint32_t high = __float_as_uint(mass) & kTf32Bits;
    const uint32_t b[2] = {high, __float_as_uint(mass - __uint_as_float(high))};
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      const uint2 four = *reinterpret_cast<const uint2*>(mean + 4 * (8 * u + g));
      const float2 x = __half22float2(reinterpret_cast<const __half2&>(four.x));
      const float2 y = __half22float2(reinterpret_cast<const __half2&>(four.y));
      mma_tf32(out[2 * u], x, x, b);
      mma_tf32(out[2 * u + 1], y, y, b);
    }
  }

  // To parts [8][kD + 4], by column.
  __device__ void write(float* parts) const {
    const int lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      if (32 * u + 4 * g >= kD) continue;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        *reinterpret_cast<float4*>(parts + (2 * j + k) * (kD + 4) + 4 * (8 * u + g)) =
            make_float4(out[2 * u][k], out[2 * u][2 + k], out[2 * u + 1][k], out[2 * u + 1][2 + k]);
      }
    }
  }
};

}  // namespace twilight
