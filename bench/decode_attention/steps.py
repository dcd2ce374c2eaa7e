"""Whole attention steps: one layer's time, from all layers in turn, and what they read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from decode_attention.floors import Rows
from decode_attention.host_policies import MakeLayer
from decode_attention.machine import Machine
from decode_attention.policies import PolicyDecode
from decode_attention.timing import Replay, Stopwatch, spread
from decode_attention.workload import Workload
from twilight_engine.attention.decode import DecodeAttention


@dataclass(frozen=True)
class StepTimes:
    """Microseconds a layer (median, p10, p90), and rows of a layer's mean step."""

    us: dict[str, float]
    rows: Rows


class StepRun:
    """Decodes a workload's steps under one policy.

    On a GPU the first step is launched by kernel, later ones are replayed as a CUDA graph of all
    layers (what is the same for every layer is a graph of its own, not timed: a model does it once
    for all its layers). Steps that need the host are launched by themselves.

    Args:
        make_layer: replaces a layer's step by one with the host in the loop.
        query: the step whose queries every step asks, so that all rows are hot from the second
            one on; None: each step asks its own.
    """

    def __init__(
        self,
        workload: Workload,
        machine: Machine,
        decode: DecodeAttention,
        make_layer: MakeLayer | None = None,
        query: int | None = None,
    ) -> None:
        self.workload, self.machine, self.decode, self.query = workload, machine, decode, query
        self.q = torch.zeros_like(workload.queries[0])
        self._advance: Replay | None = None
        self._layers: Callable[[], object] = self.launch_layers
        self._max_len = 0
        self._host_layers: list[Callable[[], None]] | None = None
        if make_layer is not None:
            assert isinstance(decode, PolicyDecode)
            self._host_layers = [
                make_layer(decode, i, (self.q[i], workload.new_k[i], workload.new_v[i]))
                for i in range(workload.shape.num_layers)
            ]

    def begin(self, t: int, prepare: Callable[[], object] = lambda: None) -> None:
        """Step t up to its first layer."""
        prepare()
        self.decode.begin_step()
        self.q.copy_(self.workload.queries[t if self.query is None else self.query])
        if self.decode.max_len != self._max_len:
            self._max_len = self.decode.max_len
            self._advance, self._layers = None, self.launch_layers
            self.decode.advance()
            return
        if self._advance is None:
            self._advance = Replay(self.workload.device, self.decode.advance, warm=True)
            if self._host_layers is None and not self.decode.needs_host:
                self._layers = Replay(self.workload.device, self.launch_layers, warm=True)
        self._advance()

    def run(
        self,
        warm: int,
        *,
        stop: int | None = None,
        cool: Callable[[], object] | None = None,
        prepare: Callable[[], object] = lambda: None,
    ) -> list[float]:
        """Decode up to step `stop`; microseconds a layer of the steps from `warm` on.

        Args:
            cool: runs before each step's layers; None: L2 and translations are made cold.
            prepare: runs before each step, with nothing timed.
        """
        watch = Stopwatch(self.workload.device)
        for t in range(self.workload.steps if stop is None else stop):
            self.begin(t, prepare)
            (cool or self.machine.cool)()
            if t >= warm:
                watch.run(self._layers)
            else:
                self._layers()
            self.decode.end_step()
        return [us / self.workload.shape.num_layers for us in watch.times()]

    def launch_layers(self) -> None:
        """The step's layers, one after another."""
        for i in range(self.workload.shape.num_layers):
            self.launch_layer(i)

    def launch_layer(self, i: int) -> None:
        if self._host_layers is not None:
            self._host_layers[i]()
        else:
            self.decode(i, self.q[i], self.workload.new_k[i], self.workload.new_v[i])


def rows_of(workload: Workload, warm: int) -> Rows:
    """Rows of a layer's mean step, all requests and heads together, from step `warm` on."""
    totals = np.zeros(5)
    for sequence in workload.sequences:
        log = workload.cache.log.request(sequence.sequence_id)
        missed = log.missed + log.direct
        for i, counted in enumerate((log.exact, log.index, log.tail, log.resident, missed)):
            totals[i] += counted[warm:].sum(2).mean()
    return Rows(*(float(x) for x in totals))


def measure_steps(
    workload: Workload,
    machine: Machine,
    decode: DecodeAttention,
    *,
    warm: int,
    stop: int | None = None,
    make_layer: MakeLayer | None = None,
    query: int | None = None,
    cool: Callable[[], object] | None = None,
    prepare: Callable[[], object] = lambda: None,
) -> StepTimes:
    """Time a policy's steps from the prompt on, and take the workload back to the prompt."""
    run = StepRun(workload, machine, decode, make_layer, query)
    times = run.run(warm, stop=stop, cool=cool, prepare=prepare)
    rows = rows_of(workload, warm)
    workload.rewind()
    return StepTimes(spread(times), rows)
