// How a warp shares the channels of INT4 V rows and page means in csrc/attend_lower.cu, and the
// product of 16 tokens' codes with their weights.
//
// Lane 4 * g + j holds, of tokens 4 * j .. 4 * j + 3 of a tile, the weights of query head g and the
// codes of the channels that rows g and g + 8 of A stand for. m16n8k16 takes the channels as rows
// and the tokens as k in any order that A and B agree on, so nothing is exchanged.
#pragma once

#include "csrc/row_tile.cuh"

namespace twilight {

constexpr int kCodeTileTokens = 16;

// 2^x; 0 for -inf.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
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

  __device__ static void load_codes(const uint8_t* row, int g, uint32_t (&words)[kWords]) {
    if constexpr (kPairs == 16) {
      const uint4 x = __ldg(reinterpret_cast<const uint4*>(row) + g);
      words[0] = x.x, words[1] = x.y, words[2] = x.z, words[3] = x.w;
    } else if constexpr (kPairs == 8) {
      const uint2 x = __ldg(reinterpret_cast<const uint2*>(row) + g);
      words[0] = x.x, words[1] = x.y;
    } else {
      words[0] = __ldg(reinterpret_cast<const uint32_t*>(row) + g);
      if constexpr (kRest == 1) words[1] = __ldg(row + 32 + g);
      if constexpr (kRest == 2) words[1] = __ldg(reinterpret_cast<const uint16_t*>(row + 32) + g);
    }
  }

  // mean: D float16.
  __device__ static void load_means(const __half* mean, int g, uint32_t (&pairs)[kPairs]) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(mean);
#pragma unroll
    for (int i = 0; i + 4 <= kPairs; i += 4) {
      const uint4 x = __ldg(reinterpret_cast<const uint4*>(words + at(i, g)));
      pairs[i] = x.x, pairs[i + 1] = x.y, pairs[i + 2] = x.z, pairs[i + 3] = x.w;
    }
#pragma unroll
    for (int i = kPairs - kRest; i < kPairs; ++i) pairs[i] = __ldg(words + at(i, g));
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
};

}  // namespace twilight
