"""Folders of `twilight eval` as rows of bench/results and as tables of the docs."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import record_accuracy
from typer.testing import CliRunner

from tests.cli.models import tiny_model
from twilight_engine.cli.main import app
from twilight_engine.eval.haystack import paragraphs

TOLD = ["--model-name", "Tiny", "--commit", "abc1234"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders niah, ppl and frontier of a tiny model."""
    root = tmp_path_factory.mktemp("runs")
    (root / "model").mkdir()
    model = str(tiny_model(root / "model"))
    text = root / "hay.txt"
    text.write_text("\n\n".join(itertools.islice(paragraphs(0), 40)), encoding="utf-8")
    common = [model, "--text", str(text), "--device", "cpu"]
    methods = ["--methods", "balanced,dense,lean"]
    wanted = {
        "niah": ["--length", "900", "--items", "2", *methods],
        "ppl": ["--length", "200,400", "--items", "2", "--targets", "5", *methods],
        "frontier": ["--length", "400", "--targets", "12", "--passages", "1"],
    }
    wanted["frontier"] += ["--only", "balanced,union,lean", "--cache-share", "0.0625,0.25"]
    for task, options in wanted.items():
        arguments = ["eval", task, *common, *options, "--out", str(root / task)]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    return root


def recorded(path: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["case"] for row in rows}) == len(rows)
    return {row["case"]: row for row in rows}


def test_rows_of_every_length_and_method(runs: Path, tmp_path: Path) -> None:
    other = {"bench": "accuracy", "case": "Other/ppl/200/lean", "metrics": {"kl": 1.0}}
    stale = {"bench": "accuracy", "case": "Tiny/ppl/400/lean", "metrics": {"kl": 9.0}}
    path = tmp_path / "accuracy.jsonl"
    path.write_text(f"{json.dumps(stale)}\n{json.dumps(other)}\n")
    folders = [str(runs / "niah"), str(runs / "ppl")]
    for _ in range(2):
        record_accuracy.main([*folders, *TOLD, "--results", str(tmp_path)])
    rows = recorded(path)
    methods = ("dense", "default", "lean")
    assert list(rows)[:2] == [stale["case"], other["case"]] and rows[other["case"]] == other
    assert set(rows) - {other["case"]} == {
        *(f"Tiny/niah/900/{method}" for method in methods),
        *(f"Tiny/ppl/{length}/{method}" for length in (200, 400) for method in methods),
    }
    summary = json.loads((runs / "ppl" / "summary.json").read_text())
    line = next(x for x in summary["lines"] if (x["length"], x["method"]) == (400, "lean"))
    row = rows["Tiny/ppl/400/lean"]
    assert row["commit"] == "abc1234" and row["gpu"] == "none" and row["bench"] == "accuracy"
    assert row["torch"] == summary["machine"]["torch"]
    metrics = row["metrics"]
    assert metrics["kl"] == pytest.approx(line["kl"]["value"], rel=1e-4)
    assert metrics["ppl"] / metrics["ppl_dense"] == pytest.approx(
        line["ppl_ratio"]["value"], rel=1e-3
    )
    assert metrics["link_bytes"] == pytest.approx(line["costs"]["link_bytes"], rel=1e-4)
    assert metrics["items"] == 2 and metrics["device_bytes"] > 0 and metrics["exact_rows"] >= 0
    # Two items of equal scores, which have no spread to go by.
    assert rows["Tiny/niah/900/default"]["metrics"] | {"link_bytes": 0.0} == {
        **{"score": 0.0, "score_dense": 0.0, "ci95": 1.0, "items": 2, "link_bytes": 0.0},
        "exact_rows": rows["Tiny/niah/900/default"]["metrics"]["exact_rows"],
        "device_bytes": rows["Tiny/niah/900/default"]["metrics"]["device_bytes"],
    }


def test_rows_of_a_frontier(runs: Path, tmp_path: Path) -> None:
    record_accuracy.main(
        [str(runs / "frontier"), *TOLD, "--gpu", "A", "--torch", "9", "--results", str(tmp_path)]
    )
    rows = recorded(tmp_path / "frontier.jsonl")
    names = ("balanced", "union", "lean")
    assert set(rows) == {
        f"Tiny/frontier/400/{name}{cache}" for name in names for cache in ("", ", cache 0.25")
    }
    usual, large = (rows[f"Tiny/frontier/400/lean{c}"] for c in ("", ", cache 0.25"))
    assert usual["gpu"] == "A" and usual["torch"] == "9"
    assert usual["metrics"]["kl"] == large["metrics"]["kl"]
    assert usual["metrics"]["device_share"] < large["metrics"]["device_share"]
    assert isinstance(usual["metrics"]["on_front"], bool)
    simulated = recorded(tmp_path / "accuracy.jsonl")
    assert set(simulated) == {"Tiny/ppl/400/default", "Tiny/ppl/400/lean"}
    metrics = simulated["Tiny/ppl/400/lean"]["metrics"]
    assert metrics["link_bytes"] == usual["metrics"]["link_bytes"] and metrics["items"] == 1
    assert "mass_kept_share" in metrics


def test_a_simulated_row_never_hides_a_measured_one(runs: Path, tmp_path: Path) -> None:
    for folders in (["frontier"], ["ppl", "frontier"], ["frontier"]):
        paths = [str(runs / folder) for folder in folders]
        record_accuracy.main([*paths, *TOLD, "--results", str(tmp_path)])
    rows = recorded(tmp_path / "accuracy.jsonl")
    assert "device_bytes" in rows["Tiny/ppl/400/lean"]["metrics"]
    assert rows["Tiny/ppl/400/lean"]["metrics"]["items"] == 2


def test_two_folders_of_the_same_items_are_one_run(runs: Path, tmp_path: Path) -> None:
    """Dense in one folder, the others in another: their difference is there all the same."""
    for name, methods in (("a", ["dense"]), ("b", ["balanced", "lean"])):
        shutil.copytree(runs / "niah", tmp_path / name)
        results = tmp_path / name / "results.jsonl"
        lines = results.read_text().splitlines(keepends=True)
        results.write_text("".join(x for x in lines if json.loads(x)["method"] in methods))
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    record_accuracy.main([*folders, *TOLD, "--results", str(tmp_path)])
    metrics = recorded(tmp_path / "accuracy.jsonl")["Tiny/niah/900/lean"]["metrics"]
    assert metrics["score_dense"] == 0.0


def test_markdown_has_a_row_a_method_and_a_column_a_length(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(runs / name) for name in ("niah", "ppl", "frontier")]
    record_accuracy.main([*folders, "--model-name", "Tiny", "--markdown"])
    text = capsys.readouterr().out
    assert "### Tiny, niah (2 items a length)" in text
    assert "### Tiny, ppl (2 passages a length)" in text
    assert "| method | 200 | 400 |" in text
    assert "| **balanced** | 0.0 ± 100.0 (+0.0 ± 100.0) |" in text
    assert "### Tiny, 400 tokens (1 passage x 12 targets)" in text and "| 25% |" in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert [len(block) for block in tables] == [2 + 3, 2 + 3, 2 + 6]
    for block in tables:
        assert len({line.count("|") for line in block}) == 1


def test_what_cannot_be_recorded_is_said(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            record_accuracy.main([*arguments, "--results", str(tmp_path)])
        return f"{caught.value.code} {capsys.readouterr().err}"

    niah = str(runs / "niah")
    assert "--commit is missing" in error(niah)
    assert "lacks settings.json or results.jsonl" in error(str(tmp_path), *TOLD)
    shutil.copytree(niah, tmp_path / "cut")
    (tmp_path / "cut" / "summary.json").unlink()
    assert "doesn't say what gpu" in error(str(tmp_path / "cut"), *TOLD)
    settings = json.loads((tmp_path / "cut" / "settings.json").read_text())
    changed = {**settings, "items": {"900": "2, other"}}
    (tmp_path / "cut" / "settings.json").write_text(json.dumps(changed))
    assert "has other items of 900 tokens" in error(niah, str(tmp_path / "cut"), *TOLD)
    (tmp_path / "cut" / "settings.json").write_text(json.dumps({**settings, "model": "big"}))
    assert "--model-name 'Tiny' for runs of ['big', 'model']" in error(
        niah, str(tmp_path / "cut"), *TOLD
    )
    assert not (tmp_path / "accuracy.jsonl").exists()
    frontier = str(runs / "frontier")
    assert "in more than one folder" in error(frontier, frontier, *TOLD)
