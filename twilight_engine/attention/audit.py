"""Audits of a running decode: sampled triples checked exactly against the host's rows."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from twilight_engine.attention.audit_record import Audits, Floats
from twilight_engine.attention.step import window_start
from twilight_engine.config import SparseConfig
from twilight_engine.kv.cache import KVCache, SequenceKV
from twilight_engine.layout import Pruned

CHUNK_TOKENS = 8192  # rows of one head staged at once: 4 MB in bf16 at D 128
NUM_SNAPSHOTS = 2  # audits under way; a step waits only for the one before the last
NUM_RESULTS = 256  # audits before the host reads what they found
NUM_FIGURES = 5  # of one audit: estimated_mass to worst_head_error
SEED = 0


@dataclass(frozen=True)
class Audit:
    """One triple of the step under way, and where its sequence stands in the batch."""

    sequence: SequenceKV
    row: int
    step: int
    layer: int
    kv_head: int
    p: float
    keeps_every_row: bool


@dataclass
class _Snapshot:
    """What later layers overwrite, kept for one audit."""

    q: Tensor  # [G, D]
    out: Tensor  # [G, D]
    tokens: Tensor  # [C] int32: the exact list
    count: Tensor  # [] int32: its length
    mass: Tensor  # [] float32: what the pruner believed
    done: torch.cuda.Event | None = None


def audited_pair(sequence_id: int, length: int, every: int, num_pairs: int) -> int | None:
    """Which (layer, head) pair a sequence of this length audits in this step; None: none.

    A pure function: one step of every `every` is audited, at a place that differs from stretch to
    stretch (a fixed phase would see each page at one filling only), and the pairs take turns in an
    order of the sequence's own, so that num_pairs audits in a row cover all.
    """
    stretch, offset = divmod(length, every)
    if random.Random(f"{SEED}/{sequence_id}/{stretch}").randrange(every) != offset:
        return None
    order = list(range(num_pairs))
    random.Random(f"{SEED}/{sequence_id}").shuffle(order)
    return order[stretch % num_pairs]


class Auditor:
    """Checks triples of decode steps against an exact softmax over the host's rows.

    For query heads g of a KV head, with w[g] the softmax over every token the layer sees, in
    float64: the mass of the set S that was attended exactly, sum of w[g, S], and the error of the
    engine's output against w[g] V. On a GPU this runs on a stream of its own, in chunks through a
    fixed staging buffer; the decode stream copies q, output and list aside and goes on. A closed
    sequence's pages stay until its audits have read them. On a CPU it runs within the step.

    Args:
        cache: the engine's KV cache, with graded layers.
    """

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        model, size = cache.model, cache.config.page_size
        self._group = model.num_q_heads // model.num_kv_heads
        self._chunk_pages = -(-min(CHUNK_TOKENS, cache.plan.capacity) // size)
        self._stream = None
        if cache.on_gpu:
            self._stream = torch.cuda.Stream(cache.device, priority=0)  # CUDA's lowest
        self._snapshots = [self._snapshot() for _ in range(NUM_SNAPSHOTS)]
        with self._background():
            shape = (1, self._chunk_pages, size, 2 * model.head_dim)
            self._staging = torch.empty(shape, dtype=cache.dtype, device=cache.device)
            self._places = torch.arange(cache.plan.capacity, device=cache.device)
            # Whether a token is in S; the last entry takes what the list holds beyond its count.
            self._inside = self._places.new_empty(cache.plan.capacity + 1, dtype=torch.bool)
            results = max(NUM_RESULTS, cache.max_num_seqs)
            self._results = torch.empty(
                results, NUM_FIGURES, dtype=torch.float64, device=cache.device
            )
        self._taken = 0
        self._pending: list[tuple[Audit, int]] = []  # and the bytes moved
        self._found: dict[int, list[tuple[Audit, int, Floats]]] = {}

    def plan(
        self,
        sequences: Sequence[SequenceKV],
        sparse: Sequence[SparseConfig],
        graded_layers: Sequence[int],
    ) -> list[Audit]:
        """The audits of the step that has just begun: at most one a sequence."""
        if len(self._pending) + len(sequences) > self._results.shape[0]:
            self._read_results()
        heads = self.cache.model.num_kv_heads
        num_pairs = len(graded_layers) * heads
        audits = []
        for row, (sequence, config) in enumerate(zip(sequences, sparse, strict=True)):
            if config.audit_every is None or not num_pairs:
                continue
            length = sequence.length
            pair = audited_pair(sequence.sequence_id, length, config.audit_every, num_pairs)
            if pair is None:
                continue
            layer = graded_layers[pair // heads]
            here = config.layer(layer)
            p = here.attn_top_p if here.attn_top_k is None else float("nan")
            keeps = here.keeps_every_row
            audits.append(Audit(sequence, row, length, layer, pair % heads, p, keeps))
        return audits

    def check(self, audit: Audit, q: Tensor, out: Tensor, pruned: Pruned) -> None:
        """Take a layer's inputs aside and check them in the background.

        Args:
            q, out: [N, Hq, D]: the layer's queries and the engine's output.
            pruned: the layer's lists; read in stream order before this returns.
        """
        snapshot = self._snapshots[self._taken % NUM_SNAPSHOTS]
        self._taken += 1
        n, h = audit.row, audit.kv_head
        heads = slice(h * self._group, (h + 1) * self._group)
        if snapshot.done is not None:
            torch.cuda.current_stream(self.cache.device).wait_event(snapshot.done)
        snapshot.q.copy_(q[n, heads])
        snapshot.out.copy_(out[n, heads])
        snapshot.tokens[: audit.step].copy_(pruned.exact.tokens[n, h, : audit.step])
        snapshot.count.copy_(pruned.exact.counts[n, h])
        if audit.keeps_every_row:
            snapshot.mass.fill_(1.0)
        else:
            snapshot.mass.copy_(pruned.mass[n, h])
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.cache.device))
        with self._background():
            moved = self._compare(audit, snapshot, self._results[len(self._pending)])
            if self._stream is not None:
                snapshot.done = torch.cuda.Event()
                snapshot.done.record(self._stream)
                audit.sequence.reads = [snapshot.done]
        self._pending.append((audit, moved))

    def take(self, sequence_id: int) -> Audits | None:
        """What the audits of a sequence found, which are then forgotten; waits for them."""
        self._read_results()
        found = self._found.pop(sequence_id, [])
        if not found:
            return None
        audits = [audit for audit, _, _ in found]
        estimated, realised, weakest, error, worst = np.stack([values for _, _, values in found]).T
        return Audits(
            step=np.array([audit.step for audit in audits]),
            layer=np.array([audit.layer for audit in audits]),
            kv_head=np.array([audit.kv_head for audit in audits]),
            p=np.array([audit.p for audit in audits]),
            estimated_mass=estimated,
            realised_mass=realised,
            weakest_head_mass=weakest,
            output_error=error,
            worst_head_error=worst,
            bytes=np.array([moved for _, moved, _ in found]),
        )

    def clear(self) -> None:
        """Forget what no one has taken."""
        self._read_results()
        self._found = {}

    def _compare(self, audit: Audit, snapshot: _Snapshot, result: Tensor) -> int:
        """Fill `result` [NUM_FIGURES]; the bytes moved. All on the current stream."""
        q, engine = snapshot.q.double(), snapshot.out.double()
        window = self.cache.model.sliding_windows[audit.layer]
        start = 0 if window is None else max(0, audit.step - window)
        self._mark(audit, snapshot)
        top = torch.full_like(q[:, :1], float("-inf"))
        total, kept, out = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(q)
        size, moved = self.cache.config.page_size, 0
        last_page = -(-audit.step // size)
        for first in range(start // size, last_page, self._chunk_pages):
            pages = audit.sequence.pages[first : min(first + self._chunk_pages, last_page)]
            rows = self._rows(audit, pages)
            moved += rows.numel() * rows.element_size()
            begin, end = max(start, first * size), min(audit.step, (first + len(pages)) * size)
            rows = rows[begin - first * size : end - first * size].double()  # [T, 2 * D]
            k, v = rows.chunk(2, dim=1)
            scores = q @ k.T * self.cache.model.softmax_scale
            above = torch.maximum(top, scores.amax(dim=1, keepdim=True))
            weights, old = torch.exp(scores - above), torch.exp(top - above)
            total = total * old + weights.sum(1, keepdim=True)
            kept = kept * old + (weights * self._inside[begin:end]).sum(1, keepdim=True)
            out = out * old + weights @ v
            top = above
        mass, out = kept / total, out / total
        norm = out.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
        error = (engine - out).norm(dim=1) / norm
        figures = (snapshot.mass.double(), mass.mean(), mass.amin(), error.mean(), error.amax())
        torch.stack(figures, out=result)
        return moved

    def _mark(self, audit: Audit, snapshot: _Snapshot) -> None:
        """Which tokens were attended exactly: the list, the sinks and the window."""
        config, length = self.cache.config, audit.step
        self._inside.fill_(False)
        nowhere = self._inside.shape[0] - 1
        listed = self._places[:length] < snapshot.count
        tokens = torch.where(listed, snapshot.tokens[:length].long(), nowhere)
        self._inside.index_fill_(0, tokens, True)
        self._inside[: config.num_sink] = True
        self._inside[window_start(length, config.num_recent, config.page_size) :] = True

    def _rows(self, audit: Audit, pages: Sequence[int]) -> Tensor:
        """[tokens of the pages, 2 * D]: the host's rows of the triple, in the staging buffer."""
        model, size = self.cache.model, self.cache.config.page_size
        staging = self._staging.view(-1, 2 * model.head_dim)[: len(pages) * size]
        self.cache.transfers.to_device(
            audit.layer,
            torch.tensor(pages, dtype=torch.int32),
            staging.view(1, len(pages), size, 2 * model.head_dim),
            first_head=audit.kv_head,
            stream=0 if self._stream is None else self._stream.cuda_stream,
        )
        return staging

    def _read_results(self) -> None:
        """Wait for the audits under way and keep their figures by sequence."""
        if not self._pending:
            return
        if self._stream is not None:
            self._stream.synchronize()
        figures = self._results[: len(self._pending)].cpu().numpy().copy()
        for (audit, moved), values in zip(self._pending, figures, strict=True):
            self._found.setdefault(audit.sequence.sequence_id, []).append((audit, moved, values))
        self._pending = []

    def _snapshot(self) -> _Snapshot:
        cache, device = self.cache, self.cache.device
        shape = (self._group, cache.model.head_dim)
        return _Snapshot(
            q=torch.empty(shape, dtype=cache.dtype, device=device),
            out=torch.empty(shape, dtype=cache.dtype, device=device),
            tokens=torch.empty(cache.plan.capacity, dtype=torch.int32, device=device),
            count=torch.empty((), dtype=torch.int32, device=device),
            mass=torch.empty((), dtype=torch.float32, device=device),
        )

    def _background(self) -> contextlib.AbstractContextManager[object]:
        """The audits' stream on a GPU; nothing on a CPU."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
