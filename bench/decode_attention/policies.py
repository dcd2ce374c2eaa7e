"""What people would use instead: the same operator with another way to bring the rows.

Each is a policy, a switch of one operator, not the system that made it known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from twilight_engine.attention.decode import DecodeAttention
from twilight_engine.attention.graded import GradedAttention, NewRows
from twilight_engine.attention.selectors import LayerView
from twilight_engine.config import SparseConfig
from twilight_engine.kv.cache import KVCache, SequenceKV
from twilight_engine.kv.tiers import StepBuffers
from twilight_engine.layout import (
    NO_ROW,
    SLOTS_PER_CHUNK,
    FetchLists,
    HotRows,
    Pruned,
    RowLists,
    StepMeta,
)
from twilight_engine.ops.attend_workspace import AttendState
from twilight_engine.ops.gather_rows import gather_rows
from twilight_engine.telemetry import DIRECT, MISSED

MakeAttention = Callable[[KVCache, int, Sequence[SparseConfig]], "OpenGraded"]


class OpenGraded(GradedAttention):
    """The operator, with its parts open to the bench."""

    def prune(self, q: Tensor, meta: StepMeta) -> Pruned:
        return self._prune(q, meta, self._buffers(meta.num_queries))[0]

    def buffers_of(self, meta: StepMeta) -> StepBuffers:
        return self._buffers(meta.num_queries)


class ZeroCopyRows(OpenGraded):
    """Every exact row comes over the link in every step, by the gather kernel; nothing is kept.

    The layer's slots are plain staging: lists follow each other from the first one on.

    Args:
        most_rows: of a list, if known; None: the context. Longer lists stay on the host in part,
            where attention reads them itself.
    Raises: ValueError if the layer has fewer slots than the lists can have rows.
    """

    def __init__(
        self,
        cache: KVCache,
        layer: int,
        configs: Sequence[SparseConfig],
        *,
        most_rows: int | None = None,
    ) -> None:
        super().__init__(cache, layer, configs)
        self.most_rows = min(most_rows or cache.plan.capacity, cache.plan.capacity)
        lists = len(configs) * cache.model.num_kv_heads
        slots = min(cache.plan.hot_slots)
        if lists * self.most_rows > slots:
            raise ValueError(
                f"hot_bytes gives a layer {slots} slots; staging {lists} lists of "
                f"{self.most_rows} rows takes {lists * self.most_rows}"
            )

    def _fetch(self, exact: RowLists, meta: StepMeta, buffers: StepBuffers) -> Tensor:
        most = self.most_rows
        fetch = staged_lists(exact, meta, self._hot.first_row, most)
        buffers.locations[..., :most] = fetch.dst
        buffers.locations[..., most:] = NO_ROW
        counters = self.cache.log.counters[self.layer]
        gather_rows(self.tiers.host, fetch, self.windows.rows, counters=counters)
        self.cache.log.record_layer(self.layer, {MISSED: fetch.counts, DIRECT: fetch.direct})
        return buffers.locations

    @property
    def _hot(self) -> HotRows:
        assert self.tiers.hot is not None, "the staging rows are the layer's hot rows"
        return self.tiers.hot


class QuestPages(ZeroCopyRows):
    """Quest: every token of the blocks it selects is exact; no estimate, nothing below."""

    def _attend_graded(
        self, q: Tensor, meta: StepMeta, buffers: StepBuffers, new_rows: NewRows
    ) -> list[AttendState]:
        view = LayerView(
            self.layer,
            self.index,
            self.windows,
            meta,
            self.cache.model.softmax_scale,
            self.config.selector_budget,
            self.index.candidate_block,
        )
        kept = self.selector.select(q, view)
        assert kept is not None
        exact = lists_of_blocks(kept, meta, self.index.candidate_block, buffers.pruned.exact)
        locations = self._fetch(exact, meta, buffers)
        return [self._attend_exact(q, exact, locations, meta)]


class PolicyDecode(DecodeAttention):
    """Decode steps whose graded layers are of a class of the bench's."""

    def __init__(
        self,
        cache: KVCache,
        sequences: Sequence[SequenceKV],
        sparse: SparseConfig,
        attention: MakeAttention = OpenGraded,
    ) -> None:
        super().__init__(cache, sequences, [sparse] * len(sequences))
        self.layers = {i: attention(cache, i, [sparse] * len(sequences)) for i in self._graded}
        self._graded.update(self.layers)

    @property
    def meta(self) -> StepMeta:
        """The step under way."""
        return self._metas[None]


def host_keys(tokens: Tensor, meta: StepMeta) -> Tensor:
    """Place of each token [N, Hkv, C] in its head's host strip: page id * S + offset."""
    tokens = tokens.clamp(0, meta.max_len - 1)  # what lies past a list's count is anything
    tables = meta.page_table.index_select(0, meta.query_seq)
    page = (tokens // meta.page_size).long()
    ids = tables[:, None].expand(-1, tokens.shape[1], -1).gather(2, page)
    return ids * meta.page_size + tokens % meta.page_size


def staged_lists(exact: RowLists, meta: StepMeta, first_row: int, most: int) -> FetchLists:
    """Fetch lists of the first `most` listed rows, to rows one after another from first_row on."""
    fetched = exact.counts.clamp(max=most)
    counts = fetched.flatten()
    start = (first_row + counts.cumsum(0) - counts).view_as(exact.counts)
    place = torch.arange(most, dtype=torch.int32, device=counts.device)
    dst = (start[..., None] + place).int()
    src = host_keys(exact.tokens[..., :most], meta).int().contiguous()
    return FetchLists(src, dst, fetched, torch.zeros_like(fetched))


def lists_of_blocks(kept: Tensor, meta: StepMeta, block: int, out: RowLists) -> RowLists:
    """The listed tokens of the blocks kept [N, Hkv, NB]; blocks divide a page."""
    tokens = torch.arange(meta.max_len, device=kept.device)
    inside = kept.index_select(2, tokens // block).bool()
    start = meta.window_starts.index_select(0, meta.query_seq)
    inside &= (tokens >= meta.num_sink) & (tokens < start[:, None, None])
    place = inside.cumsum(2)
    # Tokens that are not listed go to the last place, which no list of less than all reaches.
    target = torch.where(inside, place - 1, out.tokens.shape[2] - 1)
    out.tokens.scatter_(2, target, tokens.int().expand_as(target))
    out.counts.copy_(place[..., -1])
    return out


def forget_rows(cache: KVCache, *, keep_last: bool) -> None:
    """Empty every slot: no cache. keep_last: but for the previous step's set."""
    for layer in cache.layers:
        if layer.hot is not None:
            _forget(layer.hot, keep_last)


def _forget(hot: HotRows, keep_last: bool) -> None:
    pages, heads = hot.slot_map.shape[1:].numel(), hot.slot_map.shape[0]
    owner = hot.chunk_owner.repeat_interleave(SLOTS_PER_CHUNK)
    held = hot.slot_key != NO_ROW
    stale = held & (hot.slot_stamp < hot.step) if keep_last else held
    where = ((owner % heads).long() * pages + hot.slot_key)[stale]
    hot.slot_map.view(-1)[where] = NO_ROW
    hot.slot_key[stale] = NO_ROW
