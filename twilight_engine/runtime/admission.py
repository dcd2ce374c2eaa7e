"""From prompts and parameters to requests; what cannot be run is refused here, before any is."""

from __future__ import annotations

import random
from collections.abc import Sequence as Items
from typing import TypeVar

from twilight_engine.attention.selectors import NEEDS_CHANNELS, NEEDS_SIGNATURES
from twilight_engine.config import SparseConfig
from twilight_engine.kv.cache import KVCache
from twilight_engine.loaders.config import ModelConfig
from twilight_engine.loaders.tokenizer import Tokenizer
from twilight_engine.runtime.prompts import Prompt, read_prompt
from twilight_engine.runtime.request import Request, Sequence
from twilight_engine.runtime.sampler import SequenceSampler
from twilight_engine.runtime.sampling_params import SamplingParams
from twilight_engine.runtime.text import OutputText

T = TypeVar("T")


def one_each(name: str, value: T | Items[T], count: int) -> list[T]:
    """One value for all prompts, or a list with one a prompt -> a list."""
    if not isinstance(value, (list, tuple)):
        return [value] * count  # type: ignore[list-item]
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} entries for {count} prompts; give one, or each")
    return list(value)


class Admission:
    """Makes requests of an engine, or refuses them with the numbers.

    Args:
        seed: of the sequences whose SamplingParams have none; they are drawn in order of admission.
    """

    def __init__(
        self, config: ModelConfig, cache: KVCache, tokenizer: Tokenizer | None, seed: int
    ) -> None:
        self._config, self._cache, self._tokenizer = config, cache, tokenizer
        self._seeds = random.Random(seed)
        self._admitted = 0

    def admit(
        self,
        prompts: Items[Prompt],
        params: Items[SamplingParams],
        sparse: Items[SparseConfig],
    ) -> list[Request]:
        """Check everything, then build the requests, in order.

        Raises: ValueError for the first prompt that is malformed or too long, or the first
            parameter that does not fit this model or cache.
        """
        read = []
        for number, prompt in enumerate(prompts):
            text, ids = read_prompt(prompt, self._tokenizer, self._config.vocab_size, number)
            self._check_length(len(ids), number)
            self._check_params(params[number])
            self._check_sparse(sparse[number])
            read.append((text, ids))
        return [
            self._build(text, ids, one_params, one_sparse)
            for (text, ids), one_params, one_sparse in zip(read, params, sparse, strict=True)
        ]

    def _check_length(self, tokens: int, number: int) -> None:
        longest, host = self._cache.max_model_len, self._cache.max_tokens
        if tokens >= longest:
            raise ValueError(
                f"prompt {number} has {tokens} tokens; the maximum context length is {longest} "
                "tokens (max_model_len), prompt and at least one generated token together"
            )
        if tokens >= host:
            raise ValueError(
                f"prompt {number} has {tokens} tokens; the host arena of "
                f"{self._cache.plan.host_bytes} bytes (host_bytes, kv_offloading_size) holds "
                f"{host}, prompt and at least one generated token together"
            )

    def _check_params(self, params: SamplingParams) -> None:
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params is {params!r}; it must be a SamplingParams")
        vocab = self._config.vocab_size
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            outside = [t for t in getattr(params, name) or () if t >= vocab]
            if outside:
                raise ValueError(f"{name} has {outside[0]}; the vocabulary is 0 .. {vocab - 1}")
        if params.logprobs is not None and params.logprobs > vocab:
            raise ValueError(f"logprobs is {params.logprobs}; the vocabulary has {vocab} tokens")
        for name in ("stop", "bad_words"):
            if getattr(params, name) and self._tokenizer is None:
                raise ValueError(f"{name} needs a tokenizer, and the model came without one")

    def _check_sparse(self, sparse: SparseConfig) -> None:
        if not isinstance(sparse, SparseConfig):
            raise ValueError(f"sparse_config is {sparse!r}; it must be a SparseConfig")
        beyond = [i for i in sparse.by_layer if not 0 <= i < self._config.num_layers]
        if beyond:
            raise ValueError(
                f"by_layer names layers {sorted(beyond)}; the model has {self._config.num_layers}"
            )
        for layer in self._cache.sparse_layers:
            config = sparse.layer(layer)
            graded = config.policy == "graded" and not config.keeps_every_row
            if graded and config.index_top_p is not None and self._cache.config.v_index == "none":
                raise ValueError(
                    f"index_top_p is {config.index_top_p}, but the cache keeps no INT4 V; build "
                    "the LLM with KVConfig(v_index='int4'), or use index_top_p=None (preset 'lean')"
                )
            if graded and config.selector == "double_sparsity":
                raise ValueError(NEEDS_CHANNELS)
            if graded and config.selector == "lsh" and self._cache.config.lsh is None:
                raise ValueError(NEEDS_SIGNATURES)

    def _build(
        self, text: str | None, ids: list[int], params: SamplingParams, sparse: SparseConfig
    ) -> Request:
        request = Request(str(self._admitted), text, ids, params, sparse)
        self._admitted += 1
        room = min(self._cache.max_model_len, self._cache.max_tokens) - len(ids)
        eos = frozenset(() if params.ignore_eos else self._config.eos_token_ids)
        stop_ids = frozenset(params.stop_token_ids or ())
        for index in range(params.n):
            drawn = self._seeds.getrandbits(63)
            sampler = SequenceSampler(
                params,
                seed=drawn if params.seed is None else params.seed + index,
                prompt_ids=ids,
                stop_ids=sorted(eos | stop_ids),
                banned_words=self._banned_words(params),
                vocab_size=self._config.vocab_size,
                device=self._cache.device,
            )
            max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
            out = OutputText(params, self._tokenizer, ids)
            request.sequences.append(
                Sequence(request, index, max_tokens, stop_ids, eos, sampler, out)
            )
        return request

    def _banned_words(self, params: SamplingParams) -> list[list[int]]:
        """Each bad word's tokens, at the start of a text and after a space."""
        if self._tokenizer is None:
            return []
        banned = []
        for word in params.bad_words or ():
            plain = self._tokenizer.encode(word.lstrip(), add_special_tokens=False)
            spaced = self._tokenizer.encode(" " + word.lstrip(), add_special_tokens=False)
            banned.append(plain)
            if spaced[:1] != plain[:1] and len(spaced) == len(plain):
                banned.append(spaced)
        return [ids for ids in banned if ids]
