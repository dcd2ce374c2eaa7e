"""run: every (item, method) pair once, whatever interrupts it, and the same each time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.eval.harness import BALANCED, DENSE, ITEMS, METHODS, PASSAGES, engine, tiny_loaded
from twilight_engine.eval.engine import EvalEngine
from twilight_engine.eval.methods import Method
from twilight_engine.eval.progress import EvalProgress
from twilight_engine.eval.records import Record, RunFolder
from twilight_engine.eval.run import Workload, run

LOADED = tiny_loaded()
ASKED = Workload(128, [dataclasses.replace(item, metric="contains_any") for item in ITEMS])
PREDICTED = Workload(160, PASSAGES)


def go(
    path: Path, work: Sequence[Workload], methods: Sequence[Method] = METHODS, **changes: object
) -> list[Record]:
    """Run in batches of two, without bars."""

    def make_engine(workload: Workload) -> EvalEngine:
        return engine(LOADED, methods=methods, batch=2, **changes)

    folder = RunFolder(path, {})
    with EvalProgress(1, show=False) as progress:
        run(make_engine, work, methods, folder, progress)
    return folder.records


def timeless(records: Sequence[Record]) -> list[Record]:
    """By item and method, without what differs from run to run."""
    ordered = sorted(records, key=lambda r: (r["length"], r["item"], r["method"]))
    return [{k: v for k, v in r.items() if k != "step_s"} for r in ordered]


def test_every_pair_has_a_record(tmp_path):
    records = go(tmp_path, [ASKED, PREDICTED])
    assert len(records) == 3 * 4 + 3 * 4
    answered = [r for r in records if r["task"] == "niah"]
    assert {(r["item"], r["method"]) for r in answered} == {
        (item.item_id, method.name) for item in ITEMS for method in METHODS
    }
    for record in answered:
        assert record["score"] in (0.0, 1.0) and record["new_tokens"] > 0
        assert record["score"] == float("x" in record["text"].lower())
        assert record["length"] == 128 and record["batch"] in (1, 2)
    for record in records:
        if record["task"] == "ppl":
            assert (record["kl"] is None) == (record["method"] == "dense")
            assert record["targets"] == 10 and record["steps"] == 10


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3, 5])
def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, after):
    work = [ASKED, PREDICTED]
    whole = go(tmp_path / "whole", work)
    left = after
    add = RunFolder.add

    def interrupt(self, records):
        nonlocal left
        add(self, records)
        left -= 1
        if left == 0:
            raise Interrupted

    monkeypatch.setattr(RunFolder, "add", interrupt)
    with pytest.raises(Interrupted):
        go(tmp_path / "cut", work)
    monkeypatch.undo()
    assert 0 < len(RunFolder(tmp_path / "cut", {}).records) < len(whole)
    assert timeless(go(tmp_path / "cut", work)) == timeless(whole)


def test_a_finished_run_makes_no_engine(tmp_path):
    records = go(tmp_path, [ASKED], METHODS[:2])

    def make_engine(workload: Workload) -> EvalEngine:
        raise AssertionError("nothing is left to run")

    with EvalProgress(1, show=False) as progress:
        folder = RunFolder(tmp_path, {})
        run(make_engine, [ASKED], METHODS[:2], folder, progress)
    assert folder.records == records


def test_methods_can_be_added_later(tmp_path):
    """Dense runs again to compare with, and is not written twice."""
    hot = {"hot_bytes": 1 << 16}
    go(tmp_path, [PREDICTED], [DENSE], **hot)
    records = go(tmp_path, [PREDICTED], [BALANCED, DENSE], **hot)
    assert len(records) == 6
    assert all(r["kl"] is not None for r in records if r["method"] == "balanced")


def test_a_digest_tells_other_items_of_the_same_names():
    other = dataclasses.replace(ITEMS[0], context_ids=(1, *ITEMS[0].context_ids[1:]))
    same = Workload(128, list(ITEMS))
    assert Workload(128, list(ITEMS)).digest == same.digest
    assert Workload(128, [other, *ITEMS[1:]]).digest != same.digest
