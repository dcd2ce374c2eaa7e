"""A decode step as a CUDA graph: captured once, then replayed with one launch."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Collect garbage now and none within: to free an old graph, say, would end a capture."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class StepGraphs:
    """Captures steps into one memory pool, for one graph at a time.

    The host's share of a step is then one launch in place of several hundred. A graph repeats the
    same kernels on the same addresses: whatever changes from step to step must lie in tensors that
    were there before the capture.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Above the lower grades, which run on a stream of their own beside the exact rows.
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._take_pool()

    def capture(self, step: Callable[[], Tensor]) -> StepGraph:
        """Record what `step` launches, without running it.

        Args:
            step: launches the step and returns its result; it has run before, so that nothing in it
                is initialised for the first time. The last graph must be gone: its memory is used
                again.
        Raises: RuntimeError if the step waits for the device, or is otherwise not capturable.
        """
        try:
            return self._record(step)
        except RuntimeError as error:
            self._take_pool()  # the allocator takes no more captures into a pool that saw one fail
            raise RuntimeError(
                f"the decode step could not be captured as a CUDA graph ({error}); a selector of "
                "your own must not read device values on the host or copy host values to the "
                "device; enforce_eager=True runs steps without a graph"
            ) from error

    def _take_pool(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()
        # torch's allocators refuse a pool whose last graph is gone: a small one keeps it.
        x = torch.zeros(1, device=self._device)
        self._anchor = self._record(lambda: x.add_(1))

    def _record(self, step: Callable[[], Tensor]) -> StepGraph:
        current = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(current)
        with garbage_kept(), torch.cuda.stream(self._stream):
            # Other threads may go on calling CUDA: only this one's calls are held to the rules.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = step()
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        return StepGraph(graph, result)


class StepGraph:
    """A captured step; `result` is overwritten by each replay."""

    def __init__(self, graph: torch.cuda.CUDAGraph, result: Tensor) -> None:
        self._graph, self.result = graph, result

    def replay(self) -> Tensor:
        """Run the step on the current stream -> its result, valid until the next replay."""
        self._graph.replay()
        return self.result
