"""`twilight calibrate` on a tiny random model, what picks its file up, and every wrong option."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.cli.models import tiny_model
from twilight_engine.cli.calibrate_run import split
from twilight_engine.cli.main import app
from twilight_engine.eval.haystack import paragraphs
from twilight_engine.eval.items import Passage
from twilight_engine.loaders.calibration_file import read_calibration

SMALL = ["--length", "500", "--targets", "12", "--passages", "4", "--device", "cpu"]
LOOSE = ["--ppl-tolerance", "0.5", "--kl-tolerance", "0.5", "--attn-top-p", "0.5,0.8"]
PROMPT = ["--prompt", "word " * 80, "--max-tokens", "4", "--device", "cpu"]


def run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], input=stdin)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "hay.txt"
    path.write_text("\n\n".join(itertools.islice(paragraphs(0), 40)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def calibrated(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that the command wrote, away from the model."""
    path = tmp_path_factory.mktemp("out") / "made.json"
    result = run("calibrate", model, "--text", text, *SMALL, *LOOSE, "--by-layer", "--out", path)
    assert result.exit_code == 0, result.output
    assert {p.name for p in path.parent.iterdir()} == {"made.json", "made.png"}
    assert path.with_suffix(".png").stat().st_size > 10_000
    (path.parent / "table.txt").write_text(result.stdout)
    return path


def test_the_table_has_the_sweep_and_the_file_the_least_bytes(calibrated: Path) -> None:
    made = read_calibration(calibrated)
    table = (calibrated.parent / "table.txt").read_text()
    for word in ("masses", "dense layers", "held out", "chosen: ", "device 78"):
        assert word in table
    shown = [float(x) for x in re.findall(r"([\d.]+) MB +│ +(?:yes|no)", table)]
    sweep = [row["link_bytes"] / 1e6 for row in made.sweep]
    assert shown[1 : 1 + len(sweep)] == pytest.approx(sweep, abs=6e-4)  # after the preset's
    within = [row["link_bytes"] for row in made.sweep if row["within"]]
    assert made.measured["chosen"]["link_bytes"] <= 1.01 * min(within)
    assert made.measured["held_out"]["within"] is True
    sample = made.measured["sample"]
    assert len(sample["chosen_on"]) == len(sample["held_out"]) == 2
    assert not set(sample["chosen_on"]) & set(sample["held_out"])


def test_generate_chat_and_doctor_take_it_and_say_so(
    calibrated: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = tiny_model(tmp_path)
    (model / "twilight_calibration.json").write_bytes(calibrated.read_bytes())
    line = f"calibrated by {model / 'twilight_calibration.json'}: balanced, attn_top_p"
    result = run("generate", model, *PROMPT, "--report", tmp_path / "report")
    assert result.exit_code == 0 and line in result.stderr
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["shape"]["calibration"] == str(model / "twilight_calibration.json")
    assert tuple(report["shape"]["dense_layers"]) == read_calibration(calibrated).dense_layers
    data = json.loads(run("generate", model, *PROMPT, "--audit-every", "1", "--json").stdout)
    assert data["calibration"] == str(model / "twilight_calibration.json")
    assert data["offload"]["audit"]["count"] > 0
    assert line in run("chat", model, "--device", "cpu", stdin="/quit\n").stderr
    assert line in run("doctor", "--model", model, "--context", "512").stdout.replace("\n", "")
    for options in (["--calibration", "none"], ["--attn-top-p", "0.8"], ["--dense-layers", "0"]):
        data = json.loads(run("generate", model, *PROMPT, *options, "--json").stdout)
        assert data["calibration"] is None


def test_a_named_file_and_one_of_another_model(
    calibrated: Path, model: Path, tmp_path: Path
) -> None:
    named = ["--calibration", calibrated]
    data = json.loads(run("generate", model, *PROMPT, *named, "--json").stdout)
    assert data["calibration"] == str(calibrated)
    data = json.loads(run("doctor", "--model", model, "--context", "512", *named, "--json").stdout)
    assert data["calibration"] == str(calibrated)
    assert_error(run("generate", model, *PROMPT, *named, "--fetch", "page"), 2, "give one of them")
    other = json.loads(calibrated.read_text())
    other["model"] |= {"name": "other-model", "num_layers": 4, "vocab_size": 512}
    (tmp_path / "other.json").write_text(json.dumps(other))
    result = run("generate", model, *PROMPT, "--calibration", tmp_path / "other.json")
    assert_error(result, 2, "of other-model, not of", model.name, "vocab_size 512, not 256")
    (tmp_path / "other.json").write_text("{")
    result = run("generate", model, *PROMPT, "--calibration", tmp_path / "other.json")
    assert_error(result, 1, "other.json", "not valid JSON")


def assert_error(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("twilight: ") and result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--length", "100000"], ["hay has 27584 tokens", "need 400000", "shorter length"]),
        (["--passages", "1"], ["--passages is 1", "at least 2"]),
        (["--targets", "8"], ["--targets is 8", "above 8"]),
        (["--targets", "500"], ["targets is 500", "below length"]),
        (["--ppl-tolerance", "0"], ["--ppl-tolerance is 0"]),
        (["--attn-top-p", "0.5,much"], ["--attn-top-p is 'much'", "a number in (0, 1]"]),
        (
            ["--attn-top-p", "1.2", "--index-top-p", "1.5"],
            ["--attn-top-p is '1.2'; it must be a number in (0, 1]"],
        ),
        (["--attn-top-p", "0.9", "--index-top-p", "0.8"], ["every --attn-top-p is above"]),
        (["--preset", "lean", "--index-top-p", "0.9"], ["'lean' has no index grade"]),
        (["--preset", "fast"], ["preset is 'fast'"]),
        (["--device-budget", "much"], ["--device-budget is 'much'"]),
        (["--device-budget", "5%"], ["5.0% of the KV of 1024 tokens"]),
        (["--text", "/no/such/file"], ["--text /no/such/file"]),
        (["--out", "/no/such/folder/file.json"], ["/no/such/folder/file.json cannot be written"]),
    ],
)
def test_a_wrong_option_is_named(
    model: Path, text: Path, arguments: list[str], words: list[str]
) -> None:
    assert_error(run("calibrate", model, "--text", text, *SMALL, *arguments), 2, *words)


def test_without_a_setting_there_is_a_table_and_no_file(
    model: Path, text: Path, tmp_path: Path
) -> None:
    strict = ["--ppl-tolerance", "1e-9", "--kl-tolerance", "1e-12", "--attn-top-p", "0.5"]
    out = tmp_path / "made.json"
    result = run("calibrate", model, "--text", text, *SMALL, *strict, "--out", out)
    assert result.exit_code == 1 and "masses" in result.stdout
    for word in (
        "no setting is shown to stay within",
        "the closest, 0.5 / ",
        "give more --passages",
    ):
        assert word in result.stderr
    assert not out.exists() and out.with_suffix(".png").exists()


@pytest.mark.parametrize(
    ("count", "texts", "first"),
    [(4, 1, [0, 2]), (4, 2, [0, 1]), (8, 2, [0, 1, 4, 5]), (2, 2, [0]), (3, 3, [0, 2])],
)
def test_both_halves_have_passages_of_every_text(count: int, texts: int, first: list[int]) -> None:
    passages = [Passage(str(i), (), ()) for i in range(count)]
    halves = split(passages, texts)
    assert [int(p.item_id) for p in halves[0]] == first
    assert sorted(p.item_id for half in halves for p in half) == [str(i) for i in range(count)]
