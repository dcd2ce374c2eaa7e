"""Types of the compiled module; tests/test_bindings.py holds this file to it."""

from collections.abc import Sequence

has_cuda: bool

class HostArena:
    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        num_pages: int,
        page_bytes: int,
        device: int = -1,
    ) -> None: ...
    def memory(self) -> memoryview: ...
    def ensure_pages(self, num_pages: int) -> None: ...
    def close(self) -> None: ...
    def offset(self, layer: int, kv_head: int, page: int) -> int: ...
    @property
    def strip_pages(self) -> int: ...
    @property
    def extent_pages(self) -> int: ...
    @property
    def grown_pages(self) -> int: ...
    @property
    def reserved_bytes(self) -> int: ...
    @property
    def touched_bytes(self) -> int: ...
    @property
    def registered_bytes(self) -> int: ...
    @property
    def num_registrations(self) -> int: ...
    @property
    def touch_seconds(self) -> float: ...
    @property
    def register_seconds(self) -> float: ...
    @property
    def numa_node(self) -> int: ...
    @property
    def closed(self) -> bool: ...

class PagePool:
    def __init__(self, num_pages: int) -> None: ...
    def allocate(self, n: int, exact: bool = True, after: int = -1) -> list[int]: ...
    def share(self, pages: Sequence[int]) -> None: ...
    def release(self, pages: Sequence[int], epoch: int = -1) -> None: ...
    def complete(self, epoch: int) -> None: ...
    def mark_sparse(self, pages: Sequence[int]) -> None: ...
    def references(self, page: int) -> int: ...
    def is_exact(self, page: int) -> bool: ...
    @property
    def num_pages(self) -> int: ...
    @property
    def num_free(self) -> int: ...
    @property
    def num_pending(self) -> int: ...

class Transfers:
    def __init__(self, arena: HostArena) -> None: ...
    def copy(
        self,
        *,
        to_host: bool,
        layer: int,
        head_begin: int,
        head_end: int,
        pages: int,
        num_pages: int,
        device: int,
        device_bytes: int,
        stream: int,
    ) -> None: ...
    def totals(self, to_host: bool) -> tuple[int, int, int, float]: ...

def host_limits(root: str = "") -> dict[str, int]: ...
def append_rows(
    *,
    k: int,
    v: int,
    k_stride_bytes: Sequence[int],
    v_stride_bytes: Sequence[int],
    host_kv: int,
    host_head_bytes: int,
    pages: int,
    pages_head_bytes: int,
    windows: int,
    window_rows: int,
    num_sink: int,
    page_table: int,
    page_table_stride: int,
    seq_slots: int,
    seq_lens: int,
    cu_seqlens_q: int,
    query_seq: int,
    positions: int,
    counters: int,
    num_queries: int,
    num_seqs: int,
    num_kv_heads: int,
    page_size: int,
    head_bytes: int,
    k_codes: int,
    k_scale: int,
    k_bounds: int,
    v_codes: int,
    v_scale: int,
    v_mean: int,
    head_dim: int,
    dtype: int,
    stream: int,
) -> None: ...
def index_pages(
    *,
    k: int,
    v: int,
    k_strides: Sequence[int],
    v_strides: Sequence[int],
    page_ids: int,
    num_pages: int,
    k_codes: int,
    k_scale: int,
    k_bounds: int,
    v_codes: int,
    v_scale: int,
    v_mean: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: int,
    stream: int,
) -> None: ...
def quest_scores(
    *,
    q: int,
    bounds: int,
    by_channel: bool,
    page_table: int,
    page_table_stride: int,
    query_seq: int,
    positions: int,
    ctx_starts: int,
    window_starts: int,
    scores: int,
    num_queries: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_blocks: int,
    block: int,
    page_size: int,
    num_sink: int,
    softmax_scale: float,
    dtype: int,
    stream: int,
) -> None: ...
def lsh_candidates(
    *,
    q_codes: int,
    k_codes: int,
    page_table: int,
    page_table_stride: int,
    query_seq: int,
    positions: int,
    ctx_starts: int,
    window_starts: int,
    candidates: int,
    num_queries: int,
    num_q_heads: int,
    num_kv_heads: int,
    num_tables: int,
    num_tokens: int,
    page_size: int,
    num_sink: int,
    stream: int,
) -> None: ...
def select_blocks(
    *,
    scores: int,
    query_seq: int,
    positions: int,
    ctx_starts: int,
    window_starts: int,
    candidates: int,
    budget: float,
    budget_is_share: bool,
    block: int,
    num_queries: int,
    num_q_heads: int,
    num_kv_heads: int,
    num_blocks: int,
    num_sink: int,
    stream: int,
) -> None: ...
def measure_link(device: int, bytes: int = ..., repeats: int = 8) -> tuple[float, float]: ...
def time_host_alloc(device: int, bytes: int) -> float: ...
def device_numa_node(device: int) -> int: ...
def estimate_scores_workspace(*, num_rows: int, num_kv_heads: int, group: int) -> int: ...
def estimate_scores(
    *,
    q: int,
    k_codes: int,
    k_scale: int,
    k_bounds: int,
    rows: int,
    candidates: int,
    page_table: int,
    seq_slots: int,
    window_starts: int,
    query_seq: int,
    positions: int,
    ctx_starts: int,
    scores: int,
    lse: int,
    errors: int,
    workspace: int,
    workspace_size: int,
    num_rows: int,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    page_size: int,
    num_sink: int,
    window_rows: int,
    capacity: int,
    table_stride: int,
    num_pages: int,
    num_blocks: int,
    by_token: bool,
    row_dtype: int,
    per_token: bool,
    early: bool,
    drop: bool,
    new_k: int,
    new_v: int,
    new_k_stride_bytes: Sequence[int],
    new_v_stride_bytes: Sequence[int],
    softmax_scale: float,
    codes_page_stride: int,
    scale_page_stride: int,
    bounds_page_stride: int,
    stream: int,
) -> None: ...
def prune(
    *,
    scores: int,
    lse: int,
    top_p: int,
    index_top_p: int,
    top_k: int,
    candidates: int,
    errors: int,
    window_starts: int,
    query_seq: int,
    positions: int,
    ctx_starts: int,
    weights: int,
    exact_tokens: int,
    exact_counts: int,
    index_counts: int,
    grades: int,
    mass: int,
    num_rows: int,
    num_kv_heads: int,
    group: int,
    page_size: int,
    num_sink: int,
    max_len: int,
    capacity: int,
    exact_capacity: int,
    grades_capacity: int,
    block: int,
    num_blocks: int,
    unite: bool,
    dropped: bool,
    expand_pages: bool,
    num_pages: int,
    margin: float,
    stream: int,
) -> None: ...

class SplitWork:
    def __init__(
        self,
        *,
        num_queries: int,
        num_kv_heads: int,
        group: int,
        num_blocks: int,
        workspace: int,
    ) -> None: ...

class StepView:
    def __init__(
        self,
        *,
        page_table: int,
        seq_slots: int,
        window_starts: int,
        query_seq: int,
        positions: int,
        ctx_starts: int,
        page_table_stride: int,
        page_size: int,
        num_sink: int,
    ) -> None: ...

def attend_pages(
    *,
    work: SplitWork,
    step: StepView,
    q: int,
    pages: int,
    head_bytes: int,
    streamed_bytes: int,
    softmax_scale: float,
    head_dim: int,
    row_dtype: int,
    stream: int,
) -> None: ...
def attend_rows(
    *,
    work: SplitWork,
    step: StepView,
    q: int,
    pool: int,
    host_kv: int,
    host_head_bytes: int,
    tokens: int,
    counts: int,
    locations: int,
    direct_bytes: int,
    capacity: int,
    window_rows: int,
    softmax_scale: float,
    head_dim: int,
    row_dtype: int,
    stream: int,
) -> None: ...
def attend_lower(
    *,
    work: SplitWork,
    step: StepView,
    scores: int,
    lse: int,
    grades: int,
    index_counts: int,
    v_codes: int,
    v_scale: int,
    v_mean: int,
    score_capacity: int,
    grade_capacity: int,
    head_dim: int,
    stream: int,
) -> None: ...
def merge_states(
    *,
    works: Sequence[SplitWork],
    out: int,
    lse: int,
    head_dim: int,
    row_dtype: int,
    stream: int,
) -> None: ...
def resolve_rows(
    *,
    tokens: int,
    counts: int,
    page_table: int,
    seq_slots: int,
    cu_seqlens_q: int,
    query_seq: int,
    slot_map: int,
    slot_key: int,
    slot_stamp: int,
    chunk_owner: int,
    set_mean: int,
    step: int,
    locations: int,
    fetch_src: int,
    fetch_dst: int,
    fetch_counts: int,
    fetch_direct: int,
    counters: int,
    num_queries: int,
    num_seqs: int,
    num_kv_heads: int,
    capacity: int,
    fetch_capacity: int,
    num_chunks: int,
    first_row: int,
    page_size: int,
    table_pages: int,
    table_stride: int,
    keys_per_head: int,
    shared_pages: bool,
    announced: int,
    layer: int,
    stream: int,
) -> None: ...
def rebalance_quotas(
    *,
    slot_map: int,
    slot_key: int,
    chunk_owner: int,
    set_mean: int,
    active: int,
    num_chunks: int,
    num_owners: int,
    num_kv_heads: int,
    keys_per_head: int,
    stream: int,
) -> None: ...
def release_sequence(
    *,
    slot_map: int,
    slot_key: int,
    chunk_owner: int,
    set_mean: int,
    page_ids: int,
    num_pages: int,
    seq_slot: int,
    num_chunks: int,
    num_kv_heads: int,
    page_size: int,
    keys_per_head: int,
    first_row: int,
    stream: int,
) -> None: ...
def gather_rows(
    *,
    host_kv: int,
    src: int,
    dst: int,
    counts: int,
    rows: int,
    counters: int,
    times: int,
    num_segments: int,
    num_kv_heads: int,
    fetch_capacity: int,
    head_stride_bytes: int,
    row_bytes: int,
    num_blocks: int,
    announced: int,
    step: int,
    layer: int,
    stream: int,
) -> None: ...
