"""LLM: load a model, keep its KV cache in host memory, generate."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from inspect import GEN_CLOSED, getgeneratorstate
from pathlib import Path
from typing import Any, Literal, Self

import torch

from twilight_engine.config import KVConfig, SparseConfig
from twilight_engine.kv.cache import KVCache
from twilight_engine.loaders.chat_template import ChatTemplate
from twilight_engine.loaders.config import ModelConfig
from twilight_engine.loaders.tokenizer import Tokenizer
from twilight_engine.models.load import LoadFormat, load_model
from twilight_engine.runtime.admission import Admission, one_each
from twilight_engine.runtime.arguments import (
    check_at_least_one,
    context_length,
    default_sampling,
    make_configs,
    pick_device,
    pick_tokenizer,
)
from twilight_engine.runtime.batch import run_requests
from twilight_engine.runtime.calibration import CalibrationChoice, pick_calibration
from twilight_engine.runtime.outputs import RequestOutput
from twilight_engine.runtime.progress import NoProgress, RunProgress, make_progress
from twilight_engine.runtime.prompts import (
    Message,
    Prompt,
    as_prompt_list,
    is_one_conversation,
    is_one_prompt,
)
from twilight_engine.runtime.request import Request
from twilight_engine.runtime.runner import Runner
from twilight_engine.runtime.sampling_params import SamplingParams


class LLM:
    """A model with its KV cache in host memory, for offline generation.

    Memory is planned and taken when it is built and given back by `close` (or the end of a `with`).
    It serves one call at a time and installs no signal handlers: Ctrl-C raises KeyboardInterrupt
    out of the call, after every page is released, and the LLM stays usable.

    Args:
        model: a Hugging Face directory or a GGUF file; a ModelConfig for load_format "dummy".
        dtype: "auto", "float32", "float16", "bfloat16" or a torch dtype; a CPU runs float32.
        device: "auto" is the GPU if there is one, else "cpu".
        load_format: "auto", "safetensors", "gguf", or "dummy" for random weights.
        max_model_len: most tokens of a sequence, prompt and output; None: what the model allows.
        max_num_seqs: most sequences that decode together.
        kv_config: where the KV cache lives; None: the preset's.
        sparse_config: how steps attend where a call does not say; None: the preset's.
        preset: "balanced", "lean" or "paper"; None: the calibration's, or "balanced".
        calibration: "auto" takes what `twilight calibrate` wrote beside the model, if no config and
            no other preset is given; a path names a file; None: none. `.calibration` has it.
        seed: of sampling without a seed of its own, and of dummy weights.
        tokenizer: another tokenizer, or a directory that has one; None: the model's.
        generation_config: sampling defaults: "auto" the checkpoint's, "vllm" SamplingParams' own.
        prefill_chunk_size: tokens of a prompt that go through a layer at once.
        kv_offloading_size, hot_bytes: KVConfig.host_bytes in GiB, and KVConfig.hot_bytes.
        enforce_eager: launch decode steps kernel by kernel instead of as CUDA graphs.
    Raises:
        ValueError, NotImplementedError: for arguments or checkpoints that cannot be served.
        HostMemoryError: if the host cannot hold the KV cache.
    """

    def __init__(
        self,
        model: str | Path | ModelConfig,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        load_format: LoadFormat = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 8,
        kv_config: KVConfig | None = None,
        sparse_config: SparseConfig | None = None,
        preset: str | None = None,
        calibration: CalibrationChoice = "auto",
        seed: int = 0,
        tokenizer: Tokenizer | str | Path | None = None,
        generation_config: Literal["auto", "vllm"] = "auto",
        prefill_chunk_size: int = 8192,
        kv_offloading_size: float | None = None,
        hot_bytes: int | None = None,
        enforce_eager: bool = False,
    ) -> None:
        check_at_least_one(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            prefill_chunk_size=prefill_chunk_size,
        )
        if generation_config not in ("auto", "vllm"):
            raise ValueError(f"generation_config is {generation_config!r}; allowed: 'auto', 'vllm'")
        given = kv_config is not None or sparse_config is not None
        self.calibration = pick_calibration(model, calibration, load_format, preset, given)
        self.kv_config, self.sparse_config = make_configs(
            kv_config, sparse_config, preset, self.calibration, kv_offloading_size, hot_bytes
        )
        self.device = pick_device(device)
        torch.manual_seed(seed)
        loaded = load_model(model, dtype=dtype, device=self.device, load_format=load_format)
        self.model, self.model_config = loaded.model, loaded.config
        self.tokenizer = pick_tokenizer(tokenizer, loaded.tokenizer)
        self.dtype = loaded.model.dtype
        if self.device.type == "cpu" and self.dtype != torch.float32:
            raise NotImplementedError(f"dtype is {self.dtype}; on a CPU supported: torch.float32")
        self.max_model_len = context_length(max_model_len, self.model_config)
        self._defaults = loaded.generation_defaults if generation_config == "auto" else {}
        self.cache = KVCache(
            self.model_config,
            self.kv_config,
            max_model_len=self.max_model_len,
            max_num_seqs=max_num_seqs,
            device=self.device,
            dtype=self.dtype,
        )
        chunk, eager = prefill_chunk_size, enforce_eager
        self._runner = Runner(self.model, self.cache, prefill_chunk_size=chunk, enforce_eager=eager)
        self._admission = Admission(self.model_config, self.cache, self.tokenizer, seed)
        self._run: Generator[None, None, None] | None = None
        self._closed = False

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        sparse_config: SparseConfig | Sequence[SparseConfig] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generate from one prompt or several; outputs come in the order of the prompts.

        Args:
            prompts: a string, token ids, {"prompt": ...}, {"prompt_token_ids": ...}, or a list.
            sampling_params: for all prompts, or one each; None: get_default_sampling_params().
            sparse_config: how to attend, for all prompts or one each; None: the LLM's.
            use_tqdm: show progress bars on stderr.
        Raises:
            ValueError: before any prompt is run, for one that is malformed or too long, or unfit
                parameters. RuntimeError: if the LLM is closed, or a stream of it is not finished.
        """
        requests = self._admit(as_prompt_list(prompts), sampling_params, sparse_config)
        sequences = [sequence for request in requests for sequence in request.sequences]
        progress = make_progress(
            use_tqdm,
            prompt_tokens=sum(len(sequence.prompt_ids) for sequence in sequences),
            max_tokens=sum(sequence.max_tokens for sequence in sequences),
        )
        with progress, contextlib.closing(self._start(requests, progress)) as run:
            for _ in run:
                pass
        return [request.output() for request in requests]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        sparse_config: SparseConfig | Sequence[SparseConfig] | None = None,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or several, through the model's chat template.

        Without sampling_params an answer may take what the context has room for. Otherwise like
        `generate`; see `chat_prompt` for the template's arguments.
        """
        one = is_one_conversation(messages)
        conversations: Any = [messages] if one else messages
        prompts = [
            self.chat_prompt(
                conversation,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                chat_template_kwargs=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params(max_tokens=None)
        return self.generate(
            prompts, sampling_params, sparse_config=sparse_config, use_tqdm=use_tqdm
        )

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """A conversation as a prompt for `generate` or `stream`.

        Args:
            chat_template: Jinja source in place of the model's template.
            add_generation_prompt: end with the header of an assistant's message.
            chat_template_kwargs: what the template takes besides (`enable_thinking`).
        Raises: ValueError without tokenizer or template, or if the template refuses the messages.
        """
        tokenizer = self.get_tokenizer()
        options = {"add_generation_prompt": add_generation_prompt, **(chat_template_kwargs or {})}
        if chat_template is None:
            text = tokenizer.apply_chat_template(messages, **options)
        else:
            template = ChatTemplate(chat_template, tokenizer.special_tokens)
            text = template.render(messages, **options)
        ids = tokenizer.encode(text, add_special_tokens=False)
        return {"prompt": text, "prompt_token_ids": ids}

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        sparse_config: SparseConfig | None = None,
    ) -> Iterator[RequestOutput]:
        """Generate from one prompt, yielding its RequestOutput so far at each new token.

        The last is finished and has the metrics. Closing the iterator stops the generation and
        releases its pages. Raises as `generate` does, at once.
        """
        if not is_one_prompt(prompt):
            raise ValueError("stream takes one prompt; use generate for several")
        (request,) = self._admit([prompt], sampling_params, sparse_config)
        return self._stream(request)

    def get_default_sampling_params(self, **changes: Any) -> SamplingParams:
        """What `generate` uses without sampling_params."""
        return default_sampling(self._defaults, changes)

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises: ValueError if there is none."""
        if self.tokenizer is None:
            raise ValueError("this needs a tokenizer, and the model came without one")
        return self.tokenizer

    @property
    def registered_bytes(self) -> int:
        """Host bytes pinned for the device right now; 0 once closed."""
        return self.cache.registered_bytes

    def close(self) -> None:
        """Stop a stream that runs, and free every byte of the KV cache. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._run is not None:
            self._run.close()
        self.cache.close()

    shutdown = close

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _admit(
        self,
        prompts: list[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        sparse_config: SparseConfig | Sequence[SparseConfig] | None,
    ) -> list[Request]:
        self._check_idle()
        params = sampling_params or self.get_default_sampling_params()
        return self._admission.admit(
            prompts,
            one_each("sampling_params", params, len(prompts)),
            one_each("sparse_config", sparse_config or self.sparse_config, len(prompts)),
        )

    def _check_idle(self) -> None:
        if self._closed:
            raise RuntimeError("the LLM is closed")
        if self._run is not None and getgeneratorstate(self._run) != GEN_CLOSED:
            raise RuntimeError("the LLM is busy; finish or close the stream that runs first")

    def _start(self, requests: list[Request], progress: RunProgress) -> Generator[None, None, None]:
        self._check_idle()
        self._run = run_requests(self._runner, requests, progress, self.tokenizer)
        return self._run

    def _stream(self, request: Request) -> Iterator[RequestOutput]:
        with contextlib.closing(self._start([request], NoProgress())) as run:
            for _ in run:
                if not request.finished:
                    yield request.output()
        yield request.output()
