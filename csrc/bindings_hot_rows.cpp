// resolve_rows, hot_quotas and gather_rows.
#ifdef TWILIGHT_CUDA
#include "csrc/bindings.h"
#include "csrc/gather_rows.h"
#include "csrc/hot_quotas.h"
#include "csrc/resolve_rows.h"

namespace twilight::bindings {

void bind_hot_rows(py::module_& m) {
  m.def(
      "resolve_rows",
      [](uint64_t tokens, uint64_t counts, uint64_t page_table, uint64_t seq_slots,
         uint64_t cu_seqlens_q, uint64_t query_seq, uint64_t slot_map, uint64_t slot_key,
         uint64_t slot_stamp, uint64_t chunk_owner, uint64_t set_mean, uint64_t step,
         uint64_t locations, uint64_t fetch_src, uint64_t fetch_dst, uint64_t fetch_counts,
         uint64_t fetch_direct, uint64_t counters, int num_queries, int num_seqs, int num_kv_heads,
         int capacity, int fetch_capacity, int num_chunks, int first_row, int page_size,
         int table_pages, int64_t table_stride, int64_t keys_per_head, bool shared_pages,
         uint64_t announced, unsigned layer, uint64_t stream) {
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
                                            table_pages,
                                            table_stride,
                                            keys_per_head,
                                            shared_pages,
                                            as<uint64_t>(announced),
                                            layer};
        check(twilight::launch_resolve_rows(p, as_stream(stream)), "resolve_rows");
      },
      py::kw_only(), py::arg("tokens"), py::arg("counts"), py::arg("page_table"),
      py::arg("seq_slots"), py::arg("cu_seqlens_q"), py::arg("query_seq"), py::arg("slot_map"),
      py::arg("slot_key"), py::arg("slot_stamp"), py::arg("chunk_owner"), py::arg("set_mean"),
      py::arg("step"), py::arg("locations"), py::arg("fetch_src"), py::arg("fetch_dst"),
      py::arg("fetch_counts"), py::arg("fetch_direct"), py::arg("counters"), py::arg("num_queries"),
      py::arg("num_seqs"), py::arg("num_kv_heads"), py::arg("capacity"), py::arg("fetch_capacity"),
      py::arg("num_chunks"), py::arg("first_row"), py::arg("page_size"), py::arg("table_pages"),
      py::arg("table_stride"), py::arg("keys_per_head"), py::arg("shared_pages"),
      py::arg("announced"), py::arg("layer"), py::arg("stream"));
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
         uint64_t counters, uint64_t times, int num_segments, int num_kv_heads, int fetch_capacity,
         int64_t head_stride_bytes, int row_bytes, int num_blocks, uint64_t announced,
         uint64_t step, unsigned layer, uint64_t stream) {
        const twilight::GatherRowsParams p{as<char>(host_kv),  as<int>(src),
                                           as<int>(dst),       as<int>(counts),
                                           as<char>(rows),     as<int64_t>(counters),
                                           as<int64_t>(times), num_segments,
                                           num_kv_heads,       fetch_capacity,
                                           head_stride_bytes,  row_bytes,
                                           num_blocks,         as<uint64_t>(announced),
                                           as<int>(step),      layer};
        check(twilight::launch_gather_rows(p, as_stream(stream)), "gather_rows");
      },
      py::kw_only(), py::arg("host_kv"), py::arg("src"), py::arg("dst"), py::arg("counts"),
      py::arg("rows"), py::arg("counters"), py::arg("times"), py::arg("num_segments"),
      py::arg("num_kv_heads"), py::arg("fetch_capacity"), py::arg("head_stride_bytes"),
      py::arg("row_bytes"), py::arg("num_blocks"), py::arg("announced"), py::arg("step"),
      py::arg("layer"), py::arg("stream"));
}

}  // namespace twilight::bindings
#endif
