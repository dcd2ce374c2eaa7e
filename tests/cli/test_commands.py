"""The commands on a tiny random model: what they print, and where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.cli.models import CHAT_TEMPLATE, tiny_model
from twilight_engine.cli.fit import weight_bytes
from twilight_engine.cli.main import app
from twilight_engine.cli.report_plots import plot_report
from twilight_engine.cli.units import format_bytes, format_seconds
from twilight_engine.models.load import load_model

LONG = " ".join(f"word{i}" for i in range(90))


def run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("model"), chat_template=CHAT_TEMPLATE))


def test_generate_prints_text_and_then_what_it_cost(model: str) -> None:
    result = run("generate", model, "--prompt", LONG, "--max-tokens", "6", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("\n")
    assert f"{len(LONG)} tokens read" in result.stderr
    assert "hit rate" in result.stderr


def test_generate_json_is_one_object(model: str) -> None:
    arguments = ["--max-tokens", "6", "--device", "cpu", "--json"]
    result = run("generate", model, "--prompt", LONG, *arguments)
    data = json.loads(result.stdout)
    assert data["num_prompt_tokens"] == len(LONG)
    assert len(data["token_ids"]) == 6
    assert data["offload"]["run"]["num_decode_steps"] == 5
    assert 0 < data["offload"]["bytes"]["host_to_device"] < data["offload"]["bytes"]["dense"]


def test_generate_reads_a_file_or_stdin_alike(model: str, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(LONG)
    options = ["--max-tokens", "4", "--device", "cpu", "--json"]
    from_file = run("generate", model, "--prompt-file", str(tmp_path / "prompt.txt"), *options)
    from_stdin = run("generate", model, "--prompt-file", "-", *options, stdin=LONG)
    tokens = json.loads(from_file.stdout)["token_ids"]
    assert json.loads(from_stdin.stdout)["token_ids"] == tokens


def test_generate_with_every_row_equals_the_dense_policy(model: str) -> None:
    options = ["--prompt", LONG, "--max-tokens", "8", "--device", "cpu", "--json"]
    kept = run("generate", model, *options, "--attn-top-p", "1")
    dense = run("generate", model, *options, "--policy", "dense")
    assert json.loads(kept.stdout)["token_ids"] == json.loads(dense.stdout)["token_ids"]


def test_the_dense_policy_moves_all_but_the_recent_window(model: str) -> None:
    options = ["--prompt", LONG, "--max-tokens", "5", "--device", "cpu", "--json"]
    data = json.loads(run("generate", model, *options, "--policy", "dense").stdout)["offload"]
    row = 2 * 64 * 4  # K and V of a head, float32
    steps, layers, window = 4, 2, 128 + 64
    assert data["bytes"]["streamed"] < data["bytes"]["dense"]
    assert data["bytes"]["streamed"] > data["bytes"]["dense"] - steps * layers * window * row


def test_generate_writes_the_report(model: str, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "report"
    options = ["--max-tokens", "5", "--device", "cpu", "--report", str(folder)]
    result = run("generate", model, "--prompt", LONG, *options)
    assert result.exit_code == 0, result.output
    written = {path.name for path in folder.iterdir()}
    assert written == {"report.json", "budget.png", "rows.png", "bytes.png"}
    assert json.loads((folder / "report.json").read_text())["run"]["num_decode_steps"] == 4
    assert "fewer bytes" in result.stderr


def test_generate_audits_and_reports_it(model: str, tmp_path: Path) -> None:
    options = ["--prompt", LONG, "--max-tokens", "9", "--device", "cpu"]
    plain = json.loads(run("generate", model, *options, "--json").stdout)
    options += ["--audit-every", "2"]
    data = json.loads(run("generate", model, *options, "--json").stdout)
    assert data["token_ids"] == plain["token_ids"]
    assert 3 <= data["offload"]["audit"]["count"] <= 5 and "audit" not in plain["offload"]
    assert data["offload"]["bytes"] == plain["offload"]["bytes"]
    result = run("generate", model, *options, "--report", str(tmp_path))
    assert "triples audited: realised mass" in result.stderr
    assert "weakest query head" in result.stderr
    assert json.loads((tmp_path / "report.json").read_text())["audit"]["bytes"] > 0


def test_chat_answers_each_line_and_leaves(model: str) -> None:
    options = ["--max-tokens", "3", "--device", "cpu"]
    result = run("chat", model, *options, stdin="hello\n\nagain\n/quit\nnever\n")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("> ") == 4


def test_doctor_says_whether_a_model_fits(model: str) -> None:
    fits = run("doctor", "--model", model, "--context", "512")
    assert fits.exit_code == 0, fits.output
    assert "It fits." in fits.stdout
    for tier in ("weights", "index", "windows", "hot rows", "dense layers", "arena"):
        assert tier in fits.stdout
    huge = run("doctor", "--model", model, "--context", str(10**12))
    assert huge.exit_code == 1
    assert "It does not fit" in huge.stdout


def test_doctor_without_a_model_describes_the_machine() -> None:
    data = json.loads(run("doctor", "--json").stdout)
    assert data["link"]["host_to_device_gbps"] > 0
    assert {"Machine", "GPU", "Host memory for KV", "Versions"} <= set(data)


def test_weight_bytes_are_those_of_the_model(model: str) -> None:
    loaded = load_model(model)
    real = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    assert weight_bytes(loaded.config, 4) == real


@pytest.mark.parametrize("command", [[], ["generate"], ["chat"], ["demo"], ["doctor"]])
def test_help_is_there_for_every_command(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_version_and_no_command() -> None:
    assert run("--version").exit_code == 0
    assert "doctor" in run().stdout


def test_numbers_read_well() -> None:
    assert [format_bytes(n) for n in (0, 999, 1024, 1536, 15 << 20, 1234567, 263 << 20)] == [
        *("0 B", "999 B", "1 KiB", "1.5 KiB", "15 MiB", "1.18 MiB", "263 MiB")
    ]
    assert [format_seconds(s) for s in (0.0123, 4.25, 75)] == ["12.3 ms", "4.2 s", "1 min 15 s"]


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_plots_are_drawn_for_runs_of_any_length(steps: int, tmp_path: Path) -> None:
    from tests.runtime.runs import made_up_output, made_up_shape, made_up_steps
    from twilight_engine.runtime.report import build_report

    shape = made_up_shape()
    report = build_report([made_up_output(made_up_steps(shape, steps=steps))], shape)
    assert all(path.stat().st_size > 1000 for path in plot_report(report, tmp_path))
