// Exact dots of estimate_scores on resident tokens, by the warp that an item of them falls to.
#pragma once

#include "csrc/estimate_schedule.cuh"
#include "csrc/running_softmax.cuh"

namespace twilight {

// A token of the windows, by its place in the order of visible ones.
struct Resident {
  int t;
  bool visible;
  int64_t row;  // of p.rows; of any token, if this one is not visible

  __device__ Resident(const EstimateScoresParams& p, const Segment& s, int number) {
    const int slots = p.num_sink + p.window_rows;
    t = number < p.num_sink ? number : max(s.window, p.num_sink) + number - p.num_sink;
    visible = number < slots && t >= s.start && t < s.stop;
    const int place =
        t < p.num_sink ? t : p.num_sink + t - p.by_window.divide(t) * int(p.by_window.by);
    row = (int64_t(s.slot) * p.num_kv_heads + s.kv_head) * slots + (visible ? place : 0);
  }
};

// Asks the L2 for the keys of an item: loads that come after a ring of pages would wait for it.
template <int D>
__device__ void prefetch_residents(const EstimateScoresParams& p, const Segment& s, int item,
                                   int lane) {
  static_assert(kResidentTokens == 16);
  const Resident resident(p, s, item * kResidentTokens + lane / 2);
  if (!resident.visible) return;
  const int bytes = D * (p.row_dtype == kFloat32 ? 4 : 2), half = lane % 2 * (bytes / 2);
  const char* key = static_cast<const char*>(p.rows) + resident.row * 2 * bytes + half;
  for (int at = 0; at < bytes / 2; at += 128) {
    prefetch(key + at);
  }
}

// Puts the step's own row where the windows keep it, if this item has it. Whoever writes the same
// row at this moment writes the same bytes (p.new_k).
template <int D>
__device__ void bring_new_row(const EstimateScoresParams& p, const Segment& s, int item, int lane) {
  const int t = s.stop - 1;
  const int number = t < p.num_sink ? t : p.num_sink + t - max(s.window, p.num_sink);
  if (number / kResidentTokens != item) return;
  const Resident resident(p, s, number);
  if (!resident.visible) return;
  const int bytes = D * (p.row_dtype == kFloat32 ? 4 : 2);
  char* row = static_cast<char*>(p.rows) + resident.row * 2 * bytes;
  const char* k = p.new_k + s.n * p.new_k_stride_bytes[0] + s.kv_head * p.new_k_stride_bytes[1];
  const char* v = p.new_v + s.n * p.new_v_stride_bytes[0] + s.kv_head * p.new_v_stride_bytes[1];
  for (int at = lane * 16; at < 2 * bytes; at += 32 * 16) {
    const char* from = at < bytes ? k + at : v + (at - bytes);
    *reinterpret_cast<uint4*>(row + at) = *reinterpret_cast<const uint4*>(from);
  }
  __syncwarp();
}

// The channels of a key that lane j of four multiplies, in the order of load_query.
template <int D, typename T>
struct Key {
  static constexpr int kWords = D / 4 * sizeof(T) / 4;
  uint32_t words[kWords];

  __device__ void load(const T* row, int j) {
    using L = Lanes<D>;
#pragma unroll
    for (int w = 0; w < L::kRegs; ++w) {
      const int channels = L::kHalf && w == L::kWords ? 4 : 8;
      const T* from = row + 2 * L::byte(w, j);
#pragma unroll
      for (int at = 0; at < channels * int(sizeof(T)) / 4; at += 4) {
        uint32_t* to = words + w * 8 * sizeof(T) / 4 + at;
        if (channels * sizeof(T) == 8) {
          const uint2 v = *reinterpret_cast<const uint2*>(from);
          to[0] = v.x, to[1] = v.y;
        } else {
          const uint4 v = reinterpret_cast<const uint4*>(from)[at / 4];
          to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        }
      }
    }
  }

  __device__ float channel(int i) const {
    if constexpr (sizeof(T) == 4) return __uint_as_float(words[i]);
    const uint16_t bits = words[i / 2] >> (i % 2 * 16);
    return to_float(reinterpret_cast<const T&>(bits));
  }
};

// The dots of a key with heads 2 * j and 2 * j + 1, by the four lanes that have its channels.
template <int D, typename T>
__device__ float2 resident_dots(const Key<D, T>& key, const float* q, int heads, int j) {
  float channels[D / 4];
#pragma unroll
  for (int i = 0; i < D / 4; ++i) channels[i] = key.channel(i);
  float2 mine = {};
#pragma unroll 1
  for (int h = 0; h < heads; ++h) {
    float4 dot = {};
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      const float4 v = reinterpret_cast<const float4*>(q)[i * 32 + h * 4 + j];
      const float* k = channels + 4 * i;
      dot.x += v.x * k[0], dot.y += v.y * k[1], dot.z += v.z * k[2], dot.w += v.w * k[3];
    }
    const float sum = quad_sum((dot.x + dot.y) + (dot.z + dot.w)) * 0.0625f;
    if (h == 2 * j) mine.x = sum;
    if (h == 2 * j + 1) mine.y = sum;
  }
  return mine;
}

// Lane 4 * r + j takes token r of eight, the channels that j takes of codes too, and ends up with
// the scores of heads 2 * j and 2 * j + 1. q is 16 times the scaled queries.
template <int D, typename T>
__device__ void resident_item(const EstimateScoresParams& p, const Segment& s, int item,
                              const float* q, int lane, Softmax (&state)[2]) {
  constexpr int kKeys = sizeof(T) * D <= 256 ? 2 : 1;  // of a lane, asked for at once
  const int j = lane % 4;
#pragma unroll 1
  for (int begin = 0; begin < kResidentTokens; begin += kKeys * 8) {
    const int first = item * kResidentTokens + begin + lane / 4;
    Key<D, T> keys[kKeys];
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const Resident resident(p, s, first + i * 8);
      keys[i].load(static_cast<const T*>(p.rows) + resident.row * 2 * D, j);
    }
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const float2 scores = resident_dots(keys[i], q, s.heads, j);
      const Resident resident(p, s, first + i * 8);
      if (!resident.visible) continue;
      state[0].add(scores.x);
      state[1].add(scores.y);
      float* out = p.scores + s.q_head(p, j * 2) * p.capacity + resident.t;
      if (j * 2 < s.heads) out[0] = scores.x;
      if (j * 2 + 1 < s.heads) out[p.capacity] = scores.y;
    }
  }
}

// One item: kResidentTokens of the tokens that the windows hold.
template <int D>
__device__ void resident_scores(const EstimateScoresParams& p, const Segment& s, int item,
                                const float* q, int lane, Softmax (&state)[2]) {
  const bool visible = Resident(p, s, item * kResidentTokens + lane % kResidentTokens).visible;
  if (!__any_sync(0xffffffffu, visible)) return;
  if (p.row_dtype == kBFloat16) {
    resident_item<D, __nv_bfloat16>(p, s, item, q, lane, state);
  } else if (p.row_dtype == kFloat16) {
    resident_item<D, __half>(p, s, item, q, lane, state);
  } else {
    resident_item<D, float>(p, s, item, q, lane, state);
  }
}

}  // namespace twilight
