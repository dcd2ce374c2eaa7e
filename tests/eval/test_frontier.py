from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.cli.models import tiny_model
from twilight_engine.cli.main import app
from twilight_engine.eval.frontier import FrontierPoint, mark_front
from twilight_engine.eval.simulation.row_cache import cache_slots, lru_misses


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
    got = lru_misses(wanted, torch.tensor(slots))
    assert torch.equal(got, brute_force_misses(wanted, slots))


def test_slots_follow_the_mean_sets():
    wanted = torch.zeros(2, 3, 100, dtype=torch.bool)
    wanted[0, :, :30], wanted[1, :, :10] = True, True
    assert cache_slots(wanted, 0.1).tolist() == [15, 5]


def test_command_writes_table_json_and_plot(tmp_path: Path):
    (tmp_path / "model").mkdir()
    model = tiny_model(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("The miller met the ferryman at the harbour. " * 60)
    out = tmp_path / "out"
    arguments = ["eval", "frontier", str(model), "--text", str(text), "--length", "400"]
    arguments += ["--targets", "12", "--passages", "1", "--out", str(out), "--device", "cpu"]
    arguments += ["--only", "balanced,lean,paper"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    record = json.loads((out / "frontier.json").read_text())
    names = {p["name"]: p for p in record["points"]}
    assert set(names) == {"balanced", "lean", "paper"}
    assert names["balanced"]["ppl_dense"] > 1 and names["balanced"]["mass"] >= 0.75
    assert any(p["on_front"] for p in names.values())
    assert (out / "frontier.png").stat().st_size > 10_000


def test_unknown_grading_is_named(tmp_path: Path):
    (tmp_path / "model").mkdir()
    model = tiny_model(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("word " * 2000)
    arguments = ["eval", "frontier", str(model), "--text", str(text), "--only", "nonsense"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code != 0
    assert "nonsense" in str(result.exception) + result.output
