"""Which tokens collide with a query in the hash tables of the index."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import IndexPages, StepMeta, num_blocks
from twilight_engine.ops.cpu.lsh_candidates import lsh_candidates_cpu
from twilight_engine.ops.launch import check_dtype, check_shape, current_stream, kernels, ptr


def lsh_candidates(
    q_codes: Tensor, index: IndexPages, meta: StepMeta, *, candidates: Tensor | None = None
) -> Tensor:
    """Mark the list tokens whose signatures agree with a query's in at least two tables.

    candidates[n, h, t] = 1 if, for any query head of KV head h, lsh_codes of token t equals
    q_codes in LSH_MIN_TABLES tables or more. 0 for resident tokens, those the row does not see and
    those whose page is NO_ROW.

    Args:
        q_codes: [N, Hq, L] int16, contiguous: ops.lsh_codes of the queries.
        index: with lsh_codes [P, Hkv, S, L], contiguous.
        candidates: [N, Hkv, num_blocks(max_len, 1, S)] uint8, contiguous, to write to.
    Returns: candidates: entry t is token t, as layout.block_of has it for blocks of one token.
    Raises: ValueError for other shapes or dtypes, or an index without signatures.
    Source: MagicPIG (arXiv 2410.16179), section 4.
    """
    if index.lsh_codes is None:
        raise ValueError("index.lsh_codes is None; allocate the index with lsh_tables")
    codes = index.lsh_codes
    _, heads, size, tables = codes.shape
    hq, total = q_codes.shape[1], num_blocks(meta.max_len, 1, size)
    check_shape("q_codes", q_codes, (meta.num_queries, None, tables))
    check_dtype("q_codes", q_codes, torch.int16)
    check_dtype("index.lsh_codes", codes, torch.int16)
    if hq % heads:
        raise ValueError(f"q_codes has {hq} heads; it must be a multiple of the index's {heads}")
    if meta.page_size != size:
        raise ValueError(f"meta.page_size is {meta.page_size}; the index has pages of {size}")
    if candidates is None:
        shape = (meta.num_queries, heads, total)
        candidates = torch.empty(shape, dtype=torch.uint8, device=q_codes.device)
    check_shape("candidates", candidates, (meta.num_queries, heads, total))
    check_dtype("candidates", candidates, torch.uint8)
    tensors = {"q_codes": q_codes, "index.lsh_codes": codes, "candidates": candidates}
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; it must be contiguous")
    if candidates.numel() == 0:
        return candidates
    if not q_codes.is_cuda:
        lsh_candidates_cpu(q_codes, codes, meta, candidates)
        return candidates
    kernels().lsh_candidates(
        q_codes=ptr(q_codes),
        k_codes=ptr(codes),
        page_table=ptr(meta.page_table),
        page_table_stride=meta.page_table.stride(0),
        query_seq=ptr(meta.query_seq),
        positions=ptr(meta.positions),
        ctx_starts=ptr(meta.ctx_starts),
        window_starts=ptr(meta.window_starts),
        candidates=ptr(candidates),
        num_queries=meta.num_queries,
        num_q_heads=hq,
        num_kv_heads=heads,
        num_tables=tables,
        num_tokens=total,
        page_size=size,
        num_sink=meta.num_sink,
        stream=current_stream(q_codes),
    )
    return candidates
