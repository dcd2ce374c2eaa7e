// Misses that resolve_rows announces before they have slots, so that gather_rows, whose blocks are
// there by then (dependent_launch.cuh), asks the host for their rows meanwhile. Device code only.
//
// A (sequence, KV head) has kAnnouncedWords words: the number of its misses, then their keys, each
// with a tag of the step and layer in the upper half. A word is written and read whole, so nobody
// has to fence it off from another. What is read is a guess: a tag that returns, when steps are
// taken back, may belong to older words. So gather_rows keeps to what the lists say once they are
// there, and takes a row that it asked for early only where they name the same one.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "csrc/ptx.cuh"

namespace twilight {

constexpr int kMostAnnounced = 1023;  // keys of a (sequence, KV head); ANNOUNCED_WORDS in layout.py
constexpr int kAnnouncedWords = 1 + kMostAnnounced;
constexpr unsigned kMostLayers = 1024;
constexpr int kNotAnnounced = -1;
constexpr int kMostTries = 4096;  // some milliseconds: more than a step of which anyone waits

__device__ __forceinline__ unsigned announcement_tag(int step, unsigned layer) {
  return static_cast<unsigned>(step) * kMostLayers + layer;
}

// Word `at` of a (sequence, KV head): its count is word 0, key i word 1 + i.
__device__ __forceinline__ int word_of(int segment, int at) {
  return segment * kAnnouncedWords + at;
}

__device__ __forceinline__ void announce(uint64_t* words, int segment, int at, unsigned tag,
                                         int value) {
  if (at >= kAnnouncedWords) return;
  store_relaxed(words + word_of(segment, at), uint64_t{tag} << 32 | static_cast<unsigned>(value));
}

// Waits for words: which[i] becomes the value of word which[i], or kNotAnnounced where no word is
// asked for (which[i] < 0) or it does not come.
template <int kCount>
__device__ __forceinline__ void await_words(const uint64_t* words, unsigned tag,
                                            int (&which)[kCount]) {
  uint64_t found[kCount];
  bool missing = true;
#pragma unroll 1
  for (int tries = 0; missing && tries < kMostTries; ++tries) {
    if (tries > 0) __nanosleep(64);
#pragma unroll
    for (int i = 0; i < kCount; ++i) found[i] = load_relaxed(words + max(which[i], 0));
    missing = false;
#pragma unroll
    for (int i = 0; i < kCount; ++i) missing |= which[i] >= 0 && found[i] >> 32 != tag;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const bool there = which[i] >= 0 && found[i] >> 32 == tag;
    which[i] = there ? static_cast<int>(found[i]) : kNotAnnounced;
  }
}

}  // namespace twilight
