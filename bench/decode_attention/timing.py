"""Times on a GPU (events, queued behind work that hides the launch) or on a CPU (its clock)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from twilight_engine.runtime.step_graph import garbage_kept


def spread(times: list[float]) -> dict[str, float]:
    """Median, p10 and p90 of microseconds."""
    cuts = statistics.quantiles(times, n=10) if len(times) > 1 else [times[0]] * 9
    return {"us": statistics.median(times), "us_p10": cuts[0], "us_p90": cuts[-1]}


class Stopwatch:
    """Collects the times of runs; on a GPU nothing is waited for until `times` is read."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._times: list[float] = []

    def run(self, work: Callable[[], object]) -> None:
        """Run and time; on the current stream, which had better be busy until it is launched."""
        if not self._on_gpu:
            started = time.perf_counter()
            work()
            self._times.append((time.perf_counter() - started) * 1e6)
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        self._events.append((start, end))

    def times(self) -> list[float]:
        """Microseconds of each run."""
        for start, end in self._events:
            end.synchronize()
            self._times.append(start.elapsed_time(end) * 1e3)
        self._events = []
        return self._times


class Replay:
    """Work captured as a CUDA graph of its own memory; on a CPU simply the work.

    Args:
        warm: the work has run already; otherwise it runs once before its capture.
        countable: keep the graph's nodes, for `raw_graph`.
    """

    def __init__(
        self,
        device: torch.device,
        work: Callable[[], object],
        *,
        warm: bool = False,
        countable: bool = False,
    ) -> None:
        self.work = work
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type != "cuda":
            return
        if not warm:
            work()
        stream = torch.cuda.Stream(device, priority=-1)  # as an engine captures its steps
        current = torch.cuda.current_stream(device)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph(keep_graph=countable)
        stream.wait_stream(current)
        with garbage_kept(), torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._kept = work()  # what the graph writes must not be freed
            finally:
                graph.capture_end()
        current.wait_stream(stream)
        self.graph = graph

    def __call__(self) -> None:
        if self.graph is None:
            self.work()
        else:
            self.graph.replay()

    @property
    def raw_graph(self) -> int:
        """The cudaGraph_t of countable work on a GPU."""
        assert self.graph is not None
        return self.graph.raw_cuda_graph()


def time_work(
    device: torch.device,
    work: Callable[[], object],
    *,
    repeats: int,
    before: Callable[[], object] = lambda: None,
    warmup: int = 2,
) -> list[float]:
    """Microseconds of each run of `work`; `before` runs ahead of each, untimed."""
    for _ in range(warmup):
        before()
        work()
    watch = Stopwatch(device)
    for _ in range(repeats):
        before()
        watch.run(work)
    return watch.times()
