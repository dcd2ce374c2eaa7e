// How csrc/resolve_rows.cu brings the rows of a list's misses from host memory itself.
//
// The misses' keys are known before their slots are. Their rows are asked for at once, by copies to
// shared memory, and are on the link while slots are chosen; then they go to these. What shared
// memory has no room for follows by way of registers. Neighbours in the list, which are neighbours
// in host memory, are asked for by neighbouring lanes. Device code only.
#pragma once

#include "csrc/link_times.cuh"
#include "csrc/resolve_lists.cuh"
#include "csrc/resolve_rows.h"
#include "csrc/resolve_slots.cuh"

namespace twilight {

constexpr int kVectorBytes = 16;
constexpr int kInFlight = 2;  // loads of a lane, of rows beyond the staged ones

// A thread's vectors of rows laid end to end, kThreads apart.
struct RowVectors {
  int row, offset;          // of the vector at hand: its row, and the vectors of it in front
  int rows_on, vectors_on;  // from one to the next
  int row_vectors;

  __device__ explicit RowVectors(int row_bytes) : row_vectors(row_bytes / kVectorBytes) {
    row = static_cast<int>(threadIdx.x) / row_vectors;
    offset = static_cast<int>(threadIdx.x) - row * row_vectors;
    rows_on = kThreads / row_vectors;
    vectors_on = kThreads - rows_on * row_vectors;
  }
  __device__ __forceinline__ void next() {
    row += rows_on;
    offset += vectors_on;
    if (offset >= row_vectors) ++row, offset -= row_vectors;
  }
  __device__ int at() const { return row * row_vectors + offset; }
};

__device__ __forceinline__ const char* host_vector(const ResolveRowsParams& p, const Segment& s,
                                                   int key, int offset) {
  return p.host_kv + s.h * p.head_stride_bytes + static_cast<int64_t>(key) * p.row_bytes +
         offset * kVectorBytes;
}

__device__ __forceinline__ uint4* row_vector(const ResolveRowsParams& p, int row, int offset) {
  char* to = p.rows + static_cast<int64_t>(row) * p.row_bytes + offset * kVectorBytes;
  return reinterpret_cast<uint4*>(to);
}

// Asks for the rows of the first misses that may get slots, to the block's staging; returns how
// many. The misses have been noted, and a barrier has passed.
__device__ inline int ask_rows(const ResolveRowsParams& p, const Segment& s, int wanted,
                               const Shared& shared) {
  const int staged = min(min(wanted, p.staged_rows), kKeptMisses);
  const uint32_t staging = shared_address(in_shared<char>(s.staging_at));
  for (RowVectors v(p.row_bytes); v.row < staged; v.next()) {
    copy_async<kVectorBytes>(staging + v.at() * kVectorBytes,
                             host_vector(p, s, shared.missing[v.row].key, v.offset));
  }
  return staged;
}

// Puts the rows of the `placed` misses into their slots; `staged` have been asked for. Called when
// the slots are known, the misses listed, and a barrier has passed.
__device__ inline void bring_rows(const ResolveRowsParams& p, const Segment& s, int placed,
                                  int staged, const Shared& shared) {
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  const uint4* staging = in_shared<const uint4>(s.staging_at);
  for (RowVectors v(p.row_bytes); v.row < min(placed, staged); v.next()) {
    *row_vector(p, p.first_row + shared.victims[v.row], v.offset) = staging[v.at()];
  }
  if (placed <= staged) return;
  const int64_t list = static_cast<int64_t>(blockIdx.x) * p.fetch_capacity;
  RowVectors rest(p.row_bytes);
  while (rest.row < staged) rest.next();
#pragma unroll 1
  while (rest.row < placed) {
    uint4 data[kInFlight];
    int row[kInFlight], offset[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i, rest.next()) {
      row[i] = kNoRow;
      if (rest.row >= placed) continue;
      row[i] = p.fetch_dst[list + rest.row];
      offset[i] = rest.offset;
      data[i] = __ldcs(reinterpret_cast<const uint4*>(
          host_vector(p, s, p.fetch_src[list + rest.row], rest.offset)));
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (row[i] >= 0) *row_vector(p, row[i], offset[i]) = data[i];
    }
  }
}

}  // namespace twilight
