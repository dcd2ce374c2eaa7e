// A warp's ring of index pages in shared memory, filled by cp.async ahead of their use.
#pragma once

#include <cstdint>

#include "csrc/int4_tiles.cuh"

namespace twilight {

template <int D, int kTokens, int kStages>
class PageRing {
 public:
  static constexpr int kCodeBytes = kTokens * D / 2;
  static constexpr int kScaleBytes = 4 * (D > kTokens ? D : kTokens);  // a channel's or a token's
  static constexpr int kStageBytes = (kCodeBytes + kScaleBytes + 127) / 128 * 128;
  static constexpr int kBytes = kStages * kStageBytes;

  __device__ PageRing(uint8_t* memory, int lane)
      : address_(held(shared_address(memory))), lane_(held(lane)) {}

  __device__ const uint8_t* codes(int turn) const {
    return static_cast<const uint8_t*>(__cvta_shared_to_generic(stage(turn)));
  }
  __device__ const uint16_t* scales(int turn) const {
    return reinterpret_cast<const uint16_t*>(codes(turn) + kCodeBytes);
  }

  __device__ int lane() const { return lane_; }

  // Codes of kTokens tokens, 16-byte aligned.
  __device__ void copy_all_codes(int turn, const uint8_t* from) const {
    constexpr int kStep = 32 * 16;
    const int place = Lanes<D>::place(lane_ * 16);
    const uint32_t to = stage(turn);
    from += lane_ * 16;
#pragma unroll
    for (int i = 0; i < ceil_div(kCodeBytes, kStep); ++i) {
      // place() moves bits by others: that of a sum of disjoint bits is the exclusive or of both's.
      const int moved = place ^ (Lanes<D>::place(i * kStep) - i * kStep);
      if (kCodeBytes % kStep == 0 || i * kStep + lane_ * 16 < kCodeBytes) {
        copy_async<16>(to + i * kStep + moved, from + i * kStep);
      }
    }
  }

  // Codes of `tokens` tokens, each where Lanes<D>::place puts it; vectors: 16-byte aligned.
  __device__ void copy_codes(int turn, const uint8_t* from, int tokens, bool vectors) const {
    const uint32_t to = stage(turn);
    const int bytes = tokens * (D / 2);
    if (vectors) {
      copy_loop<16>(to, from, bytes);
    } else {
      copy_loop<8>(to, from, bytes);
    }
  }

  // `bytes` of scales and minima, in vectors of kVector bytes.
  template <int kVector>
  __device__ void copy_scales(int turn, const uint16_t* from, int bytes) const {
    const int mine = lane_ * kVector;
    const uint32_t to = stage(turn) + kCodeBytes + mine;
    const uint8_t* source = reinterpret_cast<const uint8_t*>(from) + mine;
#pragma unroll
    for (int i = 0; i < ceil_div(kScaleBytes, 32 * kVector); ++i) {
      const int at = i * 32 * kVector;
      const bool whole = at + 32 * kVector <= bytes;  // known at compile time for a channel's
      if (whole || at + mine < bytes) copy_async<kVector>(to + at, source + at);
    }
  }

  // Ends what was copied since the last call: one call a stage, in order, even if it is empty.
  __device__ void commit() const { commit_copies(); }

  // Waits for the oldest stage, kStages of them having been begun since its turn.
  __device__ void wait() const {
    wait_copies<kStages - 1>();
    __syncwarp();
  }

 private:
  __device__ uint32_t stage(int turn) const { return address_ + turn % kStages * kStageBytes; }

  template <int kVector>
  __device__ void copy_loop(uint32_t to, const uint8_t* from, int bytes) const {
#pragma unroll 1
    for (int at = lane_ * kVector; at < bytes; at += 32 * kVector) {
      copy_async<kVector>(to + Lanes<D>::place(at), from + at);
    }
  }

  uint32_t address_;
  int lane_;
};

}  // namespace twilight
