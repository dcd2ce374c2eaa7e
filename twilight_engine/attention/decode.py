"""One decode step's attention: dense layers, the dense policy, or the graded pipeline."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twilight_engine.attention.audit import Audit, Auditor
from twilight_engine.attention.graded import GradedAttention
from twilight_engine.attention.step import (
    append_step,
    bucket,
    page_table,
    window_start,
    with_sliding_window,
)
from twilight_engine.attention.streamed import StreamedAttention
from twilight_engine.config import SparseConfig
from twilight_engine.kv.cache import KVCache, SequenceKV
from twilight_engine.layout import StepMeta
from twilight_engine.ops.attend_pages import attend_pages
from twilight_engine.ops.lsh_codes import write_lsh_codes
from twilight_engine.ops.merge_states import merge_states
from twilight_engine.telemetry import Visit


class DecodeAttention:
    """Attention of a static batch of sequences, a token each a step; callable as `attend`.

    Args:
        cache: the engine's KV cache.
        sequences: open sequences that hold their prompts.
        sparse: a SparseConfig for each. Within a batch only attn_top_p, index_top_p and attn_top_k
            may differ (and neither between a number and None), and audit_every at will.
        auditor: checks triples of the sequences whose config has audit_every; None: nobody does.
    Raises:
        ValueError: for configs that cannot share a batch or do not fit the cache.
    """

    def __init__(
        self,
        cache: KVCache,
        sequences: Sequence[SequenceKV],
        sparse: Sequence[SparseConfig],
        auditor: Auditor | None = None,
    ) -> None:
        if len(sequences) != len(sparse):
            raise ValueError(f"{len(sequences)} sequences came with {len(sparse)} sparse configs")
        self.cache, self.sequences = cache, list(sequences)
        self._sparse, self._auditor = list(sparse), auditor
        self._audits: list[Audit] = []
        device = cache.device
        self._slots = torch.tensor([s.slot for s in sequences], device=device)
        self._lens = torch.tensor([s.length for s in sequences], dtype=torch.int32, device=device)
        self._table = page_table(cache, sequences)
        self._row = torch.arange(len(sequences) + 1, dtype=torch.int32, device=device)
        self._zeros = torch.zeros(len(sequences), dtype=torch.int32, device=device)
        self._max_len = 0
        self._begun = False
        self._graded: dict[int, GradedAttention] = {}
        self._streamed = StreamedAttention(cache, self._dense_policy_layers(sparse))
        for layer in cache.sparse_layers:
            if layer not in self._streamed.layers:
                configs = [config.layer(layer) for config in sparse]
                self._graded[layer] = GradedAttention(cache, layer, configs)
        self._metas: dict[int | None, StepMeta] = {}
        cache.batch_changed()

    @property
    def positions(self) -> Tensor:
        """[B] int64: the position of each sequence's token in this step, device."""
        return self._lens.long() - 1

    @property
    def max_len(self) -> int:
        """What bounds every sequence in this step; a captured step serves all of one max_len."""
        return self._max_len

    @property
    def needs_host(self) -> bool:
        """Whether the layers of this step need the host, so that it cannot be a CUDA graph."""
        return bool(self._streamed.layers or self._audits)

    def begin_step(self) -> None:
        """The host's part of a step: make room for a token in every sequence, and log it.

        Raises: OutOfPages or ValueError if a sequence cannot grow; none has got its token then.
        """
        cache, config = self.cache, self.cache.config
        grown = [cache.extend(s, s.length + 1) for s in self.sequences]
        if any(grown):
            self._table.copy_(page_table(cache, self.sequences))
        for sequence in self.sequences:
            cache.begin_token(sequence, first=not self._begun)
        self._begun = True
        longest = max(s.length for s in self.sequences)
        self._max_len = min(bucket(longest, config.page_size), cache.plan.capacity)
        cache.start_step(self._slots)
        recent, size = config.num_recent, config.page_size
        cache.log.begin_step(
            [
                Visit(s.sequence_id, s.length, window_start(s.length, recent, size))
                for s in self.sequences
            ]
        )
        self._streamed.begin_step(self.sequences, self._table)
        if self._auditor is not None:
            layers = list(self._graded)
            self._audits = self._auditor.plan(self.sequences, self._sparse, layers)

    def advance(self) -> None:
        """The device's part, before the first layer: count the tokens and describe the step."""
        self._lens.add_(1)
        config = self.cache.config
        recent, size = config.num_recent, config.page_size
        starts = torch.div(self._lens - recent, size, rounding_mode="floor").clamp_(min=0) * size
        meta = StepMeta(
            page_table=self._table,
            seq_slots=self._slots.int(),
            seq_lens=self._lens,
            window_starts=starts,
            cu_seqlens_q=self._row,
            query_seq=self._row[:-1],
            positions=self._lens - 1,
            ctx_starts=self._zeros,
            page_size=size,
            num_sink=config.num_sink,
            max_len=self._max_len,
        )
        windows = set(self.cache.model.sliding_windows)
        self._metas = {w: with_sliding_window(meta, w) for w in windows}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one layer; q [B, Hq, D], k and v [B, Hkv, D] -> [B, Hq, D]."""
        tiers = self.cache.layers[layer]
        meta = self._metas[self.cache.model.sliding_windows[layer]]
        graded = self._graded.get(layer)
        appends = graded is not None and graded.appends
        if not appends:
            append_step(self.cache, layer, k, v, meta)
        if tiers.pages is not None:
            scale = self.cache.model.softmax_scale
            state = attend_pages(q, tiers.pages, meta.page_table, meta, softmax_scale=scale)
            return merge_states([state], q.dtype)[0]
        assert tiers.windows is not None and tiers.index is not None
        if tiers.lsh is not None:
            write_lsh_codes(k, meta, tiers.lsh, tiers.index)
        if graded is None:
            return self._streamed(layer, q, meta)
        out = graded(q, meta, (k, v) if appends else None)
        self._audit(layer, q, out)
        return out

    def _audit(self, layer: int, q: Tensor, out: Tensor) -> None:
        """Hand a graded layer that is audited in this step to the auditor."""
        for audit in self._audits:
            if audit.layer == layer:
                assert self._auditor is not None
                pruned = self.cache.buffers[layer].first(q.shape[0]).pruned
                self._auditor.check(audit, q, out, pruned)

    def end_step(self) -> None:
        """Close the step's log."""
        self.cache.log.end_step()

    def _dense_policy_layers(self, sparse: Sequence[SparseConfig]) -> list[int]:
        """Sparse layers whose policy is dense: in all sequences of the batch, or in none."""
        dense = []
        for layer in self.cache.sparse_layers:
            policies = {config.layer(layer).policy for config in sparse}
            if len(policies) > 1:
                raise ValueError(f"layer {layer}: one batch cannot mix policies {sorted(policies)}")
            if policies == {"dense"}:
                dense.append(layer)
        return dense
