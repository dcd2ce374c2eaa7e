"""The memory plan: what every tier of an engine needs, before any of it is taken."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from twilight_engine.config import KVConfig
from twilight_engine.kv.index import index_page_bytes
from twilight_engine.kv.lsh import hash_bytes, num_tables
from twilight_engine.layout import ANNOUNCED_WORDS, SLOTS_PER_CHUNK

# Default hot rows as a share of the sparse layers' KV: 2-4 times the mean exact set of graded
# attention (0.7-2.9 % of the context on real models), and more where no INT4 V exists and the
# exact sets are larger.
HOT_SHARE_WITH_V_INDEX = 1 / 16
HOT_SHARE_WITHOUT_V_INDEX = 1 / 8


class ModelShape(Protocol):
    """What the plan reads of a model's config."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_q_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by tier, and the counts that follow from the budgets.

    Attributes:
        device: tier name -> bytes on the device (weights not included).
        host: tier name -> bytes of host memory, pinned on a GPU.
        num_pages: pages of the pool; a page is page_size tokens over all layers and heads.
        pages_per_sequence: pages of one sequence of max_model_len tokens.
        capacity: entries of a list of one KV head: max_model_len rounded up to a page.
        hot_slots: hot-row slots by layer, multiples of SLOTS_PER_CHUNK, 0 in a dense one.
    """

    device: dict[str, int]
    host: dict[str, int]
    num_pages: int
    pages_per_sequence: int
    capacity: int
    hot_slots: tuple[int, ...]
    dense_layers: tuple[int, ...]

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


def dense_layer_set(model: ModelShape, kv_config: KVConfig) -> tuple[int, ...]:
    """The dense layers of a model, checked against its depth.

    Raises: ValueError for a layer the model does not have.
    """
    if kv_config.dense_layers == "all":
        return tuple(range(model.num_layers))
    beyond = [i for i in kv_config.dense_layers if i >= model.num_layers]
    default = KVConfig().dense_layers
    if beyond and kv_config.dense_layers != default:
        raise ValueError(f"dense_layers names layers {beyond}; the model has {model.num_layers}")
    return tuple(sorted({i for i in kv_config.dense_layers if i < model.num_layers}))


def plan_memory(
    model: ModelShape,
    kv_config: KVConfig,
    *,
    max_model_len: int,
    max_num_seqs: int,
    dtype_bytes: int,
) -> MemoryPlan:
    """What an engine of this shape takes on the device and in host memory.

    Raises: ValueError if host_bytes holds less than one page.
    """
    size, heads, dim = kv_config.page_size, model.num_kv_heads, model.head_dim
    row = 2 * dim * dtype_bytes
    page_bytes = model.num_layers * heads * size * row
    per_sequence = -(-max_model_len // size)
    num_pages = per_sequence * max_num_seqs
    if kv_config.host_bytes is not None:
        num_pages = min(num_pages, kv_config.host_bytes // page_bytes)
        if num_pages < 1:
            raise ValueError(
                f"host_bytes is {kv_config.host_bytes}, less than one page of {page_bytes} bytes "
                f"({size} tokens, {model.num_layers} layers, {heads} KV heads, head_dim {dim})"
            )
    dense = dense_layer_set(model, kv_config)
    sparse = model.num_layers - len(dense)
    capacity = per_sequence * size
    layer_kv = num_pages * heads * size * row
    slots = _hot_slots(model, kv_config, layer_kv, row, dense, max_num_seqs * heads)
    lists = max_num_seqs * capacity
    device = {
        "index": sparse
        * num_pages
        * index_page_bytes(
            heads, size, dim, kv_config.k_index, kv_config.v_index, num_tables(kv_config.lsh)
        ),
        "hash functions": hash_bytes(kv_config.lsh, dim, sparse, max_num_seqs * heads),
        "windows": sparse
        * max_num_seqs
        * heads
        * (kv_config.num_sink + kv_config.window_rows)
        * row,
        "hot rows": sum(slots) * (row + 8),
        "slot maps": sum(count > 0 for count in slots) * num_pages * heads * size * 4,
        "dense layers": len(dense) * layer_kv,
        # scores; prune's weights, exact, location and two fetch lists; grades; errors; announced
        "step buffers": lists * (model.num_q_heads * 4 + heads * (5 * 4 + 1))
        + max_num_seqs * (per_sequence * model.num_q_heads * 4 + heads * ANNOUNCED_WORDS * 8)
        if sparse
        else 0,
        # one layer's K and V, and the hidden states of the whole prompt
        "prefill": max_model_len * (heads * row + 2 * model.hidden_size * dtype_bytes),
    }
    return MemoryPlan(
        device=device,
        host={"arena": num_pages * page_bytes},
        num_pages=num_pages,
        pages_per_sequence=per_sequence,
        capacity=capacity,
        hot_slots=slots,
        dense_layers=dense,
    )


def _hot_slots(
    model: ModelShape,
    kv_config: KVConfig,
    layer_kv: int,
    row_bytes: int,
    dense: tuple[int, ...],
    owners: int,
) -> tuple[int, ...]:
    """Slots of each layer: the budget in whole chunks.

    Where the budget is a share of the KV, each head gets one chunk at least.
    """
    graded = [i for i in range(model.num_layers) if i not in dense]
    parts = _hot_parts(model, kv_config, graded)
    chunk = SLOTS_PER_CHUNK * row_bytes
    if kv_config.hot_bytes is not None:
        budget, least = kv_config.hot_bytes, 0
    elif kv_config.hot_kv_share is not None:
        budget, least = int(kv_config.hot_kv_share * model.num_layers * layer_kv), owners
    else:
        with_v = kv_config.v_index == "int4"
        share = HOT_SHARE_WITH_V_INDEX if with_v else HOT_SHARE_WITHOUT_V_INDEX
        budget, least = int(layer_kv * share) * len(graded), owners
    counts = [max(least, int(budget * part) // chunk) if part else 0 for part in parts]
    return tuple(count * SLOTS_PER_CHUNK for count in counts)


def _hot_parts(
    model: ModelShape, kv_config: KVConfig, graded: list[int]
) -> tuple[float | Fraction, ...]:
    """The part of the hot rows that each layer gets; they add up to 1, or all are 0.

    Raises: ValueError for hot_shares of another number of layers, or with hot rows in a dense one.
    """
    shares = kv_config.hot_shares
    if shares is None:
        even = Fraction(1, max(len(graded), 1))  # exact, so that equal layers get equal chunks
        return tuple(even if i in graded else 0 for i in range(model.num_layers))
    if len(shares) != model.num_layers:
        raise ValueError(
            f"hot_shares has {len(shares)} entries; the model has {model.num_layers} layers"
        )
    wasted = [i for i, share in enumerate(shares) if share and i not in graded]
    if wasted:
        raise ValueError(
            f"hot_shares gives hot rows to layers {wasted}, which are dense and need none"
        )
    return shares
