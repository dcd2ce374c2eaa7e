// The queries of a unit of estimate_scores as B of the tiles, folded with the scales of a page.
#pragma once

#include "csrc/int4_tiles.cuh"

namespace twilight {

template <int D>
struct FoldedQuery {
  using L = Lanes<D>;

  Folded<D> folded;
  float base = 0.0f;     // what C starts at, of head lane / 4
  float middle = 0.0f;   // int4_channel: the score of the middle of the page's bounds, likewise
  float squares = 0.0f;  // sum of (16 q step)^2, or of (16 q)^2 for int4_token, likewise

  // int4_channel. Up to four heads leave half of the columns of B idle: their lanes then fold half
  // of the channels.
  __device__ void fold_page(const float* q, const uint16_t* scales, int heads, int lane,
                            bool multiplied, bool with_squares) {
    if constexpr (L::kRegs % 2 == 0) {
      if (heads <= 4) {
        fold_part<2>(q, scales, lane, multiplied, with_squares);
        return;
      }
    }
    fold_part<1>(q, scales, lane, multiplied, with_squares);
  }

  // int4_token: B is q alone, the same for every page.
  __device__ void fold_alone(const float* q, int lane) {
    float values[L::kChannels];
    load_query(q, lane / 4, lane % 4, values);
    float sum = 0.0f, square = 0.0f;
#pragma unroll
    for (float value : values) {
      sum += value;
      square += value * value;
    }
    folded.set(values);
    base = -quad_sum(sum);
    squares = quad_sum(square);
  }

 private:
  template <int kParts>
  __device__ void fold_part(const float* q, const uint16_t* scales, int lane, bool multiplied,
                            bool with_squares) {
    constexpr int kRegs = L::kRegs / kParts;
    const int part = kParts == 1 ? 0 : lane / 16, head = lane / 4 - part * 4;
    const auto sum_of_head = [](float x) {
      x = quad_sum(x);
      return kParts == 1 ? x : x + __shfl_xor_sync(0xffffffffu, x, 16);
    };
    float values[L::kChannels / kParts];
    load_query(q, head, lane % 4, values, part);
    float steps = 0.0f, lows = 0.0f;
    if constexpr (kParts == 2) scales += part * 2 * L::byte(kRegs, 0);
    for_channels<D, kRegs>(scales, lane % 4, [&](int e, float scale, float low) {
      lows += values[e] * low;
      values[e] *= scale;
      steps += values[e];
    });
    steps = sum_of_head(steps), lows = sum_of_head(lows) * 0.0625f;
    base = lows - steps;
    middle = lows + 7.5f * 0.0625f * steps;
    if (multiplied) {
      folded.set(values);
      if constexpr (kParts == 2) folded.join();
    }
    if (with_squares) {
      float square = 0.0f;
#pragma unroll
      for (float value : values) square += value * value;
      squares = sum_of_head(square);
    }
  }
};

}  // namespace twilight
