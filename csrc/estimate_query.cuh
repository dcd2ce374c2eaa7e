// The queries of a unit of estimate_scores as B of the tiles, folded with the scales of a page, and
// what turns the tiles' sums into scores.
#pragma once

#include "csrc/int4_tiles.cuh"

namespace twilight {

__device__ __forceinline__ float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A lane folds channels of head lane / kFoldLanes, and holds the scores of kOwn heads, of which
// own_head(i) is one.
template <int D, bool kPaired>
struct FoldedQuery {
  using L = Lanes<D>;
  using F = Folded<D, kPaired>;
  static constexpr int kOwn = kPaired ? 1 : 2;
  static constexpr int kFoldLanes = kPaired ? 8 : 4;

  const int lane;
  const float* staged;  // 16 q, as load_query reads it
  // Of the channels that the lane folds, if these are half of its share: registers allow no more.
  float kept[F::kParts == 2 ? F::kCount : 1];
  F folded;
  float norm = 0.0f;    // int4_channel: of 16 q step, of the head that the lane folds; of 16 q else
  float unit[kOwn]{};   // of the sums of own heads
  float base[kOwn]{};   // of own heads: q . min, or the sum of q for int4_token
  float start[kOwn]{};  // of own heads' scores: a base less what kShifter adds to them

  // q: 16 times the scaled queries, as load_query reads them.
  __device__ FoldedQuery(const float* q, int lane) : lane(lane), staged(q) {
    if constexpr (F::kParts == 2) load_query(q, lane / kFoldLanes, lane % 4, kept, part());
  }

  __device__ int own_head(int i) const { return kPaired ? lane % 4 : lane % 4 * 2 + i; }

  // What head own_head(i) has in the lanes that fold it.
  __device__ float of_own_head(float value, int i) const {
    return __shfl_sync(0xffffffffu, value, own_head(i) * kFoldLanes);
  }

  // int4_channel, from a page's scales and minima.
  __device__ void fold_page(const uint16_t* scales) {
    float x[F::kCount], lows[2] = {};
    load(x);
    for_part(scales, [&](int e, float scale, float low) {
      lows[e % 2] += x[e] * low;
      x[e] *= scale;
    });
    fold(x);
    const float sum = sum_of_head(lows[0] + lows[1]) * 0.0625f;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      base[i] = of_own_head(sum, i);
      start[i] = fmaf(-kShifter, unit[i], base[i]);
    }
  }

  // The same of a page whose codes are left out: the norm alone. Returns the score of the middle of
  // the page's bounds, of the head that the lane folds.
  __device__ float skim_page(const uint16_t* scales) {
    float values[F::kCount], squares = 0.0f, middle = 0.0f;
    load(values);
    for_part(scales, [&](int e, float scale, float low) {
      const float x = values[e] * scale;
      squares += x * x;
      middle += values[e] * low + 7.5f * x;
    });
    set_norm(squares);
    return sum_of_head(middle) * 0.0625f;
  }

  // int4_token: B is q alone, the same for every page.
  __device__ void fold_alone() {
    float values[F::kCount], sum = 0.0f;
    load(values);
#pragma unroll
    for (float value : values) sum += value;
    sum = sum_of_head(sum) * 0.0625f;
    fold(values);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      base[i] = of_own_head(sum, i);
      start[i] = -kShifter * unit[i];
    }
  }

  // The dot of q and the middles of a run's bounds, of the head that the lane folds.
  __device__ float middle_of_bounds(const uint16_t* bounds) const {
    float values[F::kCount], sum = 0.0f;
    load(values);
    for_part(bounds, [&](int e, float low, float high) { sum += values[e] * (low + high); });
    return sum_of_head(sum) * (0.5f * 0.0625f);
  }

  // From the sums of own head i's high and low bytes, both added to kShifterBits.
  __device__ float score(int high, int low, int i) const {
    const float sum = fmaf(__int_as_float(high) - kShifter, 256.0f, __int_as_float(low));
    return fmaf(sum, unit[i], start[i]);
  }

 private:
  __device__ void load(float (&values)[F::kCount]) const {
    if constexpr (F::kParts == 2) {
#pragma unroll
      for (int e = 0; e < F::kCount; ++e) values[e] = kept[e];
    } else {
      load_query(staged, lane / kFoldLanes, lane % 4, values);
    }
  }
  __device__ int part() const { return F::kParts == 1 ? 0 : lane / 4 % 2; }

  template <typename Use>
  __device__ void for_part(const uint16_t* rows, Use use) const {
    constexpr int kRegs = L::kRegs / F::kParts;
    for_channels<D, kRegs>(rows + part() * 2 * L::byte(kRegs, 0), lane % 4, use);
  }
  __device__ float sum_of_head(float x) const {
    x = quad_sum(x);
    return F::kParts == 1 ? x : x + __shfl_xor_sync(0xffffffffu, x, 4);
  }

  // Returns 1 / norm. Zeros count as a norm that is none, but NaN stays NaN.
  __device__ float set_norm(float squares) {
    squares = sum_of_head(squares);
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(squares) : "f"(1e-36f));
    const float inverse = rsqrt_approx(squares);
    norm = squares * inverse;
    return inverse;
  }

  // No channel is larger than the norm, so it is the range of the fixed point.
  __device__ void fold(const float (&x)[F::kCount]) {
    float squares[2] = {};  // two chains of dependent sums
#pragma unroll
    for (int e = 0; e < F::kCount; ++e) squares[e % 2] += x[e] * x[e];
    const float inverse = set_norm(squares[0] + squares[1]);
    folded.set(x, kFixedRange * inverse, lane);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      unit[i] = of_own_head(norm, i) * (0.0625f / (kFixedRange * F::kOdd));
    }
  }
};

}  // namespace twilight
