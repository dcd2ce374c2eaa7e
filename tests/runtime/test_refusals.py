"""What cannot be run is refused up front, with the numbers, and Ctrl-C leaves nothing behind."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.runtime.tiny import prompt_ids, tiny_llm
from twilight_engine import LLM, KVConfig, SamplingParams, SparseConfig

QUIET: dict[str, Any] = {"use_tqdm": False}
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with tiny_llm() as made:
        yield made


@pytest.fixture
def _nothing_runs(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("a prompt was run")

    monkeypatch.setattr(llm.cache, "open_sequence", fail)


@pytest.mark.usefixtures("_nothing_runs")
@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (prompt_ids(256), r"prompt 0 has 256 tokens; the maximum context length is 256 tokens"),
        (["fine", prompt_ids(300)], r"prompt 1 has 300 tokens; the maximum context length is 256"),
        ("", r"prompt 0 has no tokens"),
        (["fine", ""], r"prompt 1 has no tokens"),
        ([[]], r"prompt 0 has no tokens"),
        ([1, 260], r"prompt 0 has token 260; the vocabulary is 0 .. 259"),
        ({"text": "x"}, r"prompt 0 has keys \['text'\]; it must be a string, a list of token ids"),
        (3, r"prompts is 3; it must be a string"),
        (["fine", 3.5], r"prompt 1 is 3.5; it must be a string"),
        ([["a", 1]], r"prompt 0 is \['a', 1\]"),
        ({"prompt": 4}, r"prompt 0 is {'prompt': 4}"),
    ],
)
def test_prompts_are_refused_before_any_is_run(llm: LLM, prompts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, GREEDY, **QUIET)


@pytest.mark.usefixtures("_nothing_runs")
@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(stop_token_ids=[260]), r"stop_token_ids has 260; the vocabulary is 0"),
        (SamplingParams(allowed_token_ids=[999]), r"allowed_token_ids has 999"),
        (SamplingParams(logit_bias={300: 1}), r"logit_bias has 300"),
        ([GREEDY, GREEDY], r"sampling_params has 2 entries for 1 prompts"),
        ({"temperature": 0}, r"sampling_params is {'temperature': 0}; it must be a SamplingParams"),
    ],
)
def test_params_that_do_not_fit_are_refused(llm: LLM, params: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate("fine", params, **QUIET)


@pytest.mark.usefixtures("_nothing_runs")
@pytest.mark.parametrize(
    ("sparse", "message"),
    [
        ([SparseConfig()] * 2, r"sparse_config has 2 entries for 1 prompts"),
        (0.8, r"sparse_config is 0.8; it must be a SparseConfig"),
        (SparseConfig(by_layer={3: SparseConfig()}), r"by_layer names layers \[3\]; the model has"),
    ],
)
def test_sparse_configs_that_do_not_fit_are_refused(llm: LLM, sparse: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate("fine", GREEDY, sparse_config=sparse, **QUIET)


def test_an_index_grade_needs_the_index() -> None:
    config = KVConfig(page_size=16, num_recent=16, v_index="none", dense_layers=(0,))
    with tiny_llm(kv_config=config) as made:
        with pytest.raises(ValueError, match=r"index_top_p is 0.99, but the cache keeps no INT4 V"):
            made.generate("fine", GREEDY, **QUIET)
        lean = SparseConfig.preset("lean")
        assert made.generate("fine", GREEDY, sparse_config=lean, **QUIET)[0].finished


def test_the_selector_lsh_needs_signatures(llm: LLM) -> None:
    lsh = SparseConfig(selector="lsh")
    with pytest.raises(ValueError, match=r"selector is 'lsh', but .* KVConfig\(lsh=\(10, 150\)\)"):
        llm.generate("fine", GREEDY, sparse_config=lsh, **QUIET)
    with pytest.raises(ValueError, match=r"selector is 'lsh'"):
        llm.generate("fine", GREEDY, sparse_config=SparseConfig(by_layer={1: lsh}), **QUIET)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_num_seqs": 0}, r"max_num_seqs is 0; it must be a whole number >= 1"),
        ({"max_model_len": 0}, r"max_model_len is 0"),
        ({"prefill_chunk_size": 0}, r"prefill_chunk_size is 0"),
        ({"device": "tpu"}, r"device|tpu"),
        ({"preset": "best", "kv_config": None}, r"preset is 'best'; allowed: 'balanced'"),
        ({"generation_config": "hf"}, r"generation_config is 'hf'; allowed: 'auto', 'vllm'"),
        ({"dtype": "int8"}, r"dtype is 'int8'"),
        ({"load_format": "pickle"}, r"load_format is 'pickle'"),
        ({"kv_offloading_size": 0}, r"kv_offloading_size is 0; it must be > 0 GiB"),
        ({"hot_bytes": 5}, r"hot_bytes is 5 and kv_config's \d+; give one of them"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        tiny_llm(**changes)


def test_a_cpu_runs_float32_only() -> None:
    with pytest.raises(NotImplementedError, match=r"dtype is torch.bfloat16; on a CPU supported"):
        tiny_llm(dtype="bfloat16")


def test_text_needs_a_tokenizer() -> None:
    made = tiny_llm(tokenizer=None)
    with made, pytest.raises(ValueError, match="prompt 0 is text, but the model came without"):
        made.generate("text", **QUIET)
    with pytest.raises(ValueError, match="this needs a tokenizer"):
        made.chat([{"role": "user", "content": "x"}])


def test_a_longer_context_than_the_model_was_made_for_warns() -> None:
    with pytest.warns(UserWarning, match="max_model_len is 1024; the model was made for 512"):
        tiny_llm(max_model_len=1024).close()


@pytest.fixture
def _ctrl_c_raises() -> Iterator[None]:
    """Python's own handler, also where the tests run in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_raises")
@pytest.mark.parametrize("calls_before", [0, 4, 7, 8, 13, 14])
def test_ctrl_c_gives_every_page_back(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, calls_before: int
) -> None:
    """Two prompts of two chunks: 6 layer calls a prefill, then 3 a step."""
    prompts = [prompt_ids(100, i) for i in range(2)]
    expected = llm.generate(prompts, GREEDY, **QUIET)
    free = llm.cache.free_tokens
    run_layer, calls = llm.model.run_layer, 0

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        if calls == calls_before:
            signal.raise_signal(signal.SIGINT)
        calls += 1
        return run_layer(*args)

    with monkeypatch.context() as patch:
        patch.setattr(llm.model, "run_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompts, GREEDY, **QUIET)
    assert llm.cache.free_tokens == free
    again = llm.generate(prompts, GREEDY, **QUIET)
    assert [o.outputs[0].token_ids for o in again] == [o.outputs[0].token_ids for o in expected]


def test_no_signal_handler_is_installed() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with tiny_llm() as made:
        made.generate(prompt_ids(20), GREEDY)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
