"""StepLog: what it says of one sequence, over blocks, steps of any width and windowed layers."""

from __future__ import annotations

import numpy as np
import torch

from twilight_engine.layout import COUNTER_FETCHED_BYTES
from twilight_engine.telemetry import DIRECT, EXACT, INDEX, MISSED, StepLog, Visit

HEADS, WINDOW = 2, 30
# By step: (sequence id, context, window start) of each sequence of the batch.
STEPS = [
    [(7, 50, 16), (3, 100, 64), (9, 20, 0)],
    [(3, 101, 64)],
    [(7, 51, 32), (3, 102, 80)],
    [(9, 21, 0)],
    [(3, 103, 80), (7, 52, 32)],
]


def filled() -> tuple[StepLog, dict[int, list[tuple[int, int]]]]:
    """A log of STEPS over blocks of two; by sequence, its (step, place in the batch)."""
    log = StepLog(
        num_layers=3,
        max_num_seqs=3,
        num_kv_heads=HEADS,
        dense_layers=(0,),
        sliding_windows=(None, None, WINDOW),
        num_sink=4,
        device=torch.device("cpu"),
        block_steps=2,
    )
    places: dict[int, list[tuple[int, int]]] = {}
    for t, visits in enumerate(STEPS):
        log.begin_step([Visit(*visit) for visit in visits])
        log.counters[1, COUNTER_FETCHED_BYTES] += 100 * (t + 1)
        values = torch.arange(len(visits) * HEADS, dtype=torch.int32).view(-1, HEADS)
        counts = {column: values + 10 * t + column for column in (EXACT, INDEX, MISSED, DIRECT)}
        for layer in (1, 2):
            log.record_layer(layer, {c: counts[c] for c in (EXACT, INDEX)})
            at, n = log.layer(layer), len(visits)
            at.missed[:n], at.direct[:n] = counts[MISSED], counts[DIRECT]
            at.mass[:n] = values / 10 + t
        log.end_step()
        for b, visit in enumerate(visits):
            places.setdefault(visit[0], []).append((t, b))
    return log, places


def test_a_request_gets_its_own_steps():
    log, places = filled()
    for sequence_id, steps in places.items():
        found = log.request(sequence_id)
        assert found.context.tolist() == [STEPS[t][b][1] for t, b in steps]
        assert found.batch.tolist() == [len(STEPS[t]) for t, _ in steps]
        assert found.batch_context.tolist() == [sum(v[1] for v in STEPS[t]) for t, _ in steps]
        for i, (t, b) in enumerate(steps):
            first = 10 * t + HEADS * b
            assert found.exact[i].tolist() == [[0, 0]] + 2 * [[first + EXACT, first + EXACT + 1]]
            assert found.index[i, 1].tolist() == [first + INDEX, first + INDEX + 1]
            assert found.missed[i, 2].tolist() == [first + MISSED, first + MISSED + 1]
            assert found.direct[i, 2].tolist() == [first + DIRECT, first + DIRECT + 1]
            assert np.allclose(found.mass[i, :, 1], [1, t + (2 * b + 1) / 10, t + (2 * b + 1) / 10])
            assert found.counters[i, :, COUNTER_FETCHED_BYTES].tolist() == [0, 100 * (t + 1), 0]


def test_tokens_divide_into_resident_and_graded():
    log, _ = filled()
    found = log.request(3)
    # Layer 0 is dense; layer 1 lists tokens 4 .. window start; layer 2 sees the last 30 tokens.
    assert found.resident[:, 0, 0].tolist() == [100, 101, 102, 103]
    assert found.resident[:, 1, 0].tolist() == [40, 41, 26, 27]
    assert found.resident[:, 2, 0].tolist() == [30, 30, 22, 23]
    total = found.exact + found.index + found.tail + found.resident
    assert total[0, 1, 0] == 100 and (found.tail[0, 2] == 0).all()


def test_a_sequence_that_never_ran_has_no_steps():
    log, _ = filled()
    found = log.request(99)
    assert found.exact.shape == (0, 3, HEADS) and found.counters.shape[0] == 0
    assert found.hit_rate == 1.0
    log.clear()
    assert len(log.request(3).context) == 0
