"""TwilightLM under the real lm-evaluation-harness, on a tiny random model and local tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra lm-eval (700 MB) is not installed")

from lm_eval.api.instance import Instance

from tests.eval.harness import DENSE, METHODS, tiny_loaded
from tests.models.dense import DenseAttend
from twilight_engine.eval.lm_eval import TwilightLM, read_gen_kwargs
from twilight_engine.eval.lm_eval_run import load_tasks, run_lm_eval
from twilight_engine.eval.methods import Method, parse_methods
from twilight_engine.eval.records import RunFolder
from twilight_engine.eval.respond import Responder

LOADED = tiny_loaded()
TOKENIZER = LOADED.tokenizer
END = 256  # of the byte tokenizer


def model(path: Path, method: Method = DENSE, **options: Any) -> TwilightLM:
    responder = Responder(LOADED, METHODS, RunFolder(path, {}), batch=3)
    return TwilightLM(responder, method, name="org/tiny", **options)


def requests(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, i, ("t", i, 1)) for i, args in enumerate(arguments)]


def by_plain_forward(context: list[int], targets: list[int]) -> tuple[float, bool]:
    """Sum of the targets' log-softmax, and whether each is the most probable."""
    ids = torch.tensor(context + targets)
    logits = LOADED.model(ids, torch.arange(len(ids)), DenseAttend(LOADED.config))
    log_p = logits.log_softmax(-1)[len(context) - 1 : -1]
    wanted = torch.tensor(targets)
    return float(log_p.gather(1, wanted[:, None]).sum()), bool((log_p.argmax(-1) == wanted).all())


def tokens(text: str) -> list[int]:
    """A token a byte, so that pieces have the tokens they have in the whole."""
    assert TOKENIZER is not None
    return TOKENIZER.encode(text)


def assert_close(found: tuple[float, bool], expected: tuple[float, bool]) -> None:
    assert found[0] == pytest.approx(expected[0], abs=1e-3) and found[1] == expected[1]


def test_loglikelihoods_are_a_plain_models(tmp_path: Path) -> None:
    lm = model(tmp_path)
    pairs = [("The lighthouse stands on", " a rock"), ("Who? " * 30, "Abel"), ("", "Abel keeps")]
    found = lm.loglikelihood(requests("loglikelihood", *pairs))
    for (context, continuation), result in zip(pairs, found, strict=True):
        # The blank at the end of "Who? " is the continuation's; <end> stands for no context.
        bare = context.rstrip()
        whole = tokens(context + continuation)
        known = whole[: len(bare)] or [END]
        assert_close(result, by_plain_forward(known, whole[len(bare) :]))
    assert [result[1] for result in found] == [False] * 3


def test_a_greedy_continuation_is_known_as_such(tmp_path: Path) -> None:
    lm = model(tmp_path)
    context = "The lighthouse stands on a rock"
    ids = tokens(context)
    for _ in range(4):
        logits = LOADED.model(torch.tensor(ids), torch.arange(len(ids)), DenseAttend(LOADED.config))
        ids.append(int(logits[-1].argmax()))
    greedy = ids[len(context) :]
    results = lm._likelihoods(["t", "t"], [(ids[:-4], greedy), (ids[:-4], [*greedy[:3], 65])])
    assert [result[1] for result in results] == [True, greedy[3] == 65]


def test_rolling_likelihood_is_of_windows_that_do_not_overlap(tmp_path: Path) -> None:
    lm = model(tmp_path, max_length=20)
    text = "The lighthouse stands on a rock, and Mr Abel keeps it."
    (found,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    ids = tokens(text)
    # 54 tokens: 20 behind <end>, 20 behind the one before, and 14 with all the context there is.
    expected = by_plain_forward([END], ids[:20])[0] + by_plain_forward(ids[19:20], ids[20:40])[0]
    expected += by_plain_forward(ids[33:40], ids[40:])[0]
    assert len(ids) == 54 and found == pytest.approx(expected, abs=2e-3)


def test_an_answer_stops_at_until(tmp_path: Path) -> None:
    lm = model(tmp_path)
    context = "The lighthouse stands on a rock. " * 3
    free = {"max_gen_toks": 16, "do_sample": False, "temperature": 1.0, "until": []}
    (text,) = lm.generate_until(requests("generate_until", (context, free)))
    stop = text[6:8]
    until = {"max_gen_toks": 16, "until": ["Question:", stop]}
    (cut,) = lm.generate_until(requests("generate_until", (context, until)))
    assert len(text) > 8 and cut == text[: text.index(stop)]


def test_long_prompts_lose_their_beginning_with_a_warning(tmp_path: Path) -> None:
    lm = model(tmp_path, max_length=60)
    context = "The lighthouse stands on a rock. " * 3
    short = context[-50:]
    kwargs = {"max_gen_toks": 10}
    with pytest.warns(UserWarning, match="1 of 2 prompts are longer than max_length 60"):
        found = lm.generate_until(requests("generate_until", (context, kwargs), (short, kwargs)))
    assert found[0] == found[1]
    with pytest.warns(UserWarning, match="lose their beginning"):
        (cut,) = lm.loglikelihood(requests("loglikelihood", (context, "Abel")))
    assert_close(cut, by_plain_forward(tokens(context.rstrip())[-56:], tokens(" Abel")))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"do_sample": True, "temperature": 0.7}, "temperature is 0.7 with do_sample"),
        ({"temperature": 0.7}, "answers are greedy here"),
        ({"num_beams": 4}, r"arguments \['num_beams'\] are unknown; allowed: until"),
        ({"max_gen_toks": 0}, "max_gen_toks is 0"),
        ({"max_gen_toks": 600}, "max_gen_toks is 600; max_length 512 leaves no room"),
    ],
)
def test_other_ways_to_generate_are_refused(
    tmp_path: Path, kwargs: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        model(tmp_path).generate_until(requests("generate_until", ("Who?", kwargs)))


def test_generation_arguments() -> None:
    assert read_gen_kwargs({}) == (256, ())
    assert read_gen_kwargs({"until": "\n", "max_tokens": 5}, 9) == (5, ("\n",))
    assert read_gen_kwargs({"do_sample": True, "temperature": 0.0, "until": ["", "a"]}, 9) == (
        *(9, ("a",)),
    )


def test_a_request_that_cannot_be_scored_is_named(tmp_path: Path) -> None:
    lm = model(tmp_path, max_length=5)
    with pytest.raises(ValueError, match="continuation of 9; each needs one, and max_length 5"):
        lm.loglikelihood(requests("loglikelihood", ("Who?", " Mr Abel!")))


def test_chat_templates(tmp_path: Path) -> None:
    lm = model(tmp_path)
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "It is "}]
    assert lm.apply_chat_template(chat[:1]) == "[user]Who?[assistant]"
    assert lm.apply_chat_template(chat, add_generation_prompt=False) == (
        "[user]Who?[assistant]It is"
    )
    assert "[assistant]" in str(lm.chat_template(True)) and lm.chat_template() == ""
    assert lm.tokenizer_name == "org__tiny"


def write_tasks(folder: Path, right: str, labels: list[int]) -> None:
    """A generative and a multiple-choice task of local files."""
    data = {
        "gen": [{"q": "Who keeps the light?", "a": right}, {"q": "Where?", "a": "zzz"}],
        "mc": [{"q": "Abel is", "label": labels[0]}, {"q": "It is", "label": labels[1]}],
    }
    for name, rows in data.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = "test_split: test\ndataset_path: json\ndataset_kwargs: {data_files: {test: %s}}\n"
    (folder / "gen.yaml").write_text(
        "task: tiny_gen\n"
        + common % (folder / "gen.jsonl")
        + 'output_type: generate_until\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\n'
        + "generation_kwargs: {until: [], do_sample: false, max_gen_toks: 8}\n"
        + "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    (folder / "mc.yaml").write_text(
        "task: tiny_mc\n"
        + common % (folder / "mc.jsonl")
        + 'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_target: label\n'
        + "doc_to_choice: [old, gone, here]\n"
        + "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )


def best_choice(question: str) -> int:
    context = tokens(question)
    scores = [by_plain_forward(context, tokens(c))[0] for c in (" old", " gone", " here")]
    return scores.index(max(scores))


def test_a_whole_evaluation_gives_the_scores_worked_out_by_hand(tmp_path: Path) -> None:
    kwargs = {"max_gen_toks": 8, "until": []}
    (right,) = model(tmp_path / "first").generate_until(
        requests("generate_until", ("Who keeps the light?", kwargs))
    )
    labels = [best_choice("Abel is"), (best_choice("It is") + 1) % 3]
    write_tasks(tmp_path, right, labels)
    tasks = load_tasks(["tiny_*"], tmp_path)
    responder = Responder(LOADED, METHODS[:2], RunFolder(tmp_path / "out", {}))
    lines, raw = run_lm_eval(responder, tasks, name="tiny")
    found = {(line.task, line.method): line for line in lines}
    assert set(found) == {(t, m.name) for t in ("tiny_gen", "tiny_mc") for m in METHODS[:2]}
    for task in ("tiny_gen", "tiny_mc"):
        dense = found[task, "dense"]
        assert dense.value == 0.5 and dense.items == 2 and dense.stderr == pytest.approx(0.5)
        assert found[task, "balanced"].change is not None
        assert found[task, "balanced"].costs["exact_rows"] is not None
    assert raw["dense"]["results"]["tiny_mc"]["acc,none"] == 0.5 and "samples" not in raw["dense"]


def test_every_method_word_runs(tmp_path: Path) -> None:
    """Above the resident rows of the default KVConfig, so that each word's own steps run."""
    words = "balanced@0.9,top_k:8,quest:64,quest+lean@0.85,double_sparsity:64,lsh,table"
    methods = parse_methods(words)
    responder = Responder(LOADED, methods, RunFolder(tmp_path, {}))
    asked = requests("generate_until", ("The light is on. " * 24, {"max_gen_toks": 4}))
    scored = requests("loglikelihood", ("The light is on. " * 24, "Why?"))
    for method in methods:
        lm = TwilightLM(responder, method)
        assert len(lm.generate_until(asked)) == 1
        assert -100 < lm.loglikelihood(scored)[0][0] < 0
    assert len(responder.folder.records) == 2 * len(methods)


def test_tasks_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown task 'gsm9k'; nearest: .*gsm8k.*lm-eval knows"):
        load_tasks(["gsm9k"])
    write_tasks(tmp_path, "x", [0, 0])
    (tmp_path / "gen.jsonl").unlink()
    with pytest.raises(ConnectionError, match=r"data of task tiny_gen cannot be loaded: .*HF_HOME"):
        load_tasks(["tiny_mc", "tiny_gen"], tmp_path)
