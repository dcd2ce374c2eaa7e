// INT4 codes of K as the A operand of tensor-core tiles (m16n8k16, bf16 in, float accumulate), and
// up to 8 query heads, scaled a channel, as B; csrc/estimate_scores.cu has the formula.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace twilight {

constexpr uint32_t kOnes = 0x3F803F80;     // two bf16 ones
constexpr uint32_t kNibbles = 0x00780078;  // bits 3-6 of both

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

  // A token's words from a run of tokens in shared memory.
  __device__ static void load(const uint8_t* run, int token, int j, uint32_t (&words)[kRegs]) {
    const int at = token * (D / 2);
    if constexpr (D >= 128) {
#pragma unroll
      for (int w = 0; w < kWords; w += 4) {
        const uint4 v = *reinterpret_cast<const uint4*>(run + place(at + byte(w, j)));
        words[w] = v.x, words[w + 1] = v.y, words[w + 2] = v.z, words[w + 3] = v.w;
      }
    } else {
      const uint2 v = *reinterpret_cast<const uint2*>(run + place(at + byte(0, j)));
      words[0] = v.x, words[1] = v.y;
      if constexpr (kHalf) {
        const uint32_t h = *reinterpret_cast<const uint16_t*>(run + place(at + byte(2, j)));
        words[2] = h | h << 8;  // nibbles 0, 1 at bits 0-7 and 2, 3 at bits 16-23
      } else if constexpr (kWords == 3) {
        words[2] = *reinterpret_cast<const uint32_t*>(run + place(at + byte(2, j)));
      }
    }
  }
};

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// (x & kNibbles) | kOnes, in one instruction, where the compiler would take two.
__device__ __forceinline__ uint32_t one_and_nibbles(uint32_t x) {
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "r"(kNibbles), "r"(kOnes));
  return y;
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

// B of the tensor-core tiles: a lane's channels of head lane / 4, in A's order, as hi + lo.
template <int D>
struct Folded {
  using L = Lanes<D>;
  static constexpr int kPairs = L::kChannels / 2;
  uint32_t hi[kPairs], lo[kPairs];

  // From the lane's channels, or the first kCount of them. Pair i of register w holds the codes i
  // and i + 4 of a word, i and i + 2 of a half word.
  template <int kCount>
  __device__ void set(const float (&values)[kCount]) {
#pragma unroll
    for (int pair = 0; pair < kCount / 2; ++pair) {
      const bool half_word = L::kHalf && pair >= L::kWords * 4;
      const int e = pair / 4 * 8 + pair % 4;
      const float x = values[e], y = values[e + (half_word ? 2 : 4)];
      const __nv_bfloat162 high = __floats2bfloat162_rn(x, y);
      const float2 rounded = __bfloat1622float2(high);
      const __nv_bfloat162 low = __floats2bfloat162_rn(x - rounded.x, y - rounded.y);
      hi[pair] = *reinterpret_cast<const uint32_t*>(&high);
      lo[pair] = *reinterpret_cast<const uint32_t*>(&low);
    }
  }

  // Takes the second half of the channels from the lane 16 further on, whose first half it is.
  __device__ void join() {
#pragma unroll
    for (int pair = 0; pair < kPairs / 2; ++pair) {
      hi[pair + kPairs / 2] = __shfl_down_sync(0xffffffffu, hi[pair], 16);
      lo[pair + kPairs / 2] = __shfl_down_sync(0xffffffffu, lo[pair], 16);
    }
  }

  // c += A B for tokens lane / 4 and lane / 4 + 8 of a tile.
  __device__ void multiply(const uint32_t (&above)[L::kRegs], const uint32_t (&below)[L::kRegs],
                           float (&c)[4]) const {
    float d[4] = {};  // a second chain of dependent products
#pragma unroll
    for (int pair = 0; pair < kPairs; pair += 2) {
      const uint32_t x = above[pair / 4], y = below[pair / 4];
      uint32_t a[4];
      if (pair % 4 == 0) {
        a[0] = one_and_nibbles(x << 3), a[1] = one_and_nibbles(y << 3);
        a[2] = one_and_nibbles(x >> 1), a[3] = one_and_nibbles(y >> 1);
      } else {
        a[0] = one_and_nibbles(x >> 5), a[1] = one_and_nibbles(y >> 5);
        a[2] = one_and_nibbles(x >> 9), a[3] = one_and_nibbles(y >> 9);
      }
      mma(c, a, hi[pair], hi[pair + 1]);
      mma(d, a, lo[pair], lo[pair + 1]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] += d[i];
  }
};

}  // namespace twilight
