"""Steps as CUDA graphs: the tokens and counters of eager steps, whatever changes in between."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.runtime.tiny import CONFIG, KV, prompt_ids, tiny_llm
from twilight_engine import LLM, KVConfig, RequestOutput, SamplingParams, SparseConfig
from twilight_engine.attention.selectors import DoubleSparsitySelector, LayerView
from twilight_engine.attention.step import bucket
from twilight_engine.runtime.step_graph import garbage_kept

LENGTHS = [150, 40, 97]
PRESETS = ("balanced", "lean", "paper")


def kv(preset: str) -> KVConfig:
    changes = {f.name: getattr(KV, f.name) for f in dataclasses.fields(KV)}
    return KVConfig.preset(preset, **{k: v for k, v in changes.items() if not k.endswith("index")})


def run(llm: LLM, sparse: SparseConfig, *, tokens: int = 40) -> list[RequestOutput]:
    """Sequences of different lengths and ends: they leave the batch at different steps."""
    params = [
        SamplingParams(temperature=0.0, max_tokens=tokens - 9 * i, ignore_eos=True)
        for i in range(len(LENGTHS))
    ]
    prompts = [prompt_ids(length, i) for i, length in enumerate(LENGTHS)]
    return llm.generate(prompts, params, sparse_config=sparse, use_tqdm=False)


def alike(a: list[RequestOutput], b: list[RequestOutput]) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.outputs[0].token_ids == y.outputs[0].token_ids
        assert x.metrics.host_to_device_bytes == y.metrics.host_to_device_bytes
        assert x.metrics.hit_rate == y.metrics.hit_rate


def both(sparse: SparseConfig, **options: Any) -> tuple[list[RequestOutput], list[RequestOutput]]:
    with tiny_llm(device="cuda", **options) as llm:
        graphs = run(llm, sparse)
    with tiny_llm(device="cuda", enforce_eager=True, **options) as llm:
        return graphs, run(llm, sparse)


@pytest.mark.parametrize("size", [16, 64])
def test_buckets_bound_lengths_and_are_few(size: int) -> None:
    found = set()
    for length in range(1, 4096 * size, 37):
        top = bucket(length, size)
        pages = -(-length // size)
        assert top % size == 0 and pages * size <= top <= max(pages + 1, pages * 9 // 8) * size
        assert bucket(top, size) == top
        found.add(top)
    assert len(found) <= 16 + 8 * 9


@pytest.mark.gpu
@pytest.mark.parametrize("preset", PRESETS)
def test_tokens_and_traffic_of_eager_steps(preset: str) -> None:
    alike(*both(SparseConfig.preset(preset), kv_config=kv(preset)))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sparse",
    [
        SparseConfig(attn_top_p=1.0),
        SparseConfig(policy="dense"),
        SparseConfig(group_rule="union", fetch="page"),
        SparseConfig(selector="streaming", selector_budget=64),
        SparseConfig(audit_every=3),
    ],
    ids=["every-row", "streamed", "union-page", "streaming", "audited"],
)
def test_other_steps(sparse: SparseConfig) -> None:
    alike(*both(sparse))


@pytest.mark.gpu
@pytest.mark.parametrize("selector", ["double_sparsity", "double_sparsity_online", "lsh"])
def test_selectors_of_tokens(selector: str) -> None:
    chosen: object = selector
    if selector == "double_sparsity":
        ranking = torch.arange(CONFIG.head_dim).expand(CONFIG.num_layers, CONFIG.num_kv_heads, -1)
        chosen = DoubleSparsitySelector.from_ranking(ranking)
    config = dataclasses.replace(KV, lsh=(4, 30) if selector == "lsh" else None)
    alike(*both(SparseConfig(selector=chosen, selector_budget=40), kv_config=config))


@pytest.mark.gpu
def test_a_dense_cache_on_the_device() -> None:
    config = dataclasses.replace(KV, dense_layers="all")
    alike(*both(SparseConfig(policy="dense"), kv_config=config))


@pytest.mark.gpu
def test_a_model_with_windows() -> None:
    model = dataclasses.replace(CONFIG, sliding_windows=(None, 48, None))
    alike(*both(SparseConfig(), model=model))


@pytest.mark.gpu
def test_later_calls_use_the_same_memory() -> None:
    with tiny_llm(device="cuda") as llm:
        first = run(llm, SparseConfig())
        torch.cuda.synchronize()
        before = torch.cuda.memory_reserved()
        for _ in range(5):
            alike(first, run(llm, SparseConfig()))
        assert torch.cuda.memory_reserved() == before


@pytest.mark.gpu
def test_link_time_is_that_of_the_fetches() -> None:
    for outputs in both(SparseConfig(attn_top_p=0.95)):
        for output in outputs:
            assert (output.metrics.link_s > 0) == (output.metrics.fetched_bytes > 0)
            assert output.metrics.link_s < output.metrics.decode_s


class ReadsOnTheHost:
    """A selector that breaks the rule."""

    def select(self, q: Tensor, view: LayerView) -> Tensor | None:
        assert q.sum().item() == q.sum().item()
        return None


@pytest.mark.gpu
def test_a_selector_that_waits_is_refused_with_a_reason() -> None:
    sparse = SparseConfig(selector=ReadsOnTheHost())
    with tiny_llm(device="cuda") as llm:
        with pytest.raises(RuntimeError, match="must not read device values on the host"):
            run(llm, sparse)
        run(llm, SparseConfig())  # the engine lives on
    with tiny_llm(device="cuda", enforce_eager=True) as llm:
        run(llm, sparse)


class Knot:
    """Refers to itself, so that only a collection frees it."""

    def __init__(self) -> None:
        self.me = self


def test_garbage_is_collected_before_and_not_within() -> None:
    old = weakref.ref(Knot())
    with pytest.raises(RuntimeError, match="the step failed"), garbage_kept():
        assert old() is None
        new = weakref.ref(Knot())
        for _ in range(10 * sum(gc.get_threshold())):
            Knot()
        assert new() is not None
        raise RuntimeError("the step failed")
    assert gc.isenabled()
