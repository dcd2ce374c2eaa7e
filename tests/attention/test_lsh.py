"""The selector `lsh`: signatures wherever rows are stored, what the plan says, what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attention.model_shape import Run, Shape, make_cache
from tests.ops.lsh_case import differing_bits
from twilight_engine.attention.copy import copy_sequence
from twilight_engine.attention.selectors import LayerView, LshSelector, make_selector
from twilight_engine.config import KVConfig, SparseConfig
from twilight_engine.kv.cache import KVCache, SequenceKV
from twilight_engine.kv.rewind import rewind
from twilight_engine.layout import num_blocks
from twilight_engine.ops import lsh_codes as op
from twilight_engine.reference.lsh_candidates import lsh_candidates as lsh_candidates_reference
from twilight_engine.reference.lsh_codes import lsh_codes as lsh_codes_reference

PLAIN = KVConfig(page_size=16, num_recent=16, dense_layers=(0,))
SIGNED = dataclasses.replace(PLAIN, lsh=(6, 20))
FIRST_CHUNK = 32  # of a Run's prefill: two pages
SHAPE = Shape(num_layers=3, windows=(None, None, 100))


def signatures(cache: KVCache, layer: int, sequence: SequenceKV) -> Tensor:
    """[length, Hkv, L] of a sequence's tokens."""
    index = cache.layers[layer].index
    assert index is not None and index.lsh_codes is not None
    pages = index.lsh_codes[torch.tensor(sequence.pages, device=cache.device)]
    return pages.transpose(1, 2).flatten(0, 1)[: sequence.length]


def assert_signed(cache: KVCache, run: Run, sequences: list[SequenceKV], centre: int) -> None:
    """Every token's bits are those of its K less the mean of the first `centre` of the prompt."""
    for layer in cache.sparse_layers:
        hashes = cache.layers[layer].lsh
        assert hashes is not None
        for sequence, rows, prompt in zip(sequences, run.rows, run.lengths, strict=True):
            k = rows[layer][0]
            assert k.shape[0] == sequence.length
            want = lsh_codes_reference(k - k[: min(centre, prompt)].mean(0), hashes)
            assert differing_bits(signatures(cache, layer, sequence), want) <= 2  # by rounding


def signed_run(cache: KVCache, lengths: list[int], seed: int = 0) -> Any:
    run: Any = Run(cache, lengths, seed=seed)
    run.lengths = lengths
    return run


def test_prefilled_and_decoded_tokens_are_signed_alike(device):
    """In chunks, in new pages, from an open page; a slot's next sequence has its own centre."""
    with make_cache(device, SIGNED, shape=SHAPE) as cache:
        for seed, lengths in enumerate(([150, 5], [37, 64])):
            run = signed_run(cache, lengths, seed)
            assert_signed(cache, run, run.sequences, FIRST_CHUNK)
            decode = run.decoder([SparseConfig(), SparseConfig()])
            for _ in range(20):
                run.step(decode)
            assert_signed(cache, run, run.sequences, FIRST_CHUNK)
            for sequence in run.sequences:
                cache.close_sequence(sequence)


def test_the_dense_policy_signs_too_and_a_cut_signs_again(device):
    with make_cache(device, SIGNED, shape=SHAPE) as cache:
        run = signed_run(cache, [70, 29])
        decode = run.decoder([SparseConfig(policy="dense")] * 2)
        for _ in range(20):
            run.step(decode)
        rewind(cache, run.sequences, run.lengths)
        run.rows = [
            [(k[:length], v[:length]) for k, v in rows]
            for rows, length in zip(run.rows, run.lengths, strict=True)
        ]
        decode = run.decoder([SparseConfig()] * 2)
        for _ in range(9):  # other tokens than before the cut
            run.step(decode)
        assert_signed(cache, run, run.sequences, FIRST_CHUNK)


@pytest.mark.parametrize("source", [PLAIN, SIGNED])
def test_a_copy_is_signed_as_a_prefill(source, device, monkeypatch):
    """Bit by bit where the first chunk holds the tokens that make the centre."""
    monkeypatch.setattr(op, "CENTRE_TOKENS", FIRST_CHUNK)
    with make_cache(device, source, shape=SHAPE) as first:
        with make_cache(device, SIGNED, shape=SHAPE) as second:
            run = signed_run(first, [150, 5])
            copies = [copy_sequence(first, s, second) for s in run.sequences]
            assert_signed(second, run, copies, FIRST_CHUNK)
            for layer in first.sparse_layers if source is SIGNED else []:
                mine, theirs = first.layers[layer].lsh, second.layers[layer].lsh
                assert mine is not None and theirs is not None
                assert torch.equal(mine.centres, theirs.centres)


def test_a_copy_at_once_has_the_centre_of_what_it_copies(device):
    with make_cache(device, PLAIN, shape=SHAPE) as first:
        with make_cache(device, SIGNED, shape=SHAPE) as second:
            run = signed_run(first, [150, 5])
            copies = [copy_sequence(first, s, second) for s in run.sequences]
            assert_signed(second, run, copies, 150)


class Spy:
    """Takes a layer's queries and view aside and leaves every token in."""

    def select(self, q: Tensor, view: LayerView) -> None:
        self.q, self.view = q.clone(), view


def test_the_mask_is_of_tokens_and_as_the_reference_has_it(device):
    with make_cache(device, SIGNED, shape=SHAPE) as cache:
        run, spy = signed_run(cache, [150, 67]), Spy()
        run.step(run.decoder([SparseConfig(selector=spy)] * 2))
        view, selector = spy.view, make_selector(SparseConfig(selector="lsh"))
        assert selector.per_token
        mask = selector.select(spy.q, dataclasses.replace(view, block=1))
        assert mask.shape == (2, 2, num_blocks(view.meta.max_len, 1, 16))
        q_codes = op.lsh_codes(spy.q, view.lsh)
        assert torch.equal(mask, lsh_candidates_reference(q_codes, view.index, view.meta))
        listed = [int(x) for x in view.meta.window_starts]
        for n, end in enumerate(listed):
            share = mask[n, :, :end].float().mean()
            assert 0 < share < 1 and not mask[n, :, end:].any()


@pytest.mark.parametrize("lsh", [None, (10, 150)])
def test_the_plan_counts_what_is_allocated(lsh, device):
    config = dataclasses.replace(PLAIN, lsh=lsh)
    with make_cache(device, config, shape=SHAPE, max_num_seqs=3) as cache:
        layers = [cache.layers[i] for i in cache.sparse_layers]
        index = [t for layer in layers for t in vars(layer.index).values() if isinstance(t, Tensor)]
        hashes = [layer.lsh for layer in layers if layer.lsh is not None]
        shared = {h.projections.data_ptr(): h.projections for h in hashes}.values()

        def total(tensors: Any) -> int:
            return sum(t.numel() * t.element_size() for t in tensors)

        assert cache.plan.device["index"] == total(index)
        assert cache.plan.device["hash functions"] == total([*shared, *(h.centres for h in hashes)])
        assert len(shared) == (lsh is not None)


def test_all_dense_takes_no_hash_functions(device):
    config = dataclasses.replace(SIGNED, dense_layers="all")
    with make_cache(device, config, shape=SHAPE) as cache:
        assert cache.plan.device["hash functions"] == 0 and cache.plan.device["index"] == 0


def test_a_cache_without_signatures_is_refused(device):
    message = r"selector is 'lsh', but .* build it with KVConfig\(lsh=\(10, 150\)\)"
    with make_cache(device, PLAIN, shape=SHAPE) as cache:
        run = signed_run(cache, [40])
        for selector in ("lsh", LshSelector()):
            with pytest.raises(ValueError, match=message):
                run.decoder([SparseConfig(selector=selector)])
        run.step(run.decoder([SparseConfig(selector="lsh", attn_top_p=1.0, index_top_p=1.0)]))
        spy = Spy()
        run.step(run.decoder([SparseConfig(selector=spy)]))
        with pytest.raises(ValueError, match=message):
            LshSelector().select(spy.q, spy.view)


@pytest.mark.parametrize(
    "lsh", [(0, 150), (17, 150), (10, 1), (10, 513), (10,), 10, "10", (10.0, 150), (True, 9)]
)
def test_a_bad_shape_of_tables_is_named(lsh):
    with pytest.raises(ValueError, match=r"lsh is .*; it must be \(bits a table, tables\) with"):
        KVConfig(lsh=lsh)


def test_a_list_will_do():
    assert KVConfig(lsh=[8, 75]) == KVConfig(lsh=(8, 75))  # type: ignore[arg-type]
    hash(KVConfig(lsh=[8, 75]))  # type: ignore[arg-type]
