"""Runs the model: a prompt layer by layer, then a token a step for a static batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from twilight_engine.attention.audit import Auditor
from twilight_engine.attention.audit_record import Audits
from twilight_engine.attention.decode import DecodeAttention
from twilight_engine.attention.prefill import PrefillAttention
from twilight_engine.config import SparseConfig
from twilight_engine.kv.cache import KVCache, SequenceKV
from twilight_engine.models.decoder import DecoderModel
from twilight_engine.runtime.step_graph import StepGraph, StepGraphs


class Runner:
    """Prefill and decode steps of a model over a KV cache; knows no requests and no sampling.

    Args:
        prefill_chunk_size: tokens a chunk; rounded up to whole pages.
        enforce_eager: launch every step kernel by kernel, also where a CUDA graph could serve.
    """

    def __init__(
        self,
        model: DecoderModel,
        cache: KVCache,
        *,
        prefill_chunk_size: int,
        enforce_eager: bool = False,
    ) -> None:
        self.model, self.cache = model, cache
        captures = cache.on_gpu and not enforce_eager
        self._graphs = StepGraphs(cache.device) if captures else None
        size = cache.config.page_size
        self.chunk_size = -(-prefill_chunk_size // size) * size
        self._auditor: Auditor | None = None

    @torch.inference_mode()
    def prefill(
        self,
        sequence: SequenceKV,
        token_ids: Sequence[int],
        on_tokens: Callable[[float], None] = lambda tokens: None,
    ) -> Tensor:
        """Run a prompt and store its KV -> logits [1, V] float32 after its last token.

        Layer-major: every chunk of a layer runs before the next layer, so the device holds the
        K and V of one layer, and the hidden states of the whole prompt.

        Args:
            sequence: open, empty, with pages for the prompt.
            on_tokens: called with the prompt tokens done since the last call; a chunk counts for
                its share of the layers.
        """
        num_tokens, device = len(token_ids), self.cache.device
        ids = torch.tensor(token_ids, dtype=torch.int64, device=device)
        attend = PrefillAttention(
            self.cache, sequence, num_tokens=num_tokens, chunk_size=self.chunk_size
        )
        rotary = self.model.rotary(torch.arange(num_tokens, device=device), num_tokens)
        x = self.model.embed(ids)
        for layer in range(self.model.config.num_layers):
            attend.begin_layer(layer)
            for start in range(0, num_tokens, self.chunk_size):
                end = min(start + self.chunk_size, num_tokens)
                attend.begin_chunk(start, end - start)
                part = rotary.slice(start, end)
                x[start:end] = self.model.run_layer(layer, x[start:end], part, attend)
                on_tokens((end - start) / self.model.config.num_layers)
        attend.finish()
        return self.model.logits(x[-1:])

    def start_decode(
        self,
        sequences: Sequence[SequenceKV],
        sparse: Sequence[SparseConfig],
        prompt_lens: Sequence[int],
    ) -> DecodeBatch:
        """Prepare steps for prefilled sequences; build a new one when the batch changes."""
        if self._auditor is None and any(config.audit_every is not None for config in sparse):
            self._auditor = Auditor(self.cache)
        attend = DecodeAttention(self.cache, list(sequences), list(sparse), self._auditor)
        lengths = torch.tensor(prompt_lens, dtype=torch.int64, device=self.cache.device)
        return DecodeBatch(self.model, attend, lengths, self._graphs)

    def take_audits(self, sequence: SequenceKV) -> Audits | None:
        """What audits of a sequence's steps found, once; waits for them. None: there were none."""
        return None if self._auditor is None else self._auditor.take(sequence.sequence_id)

    def clear_audits(self) -> None:
        """Forget the audits that nobody took."""
        if self._auditor is not None:
            self._auditor.clear()


class DecodeBatch:
    """Decode steps of a fixed set of sequences.

    On a GPU the first step of a batch is launched kernel by kernel, later ones are one CUDA graph,
    captured anew when the step's max_len grows. A step that needs the host (the streamed dense
    policy, an audit) is launched by itself.

    Args:
        graphs: captures steps; None: every step is launched kernel by kernel.
    """

    def __init__(
        self,
        model: DecoderModel,
        attend: DecodeAttention,
        prompt_lens: Tensor,
        graphs: StepGraphs | None,
    ) -> None:
        self._model, self._attend, self._prompt_lens = model, attend, prompt_lens
        self._graphs = graphs
        self._tokens = torch.zeros_like(prompt_lens)
        self._graph: StepGraph | None = None
        self._graph_len = 0
        self._steps = 0

    @torch.inference_mode()
    def step(self, token_ids: Tensor) -> Tensor:
        """Append a token to each sequence -> logits [B, V] float32 of the tokens that follow.

        Args:
            token_ids: [B] int64, device.
        Returns: logits, which the next step may overwrite.
        Raises: OutOfPages if a sequence cannot grow; RuntimeError if a selector of the user's
            cannot be captured.
        """
        self._attend.begin_step()
        self._tokens.copy_(token_ids)
        logits = self._replay() if self._may_replay() else self._launch()
        self._attend.end_step()
        self._steps += 1
        return logits

    def _may_replay(self) -> bool:
        return self._graphs is not None and self._steps > 0 and not self._attend.needs_host

    def _replay(self) -> Tensor:
        assert self._graphs is not None
        if self._graph is None or self._graph_len != self._attend.max_len:
            self._graph = None  # its memory goes to the next one
            self._graph = self._graphs.capture(self._launch)
            self._graph_len = self._attend.max_len
        return self._graph.replay()

    def _launch(self) -> Tensor:
        """Launch the step's kernels."""
        self._attend.advance()
        positions = self._attend.positions
        logits = self._model(self._tokens, positions, self._attend, self._prompt_lens)
        assert isinstance(logits, Tensor)
        return logits
