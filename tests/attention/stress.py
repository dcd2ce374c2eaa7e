"""Decoding over random lists, with everything known that must come out: for the stress tests."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.attention.model_shape import Shape, make_cache
from tests.compare import TOLERANCE
from twilight_engine.attention.decode import DecodeAttention
from twilight_engine.attention.selectors import LayerView
from twilight_engine.attention.step import page_table, prefill_meta, window_start
from twilight_engine.attention.store import store_rows
from twilight_engine.config import EVERY_CANDIDATE, KVConfig, SparseConfig
from twilight_engine.kv.cache import KVCache, SequenceKV
from twilight_engine.layout import NO_ROW, SLOTS_PER_CHUNK
from twilight_engine.runtime.step_graph import StepGraph, StepGraphs

MOST_DELAY_CYCLES = 200_000  # some 100 us


class RandomTokens:
    """A selector whose candidates, which are all exact, are drawn anew for each step.

    A sequence's favourites come more often, so that some are hot; lists are sometimes empty,
    sometimes the whole context. The streams beside the main one are kept busy for a random time
    before each layer (not in a capture), so that a missing wait shows.
    """

    per_token = True

    def __init__(self, cache: KVCache, batch: int, clock: random.Random) -> None:
        model = cache.model
        shape = (model.num_layers, batch, model.num_kv_heads, cache.plan.capacity)
        self.masks = torch.zeros(shape, dtype=torch.uint8, device=cache.device)
        self._favour = torch.rand(shape, device=cache.device).pow(8)
        streams = (cache.copy_stream, cache.side_stream, cache.append_stream)
        self._streams = [s for s in streams if s is not None]
        self._clock = clock

    def draw(self) -> None:
        share = torch.rand(*self.masks.shape[:3], 1, device=self.masks.device) * 1.2 - 0.1
        wanted = torch.rand_like(self._favour) < self._favour * share
        everything = torch.rand_like(share) < 0.02
        self.masks.copy_(wanted | everything)

    def select(self, q: Tensor, view: LayerView) -> Tensor:
        for stream in self._streams:
            if not torch.cuda.is_current_stream_capturing():
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(self._clock.randrange(MOST_DELAY_CYCLES))
        size = view.meta.page_size
        return self.masks[view.layer, ..., : -(-view.meta.max_len // size) * size].contiguous()


@dataclass(frozen=True)
class Case:
    """A shape and how little room there is."""

    shape: Shape
    page_size: int
    max_len: int
    max_seqs: int
    hot_share: float  # of all rows


class Stress:
    """A cache, its open sequences, and every row that was ever written to it.

    Nothing waits for the device until `check`: a step's misses, evictions, appends and attention
    run into those of the next. What is wrong is counted on the device.
    """

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        self.case, self.device = case, device
        self.random = random.Random(seed)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        shape, size = case.shape, case.page_size
        row_bytes = 2 * shape.head_dim * self.dtype.itemsize
        kv_bytes = shape.num_layers * shape.num_kv_heads * case.max_seqs * case.max_len * row_bytes
        config = KVConfig(
            page_size=size,
            num_recent=size,
            dense_layers=(),
            hot_bytes=int(case.hot_share * kv_bytes),
        )
        self.cache = make_cache(
            device,
            config,
            shape=shape,
            max_model_len=case.max_len,
            max_num_seqs=case.max_seqs,
            dtype=self.dtype,
        )
        rows = (shape.num_kv_heads, self.cache.plan.num_pages * size, 2 * shape.head_dim)
        self.truth = torch.zeros(shape.num_layers, *rows, dtype=self.dtype, device=device)
        self.graphs = StepGraphs(device) if device.type == "cuda" else None
        self.sequences: list[SequenceKV] = []
        self.wrong_rows = torch.zeros((), dtype=torch.int64, device=device)
        self.rows_seen = torch.zeros((), dtype=torch.int64, device=device)
        self.worst_error = torch.zeros((), device=device)
        self.outputs_seen = 0

    def episode(self, steps: int, *, tail: str, check_every: int) -> None:
        """Close and open sequences, then decode a random batch of them.

        Args:
            tail: with "renormalise" outputs are held against a reference; "mean" has the page means
                attended while rows are fetched.
            check_every: of so many steps one is checked, on average; the others follow unhindered.
        """
        self._renew(steps)
        batch = self.random.sample(self.sequences, self.random.randint(1, len(self.sequences)))
        shape = self.case.shape
        selector = RandomTokens(self.cache, len(batch), self.random)
        sparse = SparseConfig(
            attn_top_k=EVERY_CANDIDATE,
            index_top_p=None,
            tail=tail,  # type: ignore[arg-type]
            mass_margin=0.0,
            selector=selector,
        )
        decode = DecodeAttention(self.cache, batch, [sparse] * len(batch))
        runner = _Steps(self, decode, capture=self.random.random() < 0.5)
        for step in range(steps):
            selector.draw()
            out = runner.step()
            if step == steps - 1 or self.random.randrange(check_every) == 0:
                for layer in range(shape.num_layers):
                    self._count_wrong_rows(layer)
                    if tail == "renormalise":
                        self._compare(layer, runner, batch, selector.masks[layer], out[layer])

    def check(self) -> None:
        """Wait for the device, and assert that nothing was wrong so far."""
        assert int(self.wrong_rows) == 0 and int(self.rows_seen) > 0
        assert float(self.worst_error) <= TOLERANCE[self.dtype][0] * torch.finfo(self.dtype).eps
        assert self.outputs_seen > 0
        for layer, tiers in enumerate(self.cache.layers):
            for sequence in self.sequences:
                full = sequence.length // self.case.page_size
                pages = torch.tensor(sequence.pages[:full], dtype=torch.int64)
                host = tiers.host[:, pages].flatten(1, 2)
                truth = self.truth[layer].unflatten(1, (-1, self.case.page_size))
                assert torch.equal(host, truth[:, pages.to(self.device)].flatten(1, 2).cpu())

    def close(self) -> None:
        self.cache.close()

    def _renew(self, steps: int) -> None:
        """Some sequences end, and all that lack room for the steps; others take their pages."""
        for sequence in list(self.sequences):
            if sequence.length + steps > self.case.max_len or self.random.random() < 0.3:
                self.cache.close_sequence(sequence)
                self.sequences.remove(sequence)
        while not self.sequences or (
            len(self.sequences) < self.case.max_seqs and self.random.random() < 0.7
        ):
            self._open(self.random.randint(1, self.case.max_len - steps))

    def _open(self, length: int) -> None:
        cache, shape = self.cache, self.case.shape
        sequence = cache.open_sequence(length)
        table = page_table(cache, [sequence])
        meta = prefill_meta(cache, table, sequence.slot, 0, length)
        keys = self.keys(sequence, length)
        for layer in range(shape.num_layers):
            k, v = (self.rows(length, shape.num_kv_heads) for _ in range(2))
            store_rows(cache, layer, k, v, meta, first_page=0)
            self.truth[layer][:, keys] = torch.cat([k, v], dim=-1).transpose(0, 1)
        sequence.length = length
        self.sequences.append(sequence)

    def rows(self, *shape: int) -> Tensor:
        return torch.randn(*shape, self.case.shape.head_dim, device=self.device).to(self.dtype)

    def keys(self, sequence: SequenceKV, length: int) -> Tensor:
        """[L]: where a sequence's tokens lie in a head's strip."""
        size = self.case.page_size
        pages = torch.tensor(sequence.pages, device=self.device)
        tokens = torch.arange(length, device=self.device)
        return pages[tokens // size] * size + tokens % size

    def _count_wrong_rows(self, layer: int) -> None:
        """Every row that the map claims is the host's, and every slot is in the map."""
        tiers, hkv = self.cache.layers[layer], self.case.shape.num_kv_heads
        assert tiers.hot is not None and tiers.windows is not None
        hot, pool = tiers.hot, tiers.windows.rows
        slots = hot.slot_key.shape[0]
        held = hot.slot_key != NO_ROW
        owner = hot.chunk_owner.repeat_interleave(SLOTS_PER_CHUNK)
        head, key = (owner.clamp(min=0) % hkv).long(), hot.slot_key.clamp(min=0).long()
        bits = torch.int16 if self.dtype == torch.bfloat16 else torch.int32
        found = pool[hot.first_row : hot.first_row + slots].view(bits)
        row = torch.arange(slots, device=self.device) + hot.first_row
        wrong = (found != self.truth[layer][head, key].view(bits)).any(-1)
        wrong |= (hot.slot_map.flatten(1)[head, key] != row) | (owner == NO_ROW)
        self.wrong_rows += (wrong & held).sum()
        self.wrong_rows += ((hot.slot_map != NO_ROW).sum() - held.sum()).abs()
        self.rows_seen += held.sum()

    def _compare(
        self,
        layer: int,
        runner: _Steps,
        batch: list[SequenceKV],
        masks: Tensor,
        out: Tensor,
    ) -> None:
        """The outputs [B, Hq, D] of a layer against float32 attention over the true rows."""
        shape, config = self.case.shape, self.cache.config
        for b, sequence in enumerate(batch):
            length = sequence.length
            rows = self.truth[layer][:, self.keys(sequence, length)].float()
            tokens = torch.arange(length, device=self.device)
            kept = masks[b, :, :length].bool() | (tokens < config.num_sink)
            kept |= tokens >= window_start(length, config.num_recent, config.page_size)
            q = runner.q[layer, b].float().unflatten(0, (shape.num_kv_heads, -1))
            logits = q @ rows[..., : shape.head_dim].transpose(1, 2) * shape.softmax_scale
            weights = logits.masked_fill(~kept[:, None], -torch.inf).softmax(-1)
            expected = (weights @ rows[..., shape.head_dim :]).flatten(0, 1)
            error = (out[b].float() - expected).abs() / expected.abs().clamp(min=1)
            self.worst_error = torch.maximum(self.worst_error, error.nan_to_num(torch.inf).max())
        self.outputs_seen += len(batch)


class _Steps:
    """The steps of one batch: launched kernel by kernel, or from the second on as a CUDA graph."""

    def __init__(self, stress: Stress, decode: DecodeAttention, *, capture: bool) -> None:
        self.stress, self.decode = stress, decode
        self.capture = capture and stress.graphs is not None
        shape, batch = stress.case.shape, len(decode.sequences)
        self.q = stress.rows(shape.num_layers, batch, shape.num_q_heads)
        self.k, self.v = (
            stress.rows(shape.num_layers, batch, shape.num_kv_heads) for _ in range(2)
        )
        self._graph: StepGraph | None = None
        self._max_len = 0

    def step(self) -> Tensor:
        """[layers, B, Hq, D]; every step has queries and rows of its own."""
        for tensor in (self.q, self.k, self.v):
            tensor.normal_()
        self.decode.begin_step()
        same = self.decode.max_len == self._max_len
        self._max_len = self.decode.max_len
        if self.capture and same:
            if self._graph is None:
                assert self.stress.graphs is not None
                self._graph = self.stress.graphs.capture(self._launch)
            out = self._graph.replay()
        else:
            self._graph = None
            out = self._launch()
        self._note_rows()
        self.decode.end_step()
        return out

    def _launch(self) -> Tensor:
        self.decode.advance()
        return torch.stack(
            [self.decode(i, self.q[i], self.k[i], self.v[i]) for i in range(self.q.shape[0])]
        )

    def _note_rows(self) -> None:
        """Into the truth, without waiting for the device."""
        decode, size = self.decode, self.stress.case.page_size
        page = decode._table.gather(1, (decode.positions // size)[:, None])[:, 0]
        new = torch.cat([self.k, self.v], dim=-1).transpose(1, 2)  # [layers, Hkv, B, 2 * D]
        self.stress.truth[:, :, page * size + decode.positions % size] = new
