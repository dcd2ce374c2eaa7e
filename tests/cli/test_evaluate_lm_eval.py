"""`twilight eval lm-eval`: its options and errors; a whole run where lm-eval is installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.cli.models import CHAT_TEMPLATE, tiny_model
from tests.cli.test_evaluate import assert_error, run
from twilight_engine.cli.evaluate_lm_eval import read_metadata

WANTED = "the extra lm-eval (700 MB) is not installed"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("model"), chat_template=CHAT_TEMPLATE))


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"q": "Who?", "a": "Abel"}, {"q": "Where?", "a": "there"}, {"q": "Why?", "a": "so"}]
    (folder / "quiz.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "quiz.yaml").write_text(
        "task: quiz\ntest_split: test\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'quiz.jsonl'}}}}}\n"
        'output_type: generate_until\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\n'
        "generation_kwargs: {until: [], do_sample: false, max_gen_toks: 8}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    return folder


def test_without_lm_eval_the_extra_is_named(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    assert_error(run("lm-eval", model, "--tasks", "gsm8k"), "twilight-engine[lm-eval]")


def test_help_and_missing_tasks(model: str) -> None:
    assert "--include-path" in run("lm-eval", "--help").output
    assert_error(run("lm-eval", model), "--tasks")


def test_metadata_is_an_object() -> None:
    assert read_metadata(None) == {} and read_metadata('{"a": [1]}') == {"a": [1]}
    with pytest.raises(ValueError, match=r"--metadata is '\[1\]'; it must be a JSON object"):
        read_metadata("[1]")
    with pytest.raises(ValueError, match="--metadata is not JSON"):
        read_metadata("{a}")


def test_a_run_writes_a_table_and_everything_beside_it(
    model: str, tasks: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason=WANTED)
    out = tmp_path / "out"
    arguments = ["lm-eval", model, "--tasks", "quiz", "--include-path", tasks, "--limit", "2"]
    arguments += ["--methods", "dense,balanced", "--apply-chat-template", "--out", out]
    result = run(*arguments, "--device", "cpu")
    assert result.exit_code == 0, result.output
    for word in ("quiz", "exact_match", "balanced", "- dense", "± 0.0000"):
        assert word in result.stdout
    names = {"settings.json", "results.jsonl", "summary.json", "lm-eval.json"}
    assert {path.name for path in out.iterdir()} == names
    summary = json.loads((out / "summary.json").read_text())
    assert [line["method"] for line in summary["lines"]] == ["dense", "balanced"]
    assert summary["settings"]["limit"] == 2 and summary["lines"][0]["items"] == 2
    assert len((out / "results.jsonl").read_text().splitlines()) == 4
    raw = json.loads((out / "lm-eval.json").read_text())
    assert raw["dense"]["n-samples"]["quiz"] == {"original": 3, "effective": 2}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--limit", "0"], ["limit is 0"]),
        (["--max-length", "0"], ["max_length is 0"]),
        (["--methods", "best"], ["unknown method 'best'"]),
        (["--include-path", "/no/such"], ["--include-path /no/such is no folder"]),
    ],
)
def test_a_wrong_option_is_named(model: str, arguments: list[str], words: list[str]) -> None:
    pytest.importorskip("lm_eval", reason=WANTED)
    assert_error(run("lm-eval", model, "--tasks", "gsm8k", *arguments), *words)
