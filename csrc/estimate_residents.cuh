// Exact dots of estimate_scores on resident tokens, by the warp that an item of them falls to.
#pragma once

#include "csrc/estimate_schedule.cuh"
#include "csrc/running_softmax.cuh"

namespace twilight {

// kCount consecutive values of a row, in one load of up to 16 bytes, or two.
template <typename T, int kCount>
__device__ __forceinline__ void load_channels(const T* from, float (&values)[8]) {
  struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
    T v[kCount];
  };
  const Pack pack = *reinterpret_cast<const Pack*>(from);
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = to_float(pack.v[i]);
}

// Lane 4 * r + j takes token r of eight, the channels that j takes of codes too, and ends up with
// the dots of heads 2 * j and 2 * j + 1. q is 16 times the scaled queries.
template <int D, typename T>
__device__ void resident_dots(const EstimateScoresParams& p, const Segment& s, int first_slot,
                              const float* q, int lane, Softmax (&state)[2]) {
  using L = Lanes<D>;
  const int j = lane % 4, slots = p.num_sink + p.window_rows;
  const int64_t head = int64_t(p.seq_slots[s.seq]) * p.num_kv_heads + s.kv_head;
  const int window_start = max(p.window_starts[s.seq], p.num_sink);
  const int slot = first_slot + lane / 4;
  const int t = slot < p.num_sink ? slot : window_start + slot - p.num_sink;
  const bool visible = slot < slots && t >= s.start && t < s.stop;
  if (!__any_sync(0xffffffffu, visible)) return;
  int place = t < p.num_sink ? t : p.num_sink + t % p.window_rows;
  if (!visible) place = 0;  // any row that exists; nothing comes of it
  const T* row = static_cast<const T*>(p.rows) + (head * slots + place) * 2 * D;
  float dots[kHeads] = {};
#pragma unroll 2
  for (int w = 0; w < L::kRegs; ++w) {
    const bool half_word = L::kHalf && w == L::kWords;
    float key[8] = {};
    if (half_word) {
      load_channels<T, 4>(row + 2 * L::byte(w, j), key);
    } else {
      load_channels<T, 8>(row + 2 * L::byte(w, j), key);
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int i = 0; i < (half_word ? 1 : 2); ++i) {
        const float4 v = reinterpret_cast<const float4*>(q)[(w * 2 + i) * 32 + h * 4 + j];
        const float* k = key + 4 * i;
        dots[h] += v.x * k[0] + v.y * k[1] + v.z * k[2] + v.w * k[3];
      }
    }
  }
  float mine[2] = {};
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const float dot = quad_sum(dots[h]) * 0.0625f;
    if (j == h / 2) mine[h % 2] = dot;
  }
  if (!visible) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    state[i].add(mine[i]);
    const int h = j * 2 + i;
    if (h < s.heads) p.scores[s.q_head(p, h) * p.capacity + t] = mine[i];
  }
}

// One item: kResidentTokens slots of the windows.
template <int D>
__device__ void resident_scores(const EstimateScoresParams& p, const Segment& s, int item,
                                const float* q, int lane, Softmax (&state)[2]) {
#pragma unroll 1
  for (int i = 0; i < kResidentTokens; i += 8) {
    const int slot = item * kResidentTokens + i;
    if (p.row_dtype == kBFloat16) {
      resident_dots<D, __nv_bfloat16>(p, s, slot, q, lane, state);
    } else if (p.row_dtype == kFloat16) {
      resident_dots<D, __half>(p, s, slot, q, lane, state);
    } else {
      resident_dots<D, float>(p, s, slot, q, lane, state);
    }
  }
}

}  // namespace twilight
