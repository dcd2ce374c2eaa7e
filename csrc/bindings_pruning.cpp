// estimate_scores, lsh_candidates and prune.
#ifdef TWILIGHT_CUDA
#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "csrc/bindings.h"
#include "csrc/estimate_scores.h"
#include "csrc/lsh_candidates.h"
#include "csrc/prune.h"

namespace twilight::bindings {

void bind_pruning(py::module_& m) {
  m.def("estimate_scores_workspace", &twilight::estimate_scores_workspace, py::kw_only(),
        py::arg("num_rows"), py::arg("num_kv_heads"), py::arg("group"));
  m.def(
      "estimate_scores",
      [](uint64_t q, uint64_t k_codes, uint64_t k_scale, uint64_t k_bounds, uint64_t rows,
         uint64_t candidates, uint64_t page_table, uint64_t seq_slots, uint64_t window_starts,
         uint64_t query_seq, uint64_t positions, uint64_t ctx_starts, uint64_t scores, uint64_t lse,
         uint64_t errors, uint64_t workspace, int64_t workspace_size, int num_rows,
         int num_kv_heads, int group, int head_dim, int page_size, int num_sink, int window_rows,
         int capacity, int table_stride, int num_pages, int num_blocks, bool by_token,
         int row_dtype, bool per_token, bool early, bool drop, uint64_t new_k, uint64_t new_v,
         std::array<int64_t, 2> new_k_stride_bytes, std::array<int64_t, 2> new_v_stride_bytes,
         float softmax_scale, int64_t codes_page_stride, int64_t scale_page_stride,
         int64_t bounds_page_stride, uint64_t stream) {
        twilight::EstimateScoresParams p{};
        p.q = as<void>(q);
        p.k_codes = as<uint8_t>(k_codes);
        p.k_scale = as<uint16_t>(k_scale);
        p.k_bounds = as<uint16_t>(k_bounds);
        p.rows = as<void>(rows);
        p.candidates = as<uint8_t>(candidates);
        p.page_table = as<int>(page_table);
        p.seq_slots = as<int>(seq_slots);
        p.window_starts = as<int>(window_starts);
        p.query_seq = as<int>(query_seq);
        p.positions = as<int>(positions);
        p.ctx_starts = as<int>(ctx_starts);
        p.scores = as<float>(scores);
        p.lse = as<float>(lse);
        p.errors = as<float>(errors);
        p.workspace = as<unsigned>(workspace);
        p.workspace_size = workspace_size;
        p.num_rows = num_rows;
        p.num_kv_heads = num_kv_heads;
        p.group = group;
        p.head_dim = head_dim;
        p.page_size = page_size;
        p.num_sink = num_sink;
        p.window_rows = window_rows;
        p.capacity = capacity;
        p.table_stride = table_stride;
        p.num_pages = num_pages;
        p.num_blocks = num_blocks;
        p.by_token = by_token;
        p.row_dtype = row_dtype;
        p.per_token = per_token;
        p.early = early;
        p.new_k = as<char>(new_k);
        p.new_v = as<char>(new_v);
        std::ranges::copy(new_k_stride_bytes, p.new_k_stride_bytes);
        std::ranges::copy(new_v_stride_bytes, p.new_v_stride_bytes);
        p.drop = drop;
        p.softmax_scale = softmax_scale;
        p.codes_page_stride = codes_page_stride;
        p.scale_page_stride = scale_page_stride;
        p.bounds_page_stride = bounds_page_stride;
        check(twilight::launch_estimate_scores(p, as_stream(stream)), "estimate_scores");
      },
      py::kw_only(), py::arg("q"), py::arg("k_codes"), py::arg("k_scale"), py::arg("k_bounds"),
      py::arg("rows"), py::arg("candidates"), py::arg("page_table"), py::arg("seq_slots"),
      py::arg("window_starts"), py::arg("query_seq"), py::arg("positions"), py::arg("ctx_starts"),
      py::arg("scores"), py::arg("lse"), py::arg("errors"), py::arg("workspace"),
      py::arg("workspace_size"), py::arg("num_rows"), py::arg("num_kv_heads"), py::arg("group"),
      py::arg("head_dim"), py::arg("page_size"), py::arg("num_sink"), py::arg("window_rows"),
      py::arg("capacity"), py::arg("table_stride"), py::arg("num_pages"), py::arg("num_blocks"),
      py::arg("by_token"), py::arg("row_dtype"), py::arg("per_token"), py::arg("early"),
      py::arg("drop"), py::arg("new_k"), py::arg("new_v"), py::arg("new_k_stride_bytes"),
      py::arg("new_v_stride_bytes"), py::arg("softmax_scale"), py::arg("codes_page_stride"),
      py::arg("scale_page_stride"), py::arg("bounds_page_stride"), py::arg("stream"));
  m.def(
      "lsh_candidates",
      [](uint64_t q_codes, uint64_t k_codes, uint64_t page_table, int64_t page_table_stride,
         uint64_t query_seq, uint64_t positions, uint64_t ctx_starts, uint64_t window_starts,
         uint64_t candidates, int num_queries, int num_q_heads, int num_kv_heads, int num_tables,
         int num_tokens, int page_size, int num_sink, uint64_t stream) {
        const twilight::LshCandidatesParams p{as<uint16_t>(q_codes),
                                              as<uint16_t>(k_codes),
                                              as<int>(page_table),
                                              page_table_stride,
                                              as<int>(query_seq),
                                              as<int>(positions),
                                              as<int>(ctx_starts),
                                              as<int>(window_starts),
                                              as<uint8_t>(candidates),
                                              num_queries,
                                              num_q_heads,
                                              num_kv_heads,
                                              num_tables,
                                              num_tokens,
                                              page_size,
                                              num_sink};
        check(twilight::launch_lsh_candidates(p, as_stream(stream)), "lsh_candidates");
      },
      py::kw_only(), py::arg("q_codes"), py::arg("k_codes"), py::arg("page_table"),
      py::arg("page_table_stride"), py::arg("query_seq"), py::arg("positions"),
      py::arg("ctx_starts"), py::arg("window_starts"), py::arg("candidates"),
      py::arg("num_queries"), py::arg("num_q_heads"), py::arg("num_kv_heads"),
      py::arg("num_tables"), py::arg("num_tokens"), py::arg("page_size"), py::arg("num_sink"),
      py::arg("stream"));
  m.def(
      "prune",
      [](uint64_t scores, uint64_t lse, uint64_t top_p, uint64_t index_top_p, uint64_t top_k,
         uint64_t candidates, uint64_t errors, uint64_t window_starts, uint64_t query_seq,
         uint64_t positions, uint64_t ctx_starts, uint64_t weights, uint64_t exact_tokens,
         uint64_t exact_counts, uint64_t index_counts, uint64_t grades, uint64_t mass, int num_rows,
         int num_kv_heads, int group, int page_size, int num_sink, int max_len, int capacity,
         int exact_capacity, int grades_capacity, int block, int num_blocks, bool unite,
         bool dropped, bool expand_pages, int num_pages, float margin, uint64_t stream) {
        twilight::PruneParams p{};
        p.scores = as<float>(scores);
        p.lse = as<float>(lse);
        p.top_p = as<float>(top_p);
        p.index_top_p = as<float>(index_top_p);
        p.top_k = as<int>(top_k);
        p.candidates = as<uint8_t>(candidates);
        p.window_starts = as<int>(window_starts);
        p.query_seq = as<int>(query_seq);
        p.positions = as<int>(positions);
        p.ctx_starts = as<int>(ctx_starts);
        p.weights = as<float>(weights);
        p.exact_tokens = as<int>(exact_tokens);
        p.exact_counts = as<int>(exact_counts);
        p.index_counts = as<int>(index_counts);
        p.grades = as<uint8_t>(grades);
        p.mass = as<float>(mass);
        p.num_rows = num_rows;
        p.num_kv_heads = num_kv_heads;
        p.group = group;
        p.page_size = page_size;
        p.num_sink = num_sink;
        p.max_len = max_len;
        p.capacity = capacity;
        p.exact_capacity = exact_capacity;
        p.grades_capacity = grades_capacity;
        p.block = block;
        p.num_blocks = num_blocks;
        p.errors = as<float>(errors);
        p.num_pages = num_pages;
        p.margin = margin;
        p.unite = unite;
        p.dropped = dropped;
        p.expand_pages = expand_pages;
        check(twilight::launch_prune(p, as_stream(stream)), "prune");
      },
      py::kw_only(), py::arg("scores"), py::arg("lse"), py::arg("top_p"), py::arg("index_top_p"),
      py::arg("top_k"), py::arg("candidates"), py::arg("errors"), py::arg("window_starts"),
      py::arg("query_seq"), py::arg("positions"), py::arg("ctx_starts"), py::arg("weights"),
      py::arg("exact_tokens"), py::arg("exact_counts"), py::arg("index_counts"), py::arg("grades"),
      py::arg("mass"), py::arg("num_rows"), py::arg("num_kv_heads"), py::arg("group"),
      py::arg("page_size"), py::arg("num_sink"), py::arg("max_len"), py::arg("capacity"),
      py::arg("exact_capacity"), py::arg("grades_capacity"), py::arg("block"),
      py::arg("num_blocks"), py::arg("unite"), py::arg("dropped"), py::arg("expand_pages"),
      py::arg("num_pages"), py::arg("margin"), py::arg("stream"));
}

}  // namespace twilight::bindings
#endif
