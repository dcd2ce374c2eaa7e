"""`twilight eval` on a tiny random model: its table and files, and every wrong option."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.cli.models import CONTEXT, tiny_model
from twilight_engine.cli.evaluate_run import TaskRun, parse_lengths, read_texts
from twilight_engine.cli.main import app
from twilight_engine.eval.haystack import paragraphs

METHODS = ["--methods", "dense,balanced"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "hay.txt"
    path.write_text("\n\n".join(itertools.islice(paragraphs(0), 40)), encoding="utf-8")
    return path


def test_ppl_writes_a_table_and_everything_beside_it(
    model: str, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    wanted = ["--length", "300,200", "--items", "2", "--targets", "5", "--out", out]
    arguments = ["ppl", model, "--text", text, *METHODS, *wanted, "--device", "cpu"]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    for word in ("ppl / dense", "balanced", "200", "300", "TPOT"):
        assert word in result.stdout
    assert {path.name for path in out.iterdir()} == {
        *("settings.json", "results.jsonl", "summary.json", "kl.png")
    }
    summary = json.loads((out / "summary.json").read_text())
    assert [(line["length"], line["method"]) for line in summary["lines"]] == [
        *((200, "dense"), (200, "balanced"), (300, "dense"), (300, "balanced"))
    ]
    results = (out / "results.jsonl").read_text()
    assert len(results.splitlines()) == 8
    again = run(*arguments)
    assert again.exit_code == 0 and again.stdout == result.stdout
    assert (out / "results.jsonl").read_text() == results
    other = run(*arguments[:-1], "cpu", "--batch", "1")
    assert_error(other, "batch was 32, is 1", "use another --out")


def test_every_selector_runs_alone_and_under_a_preset(
    model: str, text: Path, tmp_path: Path
) -> None:
    words = [
        *("quest:64", "quest+lean", "double_sparsity:64", "double_sparsity+paper@0.85"),
        *("double_sparsity_online:64", "lsh:4x30", "lsh+balanced:4x30", "streaming:64"),
    ]
    wanted = ["--length", "400", "--items", "1", "--targets", "2", "--out", tmp_path]
    methods = ["--methods", ",".join(["dense", *words])]
    result = run("ppl", model, "--text", text, *methods, *wanted, "--device", "cpu")
    assert result.exit_code == 0, result.output
    lines = json.loads((tmp_path / "summary.json").read_text())["lines"]
    assert [line["method"] for line in lines] == ["dense", *words]
    assert all(line["kl"]["value"] > 0 for line in lines[1:])


@pytest.mark.filterwarnings("error:max_model_len")
def test_niah_runs_with_the_question_decoded(model: str, text: Path, tmp_path: Path) -> None:
    """At the model's limit, which is no reason to warn."""
    wanted = ["--length", str(CONTEXT), "--items", "2", "--question", "decode", "--seed", "3"]
    methods = ["--methods", "balanced"]
    result = run("niah", model, "--text", text, *methods, *wanted, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "question decoded" in result.stdout and "- dense" in result.stdout
    assert (tmp_path / "depths.png").exists() and (tmp_path / "scores.png").exists()
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and {line["details"]["depth"] for line in lines} == {0.0, 1.0}
    # The question's tokens went through the methods' steps.
    assert all(line["steps"] > line["new_tokens"] + 20 for line in lines)


def assert_error(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("twilight: ") and result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def test_two_texts_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    paths = [tmp_path / "book.txt", tmp_path / "a" / "book.txt"]
    for path in paths:
        path.write_text("It was a day.")
    with pytest.raises(ValueError, match="two files named 'book'"):
        read_texts(paths)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "dense,best"], ["unknown method 'best'", "allowed: dense"]),
        (["--methods", "lsh:1024"], ["unknown method 'lsh:1024'", "lsh+PRESET, with :BITSxTABLES"]),
        (["--methods", "lsh:4x1"], ["lsh is (4, 1)", "bits in [1, 16]"]),
        (["--methods", "quest+paper:0"], ["selector_budget is 0"]),
        (["--length", "4K"], ["--length is '4K'", "whole number"]),
        (["--length", "0"], ["--length is '0'"]),
        (["--items", "0"], ["items is 0"]),
        (["--batch", "0"], ["batch is 0"]),
        (["--question", "skip"], ["--question is 'skip'", "'prefill', 'decode'"]),
        (["--text", "/no/such/file"], ["--text /no/such/file", "No such file"]),
        (["--length", "100000"], ["hay has 27584 tokens", "shorter length"]),
        (["--length", "900", "--host-memory", "0.0001"], ["host memory", "lower the length"]),
        (["--length", "900", "--device-memory", "0.0001"], ["device memory", "budget"]),
        (["--length", "900", "--hot-bytes", "-1"], ["hot_bytes is -"]),
    ],
)
def test_a_wrong_option_is_named(
    model: str, text: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    options = ["--items", "2", "--device", "cpu", "--out", tmp_path / "out"]
    assert_error(run("niah", model, "--text", text, *options, *arguments), *words)


def test_a_text_that_is_not_text(model: str, tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    result = run("ppl", model, "--text", tmp_path / "bytes", "--out", tmp_path / "out")
    assert_error(result, "not UTF-8")


def test_an_unknown_task_and_a_missing_text(model: str) -> None:
    assert_error(run("needles", model), "needles", "niah, ruler, ppl, longbench, lm-eval")
    assert_error(run("niah", model), "--text")


@pytest.mark.parametrize("task", ["niah", "ruler", "ppl"])
def test_help_is_there_for_every_task(task: str) -> None:
    result = run(task, "--help")
    assert result.exit_code == 0 and "--methods" in result.output


def test_paths_may_come_as_strings(text: Path) -> None:
    """Some versions of typer leave them so in the context."""
    params = {"text": [str(text)], "out": "results", "length": ["300"], "items": 1, "batch": 1}
    rest = ("model", "methods", "hot_bytes", "device_memory", "host_memory", "dtype", "device")
    options = TaskRun.of("niah", {**dict.fromkeys(rest), **params})
    assert options.text == (text,) and options.out == Path("results")


def test_lengths_come_in_any_way() -> None:
    assert parse_lengths(["4096"]) == (4096,)
    assert parse_lengths(["8192, 4096", "8192", "16384"]) == (4096, 8192, 16384)
