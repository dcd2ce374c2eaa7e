"""Steps and tensors that the attention op tests share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from twilight_engine.layout import NO_ROW, IndexPages, RowLists, StepMeta, Windows

NUM_RECENT = 20
NUM_SINK = 3


@dataclass(frozen=True)
class Case:
    """Sizes of a step: seq_lens and query rows by sequence."""

    seq_lens: tuple[int, ...] = (150,)
    q_lens: tuple[int, ...] | None = None  # one each if None
    num_kv_heads: int = 2
    group: int = 4
    head_dim: int = 64
    page_size: int = 16
    sliding_window: int | None = None

    @property
    def num_q_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def pages_per_seq(self) -> int:
        return -(-max(self.seq_lens) // self.page_size)

    @property
    def num_pages(self) -> int:
        return len(self.seq_lens) * self.pages_per_seq + 3

    @property
    def window_rows(self) -> int:
        return (-(-NUM_RECENT // self.page_size) + 2) * self.page_size


def name(case: Case) -> str:
    """A test id."""
    queries = "" if case.q_lens is None else f"-Q{max(case.q_lens)}"
    return (
        f"B{len(case.seq_lens)}{queries}-L{max(case.seq_lens)}-G{case.group}"
        f"-D{case.head_dim}-S{case.page_size}"
    )


SHAPES = [
    Case(),
    Case(seq_lens=(1,)),
    Case(seq_lens=(1, 200, 65), page_size=61, group=3, head_dim=80),
    Case(seq_lens=(90, 200, 129), page_size=64, group=1, head_dim=96, num_kv_heads=3),
    Case(seq_lens=(150, 40), q_lens=(4, 3), group=6, head_dim=128),
    Case(seq_lens=(170, 300), group=7, sliding_window=100),
    Case(seq_lens=(170, 60), group=8, head_dim=256, q_lens=(1, 5), sliding_window=47),
    Case(seq_lens=(130,), group=12, head_dim=64, page_size=64),
    Case(seq_lens=tuple(range(20, 190, 10)), group=4, head_dim=128, num_kv_heads=1),
]


def make_meta(case: Case, device: torch.device) -> StepMeta:
    """A step over shuffled pages; windows start at a page, NUM_RECENT or more tokens back."""
    q_lens = case.q_lens or (1,) * len(case.seq_lens)
    table = torch.randperm(case.num_pages)[: len(case.seq_lens) * case.pages_per_seq]
    table = table.view(len(case.seq_lens), case.pages_per_seq).int()
    query_seq, positions = [], []
    for b, (length, count) in enumerate(zip(case.seq_lens, q_lens, strict=True)):
        table[b, -(-length // case.page_size) :] = NO_ROW
        query_seq += [b] * count
        positions += range(length - count, length)
    first_seen = [
        0 if case.sliding_window is None else max(0, p + 1 - case.sliding_window) for p in positions
    ]
    starts = [
        max(0, n - q - NUM_RECENT) // case.page_size * case.page_size
        for n, q in zip(case.seq_lens, q_lens, strict=True)
    ]

    def ints(values: list[int] | tuple[int, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return StepMeta(
        page_table=table.to(device),
        seq_slots=ints(list(range(len(case.seq_lens)))[::-1]),
        seq_lens=ints(case.seq_lens),
        window_starts=ints(starts),
        cu_seqlens_q=ints([0, *torch.tensor(q_lens).cumsum(0).tolist()]),
        query_seq=ints(query_seq),
        positions=ints(positions),
        ctx_starts=ints(first_seen),
        page_size=case.page_size,
        num_sink=NUM_SINK,
        max_len=max(case.seq_lens) + 5,
    )


def listed(meta: StepMeta, n: int) -> Tensor:
    """The list tokens of query row n."""
    start = max(int(meta.ctx_starts[n]), meta.num_sink)
    window = int(meta.window_starts[int(meta.query_seq[n])])
    return torch.arange(start, max(start, min(window, int(meta.positions[n]) + 1)))


def make_lists(case: Case, meta: StepMeta, share: tuple[float, ...]) -> RowLists:
    """A random share of the list tokens, a different one for each KV head in turn."""
    lists = RowLists.empty(meta.num_queries, case.num_kv_heads, meta.max_len, meta.positions.device)
    lists.tokens.fill_(2**30)  # beyond a segment's count nothing may be read
    for n in range(meta.num_queries):
        tokens = listed(meta, n)
        for h in range(case.num_kv_heads):
            keep = torch.rand(len(tokens)) < share[(n + h) % len(share)]
            chosen = tokens[keep].to(lists.tokens)
            lists.tokens[n, h, : len(chosen)] = chosen
            lists.counts[n, h] = len(chosen)
    return lists


def make_host_kv(case: Case, dtype: torch.dtype, device: torch.device) -> Tensor:
    shape = (case.num_kv_heads, case.num_pages, case.page_size, 2 * case.head_dim)
    host = torch.randn(shape).to(dtype)
    return host.pin_memory() if device.type == "cuda" else host


def make_windows(case: Case, meta: StepMeta, host_kv: Tensor, num_hot: int) -> Windows:
    """Windows whose resident rows equal the host's; num_hot free rows of the pool follow them."""
    device = meta.positions.device
    per_head = NUM_SINK + case.window_rows
    rows = torch.full(
        (len(case.seq_lens) * case.num_kv_heads * per_head + num_hot, 2 * case.head_dim),
        torch.nan,
        dtype=host_kv.dtype,
    )
    for b, length in enumerate(case.seq_lens):
        table = meta.page_table[b].cpu()
        for h in range(case.num_kv_heads):
            base = (int(meta.seq_slots[b]) * case.num_kv_heads + h) * per_head
            for t in range(length):
                row = host_kv[h, int(table[t // case.page_size]), t % case.page_size]
                if t < NUM_SINK:
                    rows[base + t] = row
                if t >= length - case.window_rows:
                    rows[base + NUM_SINK + t % case.window_rows] = row
    return Windows(rows.to(device), case.num_kv_heads, NUM_SINK, case.window_rows)


def make_index(case: Case, device: torch.device, v_codes: bool = True) -> IndexPages:
    """Random codes; only their meaning matters to attention."""
    p, h, s, d = case.num_pages, case.num_kv_heads, case.page_size, case.head_dim

    def codes() -> Tensor:
        return torch.randint(0, 256, (p, h, s, d // 2), dtype=torch.uint8).to(device)

    def halves(*shape: int) -> Tensor:
        return torch.randn(shape).half().to(device)

    return IndexPages(
        k_index="int4_channel",
        k_codes=codes(),
        k_scale=halves(p, h, 2, d),
        k_bounds=None,
        v_codes=codes() if v_codes else None,
        v_scale=halves(p, h, s, 2) * 0.1 if v_codes else None,
        v_mean=halves(p, h, d),
    )


def row_dtypes(device: torch.device) -> list[torch.dtype]:
    """Row dtypes that the op takes on this device."""
    half = [torch.float16, torch.bfloat16] if device.type == "cuda" else []
    return [torch.float32, *half]


def make_queries(case: Case, meta: StepMeta, dtype: torch.dtype) -> Tensor:
    shape = (meta.num_queries, case.num_q_heads, case.head_dim)
    return torch.randn(shape).to(meta.positions.device, dtype)
