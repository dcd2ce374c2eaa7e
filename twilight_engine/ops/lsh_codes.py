"""SimHash signatures of K rows and queries, and where the index keeps those of K.

Plain torch on a GPU as on a CPU: a signature is one matmul, a sign and a pack.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import IndexPages, LshHashes, StepMeta
from twilight_engine.ops.launch import check_dtype, check_shape

CENTRE_TOKENS = 2048  # a fixed number, so that a prefill in chunks and a copy at once hash alike
SLICE_BYTES = 32 << 20  # of projections held at once: a chunk of 8,192 rows would take 390 MB


def lsh_codes(x: Tensor, hashes: LshHashes) -> Tensor:
    """The signature of each vector in each table.

    Bit j of table l is 1 where x . projections[:, l * bits + j] >= 0, in float32; 0 for NaN.

    Args:
        x: [..., D] float32, float16 or bfloat16: queries, or K rows less their centre.
    Returns: [..., L] int16: the bits of a uint16.
    Raises: ValueError for another D.
    Source: SimHash (Charikar, 2002), as in MagicPIG (arXiv 2410.16179), section 4.
    """
    dim, width = hashes.projections.shape
    if x.shape[-1] != dim:
        raise ValueError(f"x has shape {list(x.shape)}; its last size must be {dim}")
    rows = x.reshape(-1, dim)
    powers = 2.0 ** torch.arange(hashes.bits, device=x.device)
    codes = torch.empty(rows.shape[0], hashes.num_tables, dtype=torch.int16, device=x.device)
    step = max(1, SLICE_BYTES // (4 * width))
    for start in range(0, rows.shape[0], step):
        bits = (rows[start : start + step].float() @ hashes.projections).ge_(0)
        packed = bits.unflatten(1, (-1, hashes.bits)) @ powers  # whole numbers below 2^16: exact
        codes[start : start + step] = packed.int().to(torch.int16)
    return codes.view(*x.shape[:-1], hashes.num_tables)


def set_lsh_centres(k: Tensor, meta: StepMeta, hashes: LshHashes) -> None:
    """Make the mean of the first keys the centre of the sequence that they open.

    Args:
        k: [T, Hkv, D]: the first rows of the one sequence of `meta`; CENTRE_TOKENS of them count.
    Side effects: writes hashes.centres on torch's current stream; the host reads no device value.
    """
    check_shape("k", k, (meta.num_queries, *hashes.centres.shape[1:]))
    check_shape("meta.seq_slots", meta.seq_slots, (1,))
    # Contiguous, so that a strided source is summed in the same order.
    mean = k[:CENTRE_TOKENS].float().contiguous().mean(0, keepdim=True)
    hashes.centres.index_copy_(0, meta.seq_slots.long(), mean)


def write_lsh_codes(k: Tensor, meta: StepMeta, hashes: LshHashes, index: IndexPages) -> None:
    """Sign this step's K rows around their sequences' centres, each in its place of the index.

    lsh_codes[page, :, t % S] = signature of k[n] - centre for token t = positions[n] in `page`.
    A signature needs its own row alone, so it is there before its page is full. A row with t < 0
    or whose page is NO_ROW is padding and goes nowhere; at least one row must be none.

    Args:
        k: [N, Hkv, D] float32, float16 or bfloat16, any strides.
        index: with lsh_codes, written in place.
    Raises: ValueError for other shapes or an index without signatures.
    Side effects: runs on torch's current stream; the host reads no device value.
    """
    if index.lsh_codes is None:
        raise ValueError("index.lsh_codes is None; allocate the index with lsh_tables")
    heads, size, tables = index.lsh_codes.shape[1:]
    check_shape("k", k, (meta.num_queries, heads, hashes.projections.shape[0]))
    check_dtype("index.lsh_codes", index.lsh_codes, torch.int16)
    if hashes.num_tables != tables or meta.page_size != size:
        raise ValueError(
            f"index.lsh_codes has pages of {size} and {tables} tables; the step's pages have "
            f"{meta.page_size} and the hashes {hashes.num_tables} tables"
        )
    if meta.num_queries == 0:
        return
    seq, t = meta.query_seq.long(), meta.positions.long()
    pages = meta.page_table[seq, t.clamp(min=0) // size].long()
    codes = lsh_codes(k.float() - hashes.centres[meta.seq_slots.long()[seq]], hashes)
    # Padding repeats a row that is none: two writes to one place then agree.
    kept = (t >= 0) & (pages >= 0)
    source = torch.where(kept, torch.arange(len(t), device=t.device), kept.int().argmax())
    places = index.lsh_codes.transpose(1, 2)  # [P, S, Hkv, L]
    places[pages[source], t[source] % size] = codes[source]
