"""One layer's device index of K and V: its size and its tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.config import QUEST_BLOCK, KIndex, VIndex
from twilight_engine.layout import IndexPages


def index_page_bytes(
    num_kv_heads: int,
    page_size: int,
    head_dim: int,
    k_index: KIndex,
    v_index: VIndex,
    lsh_tables: int = 0,
) -> int:
    """Device bytes that one page takes in one layer's index."""
    codes = page_size * head_dim // 2
    per_token = page_size * 2 * 2  # (scale, min) float16
    per_channel = head_dim * 2 * 2
    keys = codes + per_channel
    if k_index == "int4_token":
        keys = codes + per_token + -(-page_size // QUEST_BLOCK) * per_channel
    values = codes + per_token if v_index == "int4" else 0
    signatures = page_size * lsh_tables * 2
    return num_kv_heads * (keys + values + head_dim * 2 + signatures)


def allocate_index(
    num_pages: int,
    num_kv_heads: int,
    page_size: int,
    head_dim: int,
    k_index: KIndex,
    v_index: VIndex,
    device: torch.device,
    *,
    lsh_tables: int = 0,
) -> IndexPages:
    """The tensors of one layer's index, zeroed; layout.IndexPages says what they hold.

    Args:
        num_pages: page ids 0 .. num_pages - 1 are valid.
        num_kv_heads, page_size, head_dim: head_dim must be even.
        k_index: "int4_channel" or "int4_token"; v_index: "none" or "int4".
        lsh_tables: signatures of a K row; 0: none.
    Raises: ValueError for an odd head_dim.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; the index packs two channels a byte: even only")
    by_token = k_index == "int4_token"
    with_v = v_index == "int4"

    def zeros(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
        return torch.zeros(num_pages, num_kv_heads, *shape, dtype=dtype, device=device)

    runs = -(-page_size // QUEST_BLOCK)
    return IndexPages(
        k_index=k_index,
        k_codes=zeros(page_size, head_dim // 2, dtype=torch.uint8),
        k_scale=zeros(page_size, 2) if by_token else zeros(2, head_dim),
        k_bounds=zeros(runs, 2, head_dim) if by_token else None,
        v_codes=zeros(page_size, head_dim // 2, dtype=torch.uint8) if with_v else None,
        v_scale=zeros(page_size, 2) if with_v else None,
        v_mean=zeros(head_dim),
        lsh_codes=zeros(page_size, lsh_tables, dtype=torch.int16) if lsh_tables else None,
    )
