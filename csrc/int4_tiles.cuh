// INT4 codes of K as the A operand of integer tensor-core tiles (m16n8k32, u8 x s8 into s32), and
// up to 8 query heads in 16-bit fixed point as B; csrc/estimate_scores.cu has the formula.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "csrc/ptx.cuh"

namespace twilight {

// The float 1.5 * 2^23, and its bits: a small integer added to it, as a float or as an integer to
// its bits, is its mantissa's low end. So integers become floats, and floats integers.
constexpr float kShifter = 12582912.0f;
constexpr int kShifterBits = 0x4B400000;
constexpr float kFixedRange = 32600.0f;  // 127 * 256 + 127, and some room for roundings
constexpr uint32_t kFlipped = 0x80808080;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// How lane j of four shares a token's D / 2 bytes of codes.
template <int D>
struct Lanes {
  static constexpr int kWords = D / 32;         // whole words of 8 codes a lane
  static constexpr bool kHalf = D % 32 != 0;    // and a half word of 4
  static constexpr int kRegs = kWords + kHalf;  // registers a token
  static constexpr int kChannels = D / 4;
  // Byte of a token at which register w of lane j begins.
  __host__ __device__ static constexpr int byte(int w, int j) {
    if (D == 128) return j * 16 + w * 4;
    if (D == 256) return w / 4 * 64 + j * 16 + w % 4 * 4;
    if (w < 2) return j * 8 + w * 4;
    return 32 + j * (kHalf ? 2 : 4);
  }

  // Where byte `offset` of a run of tokens lies in shared memory, 128-byte aligned: lanes that load
  // tokens 0, 4, 8 .. at once find them in other banks. Multiples of 16 bytes stay whole.
  __device__ static int place(int offset) {
    if (D == 64) return offset ^ ((offset >> 7 & 3) << 5);
    if (D == 128) return offset ^ ((offset >> 8 & 1) << 6);
    if (D == 256) return offset ^ ((offset >> 9 & 1) << 6);
    return offset;
  }

  // Where lane j's words of a token, the fourth, eighth .. of a run, begin.
  __device__ static int begin(int token, int j) { return place(token * (D / 2) + byte(0, j)); }

  // Words of the token `more` after the one whose words lie at `begin`: not past three more, or
  // those of other multiples of 32. The offsets add up, but in the bits that place() moves.
  __device__ static void load(const uint8_t* run, int begin, int more, int j,
                              uint32_t (&words)[kRegs]) {
    constexpr int kMoved = D == 64 ? 0x60 : D >= 128 ? 0x40 : 0;
    const auto at = [&](int skipped) {
      const int step = more * (D / 2) + skipped;
      return run + (begin ^ (step & kMoved)) + (step & ~kMoved);
    };
    if constexpr (D >= 128) {
#pragma unroll
      for (int w = 0; w < kWords; w += 4) {
        const uint4 v = *reinterpret_cast<const uint4*>(at(w * 16));
        words[w] = v.x, words[w + 1] = v.y, words[w + 2] = v.z, words[w + 3] = v.w;
      }
    } else {
      const uint2 v = *reinterpret_cast<const uint2*>(at(0));
      words[0] = v.x, words[1] = v.y;
      if constexpr (kHalf) {
        words[2] = *reinterpret_cast<const uint16_t*>(at(byte(2, j) - byte(0, j)));
      } else if constexpr (kWords == 3) {
        words[2] = *reinterpret_cast<const uint32_t*>(at(byte(2, j) - byte(0, j)));
      }
    }
  }
};

__device__ __forceinline__ void mma(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two rows of D fp16 at `rows`: calls use(e, row0, row1) for each of lane j's channels of its first
// kRegs registers, e its place in the lane's order.
template <int D, int kRegs = Lanes<D>::kRegs, typename Use>
__device__ __forceinline__ void for_channels(const uint16_t* rows, int j, Use use) {
  using L = Lanes<D>;
#pragma unroll
  for (int w = 0; w < kRegs; ++w) {
    const int channel = 2 * L::byte(w, j);
    const bool half_word = L::kHalf && w == L::kWords;
    uint4 a{}, b{};
    if (half_word) {
      const uint2 low = *reinterpret_cast<const uint2*>(rows + channel);
      const uint2 high = *reinterpret_cast<const uint2*>(rows + D + channel);
      a.x = low.x, a.y = low.y, b.x = high.x, b.y = high.y;
    } else {
      a = *reinterpret_cast<const uint4*>(rows + channel);
      b = *reinterpret_cast<const uint4*>(rows + D + channel);
    }
    const __half2* row0 = reinterpret_cast<const __half2*>(&a);
    const __half2* row1 = reinterpret_cast<const __half2*>(&b);
#pragma unroll
    for (int i = 0; i < (half_word ? 2 : 4); ++i) {
      const float2 x = __half22float2(row0[i]), y = __half22float2(row1[i]);
      use(w * 8 + 2 * i, x.x, y.x);
      use(w * 8 + 2 * i + 1, x.y, y.y);
    }
  }
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Channels of q that lane j of head h multiplies, in A's order, from shared memory: four channels
// of all lanes, then the next four. The first kCount, or those after as many.
template <int kCount>
__device__ __forceinline__ void load_query(const float* q, int h, int j, float (&values)[kCount],
                                           int part = 0) {
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
    const float4 v = reinterpret_cast<const float4*>(q)[(part * (kCount / 4) + i) * 32 + h * 4 + j];
    values[4 * i] = v.x, values[4 * i + 1] = v.y, values[4 * i + 2] = v.z, values[4 * i + 3] = v.w;
  }
}

// x and y over a unit, rounded to integers of up to kFixedRange: four signed bytes, 256 * high +
// low each, x's first. Flipped: each is 128 too large, so that none borrows from the next.
__device__ __forceinline__ uint32_t flipped_bytes(float x, float y, float per_unit) {
  constexpr int kLow = kFlipped & 0xffff, kHigh = (kFlipped >> 16) - (kShifterBits >> 16);
  const uint32_t low = __float_as_uint(fmaf(x, per_unit, kShifter + kLow));
  const uint32_t high = __float_as_uint(fmaf(y, per_unit, kShifter + kHigh));
  return (high << 16) + low;
}

// B of the tensor-core tiles, lane 4 * g + j's channels of column g in A's order, and the products.
// Columns are the high bytes of heads 0 to 7, and in products of their own the low bytes. kPaired:
// column 2 * h is the high bytes of head h of up to four, column 2 * h + 1 the low ones.
template <int D, bool kPaired>
struct Folded {
  using L = Lanes<D>;
  static constexpr int kPlanes = kPaired ? 1 : 2;
  // Column pairs share the work, half of the channels each, where these are whole words.
  static constexpr int kParts = kPaired && L::kRegs % 2 == 0 ? 2 : 1;
  static constexpr int kCount = L::kChannels / kParts;
  // Odd channels stay in the upper nibbles, 16 times as large, where sums leave room for that.
  static constexpr int kOdd = D > 128 ? 1 : 16;

  uint32_t b[kPlanes][L::kRegs][2];  // of a word: its even channels, its odd ones

  // From the lane's channels of its part.
  __device__ void set(const float (&values)[kCount], float per_unit, int lane) {
    constexpr int kWords = L::kRegs / kParts;
    constexpr uint32_t kHighBytes = 0x7531, kLowBytes = 0x6420;
    const bool odd_column = lane / 4 % 2 != 0;
    const uint32_t mine = odd_column ? kLowBytes : kHighBytes;
    const uint32_t others = odd_column ? kHighBytes : kLowBytes;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const float* x = values + w * 8 + odd;
        const uint32_t front = flipped_bytes(x[0], x[2], per_unit);
        uint32_t back = kFlipped;
        if (w < L::kWords) back = flipped_bytes(x[4], x[6], per_unit);
        if constexpr (!kPaired) {
          b[0][w][odd] = __byte_perm(front, back, kHighBytes) ^ kFlipped;
          b[1][w][odd] = __byte_perm(front, back, kLowBytes) ^ kFlipped;
        } else {
          const uint32_t own = __byte_perm(front, back, mine);
          if constexpr (kParts == 1) {
            b[0][w][odd] = own ^ kFlipped;
          } else {
            const uint32_t sent = __byte_perm(front, back, others);
            const uint32_t got = __shfl_xor_sync(0xffffffffu, sent, 4);
            b[0][w][odd] = (odd_column ? got : own) ^ kFlipped;
            b[0][w + kWords][odd] = (odd_column ? own : got) ^ kFlipped;
          }
        }
      }
    }
  }

  // A B of tokens lane / 4 and lane / 4 + 8 of a tile, kOdd times as large, added to kShifterBits.
  __device__ void multiply(const uint32_t (&above)[L::kRegs], const uint32_t (&below)[L::kRegs],
                           int (&c)[kPlanes][4]) const {
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[plane][i] = 0;
    }
    multiply_half<0>(above, below, c);
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[plane][i] = c[plane][i] * kOdd + kShifterBits;
    }
    multiply_half<1>(above, below, c);
  }

 private:
  // The even channels, or the odd ones, of words of codes.
  template <int kHalf>
  __device__ static uint32_t codes(uint32_t word) {
    if (kHalf == 0) return word & 0x0F0F0F0F;
    return kOdd == 16 ? word & 0xF0F0F0F0 : word >> 4 & 0x0F0F0F0F;
  }
  template <int kHalf>
  __device__ void multiply_half(const uint32_t (&above)[L::kRegs],
                                const uint32_t (&below)[L::kRegs], int (&c)[kPlanes][4]) const {
#pragma unroll
    for (int w = 0; w < L::kRegs; w += 2) {
      uint32_t a[4] = {codes<kHalf>(above[w]), codes<kHalf>(below[w])};
      const bool both = w + 1 < L::kRegs;
      if (both) a[2] = codes<kHalf>(above[w + 1]), a[3] = codes<kHalf>(below[w + 1]);
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        mma(c[plane], a, b[plane][w][kHalf], both ? b[plane][w + 1][kHalf] : 0);
      }
    }
  }
};

}  // namespace twilight
