// lsh_candidates: candidates[n, h, t] = 1 if the signatures of list token t equal those of a query
// head of KV head h in at least kMinTables of the L tables; 0 for all other tokens.
//
// A thread block owns a (query row, KV head) and a share of its tokens, with the group's signatures
// in shared memory. A warp owns kRun tokens of one page and takes kTokens of them at a time: its
// lanes hold the tables side by side (a pair each where L is even, so 4-byte loads), read once and
// compared with every query head of the group. A lane's count of equal tables is cut at kMinTables,
// which leaves "at least kMinTables" as it is and keeps a warp's sum within a byte: one reduction
// serves the four tokens. Bytes moved: 2 * L a list token and KV head, N times for N rows of one
// sequence, and one byte of candidates. Source: MagicPIG (arXiv 2410.16179).
#include "csrc/common.cuh"
#include "csrc/lsh_candidates.h"

namespace twilight {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTokens = 4;     // bytes of a packed count; loads under way at once in a lane
constexpr int kRun = 16;       // tokens a warp, so that reading the queries costs a few percent
constexpr int kMinTables = 2;  // LSH_MIN_TABLES in layout.py
static_assert(32 * kMinTables < 256, "a warp's count must fit a byte");

// One lane's share of a signature row: a pair of tables, or a single one where L is odd.
template <int kPair>
struct Share;
template <>
struct Share<2> {
  using Word = uint32_t;
  static __device__ __forceinline__ int equal(Word a, Word b) {
    const uint32_t differ = a ^ b;
    return static_cast<int>((differ & 0xffffu) == 0) + static_cast<int>(differ < 0x10000u);
  }
};
template <>
struct Share<1> {
  using Word = uint16_t;
  static __device__ __forceinline__ int equal(Word a, Word b) { return a == b; }
};

template <int kPair, int kSteps>
__global__ void __launch_bounds__(kThreads) lsh_candidates_kernel(LshCandidatesParams p) {
  using Word = typename Share<kPair>::Word;
  extern __shared__ uint32_t q_shared[];  // [G, L] uint16
  const int n = blockIdx.z, h = blockIdx.y;
  const int group = p.num_q_heads / p.num_kv_heads;
  const int words = p.num_tables / kPair;  // a signature row
  const int64_t first_head = static_cast<int64_t>(n) * p.num_q_heads + h * group;
  const Word* q = reinterpret_cast<const Word*>(p.q_codes + first_head * p.num_tables);
  Word* queries = reinterpret_cast<Word*>(q_shared);
  for (int i = threadIdx.x; i < group * words; i += kThreads) queries[i] = q[i];
  __syncthreads();

  const int lane = threadIdx.x % 32;
  const int b = p.query_seq[n];
  const int first = max(p.ctx_starts[n], p.num_sink);
  const int end = min(p.positions[n] + 1, p.window_starts[b]);
  const int runs = (p.page_size + kRun - 1) / kRun;  // a page
  const int run = blockIdx.x * kWarps + threadIdx.x / 32;
  const int page_number = run / runs;
  const int page_start = page_number * p.page_size;
  const int begin = page_start + run % runs * kRun;
  const int stop = min(begin + kRun, page_start + p.page_size);
  if (page_start >= p.num_tokens) return;
  uint8_t* out = p.candidates + (static_cast<int64_t>(n) * p.num_kv_heads + h) * p.num_tokens;
  const bool listed = begin < end && stop > first;
  const int page = listed ? p.page_table[b * p.page_table_stride + page_number] : kNoRow;
  if (page < 0) {
    if (begin + lane < stop) out[begin + lane] = 0;
    return;
  }
  const int64_t record = (static_cast<int64_t>(page) * p.num_kv_heads + h) * p.page_size;
  const Word* keys = reinterpret_cast<const Word*>(p.k_codes + record * p.num_tables);

  for (int t = begin; t < stop; t += kTokens) {
    Word codes[kTokens][kSteps];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const bool wanted = t + i < stop && t + i >= first && t + i < end;
      const Word* row = keys + static_cast<int64_t>(t + i - page_start) * words;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int w = s * 32 + lane;
        codes[i][s] = wanted && w < words ? row[w] : Word{0};
      }
    }
    uint32_t found = 0;  // a byte a token
    for (int g = 0; g < group; ++g) {
      int equal[kTokens] = {};
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int w = s * 32 + lane;
        if (w >= words) continue;
        const Word query = queries[g * words + w];
#pragma unroll
        for (int i = 0; i < kTokens; ++i) equal[i] += Share<kPair>::equal(codes[i][s], query);
      }
      uint32_t packed = 0;
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        packed |= static_cast<uint32_t>(min(equal[i], kMinTables)) << (8 * i);
      }
      const uint32_t sums = __reduce_add_sync(0xffffffffu, packed);
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        found |= static_cast<uint32_t>((sums >> (8 * i) & 0xffu) >= kMinTables) << (8 * i);
      }
    }
    const int mine = t + lane;
    if (lane < kTokens && mine < stop) {
      const bool wanted = mine >= first && mine < end;
      out[mine] = wanted ? found >> (8 * lane) & 1u : 0;
    }
  }
}

template <int kPair, int kSteps>
cudaError_t launch(const LshCandidatesParams& p, cudaStream_t stream) {
  const int64_t runs =
      static_cast<int64_t>(p.num_tokens / p.page_size) * ((p.page_size + kRun - 1) / kRun);
  const dim3 grid((runs + kWarps - 1) / kWarps, p.num_kv_heads, p.num_queries);
  const size_t shared = sizeof(uint16_t) * (p.num_q_heads / p.num_kv_heads) * p.num_tables;
  lsh_candidates_kernel<kPair, kSteps><<<grid, kThreads, shared, stream>>>(p);
  return cudaGetLastError();
}

template <int kPair>
cudaError_t launch_steps(const LshCandidatesParams& p, cudaStream_t stream) {
  const int steps = (p.num_tables / kPair + 31) / 32;
  if (steps <= 1) return launch<kPair, 1>(p, stream);
  if (steps <= 2) return launch<kPair, 2>(p, stream);
  if (steps <= 3) return launch<kPair, 3>(p, stream);
  if (steps <= 4) return launch<kPair, 4>(p, stream);
  if (steps <= 8) return launch<kPair, 8>(p, stream);
  return launch<kPair, kMaxLshTables / 32 / kPair>(p, stream);
}

}  // namespace

cudaError_t launch_lsh_candidates(const LshCandidatesParams& p, cudaStream_t stream) {
  if (p.num_tables < 1 || p.num_tables > kMaxLshTables) return cudaErrorInvalidValue;
  return p.num_tables % 2 == 0 ? launch_steps<2>(p, stream) : launch_steps<1>(p, stream);
}

}  // namespace twilight
