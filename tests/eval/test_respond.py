"""Responder: each request once by every method, whoever asks first, and from the folder after."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.eval.harness import BALANCED, DENSE, ITEMS, METHODS, PASSAGES, engine, tiny_loaded
from twilight_engine.eval import respond
from twilight_engine.eval.caches import MethodCaches
from twilight_engine.eval.channels import with_channels
from twilight_engine.eval.memory import MemoryBudget
from twilight_engine.eval.methods import Method, parse_methods
from twilight_engine.eval.records import RunFolder
from twilight_engine.eval.respond import Responder, by_length
from twilight_engine.models.decoder import DecoderModel
from twilight_engine.runtime.runner import DecodeBatch

LOADED = tiny_loaded()
ASKED = [dataclasses.replace(item, metric=None, answers=()) for item in ITEMS]


def responder(path: Path, **options: object) -> Responder:
    return Responder(LOADED, METHODS, RunFolder(path, {}), **{"batch": 2, **options})


def no_engine(*args: object, **options: object) -> None:
    raise AssertionError("nothing is left to run")


def test_requests_of_about_a_length_go_together():
    long = dataclasses.replace(ASKED[0], item_id="long", max_new_tokens=107)
    longer = dataclasses.replace(ASKED[0], item_id="longer", max_new_tokens=108)
    workloads = by_length([longer, *ASKED, long, ASKED[0]])
    assert [w.length for w in workloads] == [256, 512]
    # 150 + 107 tokens are 257; below, those with the fewest steps come first.
    assert [i.item_id for i in workloads[0].items] == ["item-1", "item-2", "item-0"]
    assert [i.item_id for i in workloads[1].items] == ["long", "longer"]
    assert by_length([]) == []


def test_answers_are_the_engines_and_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = responder(tmp_path)
    asked = [ASKED[2], ASKED[0], ASKED[2]]
    first = made.respond(asked, BALANCED)
    monkeypatch.setattr(respond, "EvalEngine", no_engine)
    dense = made.respond(asked, DENSE)
    # Cut short and started again, what is on disk is not made again.
    assert responder(tmp_path).respond(asked, DENSE) == dense
    monkeypatch.undo()
    with engine(LOADED) as expected:
        for method, found in ((BALANCED, first), (DENSE, dense)):
            texts = {a.item.item_id: a.text for a in next(expected.answer(ASKED, [method]))}
            assert [r["text"] for r in found] == [texts[item.item_id] for item in asked]
            assert all(r["score"] is None and r["method"] == method.name for r in found)


def test_passages_are_not_compared_so_dense_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = responder(tmp_path)
    (own, *_) = made.respond(PASSAGES, BALANCED)
    assert own["kl"] is None and own["group"] == "ppl"
    folder = tmp_path / "results.jsonl"
    kept = [line for line in folder.read_text().splitlines() if '"dense"' in line]
    folder.write_text("\n".join(kept) + "\n")
    started: list[str] = []
    start = MethodCaches.start

    def note(self: MethodCaches, method: Method) -> DecodeBatch:
        started.append(method.name)
        return start(self, method)

    monkeypatch.setattr(MethodCaches, "start", note)
    (again, *_) = responder(tmp_path).respond(PASSAGES, BALANCED)
    assert set(started) == {method.name for method in METHODS[1:]}
    assert again["nll"] == pytest.approx(own["nll"], abs=1e-6)


def test_records_are_those_asked_for(tmp_path: Path) -> None:
    responder(tmp_path).respond(ASKED, DENSE)
    made = responder(tmp_path)
    assert made.records("a", DENSE) == []
    made.respond(ASKED[:2], DENSE)
    assert {r["item"] for r in made.records("a", DENSE)} == {"item-0", "item-1"}
    assert made.records("b", DENSE) == []


def test_channels_come_from_the_first_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: later requests are answered with the same ones."""
    methods = parse_methods("double_sparsity:16")
    samples: list[Sequence[int]] = []

    def note(methods: Sequence[Method], model: DecoderModel, ids: Sequence[int]) -> list[Method]:
        samples.append(ids)
        return with_channels(methods, model, ids)

    monkeypatch.setattr(respond, "with_channels", note)
    made = Responder(LOADED, methods, RunFolder(tmp_path, {}))
    (first,) = made.respond(ASKED[:1], methods[0])
    assert first["method"] == "double_sparsity:16"
    made.respond(ASKED[1:], methods[0])
    assert samples == [ASKED[0].prompt_ids]


def test_memory_is_bounded(tmp_path: Path) -> None:
    made = responder(tmp_path, budget=MemoryBudget(device_bytes=1000))
    with pytest.raises(ValueError, match="the budget is"):
        made.respond(ASKED, DENSE)
