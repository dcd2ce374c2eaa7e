"""`twilight eval longbench` on a tiny random model: table, files, resuming, wrong options."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.models import CHAT_TEMPLATE, CONTEXT, tiny_model
from tests.cli.test_evaluate import assert_error, run

METHODS = ["--methods", "dense,balanced", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("model"), chat_template=CHAT_TEMPLATE))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two questions, one of them too long for the model, and a completion."""
    base: dict[str, Any] = {"answers": ["a b"], "length": 9, "language": "en", "all_classes": None}
    records = [
        {**base, "_id": "1", "dataset": "hotpotqa", "input": "Who?", "context": "Ann came. " * 9},
        {**base, "_id": "2", "dataset": "hotpotqa", "input": "Who?", "context": "Ann went. " * 200},
        {**base, "_id": "3", "dataset": "lcc", "input": "", "context": "x = 1\ny = 2\n" * 8},
    ]
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.mark.filterwarnings("error:max_model_len")
def test_datasets_side_by_side(model: str, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["longbench", model, "--data", data, *METHODS, "--out", out]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    for word in ("hotpotqa", "lcc", "average", "balanced", f"{CONTEXT - 64:,}"):
        assert word in result.stdout
    found = results(out)
    assert len(found) == 6 and {record["group"] for record in found} == {"hotpotqa", "lcc"}
    longest = [record for record in found if record["item"] == "longbench/some/2"]
    assert {record["prompt_tokens"] for record in longest} == {CONTEXT - 64}
    assert all(record["details"]["cut"] > 900 for record in longest)
    assert {record["new_tokens"] for record in found} == {32, 64}
    (line, _) = json.loads((out / "summary.json").read_text())["lines"]
    assert line["length"] == CONTEXT - 64 and line["score"]["count"] == 3
    # Cut short, it goes on: the last lines are made again, and nothing else.
    lines = (out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text("".join(lines[:4]))
    assert run(*arguments).exit_code == 0
    again = results(out)
    assert [r["text"] for r in again] == [r["text"] for r in found]
    assert again[:4] == found[:4]


def test_the_question_may_be_decoded(model: str, data: Path, tmp_path: Path) -> None:
    options = ["--question", "decode", "--items", "1", "--max-length", "400"]
    result = run("longbench", model, "--data", data, *METHODS, *options, "--out", tmp_path / "o")
    assert result.exit_code == 0, result.output
    found = results(tmp_path / "o")
    assert {record["item"] for record in found} == {"longbench/some/1", "longbench/some/3"}
    assert all(record["steps"] > record["new_tokens"] + 10 for record in found)


def test_what_is_missing_is_said_before_the_model_is_loaded(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    result = run("longbench", "no-model", "--data", data, "--out", tmp_path / "out")
    assert_error(
        result, "rapidfuzz is not installed (for edit_similarity)", "twilight-engine[eval]"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-length", "0"], ["max_length is 0"]),
        (["--max-length", "80"], ["--max-length is 80", "of hotpotqa needs more than"]),
        (["--items", "0"], ["items is 0"]),
        (["--data", "/no/such/file"], ["--data /no/such/file", "No such file"]),
        (["--methods", "best"], ["unknown method 'best'"]),
    ],
)
def test_a_wrong_option_is_named(
    model: str, data: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    result = run("longbench", model, "--data", data, "--out", tmp_path / "out", *arguments)
    assert_error(result, *words)


def test_help_and_a_missing_file(model: str) -> None:
    assert "--max-length" in run("longbench", "--help").output
    assert_error(run("longbench", model), "--data")
