"""Audits of requests: the same tokens, the right request, and the same triples again."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from tests.runtime.tiny import CONFIG, prompt_ids, tiny_llm
from twilight_engine import LLM, RequestOutput, SamplingParams, SparseConfig
from twilight_engine.attention.audit_record import Audits
from twilight_engine.kv.errors import OutOfPages

PAIRS = {(layer, head) for layer in (1, 2) for head in range(CONFIG.num_kv_heads)}
LENGTHS = [150, 40, 97]


def run(
    llm: LLM, sparse: SparseConfig | list[SparseConfig], *, tokens: int = 9, n: int = 1
) -> list[RequestOutput]:
    params = SamplingParams(temperature=n - 1, max_tokens=tokens, ignore_eos=True, n=n, seed=0)
    prompts = [prompt_ids(length, i) for i, length in enumerate(LENGTHS)]
    return llm.generate(prompts, params, sparse_config=sparse, use_tqdm=False)


def audits_of(output: RequestOutput) -> Audits:
    assert output.metrics is not None and output.metrics.audits is not None
    return output.metrics.audits


@pytest.mark.parametrize("p", [0.8, 1.0])
def test_tokens_and_traffic_are_the_same_with_audits(p: float) -> None:
    config = SparseConfig(attn_top_p=p)
    with tiny_llm() as plain, tiny_llm() as audited:
        off, on = run(plain, config), run(audited, config.replace(audit_every=1))
    for a, b in zip(off, on, strict=True):
        assert a.outputs[0].token_ids == b.outputs[0].token_ids
        assert a.metrics.host_to_device_bytes == b.metrics.host_to_device_bytes
        assert a.metrics.audits is None and a.metrics.audit_bytes == 0
        assert b.metrics.audit_bytes == audits_of(b).bytes.sum() > 0


def test_each_request_has_its_own_audits() -> None:
    config = SparseConfig()
    with tiny_llm() as llm:
        sparse = [config.replace(audit_every=1), config, config.replace(audit_every=2)]
        often, never, seldom = run(llm, sparse)
        assert audits_of(often).step.tolist() == list(range(151, 159))
        assert never.metrics.audits is None
        assert 3 <= audits_of(seldom).count <= 5
        assert set(audits_of(seldom).step) <= set(range(98, 106))
        assert (audits_of(often).realised_mass > 0.5).all()
        (again, *_) = run(llm, config.replace(audit_every=1))
        assert audits_of(again).count == 8, "nothing is left from the requests before"


def test_sequences_that_leave_early_take_their_own_audits() -> None:
    with tiny_llm() as llm:
        params = [
            SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
            for tokens in (9, 1, 4)
        ]
        prompts = [prompt_ids(length, i) for i, length in enumerate(LENGTHS)]
        sparse = SparseConfig(audit_every=1)
        long, none, short = llm.generate(prompts, params, sparse_config=sparse, use_tqdm=False)
    assert audits_of(long).step.tolist() == list(range(151, 159))
    assert none.metrics is not None and none.metrics.audits is None
    assert audits_of(short).step.tolist() == [98, 99, 100]


def test_all_sequences_of_a_request_are_audited() -> None:
    with tiny_llm() as llm:
        for output in run(llm, SparseConfig(audit_every=1), n=2):
            length = len(output.prompt_token_ids)
            assert audits_of(output).step.tolist() == 2 * list(range(length + 1, length + 9))


def test_a_long_run_audits_every_graded_layer_and_head() -> None:
    with tiny_llm() as llm:
        for output in run(llm, SparseConfig(audit_every=3), tokens=40):
            found = audits_of(output)
            assert set(zip(found.layer, found.kv_head, strict=True)) == PAIRS


def test_a_new_engine_audits_the_same_and_finds_the_same() -> None:
    runs = []
    for _ in range(2):
        with tiny_llm() as llm:
            runs.append(run(llm, SparseConfig(audit_every=2), tokens=20))
    for a, b in zip(*runs, strict=True):
        for field in fields(Audits):
            np.testing.assert_array_equal(
                getattr(audits_of(a), field.name), getattr(audits_of(b), field.name)
            )


def test_a_run_that_breaks_off_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    with tiny_llm() as llm:
        free = llm.cache.free_tokens
        extend, calls = llm.cache.extend, []

        def out_of_pages(*args: object) -> bool:
            calls.append(args)
            if len(calls) > 10:
                raise OutOfPages("none left", 1, 0)
            return extend(*args)

        with monkeypatch.context() as patch:
            patch.setattr(llm.cache, "extend", out_of_pages)
            with pytest.raises(OutOfPages):
                run(llm, SparseConfig(audit_every=1))
        assert llm.cache.free_tokens == free
        for output in run(llm, SparseConfig(audit_every=1)):
            assert audits_of(output).count == 8
