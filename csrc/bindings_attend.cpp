// attend_pages, attend_rows, attend_lower and merge_states.
#ifdef TWILIGHT_CUDA
#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "csrc/attend_lower.h"
#include "csrc/attend_pages.h"
#include "csrc/attend_rows.h"
#include "csrc/bindings.h"
#include "csrc/merge_states.h"

namespace twilight::bindings {

void bind_attend(py::module_& m) {
  using twilight::SplitWork;
  using twilight::StepView;
  py::class_<SplitWork>(m, "SplitWork")
      .def(py::init([](int num_queries, int num_kv_heads, int group, int num_blocks,
                       uint64_t workspace) {
             return SplitWork{num_queries, num_kv_heads, group, num_blocks, as<float>(workspace)};
           }),
           py::kw_only(), py::arg("num_queries"), py::arg("num_kv_heads"), py::arg("group"),
           py::arg("num_blocks"), py::arg("workspace"));
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
      "attend_lower",
      [](const SplitWork& work, const StepView& step, uint64_t scores, uint64_t lse,
         uint64_t grades, uint64_t index_counts, uint64_t v_codes, uint64_t v_scale,
         uint64_t v_mean, int64_t score_capacity, int64_t grade_capacity, int head_dim,
         uint64_t stream) {
        const twilight::AttendLowerParams p{work,
                                            step,
                                            as<float>(scores),
                                            as<float>(lse),
                                            as<uint8_t>(grades),
                                            as<int>(index_counts),
                                            as<uint8_t>(v_codes),
                                            as<void>(v_scale),
                                            as<void>(v_mean),
                                            score_capacity,
                                            grade_capacity,
                                            head_dim};
        check(twilight::launch_attend_lower(p, as_stream(stream)), "attend_lower");
      },
      py::kw_only(), py::arg("work"), py::arg("step"), py::arg("scores"), py::arg("lse"),
      py::arg("grades"), py::arg("index_counts"), py::arg("v_codes"), py::arg("v_scale"),
      py::arg("v_mean"), py::arg("score_capacity"), py::arg("grade_capacity"), py::arg("head_dim"),
      py::arg("stream"));
  m.def(
      "merge_states",
      [](const std::vector<SplitWork>& works, uint64_t out, uint64_t lse, int head_dim,
         int row_dtype, uint64_t stream) {
        if (works.size() > twilight::kMaxStates) {
          throw std::invalid_argument("merge_states: too many states");
        }
        twilight::MergeStatesParams p{};
        std::copy(works.begin(), works.end(), p.works);
        p.out = as<void>(out);
        p.lse = as<float>(lse);
        p.num_states = static_cast<int>(works.size());
        p.head_dim = head_dim;
        p.row_dtype = row_dtype;
        check(twilight::launch_merge_states(p, as_stream(stream)), "merge_states");
      },
      py::kw_only(), py::arg("works"), py::arg("out"), py::arg("lse"), py::arg("head_dim"),
      py::arg("row_dtype"), py::arg("stream"));
}

}  // namespace twilight::bindings
#endif
