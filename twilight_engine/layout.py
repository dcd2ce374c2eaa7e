"""The tensors that kv/, attention/, ops/ and reference/ share, and their layouts.

Shape letters: B sequences of a step, N query rows of a step (N == B in plain decode), Hq / Hkv
query / KV heads, G = Hq / Hkv, D head_dim, L tokens, P pages of the pool, S page_size, R rows of a
layer's row pool, C list capacity a (query row, KV head). A *row* is one token's K then V for one
layer and KV head: `2 * D` elements. A KV-head range (tensor parallel) is the view passed in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from twilight_engine.config import QUEST_BLOCK

NO_ROW = -1  # a hot-row slot map entry, page id or location that points nowhere

GRADE_TAIL = 0
GRADE_INDEX = 1
GRADE_EXACT = 2
GRADE_DROPPED = 3  # outside the selector's candidates and not to be compensated

LSH_MIN_TABLES = 2  # where a candidate's signatures agree with the query's: MagicPIG's rule

MOST_MASS = 0.9999  # a margin raises the mass that exact rows must reach to this at most
TIE_BITS = 10  # low bits of float32 weights that a threshold for a mass does not look at

SLOTS_PER_CHUNK = 32  # hot-row slots move between heads in chunks of this many
MAX_CHUNKS = 65536  # of a layer's hot rows: what the victim search's list in shared memory can name
MAX_AGE = 1023  # steps; hot slots unused for longer count as equally old


@dataclass(frozen=True)
class IndexPages:
    """One layer's device index of full pages, by page id; docs/index_format.md has every bit.

    K and V codes are unsigned 4 bit; byte j of a token's D/2 bytes holds channel 2j in its low
    nibble and channel 2j+1 in its high one. value = min + scale * code.

    int4_channel: scale and min per channel over the page; min is rounded down and scale up to
    fp16, so [min, min + 15 * scale] are true bounds of K; a constant channel has scale 0.
    int4_token: scale and min per token over D; k_bounds has (min, max) per channel over runs of
    QUEST_BLOCK tokens (the last run of a page may be shorter), rounded outward to fp16.
    """

    k_index: str
    k_codes: Tensor  # [P, Hkv, S, D // 2] uint8
    k_scale: Tensor  # int4_channel: [P, Hkv, 2, D] float16 (scale, min); int4_token: [P, Hkv, S, 2]
    k_bounds: Tensor | None  # int4_token: [P, Hkv, ceil(S / QUEST_BLOCK), 2, D] float16; else None
    v_codes: Tensor | None  # [P, Hkv, S, D // 2] uint8, or None without an INT4 V
    v_scale: Tensor | None  # [P, Hkv, S, 2] float16 (scale, min) per token, or None
    v_mean: Tensor  # [P, Hkv, D] float16
    lsh_codes: Tensor | None = None  # [P, Hkv, S, L] int16: uint16 signatures of each K row

    @property
    def page_size(self) -> int:
        return self.k_codes.shape[2]

    @property
    def head_dim(self) -> int:
        return self.k_codes.shape[3] * 2

    @property
    def candidate_block(self) -> int:
        """Tokens that one bound of K, so one selector decision, covers."""
        return self.page_size if self.k_index == "int4_channel" else QUEST_BLOCK


@dataclass(frozen=True)
class LshHashes:
    """The hash functions behind IndexPages.lsh_codes: SimHash of K less its sequence's centre.

    Bit j of table l is 1 where (k - centre) . projections[:, l * bits + j] >= 0. Queries are hashed
    as they are: a shift of all keys does not change a softmax.
    """

    bits: int  # a table, at most 16
    projections: Tensor  # [D, L * bits] float32, the same for all layers and heads
    centres: Tensor  # [num_seq_slots, Hkv, D] float32, of one layer

    @property
    def num_tables(self) -> int:
        return self.projections.shape[1] // self.bits


def blocks_per_page(block: int, page_size: int) -> int:
    """Candidate blocks restart at each page; the last one of a page may be shorter."""
    return -(-page_size // block)


def num_blocks(max_len: int, block: int, page_size: int) -> int:
    """Candidate blocks that max_len tokens need: the last size of a `candidates` tensor."""
    return -(-max_len // page_size) * blocks_per_page(block, page_size)


def block_of(tokens: Tensor, block: int, page_size: int) -> Tensor:
    """The candidate block of each token position."""
    return tokens // page_size * blocks_per_page(block, page_size) + tokens % page_size // block


@dataclass(frozen=True)
class Windows:
    """One layer's resident rows: sinks and a ring of recent tokens for each sequence slot.

    `rows` is the layer's whole row pool; the first num_slots * Hkv * (num_sink + window_rows) of
    them are windows, the others hot-row slots. Token t of slot s, head h is row
    (s * Hkv + h) * (num_sink + window_rows) + (t if t < num_sink else num_sink + t % window_rows).
    A sink token is written to both places while it is recent, so that page 0 can be indexed from
    the ring. window_rows is a multiple of page_size, so a page lies in one piece in the ring.
    """

    rows: Tensor  # [R, 2 * D], float32, float16 or bfloat16
    num_kv_heads: int
    num_sink: int
    window_rows: int

    @property
    def rows_per_head(self) -> int:
        return self.num_sink + self.window_rows


@dataclass(frozen=True)
class StepMeta:
    """What every layer of one step shares; all tensors int32 on the compute device.

    Query row n belongs to sequence query_seq[n] and sees tokens [ctx_starts[n], positions[n]],
    its own included. Rows of a sequence are contiguous: cu_seqlens_q[b] .. cu_seqlens_q[b + 1].
    Resident (always exact) tokens of a row are those it sees with t < num_sink or
    t >= window_starts[b]; window_starts is a multiple of page_size, so tokens in between all lie
    in full, indexed pages. `max_len` is known to the host and bounds every seq_lens entry.
    """

    page_table: Tensor  # [B, P_max] page ids, NO_ROW beyond a sequence's pages
    seq_slots: Tensor  # [B] which windows and quotas a sequence uses
    seq_lens: Tensor  # [B] tokens of the sequence after this step's append
    window_starts: Tensor  # [B]
    cu_seqlens_q: Tensor  # [B + 1]
    query_seq: Tensor  # [N]
    positions: Tensor  # [N]
    ctx_starts: Tensor  # [N] first visible token: 0, or the edge of a sliding window
    page_size: int
    num_sink: int
    max_len: int

    @property
    def num_seqs(self) -> int:
        return self.seq_lens.shape[0]

    @property
    def num_queries(self) -> int:
        return self.positions.shape[0]


@dataclass(frozen=True)
class RowLists:
    """Token positions by (query row, KV head), ascending, in segments of fixed capacity."""

    tokens: Tensor  # [N, Hkv, C] int32, the first counts[n, h] of a segment are valid
    counts: Tensor  # [N, Hkv] int32

    @classmethod
    def empty(cls, n: int, hkv: int, capacity: int, device: torch.device) -> RowLists:
        return cls(
            torch.empty(n, hkv, capacity, dtype=torch.int32, device=device),
            torch.zeros(n, hkv, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True)
class Pruned:
    """Which grade each list token of each (query row, KV head) gets."""

    exact: RowLists  # list tokens to read at full precision
    index_counts: Tensor  # [N, Hkv] int32: list tokens to read from the INT4 index
    grades: Tensor  # [N, Hkv, C] uint8 over visible tokens; residents are GRADE_EXACT
    mass: Tensor  # [N, Hkv] float32: estimated group-mean mass of the exact grade


@dataclass(frozen=True)
class HotRows:
    """One layer's slot cache of earlier exact rows: state that lives and changes on the device.

    Hot slot i is row first_row + i of the layer's row pool. Slots belong to chunks of
    SLOTS_PER_CHUNK; a chunk is lent to one (sequence slot, KV head), its quota in chunks being
    proportional to the running mean of that head's exact sets. A slot stamped with the current
    step is never a victim.
    """

    slot_map: Tensor  # [Hkv, P, S] int32: row of the pool that holds this token's row, or NO_ROW
    slot_key: Tensor  # [num_slots] int32: page * S + offset of the row held, or NO_ROW
    slot_stamp: Tensor  # [num_slots] int32: step of the last use
    chunk_owner: Tensor  # [num_slots // SLOTS_PER_CHUNK] int32: seq_slot * Hkv + head, or NO_ROW
    set_mean: Tensor  # [num_seq_slots, Hkv] float32: running mean of exact-set sizes
    step: Tensor  # [1] int32, counts decode steps; shared by all layers
    first_row: int


ANNOUNCED_WORDS = 1024  # kAnnouncedWords in csrc/announced_misses.cuh


@dataclass(frozen=True)
class Announced:
    """Where resolve_rows tells gather_rows of misses that have no slots yet, on a GPU.

    One may serve all layers of a cache, whose steps follow each other: csrc/announced_misses.cuh.
    """

    words: Tensor  # [B, Hkv, ANNOUNCED_WORDS] int64
    step: Tensor  # the hot rows' step counter
    layer: int


@dataclass(frozen=True)
class FetchLists:
    """Rows to bring from the host into hot slots, in segments a (sequence, KV head).

    Entry i of segment (b, h) copies host row src (page * S + offset, of head h) to row dst of the
    layer's pool; an entry with src or dst NO_ROW is skipped. resolve_rows fills all four tensors.
    """

    src: Tensor  # [B, Hkv, C] int32, the first counts[b, h] of a segment are valid
    dst: Tensor  # [B, Hkv, C] int32
    counts: Tensor  # [B, Hkv] int32
    direct: Tensor  # [B, Hkv] int32: list entries that found no slot (attention reads them itself)
    announced: Announced | None = None  # the misses have been announced there, or are to be

    def first(self, n: int) -> FetchLists:
        """Those of the first n sequences."""
        told = self.announced
        if told is not None:
            told = replace(told, words=told.words[:n])
        return FetchLists(self.src[:n], self.dst[:n], self.counts[:n], self.direct[:n], told)

    @classmethod
    def empty(cls, b: int, hkv: int, capacity: int, device: torch.device) -> FetchLists:
        return cls(
            torch.empty(b, hkv, capacity, dtype=torch.int32, device=device),
            torch.empty(b, hkv, capacity, dtype=torch.int32, device=device),
            torch.zeros(b, hkv, dtype=torch.int32, device=device),
            torch.zeros(b, hkv, dtype=torch.int32, device=device),
        )


# Columns of a layer's row of the byte and row counters, [num_layers, NUM_COUNTERS] int64, device.
COUNTER_FETCHED_BYTES = 0  # host -> device, by gather_rows
COUNTER_DIRECT_BYTES = 1  # host -> device, read by attention itself
COUNTER_STREAMED_BYTES = 2  # host -> device, the dense policy's streaming
COUNTER_WRITTEN_BYTES = 3  # device -> host, by append_rows
COUNTER_HIT_ROWS = 4
COUNTER_MISSED_ROWS = 5  # fetched into a slot
COUNTER_DIRECT_ROWS = 6  # found no slot
NUM_COUNTERS = 8
