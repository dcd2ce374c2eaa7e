"""Double Sparsity: the tokens it picks, and steps that attend to those alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.attention.documented import documented_selector
from tests.attention.model_shape import Run, make_cache
from tests.compare import compare
from tests.ops.graded_case import make_case
from tests.ops.step_meta import make_meta
from tests.runtime.tiny import CONFIG, prompt_ids, tiny_llm
from twilight_engine import SamplingParams, SparseConfig
from twilight_engine.attention.selectors import (
    DoubleSparsityOnlineSelector,
    DoubleSparsitySelector,
    LayerView,
)
from twilight_engine.attention.selectors.double_sparsity import channel_ranges
from twilight_engine.config import EVERY_CANDIDATE, KVConfig
from twilight_engine.eval.channels import rank_channels, with_channels
from twilight_engine.eval.methods import parse_method
from twilight_engine.layout import num_blocks
from twilight_engine.models.load import load_model
from twilight_engine.reference.estimate_scores import dequantise_keys
from twilight_engine.reference.select_blocks import list_token_counts


def view_of(case, budget: float | int) -> LayerView:
    return LayerView(0, case.index, case.windows, case.meta, case.softmax_scale, budget, 1)


def label_scores(case, mask: Tensor) -> Tensor:
    """[N, Hq, tokens] q . k over the mask's channels; -inf for what is no list token."""
    meta, size = case.meta, case.meta.page_size
    n, hq, _ = case.q.shape
    group = hq // case.windows.num_kv_heads
    out = torch.full((n, hq, num_blocks(meta.max_len, 1, size)), -torch.inf)
    for i in range(n):
        b = int(meta.query_seq[i])
        first = max(int(meta.ctx_starts[i]), meta.num_sink)
        for t in range(first, min(int(meta.positions[i]) + 1, int(meta.window_starts[b]))):
            page = meta.page_table[b, t // size].long()[None]
            for h in range(hq):
                k = dequantise_keys(case.index, page, h // group)[0, t % size]
                out[i, h, t] = (case.q[i, h].float() * mask[i, h // group] * k).sum().cpu()
    return out * case.softmax_scale


@pytest.mark.parametrize("k_index", ["int4_channel", "int4_token"])
@pytest.mark.parametrize("budget", [0.25, 20])
def test_picks_the_best_tokens_of_each_head(device, k_index, budget):
    case = make_case(make_meta(device, [150, 70, 10], page_size=16), group=3, k_index=k_index)
    channels = torch.stack([torch.randperm(64)[:16] for _ in range(2)])[None]
    found = DoubleSparsitySelector(channels).select(case.q, view_of(case, budget))
    mask = torch.zeros(2, 64).scatter_(1, channels[0], 1.0).to(device).expand(3, -1, -1)
    scores = label_scores(case, mask)
    for n, listed in enumerate(list_token_counts(case.meta).tolist()):
        count = min(listed, 20 if budget == 20 else -(-listed // 4))
        for h in range(2):
            wanted = {
                t for g in range(3) for t in scores[n, 3 * h + g].topk(count).indices.tolist()
            }
            assert set(found[n, h].nonzero().flatten().tolist()) == wanted


@pytest.mark.parametrize("k_index", ["int4_channel", "int4_token"])
def test_online_channels_are_those_of_large_queries_and_ranges(device, k_index):
    meta = make_meta(device, [150, 70, 10], page_size=16)
    case = make_case(meta, group=3, k_index=k_index)
    ranges = channel_ranges(case.index, meta)
    for n, b in enumerate(meta.query_seq.tolist()):
        pages = meta.page_table[b, : int(meta.window_starts[b]) // 16].long()
        if k_index == "int4_channel":
            spans = 15 * case.index.k_scale[pages, :, 0].float()
        else:
            bounds = case.index.k_bounds[pages].float()
            spans = (bounds[..., 1, :] - bounds[..., 0, :])[:, :, 0]  # a run a page at size 16
        expected = spans.mean(0) if len(pages) else torch.zeros_like(ranges[n])
        torch.testing.assert_close(ranges[n], expected)
    weight = case.q.float().unflatten(1, (2, 3)).abs().sum(2) * ranges
    mask = torch.zeros_like(weight).scatter_(-1, weight.topk(16, dim=-1).indices, 1.0)
    found = DoubleSparsityOnlineSelector().select(case.q, view_of(case, 9))
    scores = label_scores(case, mask)
    best = scores[0, :3].topk(9, dim=-1).indices
    assert set(found[0, 0].nonzero().flatten().tolist()) == set(best.flatten().tolist())


def test_a_step_attends_to_the_tokens_chosen_and_the_resident_ones(device):
    kv = KVConfig(page_size=16, num_recent=16, dense_layers=(), v_index="none")
    with make_cache(device, kv) as cache:
        run = Run(cache, [150])
        decode = run.decoder(
            [
                SparseConfig(
                    attn_top_k=EVERY_CANDIDATE,
                    index_top_p=None,
                    tail="renormalise",
                    selector=documented_selector("EverySeventh")(),
                )
            ]
        )
        for length in range(151, 170):
            t = torch.arange(length)
            resident = (t < kv.num_sink) | (t >= (length - 16) // 16 * 16)
            compare(*run.step(decode, kept=((t % 7 == 0) | resident).to(device)))


def test_by_name_it_asks_for_channels():
    with (
        tiny_llm() as llm,
        pytest.raises(ValueError, match="needs the model's calibrated channels"),
    ):
        llm.generate("hello", sparse_config=SparseConfig(selector="double_sparsity"))


@pytest.mark.parametrize("channels", [torch.zeros(2, 3), torch.zeros(2, 3, 4), []])
def test_channels_of_another_form_are_refused(channels):
    with pytest.raises(ValueError, match=r"channels has shape .* must be \[num_layers, num_kv"):
        DoubleSparsitySelector(channels)


def test_channel_numbers_are_not_negative():
    with pytest.raises(ValueError, match="channels has -1; channel numbers are >= 0"):
        DoubleSparsitySelector([[[3, -1]]])


@pytest.mark.parametrize("count", [0, 65])
def test_a_ranking_has_only_so_many_channels(count):
    ranking = torch.arange(64).expand(3, 2, -1)
    with pytest.raises(ValueError, match=f"num_channels is {count}; it must be 1 to 64"):
        DoubleSparsitySelector.from_ranking(ranking, count)


def test_a_selector_serves_models_of_any_dtype(device):
    meta = make_meta(device, [150], page_size=16)
    selector = DoubleSparsitySelector.from_ranking(torch.arange(64).expand(1, 2, -1))
    masks = [
        selector._mask(0, 2, make_case(meta, dtype=dtype).q)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert [mask.dtype for mask in masks] == [torch.float32, torch.bfloat16]
    assert all(mask.sum() == 2 * 16 for mask in masks)


def test_channels_of_another_model_are_refused():
    selector = DoubleSparsitySelector(torch.zeros(3, 5, 4, dtype=torch.int64))
    with (
        tiny_llm() as llm,
        pytest.raises(ValueError, match="channels are for 3 layers, 5 KV heads"),
    ):
        llm.generate([prompt_ids(90)], sparse_config=SparseConfig(selector=selector))


def test_ranked_channels_move_logits_most():
    torch.manual_seed(0)
    model = load_model(CONFIG, load_format="dummy", device="cpu").model
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen[layer] = (q, k)
        return torch.zeros_like(q)

    ids = prompt_ids(50)
    ranking = rank_channels(model, ids)
    assert ranking.shape == (CONFIG.num_layers, CONFIG.num_kv_heads, CONFIG.head_dim)
    with torch.inference_mode():
        model(torch.tensor(ids), torch.arange(50), attend, 50)
    q, k = seen[0]  # later layers saw other attention
    moved = (q.view(50, 2, 2, -1) * k[:, :, None]).abs().sum((0, 2))
    assert ranking[0].tolist() == moved.argsort(-1, descending=True).tolist()


def test_methods_get_their_channels_from_the_text():
    model = load_model(CONFIG, load_format="dummy", device="cpu").model
    methods = [parse_method("balanced"), parse_method("double_sparsity+paper@0.85")]
    plain, sparse = with_channels(methods, model, prompt_ids(60))
    assert plain is methods[0]
    assert isinstance(sparse.sparse.selector, DoubleSparsitySelector)
    selector = sparse.sparse.selector
    params = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0.0)
    with tiny_llm(kv_config=dataclasses.replace(sparse.kv, page_size=16, num_recent=16)) as llm:
        outputs = [
            llm.generate([prompt_ids(200)], params, sparse_config=config)[0].metrics.exact_rows
            for config in (sparse.sparse, sparse.sparse.replace(attn_top_p=1.0, selector=selector))
        ]
    assert 0 < outputs[0] < outputs[1]
