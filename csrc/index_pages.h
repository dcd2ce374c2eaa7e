#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace twilight {

// Where one layer's index lies; docs/index_format.md.
struct IndexPagesParams {
  uint8_t* k_codes;  // [P, Hkv, S, D / 2]
  void* k_scale;     // float16; int4_channel: [P, Hkv, 2, D]; int4_token: [P, Hkv, S, 2]
  void* k_bounds;    // float16, int4_token: [P, Hkv, ceil(S / 16), 2, D]; int4_channel: null
  uint8_t* v_codes;  // [P, Hkv, S, D / 2], or null
  void* v_scale;     // float16 [P, Hkv, S, 2], or null
  void* v_mean;      // float16 [P, Hkv, D]
  int page_size;
  int num_kv_heads;
  int head_dim;
  int dtype;  // RowDtype of K and V
};

// Row strides are multiples of 16 bytes, and so are all row addresses.
struct StagedPagesParams {
  const void* k;         // [M, S, Hkv, D]
  const void* v;         // [M, S, Hkv, D]
  int64_t k_strides[3];  // elements, over M, S, Hkv
  int64_t v_strides[3];
  const int* page_ids;  // [M]
  int num_pages;        // M
};

cudaError_t launch_index_pages(const StagedPagesParams& source, const IndexPagesParams& index,
                               cudaStream_t stream);

}  // namespace twilight
