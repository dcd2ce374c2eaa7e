// append_rows, index_pages, quest_scores, select_blocks.
#ifdef TWILIGHT_CUDA
#include <pybind11/stl.h>

#include <array>

#include "csrc/append_rows.h"
#include "csrc/bindings.h"
#include "csrc/index_pages.h"
#include "csrc/quest_scores.h"
#include "csrc/select_blocks.h"

namespace twilight::bindings {
namespace {

using Strides = std::array<int64_t, 3>;  // over pages, tokens, heads

twilight::IndexPagesParams index_params(uint64_t k_codes, uint64_t k_scale, uint64_t k_bounds,
                                        uint64_t v_codes, uint64_t v_scale, uint64_t v_mean,
                                        int page_size, int num_kv_heads, int head_dim, int dtype) {
  return {as<uint8_t>(k_codes),
          as<void>(k_scale),
          as<void>(k_bounds),
          as<uint8_t>(v_codes),
          as<void>(v_scale),
          as<void>(v_mean),
          page_size,
          num_kv_heads,
          head_dim,
          dtype};
}

}  // namespace

void bind_index(py::module_& m) {
  m.def(
      "append_rows",
      [](uint64_t k, uint64_t v, std::array<int64_t, 2> k_stride_bytes,
         std::array<int64_t, 2> v_stride_bytes, uint64_t host_kv, int64_t host_head_bytes,
         uint64_t pages, int64_t pages_head_bytes, uint64_t windows, int window_rows, int num_sink,
         uint64_t page_table, int64_t page_table_stride, uint64_t seq_slots, uint64_t seq_lens,
         uint64_t cu_seqlens_q, uint64_t query_seq, uint64_t positions, uint64_t counters,
         int num_queries, int num_seqs, int num_kv_heads, int page_size, int head_bytes,
         uint64_t k_codes, uint64_t k_scale, uint64_t k_bounds, uint64_t v_codes, uint64_t v_scale,
         uint64_t v_mean, int head_dim, int dtype, uint64_t stream) {
        const twilight::AppendRowsParams p{as<char>(k),
                                           as<char>(v),
                                           {k_stride_bytes[0], k_stride_bytes[1]},
                                           {v_stride_bytes[0], v_stride_bytes[1]},
                                           as<char>(host_kv),
                                           host_head_bytes,
                                           as<char>(pages),
                                           pages_head_bytes,
                                           as<char>(windows),
                                           window_rows,
                                           num_sink,
                                           as<int>(page_table),
                                           page_table_stride,
                                           as<int>(seq_slots),
                                           as<int>(seq_lens),
                                           as<int>(cu_seqlens_q),
                                           as<int>(query_seq),
                                           as<int>(positions),
                                           as<int64_t>(counters),
                                           num_queries,
                                           num_seqs,
                                           num_kv_heads,
                                           page_size,
                                           head_bytes};
        const auto index = index_params(k_codes, k_scale, k_bounds, v_codes, v_scale, v_mean,
                                        page_size, num_kv_heads, head_dim, dtype);
        check(twilight::launch_append_rows(p, index, as_stream(stream)), "append_rows");
      },
      py::kw_only(), py::arg("k"), py::arg("v"), py::arg("k_stride_bytes"),
      py::arg("v_stride_bytes"), py::arg("host_kv"), py::arg("host_head_bytes"), py::arg("pages"),
      py::arg("pages_head_bytes"), py::arg("windows"), py::arg("window_rows"), py::arg("num_sink"),
      py::arg("page_table"), py::arg("page_table_stride"), py::arg("seq_slots"),
      py::arg("seq_lens"), py::arg("cu_seqlens_q"), py::arg("query_seq"), py::arg("positions"),
      py::arg("counters"), py::arg("num_queries"), py::arg("num_seqs"), py::arg("num_kv_heads"),
      py::arg("page_size"), py::arg("head_bytes"), py::arg("k_codes"), py::arg("k_scale"),
      py::arg("k_bounds"), py::arg("v_codes"), py::arg("v_scale"), py::arg("v_mean"),
      py::arg("head_dim"), py::arg("dtype"), py::arg("stream"));
  m.def(
      "index_pages",
      [](uint64_t k, uint64_t v, Strides k_strides, Strides v_strides, uint64_t page_ids,
         int num_pages, uint64_t k_codes, uint64_t k_scale, uint64_t k_bounds, uint64_t v_codes,
         uint64_t v_scale, uint64_t v_mean, int page_size, int num_kv_heads, int head_dim,
         int dtype, uint64_t stream) {
        const twilight::StagedPagesParams source{as<void>(k),
                                                 as<void>(v),
                                                 {k_strides[0], k_strides[1], k_strides[2]},
                                                 {v_strides[0], v_strides[1], v_strides[2]},
                                                 as<int>(page_ids),
                                                 num_pages};
        const auto index = index_params(k_codes, k_scale, k_bounds, v_codes, v_scale, v_mean,
                                        page_size, num_kv_heads, head_dim, dtype);
        check(twilight::launch_index_pages(source, index, as_stream(stream)), "index_pages");
      },
      py::kw_only(), py::arg("k"), py::arg("v"), py::arg("k_strides"), py::arg("v_strides"),
      py::arg("page_ids"), py::arg("num_pages"), py::arg("k_codes"), py::arg("k_scale"),
      py::arg("k_bounds"), py::arg("v_codes"), py::arg("v_scale"), py::arg("v_mean"),
      py::arg("page_size"), py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("dtype"),
      py::arg("stream"));
  m.def(
      "quest_scores",
      [](uint64_t q, uint64_t bounds, bool by_channel, uint64_t page_table,
         int64_t page_table_stride, uint64_t query_seq, uint64_t positions, uint64_t ctx_starts,
         uint64_t window_starts, uint64_t scores, int num_queries, int num_q_heads,
         int num_kv_heads, int head_dim, int num_blocks, int block, int page_size, int num_sink,
         float softmax_scale, int dtype, uint64_t stream) {
        const twilight::QuestScoresParams p{as<void>(q),
                                            as<void>(bounds),
                                            by_channel,
                                            as<int>(page_table),
                                            page_table_stride,
                                            as<int>(query_seq),
                                            as<int>(positions),
                                            as<int>(ctx_starts),
                                            as<int>(window_starts),
                                            as<float>(scores),
                                            num_queries,
                                            num_q_heads,
                                            num_kv_heads,
                                            head_dim,
                                            num_blocks,
                                            block,
                                            page_size,
                                            num_sink,
                                            softmax_scale,
                                            dtype};
        check(twilight::launch_quest_scores(p, as_stream(stream)), "quest_scores");
      },
      py::kw_only(), py::arg("q"), py::arg("bounds"), py::arg("by_channel"), py::arg("page_table"),
      py::arg("page_table_stride"), py::arg("query_seq"), py::arg("positions"),
      py::arg("ctx_starts"), py::arg("window_starts"), py::arg("scores"), py::arg("num_queries"),
      py::arg("num_q_heads"), py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("num_blocks"),
      py::arg("block"), py::arg("page_size"), py::arg("num_sink"), py::arg("softmax_scale"),
      py::arg("dtype"), py::arg("stream"));
  m.def(
      "select_blocks",
      [](uint64_t scores, uint64_t query_seq, uint64_t positions, uint64_t ctx_starts,
         uint64_t window_starts, uint64_t candidates, double budget, bool budget_is_share,
         int block, int num_queries, int num_q_heads, int num_kv_heads, int num_blocks,
         int num_sink, uint64_t stream) {
        const twilight::SelectBlocksParams p{as<float>(scores),
                                             as<int>(query_seq),
                                             as<int>(positions),
                                             as<int>(ctx_starts),
                                             as<int>(window_starts),
                                             as<uint8_t>(candidates),
                                             budget,
                                             budget_is_share,
                                             block,
                                             num_queries,
                                             num_q_heads,
                                             num_kv_heads,
                                             num_blocks,
                                             num_sink};
        check(twilight::launch_select_blocks(p, as_stream(stream)), "select_blocks");
      },
      py::kw_only(), py::arg("scores"), py::arg("query_seq"), py::arg("positions"),
      py::arg("ctx_starts"), py::arg("window_starts"), py::arg("candidates"), py::arg("budget"),
      py::arg("budget_is_share"), py::arg("block"), py::arg("num_queries"), py::arg("num_q_heads"),
      py::arg("num_kv_heads"), py::arg("num_blocks"), py::arg("num_sink"), py::arg("stream"));
}

}  // namespace twilight::bindings
#endif
