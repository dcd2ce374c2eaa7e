"""`twilight eval budget` on a tiny random model: its files, going on, and every wrong option."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from tests.cli.models import tiny_model
from twilight_engine.cli.main import app


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", "budget", *map(str, arguments)])


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("budget")
    (folder / "text.txt").write_text("The miller met the ferryman at the harbour. " * 60)
    start = [str(tiny_model(folder)), "--text", str(folder / "text.txt"), "--device", "cpu"]
    return [*start, "--length", "300", "--targets", "5", "--passages", "2"]


def test_it_writes_tables_json_and_plots(arguments: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(*arguments, "--p", "0.9,0.6", "--p", "0.9", "--out", out)
    assert result.exit_code == 0, result.output
    for words in ("needs at p = 0.9", "by prompt", "each one", "int4 per token", "paper, K per ch"):
        assert words in result.stdout
    assert {path.name for path in out.iterdir()} == {
        *("settings.json", "results.jsonl", "budget.json"),
        *("dynamism.png", "mass.png", "perplexity.png"),
    }
    found = json.loads((out / "budget.json").read_text())
    assert found["machine"] == {"gpu": "none", "torch": torch.__version__}
    assert found["settings"]["tokens"] == 300 and found["graded_layers"] == [2, 3]
    assert [row["layer"] for row in found["mass_by_layer"]] == [0, 1, 2, 3] * 2
    assert {(row["rule"], row["p"]) for row in found["loss"]} == {
        (rule, p) for rule in ("balanced", "paper", "paper, K per channel") for p in (0.6, 0.9)
    }
    for row in found["mass_by_layer"]:
        assert row["captured"]["int8_token"] == pytest.approx(row["p"], abs=0.1)


def test_a_run_cut_short_goes_on(arguments: list[str], tmp_path: Path) -> None:
    wanted = [*arguments, "--out", tmp_path, "--p"]
    first = run(*wanted, "0.8")
    assert first.exit_code == 0, first.output
    results = tmp_path / "results.jsonl"
    whole = results.read_text()
    results.write_text(whole[: len(whole) // 2])
    again = run(*wanted, "0.8")
    assert again.exit_code == 0 and again.stdout == first.stdout
    assert results.read_text() == whole
    more = run(*wanted, "0.8,0.7", "--at", "0.7")  # one p more, in the same folder
    assert more.exit_code == 0 and "needs at p = 0.7" in more.stdout
    assert results.read_text().startswith(whole)
    other = run(*wanted, "0.8", "--targets", "6")
    assert other.exit_code == 2 and "targets was 5, is 6" in other.stderr


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--p", "0"], "--p is '0'; it must be a number in (0, 1]"),
        (["--p", "0.8,1.01"], "--p is '1.01'"),
        (["--p", "-0.5"], "--p is '-0.5'"),
        (["--p", "nan"], "--p is 'nan'"),
        (["--p", "half"], "--p is 'half'"),
        (["--p", "0.8,"], "--p is ''"),
        (["--p", "0.8", "--at", "0.9"], "--at is 0.9; it must be one of --p: 0.8"),
        (["--length", "2000"], "the text text has 2640 tokens; 2 passages of 2000 tokens need"),
        (["--length", "190"], "length is 190 with 5 targets; it must be at least 201"),
        (["--targets", "0"], "targets is 0"),
        (["--targets", "300"], "length is 300 with 300 targets"),
        (["--passages", "0"], "passages is 0"),
        (["--text", "/no/such/file"], "--text /no/such/file: No such file"),
        (["--dtype", "int7"], "int7"),
    ],
)
def test_a_wrong_option_is_named(
    arguments: list[str], tmp_path: Path, wrong: list[str], words: str
) -> None:
    result = run(*arguments, "--out", tmp_path / "out", *wrong)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("twilight: ") and result.stderr.count("\n") == 1
    assert words in result.stderr
    assert not (tmp_path / "out").exists()


def test_help_names_the_options() -> None:
    result = run("--help")
    assert result.exit_code == 0 and "--passages" in result.output and "(0, 1]" in result.output
