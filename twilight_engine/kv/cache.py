"""The KV cache of an engine: host arena, device index, windows, hot rows and dense pages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from twilight_engine.config import KVConfig
from twilight_engine.kv.errors import OutOfPages
from twilight_engine.kv.host import HostArena
from twilight_engine.kv.pages import PagePool
from twilight_engine.kv.plan import MemoryPlan, ModelShape, plan_memory
from twilight_engine.kv.tiers import TierShape
from twilight_engine.kv.transfers import Transfers
from twilight_engine.ops.hot_quotas import rebalance_quotas, release_sequence
from twilight_engine.telemetry import StepLog


class CachedModel(ModelShape, Protocol):
    """What the cache reads of a model's config."""

    @property
    def sliding_windows(self) -> tuple[int | None, ...]: ...
    @property
    def softmax_scale(self) -> float: ...


# Rebalancing moves chunks between heads and evicts their slots; set sizes drift over tens of steps
# (one head's set swings with a CV of .3-.8, a whole step with .06-.2).
REBALANCE_STEPS = 16


@dataclass(eq=False)
class SequenceKV:
    """One open sequence: its slot, its pages and how many tokens it holds."""

    sequence_id: int
    slot: int
    pages: list[int]
    length: int = 0
    closed: bool = False
    reads: list[torch.cuda.Event] = field(default_factory=list)  # of its pages, in the background


@dataclass
class _Closing:
    """Pages that wait for the copies which may still touch them."""

    epoch: int
    events: list[torch.cuda.Event] = field(default_factory=list)


class KVCache:
    """All KV memory of one engine, planned and taken when it is built.

    The host arena's address space is reserved at once and grown when sequences are opened; every
    row of every layer is kept there at full precision until its sequence is closed.

    Args:
        model: the shape of the model.
        kv_config: what to keep where.
        max_model_len: tokens a sequence may have, prompt and output together.
        max_num_seqs: sequences that may be open at once.
        device: where the model computes; on a CPU the "device" tiers are ordinary memory.
        dtype: dtype of the rows; float32 on a CPU.
    Raises:
        ValueError: for a budget that holds less than a page, or a layer the model lacks.
        HostMemoryError: if the host cannot hold the arena.
    """

    def __init__(
        self,
        model: CachedModel,
        kv_config: KVConfig,
        *,
        max_model_len: int,
        max_num_seqs: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.model = model
        self.config = kv_config
        self.device = torch.device(device)
        self.dtype = dtype
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.plan = self.plan_for(
            model, kv_config, max_model_len=max_model_len, max_num_seqs=max_num_seqs, dtype=dtype
        )
        # For copied pages, what needs no fetched row, the step's rows: whoever forks, joins again.
        streams = [torch.cuda.Stream(self.device) if self.on_gpu else None for _ in range(3)]
        self.copy_stream, self.side_stream, self.append_stream = streams
        self.pool = PagePool(self.plan.num_pages)
        self.host = HostArena(
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads,
            num_pages=self.plan.num_pages,
            page_size=kv_config.page_size,
            head_dim=model.head_dim,
            dtype=dtype,
            device=self.device,
        )
        self.transfers = Transfers(self.host)
        self.log = StepLog(
            num_layers=model.num_layers,
            max_num_seqs=max_num_seqs,
            num_kv_heads=model.num_kv_heads,
            dense_layers=self.plan.dense_layers,
            sliding_windows=tuple(model.sliding_windows),
            num_sink=kv_config.num_sink,
            device=self.device,
        )
        self.step = torch.zeros(1, dtype=torch.int32, device=self.device)
        tiers = TierShape(
            model, kv_config, self.plan, max_num_seqs, self.device, dtype=dtype, step=self.step
        )
        self.layers = [
            tiers.dense_layer(self.host.layer(i))
            if i in self.plan.dense_layers
            else tiers.sparse_layer(self.host.layer(i), self.plan.hot_slots[i])
            for i in range(model.num_layers)
        ]
        self.buffers = tiers.step_buffers({i: self.log.layer(i) for i in self.sparse_layers})
        self._free_slots = list(range(max_num_seqs))[::-1]
        self._next_id = 0
        self._next_epoch = 1
        self._closing: list[_Closing] = []
        self._steps_since_rebalance = 0

    @staticmethod
    def plan_for(
        model: ModelShape,
        kv_config: KVConfig,
        *,
        max_model_len: int,
        max_num_seqs: int,
        dtype: torch.dtype,
    ) -> MemoryPlan:
        return plan_memory(
            model,
            kv_config,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            dtype_bytes=dtype.itemsize,
        )

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def sparse_layers(self) -> list[int]:
        return [i for i in range(self.model.num_layers) if i not in self.plan.dense_layers]

    @property
    def shares_pages(self) -> bool:
        """Whether two open sequences may hold one page: no, each takes pages nobody else holds."""
        return False

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's K and V in one layer and KV head."""
        return 2 * self.model.head_dim * self.dtype.itemsize

    @property
    def max_tokens(self) -> int:
        """Tokens one sequence can have."""
        return min(self.max_model_len, self.plan.num_pages * self.config.page_size)

    @property
    def free_tokens(self) -> int:
        """Tokens that the free pages hold."""
        self._reclaim(wait=True)
        return self.pool.num_free * self.config.page_size

    @property
    def registered_bytes(self) -> int:
        """Host bytes pinned for the device right now."""
        return self.host.registered_bytes

    def open_sequence(self, num_tokens: int) -> SequenceKV:
        """Take a slot and the pages for this many tokens, growing the arena if need be.

        Raises:
            ValueError: more tokens than max_model_len.
            OutOfPages: no slot, or not enough pages; the message has the numbers.
        """
        if num_tokens > self.max_model_len:
            raise ValueError(
                f"the sequence needs {num_tokens} tokens; max_model_len is {self.max_model_len}"
            )
        if not self._free_slots:
            raise OutOfPages(
                f"all {self.max_num_seqs} sequence slots (max_num_seqs) are in use",
                -(-num_tokens // self.config.page_size),
                self.pool.num_free,
            )
        pages = self._take_pages(-(-num_tokens // self.config.page_size))
        sequence = SequenceKV(self._next_id, self._free_slots.pop(), pages)
        self._next_id += 1
        return sequence

    def extend(self, sequence: SequenceKV, num_tokens: int) -> bool:
        """Make room for a sequence of this many tokens; True if it got new pages."""
        missing = -(-num_tokens // self.config.page_size) - len(sequence.pages)
        if missing <= 0:
            return False
        if num_tokens > self.max_model_len:
            raise ValueError(
                f"the sequence needs {num_tokens} tokens; max_model_len is {self.max_model_len}"
            )
        sequence.pages += self._take_pages(missing, after=sequence.pages[-1], exact=False)
        return True

    def close_sequence(self, sequence: SequenceKV) -> None:
        """Give back a sequence's slot, hot rows and, once copies are done, pages. Idempotent."""
        if sequence.closed:
            return
        sequence.closed = True
        pages = torch.tensor(sequence.pages, dtype=torch.int32).to(self.device)
        for layer in self.layers:
            if layer.hot is not None:
                release_sequence(layer.hot, sequence.slot, pages)
        epoch, self._next_epoch = self._next_epoch, self._next_epoch + 1
        self.pool.release(sequence.pages, epoch=epoch)
        self._closing.append(_Closing(epoch, self._record_events() + sequence.reads))
        self._free_slots.append(sequence.slot)

    def begin_token(self, sequence: SequenceKV, *, first: bool) -> None:
        """Count one more token of a sequence; its page is no prefix to share from now on."""
        if first or sequence.length % self.config.page_size == 0:
            self.pool.mark_sparse([sequence.pages[sequence.length // self.config.page_size]])
        sequence.length += 1

    def start_step(self, slots: Tensor) -> None:
        """Count a decode step on the device; `slots` [B] int64 are the sequences in it.

        Hot-row quotas follow the running set sizes every REBALANCE_STEPS steps.
        """
        self.step.add_(1)
        if self._steps_since_rebalance == 0:
            active = torch.zeros(self.max_num_seqs, dtype=torch.uint8, device=self.device)
            active[slots] = 1
            for layer in self.layers:
                if layer.hot is not None:
                    rebalance_quotas(layer.hot, active)
        self._steps_since_rebalance = (self._steps_since_rebalance + 1) % REBALANCE_STEPS

    def batch_changed(self) -> None:
        """Rebalance the quotas at the next step."""
        self._steps_since_rebalance = 0

    def close(self) -> None:
        """Free every tier; afterwards registered_bytes is 0. Idempotent."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        self._reclaim(wait=True)
        self.layers = []
        self.buffers = {}
        self.host.close()

    def __enter__(self) -> KVCache:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _take_pages(self, count: int, *, after: int = -1, exact: bool = True) -> list[int]:
        self._reclaim(wait=self.pool.num_free < count)
        pages = self.pool.allocate(count, exact=exact, after=after)
        try:
            self.host.ensure_pages(max(pages, default=-1) + 1)
        except BaseException:
            self.pool.release(pages)
            raise
        return pages

    def _record_events(self) -> list[torch.cuda.Event]:
        if not self.on_gpu:
            return []
        events = []
        for stream in (torch.cuda.current_stream(self.device), self.copy_stream):
            event = torch.cuda.Event()
            event.record(stream)
            events.append(event)
        return events

    def _reclaim(self, *, wait: bool) -> None:
        """Make the pages of closed sequences reusable whose copies are done."""
        while self._closing:
            closing = self._closing[0]
            if not wait and not all(event.query() for event in closing.events):
                return
            for event in closing.events:
                event.synchronize()
            self.pool.complete(closing.epoch)
            self._closing.pop(0)
