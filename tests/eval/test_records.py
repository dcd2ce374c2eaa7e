"""RunFolder: results survive an interruption, and never mix with those of other settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from twilight_engine.eval.records import RunFolder

SETTINGS = {"task": "niah", "items": {"128": "2, abc"}, "seed": 0}


def record(item: str, method: str = "dense", length: int = 128) -> dict[str, object]:
    return {"item": item, "method": method, "length": length, "score": 0.5}


def test_what_was_added_is_there_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out", SETTINGS)
    folder.add([record("a"), record("b")])
    folder.add([record("a"), record("a", "lean"), record("a", length=256)])
    again = RunFolder(tmp_path / "out", SETTINGS)
    assert again.records == folder.records and len(again.records) == 4
    assert again.has(128, "a", "lean") and again.has(256, "a", "dense")
    assert not again.has(128, "b", "lean") and not again.has(256, "b", "dense")
    assert [r["item"] for r in again.of(["lean"])] == ["a"]


def test_a_line_cut_off_in_writing_is_written_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, SETTINGS)
    folder.add([record("a"), record("b")])
    results = tmp_path / "results.jsonl"
    whole = results.read_text()
    results.write_text(whole[:-7])
    again = RunFolder(tmp_path, SETTINGS)
    assert again.has(128, "a", "dense") and not again.has(128, "b", "dense")
    again.add([record("b")])
    assert results.read_text() == whole


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    RunFolder(tmp_path, SETTINGS).add([record("a")])
    with pytest.raises(ValueError, match=r"seed was 0, is 1.*use another --out"):
        RunFolder(tmp_path, {**SETTINGS, "seed": 1})
    with pytest.raises(ValueError, match=r"batch was None, is 4"):
        RunFolder(tmp_path, {**SETTINGS, "batch": 4})
    assert len(RunFolder(tmp_path, SETTINGS).records) == 1


@pytest.mark.parametrize("line", ["{not json}", "[1, 2]"])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    RunFolder(tmp_path, SETTINGS).add([record("a")])
    results = tmp_path / "results.jsonl"
    results.write_text(f"{results.read_text()}{line}\n{json.dumps(record('b'))}\n")
    with pytest.raises(ValueError, match=r"results\.jsonl, line 2 is no"):
        RunFolder(tmp_path, SETTINGS)


def test_results_without_settings_are_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"no settings\.json"):
        RunFolder(tmp_path, SETTINGS)
