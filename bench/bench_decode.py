"""TPOT of a whole model: our policies and transformers' generate, in one run.

Weights are random, of the named shape; with `--logit-std` their query projections are scaled so
that attention logits have that standard deviation, which sets how peaked attention is: at 3.5 the
group-mean sets have the share of the context measured on real models. Successive queries are
independent, though, so hot rows hit less often than in real text. TPOT is the median time of a
step, the host waiting for each token.

    python bench/bench_decode.py --shape llama-3.1-8b --context 32768
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import record
from torch import Tensor

from twilight_engine.config import EVERY_CANDIDATE, PRESETS, KVConfig, SparseConfig
from twilight_engine.kv.cache import KVCache, SequenceKV
from twilight_engine.models.decoder import DecoderModel
from twilight_engine.models.load import load_model
from twilight_engine.runtime.runner import Runner

PREFILL_CHUNK = 8192

SHAPES = {
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 1 << 20,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
    },
    "tiny": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1 << 16,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
    },
}


@dataclass(frozen=True)
class Case:
    """One policy of our engine."""

    name: str
    kv_config: KVConfig
    sparse: SparseConfig


def cases() -> Iterator[Case]:
    yield Case("dense_device", KVConfig(dense_layers="all"), SparseConfig(policy="dense"))
    yield Case("dense_streamed", KVConfig(), SparseConfig(policy="dense"))
    # Quest's policy: the best 16 pages of each query head, whole, and nothing else.
    pages = SparseConfig(
        attn_top_k=EVERY_CANDIDATE,
        index_top_p=None,
        tail="renormalise",
        selector="quest",
        selector_budget=1024,
        fetch="page",
    )
    yield Case("top_k_pages", KVConfig(), pages)
    for preset in PRESETS:
        yield Case(preset, KVConfig.preset(preset), SparseConfig.preset(preset))


class OneSequence:
    """One sequence of random tokens, prefilled, that any policy can decode on."""

    def __init__(self, model: DecoderModel, kv_config: KVConfig, context: int, steps: int) -> None:
        self.model = model
        config = model.config
        self.cache = KVCache(
            config,
            kv_config,
            max_model_len=context + steps,
            max_num_seqs=1,
            device=model.device,
            dtype=model.dtype,
        )
        self.runner = Runner(model, self.cache, prefill_chunk_size=PREFILL_CHUNK)
        self.prompt_len = context
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, config.vocab_size, (context,), generator=generator)
        self.sequence: SequenceKV = self.cache.open_sequence(context + steps)
        started = time.perf_counter()
        self.token = self.runner.prefill(self.sequence, ids.tolist()).argmax(-1)
        self.ttft_s = self._wait(started)

    def _wait(self, started: float) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def decode(self, sparse: SparseConfig, steps: int) -> tuple[list[float], Tensor]:
        """Seconds of each step, and the tokens."""
        decode = self.runner.start_decode([self.sequence], [sparse], [self.prompt_len])
        token, times, tokens = self.token, [], []
        for _ in range(steps):
            started = time.perf_counter()
            token = decode.step(token).argmax(-1)
            tokens.append(token)
            times.append(self._wait(started))
        return times, torch.cat(tokens)


def measure(model: DecoderModel, case: Case, context: int, steps: int) -> dict[str, float]:
    """One policy: TTFT, TPOT, and what it moved."""
    run = OneSequence(model, case.kv_config, context, steps)
    try:
        times, _ = run.decode(case.sparse, steps)
        log = run.cache.log.request(run.sequence.sequence_id)
        warm = slice(steps // 4, None)  # past the cold steps that fill the hot rows
        exact = log.exact[warm][:, run.cache.sparse_layers] if run.cache.sparse_layers else None
        moved = log.counters[warm, :, :3].sum((1, 2))
        return {
            "tpot_ms": statistics.median(times[warm]) * 1e3,
            "ttft_s": run.ttft_s,
            "exact_rows": float(exact.mean()) if exact is not None else float(context),
            "hit_rate": log.hit_rate,
            "link_mb_step": float(moved.mean()) / 1e6,
            "link_ms_step": float(log.link_seconds[warm].mean()) * 1e3,
        }
    finally:
        run.cache.close()
        del run
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def random_model(shape: str, logit_std: float) -> DecoderModel:
    """A model of this shape with random weights: bfloat16 on a GPU, float32 on a CPU."""
    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(SHAPES[shape]))
        loaded = load_model(
            folder,
            dtype=torch.bfloat16 if on_gpu else torch.float32,
            device="cuda" if on_gpu else "cpu",
            load_format="dummy",
        )
    with torch.inference_mode():
        scale_queries(loaded.model, logit_std)
    return loaded.model


def scale_queries(model: DecoderModel, logit_std: float) -> None:
    """Scale the merged QKV weights so that the attention logits of random states have this std."""
    config = model.config
    # Inputs are RMS-normalised, so a projection's entries have std `weight_std * sqrt(hidden)`.
    target = (logit_std / config.softmax_scale / config.head_dim**0.5) ** 0.5
    for layer in model.layers:
        weight = layer.attention.qkv_proj.weight
        keep = (config.num_q_heads + config.num_kv_heads) * config.head_dim
        std = weight[:keep].float().std().item() * config.hidden_size**0.5
        weight[:keep] *= target / std


def measure_transformers(
    shape: dict[str, object], context: int, steps: int, records: Path | None
) -> None:
    """transformers' model with its default and its offloaded cache, same shape, same loop."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{k: v for k, v in shape.items() if k != "architectures"})
    config._attn_implementation = "sdpa"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    ids = torch.randint(0, config.vocab_size, (1, context), device="cuda")
    for name in ("default", "offloaded"):
        cache = DynamicCache(config=config, offloading=name == "offloaded")
        torch.cuda.synchronize()
        started = time.perf_counter()
        with torch.inference_mode():
            for start in range(0, context, 8192):
                chunk = ids[:, start : start + 8192]
                out = model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
            torch.cuda.synchronize()
            ttft = time.perf_counter() - started
            times = []
            for _ in range(steps):
                started = time.perf_counter()
                token = out.logits[:, -1:].argmax(-1)
                out = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
                torch.cuda.synchronize()
                times.append(time.perf_counter() - started)
        metrics = {"tpot_ms": statistics.median(times[2:]) * 1e3, "ttft_s": ttft}
        record("decode", f"transformers-{name}/{context}", metrics, path=records)
        del cache, out
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--logit-std", type=float, default=3.5)
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--json", type=Path, help="append records to this file, not bench/results/")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if on_gpu and not args.no_transformers:
        measure_transformers(SHAPES[args.shape], args.context, 14, args.json)
    model = random_model(args.shape, args.logit_std)
    with torch.inference_mode():
        for case in cases():
            metrics = measure(model, case, args.context, args.steps)
            record("decode", f"{case.name}/{args.context}", metrics, path=args.json)


if __name__ == "__main__":
    main()
