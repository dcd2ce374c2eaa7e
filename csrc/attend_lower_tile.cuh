// How a warp shares the channels of INT4 V rows and page means in csrc/attend_lower.cu, and the
// products on tensor cores: of 16 tokens' codes with their weights, and of 8 means with their
// masses.
//
// Lane 4 * g + j holds, of tokens 4 * j .. 4 * j + 3 of a tile, the weights of query head g and the
// codes of the channels that rows g and g + 8 of A stand for. The products take the channels as
// rows and the tokens as k in any order that A and B agree on, so nothing is exchanged.
#pragma once

#include "csrc/row_tile.cuh"

namespace twilight {

constexpr int kCodeTileTokens = 16;
constexpr int kMeanTilePages = 8;
constexpr uint32_t kTf32Bits = 0xFFFFE000;  // of a float, what a tf32 keeps

constexpr int kSliceTokens = 64;
constexpr int kRingTokens = 256;  // two slices', and what is left of a tile, in whole tiles
constexpr int kSectorBytes = 32;  // of the L2

// Half a warp's slice, and the four tokens of a lane.
struct Slice {
  int page, skip;   // page id; tokens of the page in front of the lane's
  int token;        // the lane's first
  uint32_t grades;  // of the four, a byte each; kGradeDropped where there is none
};

// A warp's part of the block's shared memory.
struct WarpShared {
  uint2 ring[kRingTokens];  // index tokens that wait: row of V, position
  float masses[kMeanTilePages][kHeadTile];
  float references[kHeadTile];  // -lse by head, log2 units
  uint32_t pages[kMeanTilePages];
};

// Into the L2.
__device__ __forceinline__ void prefetch(const void* at) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

__device__ __forceinline__ int grade_of(uint32_t grades, int c) { return grades >> (8 * c) & 255; }

// 2^x; 0 for -inf.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Scores of the tokens from[c] that are wanted, others any number; 16 bytes at a time where
// `vectors` says that this is aligned. `any`: whether the lane wants one of this head.
__device__ __forceinline__ void load_scores(const float* from, bool any, bool vectors,
                                            const bool (&wanted)[4], float (&to)[4]) {
  float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
  if (vectors) {
    if (any) x = *reinterpret_cast<const float4*>(from);
  } else {
    if (any && wanted[0]) x.x = from[0];
    if (any && wanted[1]) x.y = from[1];
    if (any && wanted[2]) x.z = from[2];
    if (any && wanted[3]) x.w = from[3];
  }
  to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}

// Sums four heads over half a warp: lane l gets that of head l / 4 % 4.
__device__ __forceinline__ float sum_by_head(const float (&x)[4]) {
  const bool upper = threadIdx.x & 8, odd = threadIdx.x & 4;
  const float a = (upper ? x[2] : x[0]) + __shfl_xor_sync(0xffffffffu, upper ? x[0] : x[2], 8);
  const float b = (upper ? x[3] : x[1]) + __shfl_xor_sync(0xffffffffu, upper ? x[1] : x[3], 8);
  float sum = (odd ? b : a) + __shfl_xor_sync(0xffffffffu, odd ? a : b, 4);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  return sum + __shfl_xor_sync(0xffffffffu, sum, 1);
}

// Four weights as pairs of bf16 and of what those leave, tokens 0 and 1 first; returns the sum of
// all that was kept.
__device__ __forceinline__ float split_weights(const float (&weights)[4], uint32_t (&high)[2],
                                               uint32_t (&low)[2]) {
  float kept = 0.f;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const float a = weights[2 * k], b = weights[2 * k + 1];
    const __nv_bfloat162 x = __floats2bfloat162_rn(a, b);
    const float2 rounded = __bfloat1622float2(x);
    const __nv_bfloat162 y = __floats2bfloat162_rn(a - rounded.x, b - rounded.y);
    const float2 rest = __bfloat1622float2(y);
    kept += (rounded.x + rest.x) + (rounded.y + rest.y);
    high[k] = reinterpret_cast<const uint32_t&>(x);
    low[k] = reinterpret_cast<const uint32_t&>(y);
  }
  return kept;
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

// The channels of lanes 4 * g .. 4 * g + 3: pair i are those of byte at(i, g) of a token's codes,
// 2 * at and 2 * at + 1, and rows g and g + 8 of the i-th tile of A.
template <int kD>
struct LanePairs {
  static constexpr int kPairs = kD / 16;
  static constexpr int kWords = (kPairs + 3) / 4;
  static constexpr int kRest = kPairs % 4;  // 0; 1 at D 80; 2 at D 96

  __device__ static int at(int i, int g) {
    if (kRest == 0) return g * kPairs + i;
    return i < 4 ? g * 4 + i : 32 + g * kRest + i - 4;
  }

  // at: byte at(0, g) of a token's codes.
  __device__ static void load_codes(const uint8_t* at, int g, uint32_t (&words)[kWords]) {
    if constexpr (kPairs == 16) {
      const uint4 x = __ldcg(reinterpret_cast<const uint4*>(at));
      words[0] = x.x, words[1] = x.y, words[2] = x.z, words[3] = x.w;
    } else if constexpr (kPairs == 8) {
      const uint2 x = __ldcg(reinterpret_cast<const uint2*>(at));
      words[0] = x.x, words[1] = x.y;
    } else {
      words[0] = __ldcg(reinterpret_cast<const uint32_t*>(at));
      const uint8_t* rest = at + (32 + g * (kRest - 4));
      if constexpr (kRest == 1) words[1] = *rest;
      if constexpr (kRest == 2) words[1] = *reinterpret_cast<const uint16_t*>(rest);
    }
  }

  // mean: D float16.
  __device__ static void load_means(const __half* mean, int g, __half2 (&pairs)[kPairs]) {
    const __half2* words = reinterpret_cast<const __half2*>(mean);
#pragma unroll
    for (int i = 0; i + 4 <= kPairs; i += 4) {
      const uint4 x = __ldcg(reinterpret_cast<const uint4*>(words + at(i, g)));
      const __half2* four = reinterpret_cast<const __half2*>(&x);
      pairs[i] = four[0], pairs[i + 1] = four[1], pairs[i + 2] = four[2], pairs[i + 3] = four[3];
    }
#pragma unroll
    for (int i = kPairs - kRest; i < kPairs; ++i) pairs[i] = __ldcg(words + at(i, g));
  }

  // out += sum over 16 tokens of (1 + code / 16) times their weights, two bf16 sums of four each.
  __device__ static void multiply(const uint32_t (&codes)[4][kWords], const uint32_t (&high)[2],
                                  const uint32_t (&low)[2], float (&out)[kPairs][4]) {
    constexpr uint32_t kOnes = 0x3F803F80;     // two bf16 ones
    constexpr uint32_t kNibbles = 0x00780078;  // bits 3-6 of both
    constexpr uint32_t kFirstBytes = 0x4400;   // of two words: to bits 0-7 and 16-23
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const uint32_t bytes = kFirstBytes + i % 4 * 0x1111;
      const uint32_t x = __byte_perm(codes[0][i / 4], codes[1][i / 4], bytes);
      const uint32_t y = __byte_perm(codes[2][i / 4], codes[3][i / 4], bytes);
      const uint32_t a[4] = {((x << 3) & kNibbles) | kOnes, ((x >> 1) & kNibbles) | kOnes,
                             ((y << 3) & kNibbles) | kOnes, ((y >> 1) & kNibbles) | kOnes};
      mma_m16n8k16(out[i], a, high[0], high[1], __nv_bfloat16{});
      mma_m16n8k16(out[i], a, low[0], low[1], __nv_bfloat16{});
    }
  }

  // out += the means of eight pages times their masses: lane 4 * g + j has the masses of head g and
  // the means of pages j and j + 4. float16 is exact in tf32, a mass is the sum of two.
  __device__ static void multiply(const __half2 (&means)[2][kPairs], const float (&masses)[2],
                                  float (&out)[kPairs][4]) {
    uint32_t high[2], low[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      high[k] = __float_as_uint(masses[k]) & kTf32Bits;
      low[k] = __float_as_uint(masses[k] - __uint_as_float(high[k]));
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float2 x = __half22float2(means[0][i]), y = __half22float2(means[1][i]);
      mma_tf32(out[i], x, y, high);
      mma_tf32(out[i], x, y, low);
    }
  }
};

}  // namespace twilight
