"""EvalEngine: every method's answers are LLM.generate's, its predictions a plain forward's."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.eval.harness import (
    BALANCED,
    DENSE,
    ITEMS,
    METHODS,
    PASSAGES,
    by_plain_forward,
    engine,
    tiny_loaded,
)
from tests.runtime.tiny import byte_tokenizer
from twilight_engine import LLM, SamplingParams
from twilight_engine.eval.engine import Answer, EvalEngine
from twilight_engine.eval.items import Item
from twilight_engine.eval.memory import (
    MemoryBudget,
    default_hot_bytes,
    even_batches,
)
from twilight_engine.eval.methods import Method
from twilight_engine.kv.cache import KVCache
from twilight_engine.models.load import LoadedModel
from twilight_engine.runtime.runner import Runner


def generated(loaded: LoadedModel, made: EvalEngine, method: Method, **params: Any) -> list[Any]:
    """LLM.generate's outputs for ITEMS, with the same weights and configs."""
    llm = LLM(
        loaded.config,
        load_format="dummy",
        device="cpu",
        max_model_len=made.shape.max_len,
        max_num_seqs=3,
        kv_config=made.shape.kv_config(method, made.batch),
        prefill_chunk_size=64,
        tokenizer=byte_tokenizer(),
    )
    with llm:
        llm.model.load_state_dict(loaded.model.state_dict())
        sampling = [
            SamplingParams(temperature=0, max_tokens=item.max_new_tokens, **params)
            for item in ITEMS
        ]
        prompts = [list(item.prompt_ids) for item in ITEMS]
        outputs = llm.generate(prompts, sampling, sparse_config=method.sparse, use_tqdm=False)
    return outputs


def answers(made: EvalEngine, **options: Any) -> dict[str, list[Answer]]:
    return {a[0].method.name: a for a in made.answer(ITEMS, made.methods, **options)}


def test_every_method_answers_as_llm_generate():
    loaded = tiny_loaded()
    with engine(loaded) as made:
        found = answers(made)
        for method in METHODS:
            expected = generated(loaded, made, method)
            for answer, output in zip(found[method.name], expected, strict=True):
                assert answer.token_ids == output.outputs[0].token_ids
                assert answer.text == output.outputs[0].text
                assert len(answer.token_ids) == answer.item.max_new_tokens
                # Sequences leave LLM's batch as they end and keep their place in ours: alone, a
                # sequence's rows are the same, but the hot rows it gets are not.
                rows = output.metrics.exact_rows / max(1, answer.cost.steps)
                if not method.is_dense:
                    assert answer.cost.exact_rows * 2 * 2 == pytest.approx(rows)  # layers x heads
                assert answer.cost.steps == output.metrics.num_decode_steps
                assert answer.batch == 3 and answer.step_s > 0


def test_an_answer_ends_with_end_of_sequence():
    free = tiny_loaded()
    with engine(free, methods=[DENSE]) as made:
        ids = answers(made)["dense"][0].token_ids
    stop = ids[5]
    loaded = tiny_loaded(eos=(stop,))
    with engine(loaded) as made:
        found = answers(made)
        expected = generated(loaded, made, BALANCED)
        first = found["dense"][0]
        assert first.token_ids == ids[: ids.index(stop) + 1]
        assert first.cost.steps == len(first.token_ids) - 1
        for answer, output in zip(found["balanced"], expected, strict=True):
            assert answer.token_ids == output.outputs[0].token_ids
            assert answer.text == output.outputs[0].text


def test_a_question_can_be_decoded():
    """Dense decoding of the question changes nothing; a method's own answers may differ."""
    with engine() as made:
        at_once = answers(made)["dense"]
        stepwise = answers(made, question="decode")
        for one, other in zip(at_once, stepwise["dense"], strict=True):
            assert one.token_ids == other.token_ids
            question = len(one.item.question_ids)
            assert other.cost.steps == one.cost.steps + question  # the first token is a step's too
        # Item 2 has no question, so it is prefilled as a whole.
        assert stepwise["balanced"][2].cost.steps == ITEMS[2].max_new_tokens - 1
        for answer in stepwise["balanced"][:2]:
            assert answer.token_ids == decoded_by_hand(made, answer.item)


def decoded_by_hand(made: EvalEngine, item: Item) -> list[int]:
    """`balanced`: the context prefilled, then question and answer a token a step, alone."""
    kv_config = made.shape.kv_config(BALANCED, 1)
    with KVCache(
        made.loaded.config,
        kv_config,
        max_model_len=200,
        max_num_seqs=1,
        device="cpu",
        dtype=torch.float32,
    ) as cache:
        runner = Runner(made.model, cache, prefill_chunk_size=64)
        sequence = cache.open_sequence(200)
        runner.prefill(sequence, item.context_ids)
        steps = runner.start_decode([sequence], [BALANCED.sparse], [len(item.context_ids)])
        tokens = list(item.question_ids)
        for i in range(len(item.question_ids) + item.max_new_tokens - 1):
            picked = steps.step(torch.tensor([tokens[i]])).argmax(-1)
            if i + 1 >= len(item.question_ids):
                tokens.append(int(picked))
    return tokens[len(item.question_ids) :]


def test_the_order_of_methods_does_not_matter():
    with engine() as made:
        forth = {a[0].method.name: a for a in made.answer(ITEMS, METHODS)}
        back = {a[0].method.name: a for a in made.answer(ITEMS, METHODS[::-1])}
        for name in forth:
            for one, other in zip(forth[name], back[name], strict=True):
                assert one.token_ids == other.token_ids
                assert one.cost == other.cost


def test_predictions_are_a_plain_forwards():
    loaded = tiny_loaded()
    with engine(loaded) as made:
        found = {p[0].method.name: p for p in made.predict(PASSAGES, made.methods)}
    for i, passage in enumerate(PASSAGES):
        nll, is_top = by_plain_forward(loaded, passage)
        dense = found["dense"][i]
        torch.testing.assert_close(torch.tensor(dense.nll), nll, atol=1e-4, rtol=0)
        assert dense.is_top == is_top
        assert dense.kl is None and dense.same_top is None
        assert dense.cost.exact_rows == len(passage.context_ids) + 4.5
        lean = found["lean"][i]
        assert lean.kl is not None and lean.same_top is not None
        assert min(lean.kl) > -1e-5 and len(lean.nll) == len(passage.target_ids)


def test_a_dense_method_does_not_differ_from_dense():
    again = dataclasses.replace(
        BALANCED, name="all", sparse=BALANCED.sparse.replace(attn_top_p=1.0, index_top_p=None)
    )
    with engine(methods=[DENSE, BALANCED, again]) as made:
        found = {p[0].method.name: p for p in made.predict(PASSAGES, made.methods)}
    for same in found["all"]:
        assert same.kl == pytest.approx([0.0] * 10, abs=1e-5)
        assert same.same_top == [True] * 10
    assert max(k for other in found["balanced"] for k in other.kl or []) > 1e-6


def test_costs():
    with engine() as made:
        found = answers(made)
        row = made.caches.cache(BALANCED).row_bytes
        for name, batch in found.items():
            for answer in batch:
                cost, length = answer.cost, len(answer.item.prompt_ids)
                rows = cost.exact_rows + cost.index_rows + cost.tail_rows + cost.resident_rows
                assert rows == pytest.approx(length + (cost.steps + 1) / 2)
                if name == "dense":
                    assert cost.link_bytes == 0 and cost.mass == 1.0
                    assert cost.device_read_bytes == pytest.approx(rows * row * 3 * 2)
                    assert cost.device_bytes == 13 * 16 * row * 3 * 2  # pages of 200 tokens
                elif name == "paper":
                    assert cost.device_read_bytes is None
                else:
                    assert 0 < cost.mass <= 1 + 1e-5
                    assert cost.device_read_bytes is not None
                    assert cost.device_read_bytes > (length + 1) * row * 2
        assert found["lean"][0].cost.link_bytes > 0


def test_hot_rows_are_the_same_bytes_for_every_method():
    with engine() as made:
        slots = {made.caches.cache(method).plan.hot_slots for method in METHODS[1:]}
        assert len(slots) == 1
        expected = default_hot_bytes(made.loaded.config, torch.float32, 200)
        assert slots == {(0, *[3 * expected // (2 * 512)] * 2)}  # one layer is dense in both
    with engine(hot_bytes=1 << 17) as made:
        (slots,) = {made.caches.cache(method).plan.hot_slots for method in METHODS[1:]}
        assert slots == (0, *[3 * (1 << 17) // 2 // 512] * 2)


def test_a_batch_is_what_the_budget_holds():
    with engine() as made:
        plans = made.shape.plans(METHODS, 2)
        assert len(plans) == len(METHODS)
        host = sum(plan.host_bytes for plan in plans)
    with engine(budget=MemoryBudget(host_bytes=host)) as made:
        assert made.batch == 2
        assert [len(b) for b in made.batches(5)] == [1, 2, 2]
    with pytest.raises(ValueError, match=r"one sequence of 200 tokens in the 4 caches .* host"):
        engine(budget=MemoryBudget(host_bytes=1000))
    with pytest.raises(ValueError, match=r"GiB of device memory; .* lower the length"):
        engine(budget=MemoryBudget(device_bytes=1000))


def test_batches_are_even():
    assert [len(b) for b in even_batches(50, 32)] == [25, 25]
    assert [i for b in even_batches(10, 4) for i in b] == list(range(10))
    assert even_batches(0, 4) == []


def test_everything_is_given_back():
    with engine() as made:
        answers(made)
        caches: list[KVCache] = [made.caches.cache(method) for method in METHODS]
        made.caches.release()
        assert all(
            cache.pool.num_free + cache.pool.num_pending == cache.pool.num_pages for cache in caches
        )
    assert all(cache.registered_bytes == 0 and not cache.layers for cache in caches)
