"""A request's figures against the counters, and against what the run must have moved."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tests.runtime.tiny import CONFIG, prompt_ids, tiny_llm
from twilight_engine import LLM, RequestMetrics, SamplingParams, SparseConfig
from twilight_engine.layout import (
    COUNTER_DIRECT_BYTES,
    COUNTER_FETCHED_BYTES,
    COUNTER_STREAMED_BYTES,
    COUNTER_WRITTEN_BYTES,
)

ROW_BYTES = 2 * CONFIG.head_dim * 4
TOKEN_BYTES = CONFIG.num_layers * CONFIG.num_kv_heads * ROW_BYTES


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with tiny_llm() as made:
        yield made


def run(llm: LLM, lengths: list[int], count: int, sparse: SparseConfig) -> list[RequestMetrics]:
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    prompts = [prompt_ids(length, i) for i, length in enumerate(lengths)]
    outputs = llm.generate(prompts, params, sparse_config=sparse, use_tqdm=False)
    return [output.metrics for output in outputs if output.metrics is not None]


@pytest.mark.parametrize(
    "sparse", [SparseConfig(), SparseConfig(attn_top_p=1.0), SparseConfig(policy="dense")]
)
@pytest.mark.parametrize("lengths", [[150], [150, 40, 97]])
def test_requests_add_up_to_the_counters(
    llm: LLM, lengths: list[int], sparse: SparseConfig
) -> None:
    before = llm.cache.log.counters.clone()
    metrics = run(llm, lengths, 9, sparse)
    moved = (llm.cache.log.counters - before).sum(0)
    for m, length in zip(metrics, lengths, strict=True):
        assert m.prefill_written_bytes == length * TOKEN_BYTES
        assert m.written_bytes == 8 * TOKEN_BYTES
        assert m.num_prompt_tokens == length and m.num_generated_tokens == 9
        assert m.num_decode_steps == 8
    slack = 0 if len(lengths) == 1 else len(lengths) * 8 * CONFIG.num_layers
    for name, column in (
        ("fetched_bytes", COUNTER_FETCHED_BYTES),
        ("direct_bytes", COUNTER_DIRECT_BYTES),
        ("streamed_bytes", COUNTER_STREAMED_BYTES),
    ):
        total = sum(getattr(m, name) for m in metrics)
        assert abs(total - int(moved[column])) <= slack, name
    assert sum(m.device_to_host_bytes for m in metrics) == int(moved[COUNTER_WRITTEN_BYTES])


@pytest.mark.parametrize("sparse", [SparseConfig(), SparseConfig(attn_top_p=1.0)])
def test_fetched_bytes_are_the_missed_rows(llm: LLM, sparse: SparseConfig) -> None:
    (m,) = run(llm, [200], 9, sparse)
    assert m.exact_rows > 0 and m.missed_rows > 0
    assert m.fetched_bytes == m.missed_rows * ROW_BYTES
    assert m.hit_rate == pytest.approx(1 - (m.missed_rows + m.direct_rows) / m.exact_rows)
    assert m.host_to_device_bytes == m.fetched_bytes + m.direct_bytes


def test_every_visible_row_has_one_grade(llm: LLM) -> None:
    (m,) = run(llm, [200], 9, SparseConfig())
    visible = sum(range(201, 209)) * CONFIG.num_layers * CONFIG.num_kv_heads
    assert m.exact_rows + m.index_rows + m.tail_rows + m.resident_rows == visible


def test_budget_and_mass_by_layer(llm: LLM) -> None:
    (m,) = run(llm, [200], 9, SparseConfig())
    assert m.budget_by_layer.shape == (CONFIG.num_layers, CONFIG.num_kv_heads)
    assert np.all(m.budget_by_layer[0] == 0), "layer 0 is dense"
    assert np.all(m.budget_by_layer[1:] > 0)
    assert m.mass_by_layer[0] == 1 and np.all(m.mass_by_layer[1:] >= 0.75)
    assert m.budget_by_layer.sum() * 8 == pytest.approx(m.exact_rows)


def test_times_run_forward(llm: LLM) -> None:
    for m in run(llm, [60, 30], 5, SparseConfig()):
        assert m.arrival_time <= m.started_time <= m.first_token_time <= m.finished_time
        assert m.prefill_s > 0 and m.decode_s > 0 and m.queue_s >= 0
        assert m.time_per_output_token_s == pytest.approx(m.decode_s / 4)
        assert m.time_to_first_token_s <= m.finished_time - m.arrival_time


def test_a_request_of_one_token_has_no_decode_steps(llm: LLM) -> None:
    (m,) = run(llm, [60], 1, SparseConfig())
    assert m.num_decode_steps == 0 and m.decode_s == 0 and m.host_to_device_bytes == 0
    assert m.hit_rate == 1.0 and m.time_per_output_token_s == 0.0
    assert m.budget_by_layer.shape == (CONFIG.num_layers, CONFIG.num_kv_heads)


def test_the_log_does_not_grow_from_call_to_call(llm: LLM) -> None:
    (m,) = run(llm, [60], 5, SparseConfig())
    assert len(m.steps) == 1 and len(m.steps[0].context) == 4
    assert len(llm.cache.log.request(0).context) == 0
