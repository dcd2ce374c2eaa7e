// The Python module twilight_engine._C: pointers as integers in, CUDA errors out as exceptions.
// The only file that sees Python; nothing here or below sees torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef TWILIGHT_CUDA
#include <cuda_runtime.h>
#endif

#include <array>
#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef TWILIGHT_CUDA
#include "csrc/append_rows.h"
#include "csrc/attend_index.h"
#include "csrc/attend_means.h"
#include "csrc/attend_pages.h"
#include "csrc/attend_rows.h"
#include "csrc/estimate_scores.h"
#include "csrc/gather_rows.h"
#include "csrc/hot_quotas.h"
#include "csrc/index_pages.h"
#include "csrc/merge_states.h"
#include "csrc/prune.h"
#include "csrc/quest_scores.h"
#include "csrc/resolve_rows.h"
#include "csrc/select_blocks.h"
#endif
#include "engine/arena.h"
#include "engine/device_probe.h"
#include "engine/host_limits.h"
#include "engine/page_pool.h"
#include "engine/transfers.h"

namespace py = pybind11;

namespace {

#ifdef TWILIGHT_CUDA
template <typename T>
T* as(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

cudaStream_t as_stream(uint64_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

void check(cudaError_t status, const char* op) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(status));
  }
}

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

void bind_hot_rows(py::module_& m) {
  m.def(
      "resolve_rows",
      [](uint64_t tokens, uint64_t counts, uint64_t page_table, uint64_t seq_slots,
         uint64_t cu_seqlens_q, uint64_t query_seq, uint64_t slot_map, uint64_t slot_key,
         uint64_t slot_stamp, uint64_t chunk_owner, uint64_t set_mean, uint64_t step,
         uint64_t locations, uint64_t fetch_src, uint64_t fetch_dst, uint64_t fetch_counts,
         uint64_t fetch_direct, uint64_t counters, int num_queries, int num_seqs, int num_kv_heads,
         int capacity, int fetch_capacity, int num_chunks, int first_row, int page_size,
         int64_t table_stride, int64_t keys_per_head, uint64_t stream) {
        const twilight::ResolveRowsParams p{as<int>(tokens),
                                            as<int>(counts),
                                            as<int>(page_table),
                                            as<int>(seq_slots),
                                            as<int>(cu_seqlens_q),
                                            as<int>(query_seq),
                                            as<int>(slot_map),
                                            as<int>(slot_key),
                                            as<int>(slot_stamp),
                                            as<int>(chunk_owner),
                                            as<float>(set_mean),
                                            as<int>(step),
                                            as<int>(locations),
                                            as<int>(fetch_src),
                                            as<int>(fetch_dst),
                                            as<int>(fetch_counts),
                                            as<int>(fetch_direct),
                                            as<int64_t>(counters),
                                            num_queries,
                                            num_seqs,
                                            num_kv_heads,
                                            capacity,
                                            fetch_capacity,
                                            num_chunks,
                                            first_row,
                                            page_size,
                                            table_stride,
                                            keys_per_head};
        check(twilight::launch_resolve_rows(p, as_stream(stream)), "resolve_rows");
      },
      py::kw_only(), py::arg("tokens"), py::arg("counts"), py::arg("page_table"),
      py::arg("seq_slots"), py::arg("cu_seqlens_q"), py::arg("query_seq"), py::arg("slot_map"),
      py::arg("slot_key"), py::arg("slot_stamp"), py::arg("chunk_owner"), py::arg("set_mean"),
      py::arg("step"), py::arg("locations"), py::arg("fetch_src"), py::arg("fetch_dst"),
      py::arg("fetch_counts"), py::arg("fetch_direct"), py::arg("counters"), py::arg("num_queries"),
      py::arg("num_seqs"), py::arg("num_kv_heads"), py::arg("capacity"), py::arg("fetch_capacity"),
      py::arg("num_chunks"), py::arg("first_row"), py::arg("page_size"), py::arg("table_stride"),
      py::arg("keys_per_head"), py::arg("stream"));
  m.def(
      "rebalance_quotas",
      [](uint64_t slot_map, uint64_t slot_key, uint64_t chunk_owner, uint64_t set_mean,
         uint64_t active, int num_chunks, int num_owners, int num_kv_heads, int64_t keys_per_head,
         uint64_t stream) {
        const twilight::RebalanceQuotasParams p{
            as<int>(slot_map),   as<int>(slot_key),   as<int>(chunk_owner),
            as<float>(set_mean), as<uint8_t>(active), num_chunks,
            num_owners,          num_kv_heads,        keys_per_head};
        check(twilight::launch_rebalance_quotas(p, as_stream(stream)), "rebalance_quotas");
      },
      py::kw_only(), py::arg("slot_map"), py::arg("slot_key"), py::arg("chunk_owner"),
      py::arg("set_mean"), py::arg("active"), py::arg("num_chunks"), py::arg("num_owners"),
      py::arg("num_kv_heads"), py::arg("keys_per_head"), py::arg("stream"));
  m.def(
      "release_sequence",
      [](uint64_t slot_map, uint64_t slot_key, uint64_t chunk_owner, uint64_t set_mean,
         uint64_t page_ids, int num_pages, int seq_slot, int num_chunks, int num_kv_heads,
         int page_size, int64_t keys_per_head, int first_row, uint64_t stream) {
        const twilight::ReleaseSequenceParams p{as<int>(slot_map),
                                                as<int>(slot_key),
                                                as<int>(chunk_owner),
                                                as<float>(set_mean),
                                                as<int>(page_ids),
                                                num_pages,
                                                seq_slot,
                                                num_chunks,
                                                num_kv_heads,
                                                page_size,
                                                keys_per_head,
                                                first_row};
        check(twilight::launch_release_sequence(p, as_stream(stream)), "release_sequence");
      },
      py::kw_only(), py::arg("slot_map"), py::arg("slot_key"), py::arg("chunk_owner"),
      py::arg("set_mean"), py::arg("page_ids"), py::arg("num_pages"), py::arg("seq_slot"),
      py::arg("num_chunks"), py::arg("num_kv_heads"), py::arg("page_size"),
      py::arg("keys_per_head"), py::arg("first_row"), py::arg("stream"));
  m.def(
      "gather_rows",
      [](uint64_t host_kv, uint64_t src, uint64_t dst, uint64_t counts, uint64_t rows,
         uint64_t counters, int num_segments, int num_kv_heads, int fetch_capacity,
         int64_t head_stride_bytes, int row_bytes, int num_blocks, uint64_t stream) {
        const twilight::GatherRowsParams p{as<char>(host_kv), as<int>(src),   as<int>(dst),
                                           as<int>(counts),   as<char>(rows), as<int64_t>(counters),
                                           num_segments,      num_kv_heads,   fetch_capacity,
                                           head_stride_bytes, row_bytes,      num_blocks};
        check(twilight::launch_gather_rows(p, as_stream(stream)), "gather_rows");
      },
      py::kw_only(), py::arg("host_kv"), py::arg("src"), py::arg("dst"), py::arg("counts"),
      py::arg("rows"), py::arg("counters"), py::arg("num_segments"), py::arg("num_kv_heads"),
      py::arg("fetch_capacity"), py::arg("head_stride_bytes"), py::arg("row_bytes"),
      py::arg("num_blocks"), py::arg("stream"));
}

void bind_index(py::module_& m) {
  m.def(
      "append_rows",
      [](uint64_t k, uint64_t v, std::array<int64_t, 2> k_stride_bytes,
         std::array<int64_t, 2> v_stride_bytes, uint64_t host_kv, int64_t host_head_bytes,
         uint64_t pages, int64_t pages_head_bytes, uint64_t windows, int window_rows, int num_sink,
         uint64_t page_table, int64_t page_table_stride, uint64_t seq_slots, uint64_t seq_lens,
         uint64_t query_seq, uint64_t positions, uint64_t counters, int num_queries,
         int num_kv_heads, int page_size, int head_bytes, uint64_t stream) {
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
                                           as<int>(query_seq),
                                           as<int>(positions),
                                           as<int64_t>(counters),
                                           num_queries,
                                           num_kv_heads,
                                           page_size,
                                           head_bytes};
        check(twilight::launch_append_rows(p, as_stream(stream)), "append_rows");
      },
      py::kw_only(), py::arg("k"), py::arg("v"), py::arg("k_stride_bytes"),
      py::arg("v_stride_bytes"), py::arg("host_kv"), py::arg("host_head_bytes"), py::arg("pages"),
      py::arg("pages_head_bytes"), py::arg("windows"), py::arg("window_rows"), py::arg("num_sink"),
      py::arg("page_table"), py::arg("page_table_stride"), py::arg("seq_slots"),
      py::arg("seq_lens"), py::arg("query_seq"), py::arg("positions"), py::arg("counters"),
      py::arg("num_queries"), py::arg("num_kv_heads"), py::arg("page_size"), py::arg("head_bytes"),
      py::arg("stream"));
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
      "index_window_pages",
      [](uint64_t rows, int num_sink, int window_rows, uint64_t page_table,
         int64_t page_table_stride, uint64_t seq_slots, uint64_t query_seq, uint64_t positions,
         int num_queries, uint64_t k_codes, uint64_t k_scale, uint64_t k_bounds, uint64_t v_codes,
         uint64_t v_scale, uint64_t v_mean, int page_size, int num_kv_heads, int head_dim,
         int dtype, uint64_t stream) {
        const twilight::WindowPagesParams source{
            as<void>(rows),      num_sink,           window_rows,
            as<int>(page_table), page_table_stride,  as<int>(seq_slots),
            as<int>(query_seq),  as<int>(positions), num_queries};
        const auto index = index_params(k_codes, k_scale, k_bounds, v_codes, v_scale, v_mean,
                                        page_size, num_kv_heads, head_dim, dtype);
        check(twilight::launch_index_window_pages(source, index, as_stream(stream)),
              "index_window_pages");
      },
      py::kw_only(), py::arg("rows"), py::arg("num_sink"), py::arg("window_rows"),
      py::arg("page_table"), py::arg("page_table_stride"), py::arg("seq_slots"),
      py::arg("query_seq"), py::arg("positions"), py::arg("num_queries"), py::arg("k_codes"),
      py::arg("k_scale"), py::arg("k_bounds"), py::arg("v_codes"), py::arg("v_scale"),
      py::arg("v_mean"), py::arg("page_size"), py::arg("num_kv_heads"), py::arg("head_dim"),
      py::arg("dtype"), py::arg("stream"));
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

void bind_pruning(py::module_& m) {
  m.def("estimate_scores_chunks", &twilight::estimate_scores_chunks, py::kw_only(),
        py::arg("max_len"), py::arg("page_size"), py::arg("num_sink"), py::arg("window_rows"));
  m.def(
      "estimate_scores",
      [](uint64_t q, uint64_t k_codes, uint64_t k_scale, uint64_t k_bounds, uint64_t rows,
         uint64_t candidates, uint64_t page_table, uint64_t seq_slots, uint64_t window_starts,
         uint64_t query_seq, uint64_t positions, uint64_t ctx_starts, uint64_t scores, uint64_t lse,
         uint64_t partials, int num_rows, int num_kv_heads, int group, int head_dim, int page_size,
         int num_sink, int window_rows, int max_len, int capacity, int table_stride, int num_blocks,
         int row_dtype, bool per_token, bool drop, float softmax_scale, int64_t codes_page_stride,
         int64_t scale_page_stride, int64_t bounds_page_stride, uint64_t stream) {
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
        p.partials = as<float>(partials);
        p.num_rows = num_rows;
        p.num_kv_heads = num_kv_heads;
        p.group = group;
        p.head_dim = head_dim;
        p.page_size = page_size;
        p.num_sink = num_sink;
        p.window_rows = window_rows;
        p.max_len = max_len;
        p.capacity = capacity;
        p.table_stride = table_stride;
        p.num_blocks = num_blocks;
        p.row_dtype = row_dtype;
        p.per_token = per_token;
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
      py::arg("scores"), py::arg("lse"), py::arg("partials"), py::arg("num_rows"),
      py::arg("num_kv_heads"), py::arg("group"), py::arg("head_dim"), py::arg("page_size"),
      py::arg("num_sink"), py::arg("window_rows"), py::arg("max_len"), py::arg("capacity"),
      py::arg("table_stride"), py::arg("num_blocks"), py::arg("row_dtype"), py::arg("per_token"),
      py::arg("drop"), py::arg("softmax_scale"), py::arg("codes_page_stride"),
      py::arg("scale_page_stride"), py::arg("bounds_page_stride"), py::arg("stream"));
  m.def(
      "prune",
      [](uint64_t scores, uint64_t lse, uint64_t top_p, uint64_t index_top_p, uint64_t top_k,
         uint64_t candidates, uint64_t window_starts, uint64_t query_seq, uint64_t positions,
         uint64_t ctx_starts, uint64_t weights, uint64_t exact_tokens, uint64_t exact_counts,
         uint64_t index_tokens, uint64_t index_counts, uint64_t grades, uint64_t mass, int num_rows,
         int num_kv_heads, int group, int page_size, int num_sink, int max_len, int capacity,
         int exact_capacity, int index_capacity, int grades_capacity, int block, int num_blocks,
         bool unite, bool expand_pages, uint64_t stream) {
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
        p.index_tokens = as<int>(index_tokens);
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
        p.index_capacity = index_capacity;
        p.grades_capacity = grades_capacity;
        p.block = block;
        p.num_blocks = num_blocks;
        p.unite = unite;
        p.expand_pages = expand_pages;
        check(twilight::launch_prune(p, as_stream(stream)), "prune");
      },
      py::kw_only(), py::arg("scores"), py::arg("lse"), py::arg("top_p"), py::arg("index_top_p"),
      py::arg("top_k"), py::arg("candidates"), py::arg("window_starts"), py::arg("query_seq"),
      py::arg("positions"), py::arg("ctx_starts"), py::arg("weights"), py::arg("exact_tokens"),
      py::arg("exact_counts"), py::arg("index_tokens"), py::arg("index_counts"), py::arg("grades"),
      py::arg("mass"), py::arg("num_rows"), py::arg("num_kv_heads"), py::arg("group"),
      py::arg("page_size"), py::arg("num_sink"), py::arg("max_len"), py::arg("capacity"),
      py::arg("exact_capacity"), py::arg("index_capacity"), py::arg("grades_capacity"),
      py::arg("block"), py::arg("num_blocks"), py::arg("unite"), py::arg("expand_pages"),
      py::arg("stream"));
}

void bind_attend(py::module_& m) {
  using twilight::SplitWork;
  using twilight::StepView;
  py::class_<SplitWork>(m, "SplitWork")
      .def(py::init([](int num_queries, int num_kv_heads, int group, int num_blocks,
                       uint64_t workspace, uint64_t out, uint64_t lse) {
             return SplitWork{num_queries,          num_kv_heads,   group,         num_blocks,
                              as<float>(workspace), as<float>(out), as<float>(lse)};
           }),
           py::kw_only(), py::arg("num_queries"), py::arg("num_kv_heads"), py::arg("group"),
           py::arg("num_blocks"), py::arg("workspace"), py::arg("out"), py::arg("lse"));
  py::class_<StepView>(m, "StepView")
      .def(py::init([](uint64_t page_table, uint64_t seq_slots, uint64_t window_starts,
                       uint64_t query_seq, uint64_t positions, uint64_t ctx_starts,
                       int64_t page_table_stride, int page_size, int num_sink) {
             return StepView{as<int>(page_table), as<int>(seq_slots), as<int>(window_starts),
                             as<int>(query_seq),  as<int>(positions), as<int>(ctx_starts),
                             page_table_stride,   page_size,          num_sink};
           }),
           py::kw_only(), py::arg("page_table"), py::arg("seq_slots"), py::arg("window_starts"),
           py::arg("query_seq"), py::arg("positions"), py::arg("ctx_starts"),
           py::arg("page_table_stride"), py::arg("page_size"), py::arg("num_sink"));
  m.def(
      "attend_pages",
      [](const SplitWork& work, const StepView& step, uint64_t q, uint64_t pages,
         int64_t head_bytes, uint64_t streamed_bytes, float softmax_scale, int head_dim,
         int row_dtype, uint64_t stream) {
        const twilight::AttendPagesParams p{work,          step,
                                            as<void>(q),   as<void>(pages),
                                            head_bytes,    as<int64_t>(streamed_bytes),
                                            softmax_scale, head_dim,
                                            row_dtype};
        check(twilight::launch_attend_pages(p, as_stream(stream)), "attend_pages");
      },
      py::kw_only(), py::arg("work"), py::arg("step"), py::arg("q"), py::arg("pages"),
      py::arg("head_bytes"), py::arg("streamed_bytes"), py::arg("softmax_scale"),
      py::arg("head_dim"), py::arg("row_dtype"), py::arg("stream"));
  m.def(
      "attend_rows",
      [](const SplitWork& work, const StepView& step, uint64_t q, uint64_t pool, uint64_t host_kv,
         int64_t host_head_bytes, uint64_t tokens, uint64_t counts, uint64_t locations,
         uint64_t direct_bytes, int64_t capacity, int window_rows, float softmax_scale,
         int head_dim, int row_dtype, uint64_t stream) {
        const twilight::AttendRowsParams p{work,
                                           step,
                                           as<void>(q),
                                           as<void>(pool),
                                           as<void>(host_kv),
                                           host_head_bytes,
                                           as<int>(tokens),
                                           as<int>(counts),
                                           as<int>(locations),
                                           as<int64_t>(direct_bytes),
                                           capacity,
                                           window_rows,
                                           softmax_scale,
                                           head_dim,
                                           row_dtype};
        check(twilight::launch_attend_rows(p, as_stream(stream)), "attend_rows");
      },
      py::kw_only(), py::arg("work"), py::arg("step"), py::arg("q"), py::arg("pool"),
      py::arg("host_kv"), py::arg("host_head_bytes"), py::arg("tokens"), py::arg("counts"),
      py::arg("locations"), py::arg("direct_bytes"), py::arg("capacity"), py::arg("window_rows"),
      py::arg("softmax_scale"), py::arg("head_dim"), py::arg("row_dtype"), py::arg("stream"));
  m.def(
      "attend_index",
      [](const SplitWork& work, const StepView& step, uint64_t scores, uint64_t v_codes,
         uint64_t v_scale, uint64_t tokens, uint64_t counts, int64_t score_capacity,
         int64_t list_capacity, int head_dim, uint64_t stream) {
        const twilight::AttendIndexParams p{work,
                                            step,
                                            as<float>(scores),
                                            as<uint8_t>(v_codes),
                                            as<void>(v_scale),
                                            as<int>(tokens),
                                            as<int>(counts),
                                            score_capacity,
                                            list_capacity,
                                            head_dim};
        check(twilight::launch_attend_index(p, as_stream(stream)), "attend_index");
      },
      py::kw_only(), py::arg("work"), py::arg("step"), py::arg("scores"), py::arg("v_codes"),
      py::arg("v_scale"), py::arg("tokens"), py::arg("counts"), py::arg("score_capacity"),
      py::arg("list_capacity"), py::arg("head_dim"), py::arg("stream"));
  m.def(
      "attend_means",
      [](const SplitWork& work, const StepView& step, uint64_t scores, uint64_t grades,
         uint64_t v_mean, int64_t score_capacity, int64_t grade_capacity, int head_dim,
         uint64_t stream) {
        const twilight::AttendMeansParams p{work,
                                            step,
                                            as<float>(scores),
                                            as<uint8_t>(grades),
                                            as<void>(v_mean),
                                            score_capacity,
                                            grade_capacity,
                                            head_dim};
        check(twilight::launch_attend_means(p, as_stream(stream)), "attend_means");
      },
      py::kw_only(), py::arg("work"), py::arg("step"), py::arg("scores"), py::arg("grades"),
      py::arg("v_mean"), py::arg("score_capacity"), py::arg("grade_capacity"), py::arg("head_dim"),
      py::arg("stream"));
  m.def(
      "merge_states",
      [](const std::vector<uint64_t>& outs, const std::vector<uint64_t>& lses, uint64_t out,
         uint64_t lse, int rows, int head_dim, int row_dtype, uint64_t stream) {
        if (outs.size() != lses.size() || outs.size() > twilight::kMaxStates) {
          throw std::invalid_argument("merge_states: too many states, or unequal numbers");
        }
        twilight::MergeStatesParams p{};
        for (size_t i = 0; i < outs.size(); ++i) {
          p.outs[i] = as<float>(outs[i]);
          p.lses[i] = as<float>(lses[i]);
        }
        p.out = as<void>(out);
        p.lse = as<float>(lse);
        p.num_states = static_cast<int>(outs.size());
        p.rows = rows;
        p.head_dim = head_dim;
        p.row_dtype = row_dtype;
        check(twilight::launch_merge_states(p, as_stream(stream)), "merge_states");
      },
      py::kw_only(), py::arg("outs"), py::arg("lses"), py::arg("out"), py::arg("lse"),
      py::arg("rows"), py::arg("head_dim"), py::arg("row_dtype"), py::arg("stream"));
}
#endif

// Raises one of the exceptions of twilight_engine/kv/errors.py, which is plain Python.
template <typename... Args>
void raise_kv_error(const char* name, Args... args) {
  const py::object type = py::module_::import("twilight_engine.kv.errors").attr(name);
  PyErr_SetObject(type.ptr(), type(args...).ptr());
}

void bind_probes(py::module_& m) {
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  m.def(
      "host_limits",
      [](const std::string& root) {
        const twilight::HostLimits limits = twilight::read_host_limits(root);
        return std::map<std::string, int64_t>{{"mem_available_bytes", limits.mem_available_bytes},
                                              {"cgroup_limit_bytes", limits.cgroup_limit_bytes},
                                              {"cgroup_used_bytes", limits.cgroup_used_bytes},
                                              {"memlock_bytes", limits.memlock_bytes},
                                              {"usable_bytes", limits.usable_bytes()}};
      },
      py::arg("root") = "");
  m.def(
      "measure_link",
      [](int device, int64_t bytes, int repeats) {
        const twilight::LinkSpeed link = twilight::measure_link(device, bytes, repeats);
        return std::pair{link.to_device_gbps, link.to_host_gbps};
      },
      py::arg("device"), py::arg("bytes") = int64_t{64} << 20, py::arg("repeats") = 8, nogil);
  m.def("time_host_alloc", &twilight::time_host_alloc, py::arg("device"), py::arg("bytes"), nogil);
  m.def("device_numa_node", &twilight::device_numa_node, py::arg("device"), nogil);
}

void bind_engine(py::module_& m) {
  using twilight::HostArena;
  using twilight::PagePool;
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const twilight::OutOfPages& e) {
      raise_kv_error("OutOfPages", e.what(), e.wanted, e.free);
    } catch (const twilight::HostMemoryError& e) {
      raise_kv_error("HostMemoryError", e.what());
    }
  });

  const auto nogil = py::call_guard<py::gil_scoped_release>();
  py::class_<HostArena>(m, "HostArena", py::buffer_protocol())
      .def(py::init(
               [](int64_t layers, int64_t heads, int64_t pages, int64_t page_bytes, int device) {
                 return std::make_unique<HostArena>(
                     twilight::ArenaShape{layers, heads, pages, page_bytes}, device);
               }),
           py::kw_only(), py::arg("num_layers"), py::arg("num_kv_heads"), py::arg("num_pages"),
           py::arg("page_bytes"), py::arg("device") = -1)
      .def_buffer([](HostArena& a) {
        return py::buffer_info(reinterpret_cast<uint8_t*>(a.data()), a.reserved_bytes());
      })
      .def("memory",
           [](const py::object& self) {  // a view holds the object, and so the address space
             if (self.cast<HostArena&>().closed()) throw std::runtime_error("HostArena is closed");
             return py::memoryview(self);
           })
      .def("ensure_pages", &HostArena::ensure_pages, py::arg("num_pages"), nogil)
      .def("close", &HostArena::close, nogil)
      .def("offset", &HostArena::offset, py::arg("layer"), py::arg("kv_head"), py::arg("page"))
      .def_property_readonly("strip_pages", &HostArena::strip_pages)
      .def_property_readonly("extent_pages", &HostArena::extent_pages)
      .def_property_readonly("grown_pages", &HostArena::grown_pages)
      .def_property_readonly("reserved_bytes", &HostArena::reserved_bytes)
      .def_property_readonly("touched_bytes", &HostArena::touched_bytes)
      .def_property_readonly("registered_bytes", &HostArena::registered_bytes)
      .def_property_readonly("num_registrations", &HostArena::num_registrations)
      .def_property_readonly("touch_seconds", &HostArena::touch_seconds)
      .def_property_readonly("register_seconds", &HostArena::register_seconds)
      .def_property_readonly("numa_node", &HostArena::numa_node)
      .def_property_readonly("closed", &HostArena::closed);

  using Pages = std::vector<int32_t>;
  py::class_<PagePool>(m, "PagePool")
      .def(py::init<int64_t>(), py::arg("num_pages"))
      .def("allocate", &PagePool::allocate, py::arg("n"), py::arg("exact") = true,
           py::arg("after") = -1)
      .def(
          "share", [](PagePool& p, const Pages& pages) { p.share(pages); }, py::arg("pages"))
      .def(
          "release",
          [](PagePool& p, const Pages& pages, int64_t epoch) { p.release(pages, epoch); },
          py::arg("pages"), py::arg("epoch") = -1)
      .def("complete", &PagePool::complete, py::arg("epoch"))
      .def(
          "mark_sparse", [](PagePool& p, const Pages& pages) { p.mark_sparse(pages); },
          py::arg("pages"))
      .def("references", &PagePool::references, py::arg("page"))
      .def("is_exact", &PagePool::is_exact, py::arg("page"))
      .def_property_readonly("num_pages", &PagePool::num_pages)
      .def_property_readonly("num_free", &PagePool::num_free)
      .def_property_readonly("num_pending", &PagePool::num_pending);

  using twilight::Direction;
  using twilight::Transfers;
  py::class_<Transfers>(m, "Transfers")
      .def(py::init<const HostArena&>(), py::arg("arena"), py::keep_alive<1, 2>())
      .def(
          "copy",
          [](Transfers& t, bool to_host, int64_t layer, int64_t head_begin, int64_t head_end,
             uint64_t pages, int64_t num_pages, uint64_t device, int64_t device_bytes,
             uint64_t stream) {
            t.copy(to_host ? Direction::kToHost : Direction::kToDevice,
                   {layer,
                    head_begin,
                    head_end,
                    {reinterpret_cast<const int32_t*>(pages), static_cast<size_t>(num_pages)}},
                   reinterpret_cast<std::byte*>(device), device_bytes,
                   reinterpret_cast<void*>(stream));
          },
          py::kw_only(), py::arg("to_host"), py::arg("layer"), py::arg("head_begin"),
          py::arg("head_end"), py::arg("pages"), py::arg("num_pages"), py::arg("device"),
          py::arg("device_bytes"), py::arg("stream"), nogil)
      .def(
          "totals",
          [](Transfers& t, bool to_host) {
            const auto sum = t.totals(to_host ? Direction::kToHost : Direction::kToDevice);
            return py::make_tuple(sum.copies, sum.bytes, sum.timed_bytes, sum.busy_seconds);
          },
          py::arg("to_host"));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels and the offload engine; called by twilight_engine.ops and twilight_engine.kv.";
#ifdef TWILIGHT_CUDA
  m.attr("has_cuda") = true;
  bind_attend(m);
  bind_index(m);
  bind_hot_rows(m);
  bind_pruning(m);
#else
  m.attr("has_cuda") = false;
#endif
  bind_engine(m);
  bind_probes(m);
}
