"""LLM.generate, chat and stream on a tiny model, through the real cache and attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.models.dense import greedy
from tests.runtime.tiny import CONFIG, KV, byte_tokenizer, prompt_ids, tiny_llm
from twilight_engine import LLM, KVConfig, RequestOutput, SamplingParams, SparseConfig

EXACT = SparseConfig(attn_top_p=1.0)
QUIET: dict[str, Any] = {"use_tqdm": False}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with tiny_llm() as made:
        yield made
    assert made.registered_bytes == 0


def greedy_params(count: int, **changes: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **changes)


def one(outputs: list[RequestOutput]) -> Any:
    assert len(outputs) == 1 and len(outputs[0].outputs) == 1
    return outputs[0].outputs[0]


@pytest.fixture(autouse=True)
def _pages_come_back(llm: LLM) -> Iterator[None]:
    before = llm.cache.free_tokens
    yield
    assert llm.cache.free_tokens == before


def test_a_batch_gives_the_dense_models_greedy_tokens(llm: LLM) -> None:
    """Unequal prompts, more than max_num_seqs, outputs of unequal length."""
    prompts = [prompt_ids(length, i) for i, length in enumerate((100, 17, 64, 5))]
    params = [greedy_params(count) for count in (12, 1, 20, 7)]
    outputs = llm.generate(prompts, params, sparse_config=EXACT, **QUIET)
    for prompt, p, output in zip(prompts, params, outputs, strict=True):
        assert output.prompt_token_ids == prompt
        assert output.outputs[0].token_ids == greedy(llm.model, prompt, p.max_tokens or 0)
        assert output.outputs[0].finish_reason == "length" and output.finished


def test_sparse_configs_of_one_call_may_differ(llm: LLM) -> None:
    """Each prompt gives what it gives alone, whatever shares the call."""
    prompts = [prompt_ids(90, i) for i in range(4)]
    configs = [
        SparseConfig(),
        EXACT,
        SparseConfig(attn_top_p=0.5),
        SparseConfig(policy="dense"),
    ]
    params = greedy_params(6)
    together = llm.generate(prompts, params, sparse_config=configs, **QUIET)
    for prompt, config, output in zip(prompts, configs, together, strict=True):
        alone = llm.generate(prompt, params, sparse_config=config, **QUIET)
        assert one(alone).token_ids == output.outputs[0].token_ids


def test_prompts_come_in_many_shapes(llm: LLM) -> None:
    ids = byte_tokenizer().encode("hello")
    same = [
        llm.generate(prompt, greedy_params(4), **QUIET)[0]
        for prompt in ("hello", ids, {"prompt": "hello"}, {"prompt_token_ids": ids}, ["hello"])
    ]
    assert len({tuple(output.outputs[0].token_ids) for output in same}) == 1
    assert [output.prompt for output in same] == ["hello", None, "hello", None, "hello"]
    assert llm.generate([], **QUIET) == []


def test_seeded_samples_repeat_whatever_runs_beside_them(llm: LLM) -> None:
    params = SamplingParams(seed=5, n=2, max_tokens=8, temperature=2.0, ignore_eos=True)
    first = llm.generate("abc", params, **QUIET)[0]
    again = llm.generate(["xyz", "abc"], [SamplingParams(), params], **QUIET)[1]
    assert [o.token_ids for o in first.outputs] == [o.token_ids for o in again.outputs]
    assert first.outputs[0].token_ids != first.outputs[1].token_ids
    assert [o.index for o in first.outputs] == [0, 1]


def test_the_engines_seed_decides_the_rest() -> None:
    texts = []
    for seed in (1, 1, 2):
        with tiny_llm(seed=0) as made:
            made._admission = type(made._admission)(made.model_config, made.cache, None, seed)
            texts.append(made.generate([1, 2, 3], SamplingParams(temperature=2.0), **QUIET))
    ids = [one(t).token_ids for t in texts]
    assert ids[0] == ids[1] != ids[2]


def test_stop_strings_cut_the_text_across_tokens(llm: LLM) -> None:
    whole = one(llm.generate("stop", greedy_params(40), **QUIET))
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 3]
    cut = one(llm.generate("stop", greedy_params(40, stop=[stop]), **QUIET))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    kept = greedy_params(40, stop=[stop], include_stop_str_in_output=True)
    assert one(llm.generate("stop", kept, **QUIET)).text == cut.text + stop


def test_stop_tokens_and_eos(llm: LLM) -> None:
    whole = one(llm.generate("halt", greedy_params(20), **QUIET)).token_ids
    token = whole[5]
    count = whole.index(token) + 1
    cut = one(llm.generate("halt", greedy_params(20, stop_token_ids=[token]), **QUIET))
    assert cut.token_ids == whole[:count]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", token)
    late = greedy_params(20, stop_token_ids=[token], min_tokens=count + 2)
    assert len(one(llm.generate("halt", late, **QUIET)).token_ids) >= count + 2
    ends = SamplingParams(temperature=0, logit_bias={256: 100.0})
    end = one(llm.generate("halt", ends, **QUIET))
    assert (end.token_ids, end.text) == ([256], "")
    assert (end.finish_reason, end.stop_reason) == ("stop", None)
    on = one(llm.generate("halt", ends.replace(ignore_eos=True, max_tokens=3), **QUIET))
    assert on.token_ids == [256] * 3 and on.finish_reason == "length"


def test_a_sequence_ends_at_the_context_length(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    output = one(llm.generate(prompt_ids(240), params, **QUIET))
    assert len(output.token_ids) == 16 and output.finish_reason == "length"


def test_logprobs_have_vllms_shape(llm: LLM) -> None:
    output = one(llm.generate("log", greedy_params(5, logprobs=2), **QUIET))
    assert output.logprobs is not None and len(output.logprobs) == 5
    for token, step in zip(output.token_ids, output.logprobs, strict=True):
        assert len(step) == 2 and step[token].rank == 1
        assert step[token].decoded_token == byte_tokenizer().decode([token])
    total = sum(step[t].logprob for t, step in zip(output.token_ids, output.logprobs, strict=True))
    assert output.cumulative_logprob == pytest.approx(total)
    assert one(llm.generate("log", greedy_params(2), **QUIET)).logprobs is None


def test_chat_renders_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    output = llm.chat(messages, greedy_params(3), **QUIET)[0]
    assert output.prompt == "[user]hi[assistant]"
    two = llm.chat([messages, messages], greedy_params(3), **QUIET)
    assert [o.outputs[0].token_ids for o in two] == [output.outputs[0].token_ids] * 2
    other = llm.chat(messages, greedy_params(1), chat_template="{{ messages[0].content }}", **QUIET)
    assert other[0].prompt == "hi"
    with pytest.raises(ValueError, match="messages is 'hi'; it must be a list"):
        llm.chat("hi")  # type: ignore[arg-type]


def test_a_stream_is_what_generate_gives(llm: LLM) -> None:
    whole = one(llm.generate("stream", greedy_params(9), **QUIET))
    parts = list(llm.stream("stream", greedy_params(9)))
    assert [len(p.outputs[0].token_ids) for p in parts] == list(range(1, 10))
    assert all(whole.text.startswith(p.outputs[0].text) for p in parts)
    assert parts[-1].finished and parts[-1].outputs[0].text == whole.text
    assert parts[-1].metrics is not None and parts[0].metrics is None


def test_one_call_at_a_time_and_a_closed_stream_gives_its_pages_back(llm: LLM) -> None:
    free = llm.cache.free_tokens
    stream = llm.stream("stream", greedy_params(9))
    next(stream)
    assert llm.cache.free_tokens < free
    with pytest.raises(RuntimeError, match="the LLM is busy; finish or close the stream"):
        llm.generate("other", **QUIET)
    stream.close()  # type: ignore[attr-defined]
    assert llm.cache.free_tokens == free
    abandoned = llm.stream("stream", greedy_params(9))
    next(abandoned)
    del abandoned
    assert len(one(llm.generate("other", greedy_params(2), **QUIET)).token_ids) == 2


def test_a_small_host_arena_runs_batch_after_batch() -> None:
    """Pages for 160 tokens: each sequence may need 96, so they run one by one."""
    page_bytes = CONFIG.num_layers * CONFIG.num_kv_heads * 16 * 2 * CONFIG.head_dim * 4
    config = KVConfig(**{**KV.__dict__, "host_bytes": 10 * page_bytes})
    with tiny_llm(kv_config=config) as made:
        prompts = [prompt_ids(70, i) for i in range(3)]
        outputs = made.generate(prompts, greedy_params(26), sparse_config=EXACT, **QUIET)
        for prompt, output in zip(prompts, outputs, strict=True):
            assert output.outputs[0].token_ids == greedy(made.model, prompt, 26)
        whole = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
        assert len(one(made.generate(prompts[0], whole, **QUIET)).token_ids) == 160 - 70
        with pytest.raises(ValueError, match=r"prompt 0 has 160 tokens; the host arena of \d+ byt"):
            made.generate(prompt_ids(160), **QUIET)


def test_close_ends_a_stream_and_everything_else() -> None:
    made = tiny_llm()
    stream = made.stream("abc", greedy_params(9))
    next(stream)
    made.close()
    made.shutdown()
    assert made.registered_bytes == 0
    with pytest.raises(RuntimeError, match="the LLM is closed"):
        made.generate("abc", **QUIET)
