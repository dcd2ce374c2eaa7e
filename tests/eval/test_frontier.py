from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from tests.cli.models import tiny_model
from twilight_engine.cli.main import app
from twilight_engine.eval.frontier import FrontierPoint, mark_front
from twilight_engine.eval.methods import parse_method
from twilight_engine.eval.simulation.grading import Grading
from twilight_engine.eval.simulation.passage import simulate
from twilight_engine.eval.simulation.row_cache import cache_slots, lru_misses
from twilight_engine.eval.simulation.sweep import gradings


def point(name: str, kl: float, link: float, device: float) -> FrontierPoint:
    values = {f.name: 0.0 for f in dataclasses.fields(FrontierPoint)}
    values |= {"name": name, "kl": kl, "link_bytes": link, "device_share": device}
    return FrontierPoint(**{**values, "on_front": False})


def test_front_is_what_nothing_dominates():
    points = [
        point("best KL", 1.0, 9.0, 0.5),
        point("same as best KL", 1.0, 9.0, 0.5),
        point("least link", 3.0, 1.0, 0.5),
        point("worse in all", 3.0, 9.0, 0.6),
        point("least device", 9.0, 9.5, 0.1),
        point("equal but one", 1.0, 9.5, 0.5),
    ]
    on_front = {p.name for p in mark_front(points) if p.on_front}
    assert on_front == {"best KL", "same as best KL", "least link", "least device"}


def brute_force_misses(wanted: torch.Tensor, slots: list[int]) -> torch.Tensor:
    heads, steps, length = wanted.shape
    out = torch.zeros(heads, steps, dtype=torch.int64)
    for h in range(heads):
        cached: dict[int, int] = {}
        for t in range(steps):
            now = [i for i in range(length) if wanted[h, t, i]]
            out[h, t] = sum(i not in cached for i in now)
            cached |= dict.fromkeys(now, t)
            newest = sorted(cached, key=lambda i: (-cached[i], i))[: slots[h]]
            cached = {i: cached[i] for i in newest}
    return out


@pytest.mark.parametrize("slots", [[0, 5], [3, 40], [10, 10]])
def test_lru_misses_like_a_dictionary(slots):
    generator = torch.Generator().manual_seed(3)
    wanted = torch.rand(2, 9, 40, generator=generator) < 0.2
    want = brute_force_misses(wanted, slots)
    assert torch.equal(lru_misses(wanted, torch.tensor(slots)), want)
    other = brute_force_misses(wanted, [7, 2])  # caches of several sizes in one pass
    both = lru_misses(wanted, torch.tensor([slots, [7, 2]]))
    assert torch.equal(both, torch.stack([want, other])) and not torch.equal(want, other)


def test_slots_follow_the_mean_sets():
    wanted = torch.zeros(2, 3, 100, dtype=torch.bool)
    wanted[0, :, :30], wanted[1, :, :10] = True, True
    assert cache_slots(wanted, 0.1).tolist() == [15, 5]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    (tmp_path / "model").mkdir()
    text = tmp_path / "text.txt"
    text.write_text("The miller met the ferryman at the harbour. " * 60)
    model = str(tiny_model(tmp_path / "model"))
    start = ["eval", "frontier", model, "--text", str(text), "--length", "400", "--targets", "12"]
    return [*start, "--passages", "2", "--out", str(tmp_path / "out"), "--device", "cpu"]


def run(arguments: list[str]) -> Result:
    return CliRunner().invoke(app, arguments)


def test_dense_is_a_point_without_loss_or_link(arguments: list[str], tmp_path: Path):
    result = run([*arguments, "--only", "dense,balanced"])
    assert result.exit_code == 0, result.output
    dense, graded = json.loads((tmp_path / "out" / "frontier.json").read_text())["points"]
    assert dense["name"] == "dense" and dense["on_front"]
    assert abs(dense["kl"]) < 1e-6 and dense["link_bytes"] == 0 and dense["top1"] == 1
    assert dense["device_share"] == 1 > graded["device_share"]
    assert dense["exact_share"] == 1 and dense["mass_kept_share"] == 1
    assert dense["ppl"] == pytest.approx(dense["ppl_dense"])


def test_command_writes_table_json_and_plot(arguments: list[str], tmp_path: Path):
    shares = ["--cache-share", "0.25,0.0625"]
    result = run([*arguments, *shares, "--only", "balanced,lean,paper, K per channel"])
    assert result.exit_code == 0, result.output
    assert "row cache" in result.stdout and "6.25%" in result.stdout and "25%" in result.stdout
    out = tmp_path / "out"
    record = json.loads((out / "frontier.json").read_text())
    assert record["machine"] == {"gpu": "none", "torch": torch.__version__}
    assert (record["tokens"], record["targets"], len(record["passages"])) == (400, 12, 2)
    points = {(p["name"], p["cache_share"]): p for p in record["points"]}
    names = ("balanced", "lean", "paper, K per channel")
    assert set(points) == {(name, share) for name in names for share in (0.0625, 0.25)}
    assert points["balanced", 0.25]["ppl_dense"] > 1 and points["balanced", 0.25]["mass"] >= 0.75
    assert any(p["on_front"] for p in points.values())
    for name in names:
        small, large = points[name, 0.0625], points[name, 0.25]
        assert small["link_bytes"] >= large["link_bytes"] and small["kl"] == large["kl"]
        # 1/16 and 1/4 of the rows of two layers of four.
        assert large["device_share"] - small["device_share"] == pytest.approx(0.1875 / 2)
    assert any(
        points[name, 0.0625]["link_bytes"] > points[name, 0.25]["link_bytes"] for name in names
    )
    assert (out / "frontier.png").stat().st_size > 10_000


def test_a_run_cut_short_goes_on(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What is on disk is not simulated again, and the points are the same."""
    arguments += ["--only", "balanced,lean"]
    assert run(arguments).exit_code == 0
    results, points = tmp_path / "out" / "results.jsonl", tmp_path / "out" / "frontier.json"
    whole, wanted = results.read_text(), points.read_text()
    lines = whole.splitlines(keepends=True)
    assert [(r["item"], r["method"]) for r in map(json.loads, lines)] == [
        (f"text/{place}", name) for place in (460, 1780) for name in ("balanced", "lean")
    ]
    results.write_text("".join(lines[:3]) + lines[3][:40])
    points.unlink()
    simulated = []

    def counted(model, passage, grading):
        simulated.append(grading)
        return simulate(model, passage, grading)

    monkeypatch.setattr("twilight_engine.eval.frontier_run.simulate", counted)
    assert run(arguments).exit_code == 0
    assert len(simulated) == 2  # dense, and lean on the second passage
    assert results.read_text() == whole and points.read_text() == wanted
    other = run([*arguments, "--cache-share", "0.5"])
    assert other.exit_code == 2 and "cache_shares was [0.0625], is [0.5]" in other.stderr


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--only", "balanced,nonsense"], "--only names 'nonsense'; allowed: balanced, lean"),
        (["--cache-share", "0.1,2"], "--cache-share is '2'; it must be a number in (0, 1]"),
        (["--cache-share", "all"], "--cache-share is 'all'"),
        (["--passages", "0"], "passages is 0"),
    ],
)
def test_a_wrong_option_is_named(arguments: list[str], wrong: list[str], words: str):
    result = run([*arguments, *wrong])
    assert result.exit_code == 2 and words in result.stderr


def test_the_sweep_has_the_methods_under_their_names():
    sweep = gradings(4)
    for name in ("balanced@0.9", "paper@0.85", "dense-int4", "quest:1024", "top_k:1024"):
        method = parse_method(name)
        assert sweep[name] == Grading.of(method.kv, method.sparse, 4)
    assert sweep["index 0.995"].index_top_p == 0.995
