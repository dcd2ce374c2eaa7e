"""`twilight warm-up`: compile the CPU backend's loops ahead of the first request."""

from __future__ import annotations

import time

from twilight_engine.cli.units import format_seconds
from twilight_engine.config import PRESETS, KVConfig, SparseConfig

CONTEXT, TOKENS = 400, 3  # enough that pages fill, rows leave the window and all grades occur


def warm_up() -> None:
    """Compile the CPU backend's loops, so that no request waits for them.

    Numba keeps what it compiles beside the source, for this processor; a second run takes seconds.
    """
    from rich.progress import track

    from twilight_engine.loaders.config import ModelConfig
    from twilight_engine.runtime.llm import LLM
    from twilight_engine.runtime.sampling_params import SamplingParams

    started = time.perf_counter()
    model = ModelConfig(
        model_type="llama",
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_layers=3,
        num_q_heads=2,
        num_kv_heads=1,
        head_dim=64,
        max_position_embeddings=2 * CONTEXT,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    for preset in track(PRESETS, description="compiling"):
        kv, graded = KVConfig.preset(preset), SparseConfig.preset(preset)
        with LLM(model, load_format="dummy", device="cpu", max_num_seqs=1, kv_config=kv) as llm:
            for sparse in (graded, graded.replace(attn_top_p=1.0), SparseConfig(policy="dense")):
                llm.generate([1] * CONTEXT, sampling, sparse_config=sparse, use_tqdm=False)
    print(f"ready after {format_seconds(time.perf_counter() - started)}")
