// A warp's ring of index pages in shared memory, filled by cp.async ahead of their use.
#pragma once

#include <cstdint>

#include "csrc/int4_tiles.cuh"

namespace twilight {

template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t to, const uint8_t* from) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(kBytes)
                 : "memory");
  }
}

template <int D, int kTokens, int kStages>
class PageRing {
 public:
  static constexpr int kCodeBytes = kTokens * D / 2;
  static constexpr int kScaleBytes = 4 * (D > kTokens ? D : kTokens);  // a channel's or a token's
  static constexpr int kStageBytes = (kCodeBytes + kScaleBytes + 127) / 128 * 128;
  static constexpr int kBytes = kStages * kStageBytes;

  __device__ PageRing(uint8_t* memory, int lane)
      : memory_(memory),
        address_(static_cast<uint32_t>(__cvta_generic_to_shared(memory))),
        lane_(lane) {}

  __device__ const uint8_t* codes(int turn) const { return memory_ + turn % kStages * kStageBytes; }
  __device__ const uint16_t* scales(int turn) const {
    return reinterpret_cast<const uint16_t*>(codes(turn) + kCodeBytes);
  }

  // Codes of `tokens` tokens, each where Lanes<D>::place puts it; vectors: 16-byte aligned.
  __device__ void copy_codes(int turn, const uint8_t* from, int tokens, bool vectors) const {
    const uint32_t to = address_ + turn % kStages * kStageBytes;
    const int bytes = tokens * (D / 2);
    if (!vectors) {
      for (int at = lane_ * 8; at < bytes; at += 32 * 8) {
        copy_async<8>(to + Lanes<D>::place(at), from + at);
      }
    } else if (bytes == kCodeBytes) {
      copy_vectors<true>(to, from, bytes);
    } else {
      copy_vectors<false>(to, from, bytes);
    }
  }

  // `bytes` of scales and minima, in vectors of kVector bytes.
  template <int kVector>
  __device__ void copy_scales(int turn, const uint16_t* from, int bytes) const {
    const uint32_t to = address_ + turn % kStages * kStageBytes + kCodeBytes;
    const uint8_t* source = reinterpret_cast<const uint8_t*>(from);
#pragma unroll
    for (int i = 0; i < ceil_div(kScaleBytes, 32 * kVector); ++i) {
      const int at = (i * 32 + lane_) * kVector;
      if (at < bytes) copy_async<kVector>(to + at, source + at);
    }
  }

  // Ends what was copied since the last call: one call a stage, in order, even if it is empty.
  __device__ void commit() const { asm volatile("cp.async.commit_group;" ::: "memory"); }

  // Waits for the oldest stage, kStages of them having been begun since its turn.
  __device__ void wait() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 1) : "memory");
    __syncwarp();
  }

 private:
  template <bool kAll>
  __device__ void copy_vectors(uint32_t to, const uint8_t* from, int bytes) const {
    constexpr int kStep = 32 * 16;
    const int mine = lane_ * 16, place = Lanes<D>::place(mine);
#pragma unroll
    for (int i = 0; i < ceil_div(kCodeBytes, kStep); ++i) {
      // place() moves bits by others: that of a sum of disjoint bits is the exclusive or of both's.
      const int moved = place ^ (Lanes<D>::place(i * kStep) - i * kStep);
      const bool within = kAll && kCodeBytes % kStep == 0;
      if (within || i * kStep + mine < bytes) {
        copy_async<16>(to + i * kStep + moved, from + mine + i * kStep);
      }
    }
  }

  uint8_t* memory_;
  uint32_t address_;
  int lane_;
};

}  // namespace twilight
