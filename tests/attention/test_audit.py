"""Audits against a plain softmax over the host's rows; what is audited, and when."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.attention.model_shape import Run, Shape, make_cache
from twilight_engine.attention import audit
from twilight_engine.attention.audit import Auditor, audited_pair
from twilight_engine.attention.audit_record import Audits, join_audits
from twilight_engine.attention.decode import DecodeAttention
from twilight_engine.config import KVConfig, SparseConfig
from twilight_engine.kv.cache import KVCache

KV = KVConfig(page_size=16, num_recent=16, dense_layers=(0,))
SHAPE = Shape(num_layers=3)
EVERY = SparseConfig(attn_top_p=0.5, index_top_p=0.7, audit_every=1)


@dataclass
class Seen:
    """What one layer of one step was given and gave, on the CPU."""

    q: Tensor  # [B, Hq, D]
    out: Tensor
    tokens: Tensor  # [B, Hkv, C]
    counts: Tensor
    mass: Tensor


class AuditedRun:
    """Steps of a Run with an auditor; keeps by (step length of sequence 0, layer) what was seen."""

    def __init__(self, cache: KVCache, lengths: list[int], configs: list[SparseConfig]) -> None:
        self.cache, self.run, self.auditor = cache, Run(cache, lengths), Auditor(cache)
        self.decode = DecodeAttention(cache, self.run.sequences, configs, self.auditor)
        self.seen: list[dict[int, Seen]] = []

    def step(self) -> None:
        m, random = self.run.shape, self.run.random
        self.decode.begin_step()
        self.decode.advance()
        seen: dict[int, Seen] = {}
        for layer in range(m.num_layers):
            q, k, v = (
                random(len(self.run.sequences), heads, m.head_dim)
                for heads in (m.num_q_heads, m.num_kv_heads, m.num_kv_heads)
            )
            q = q * 2
            out = self.decode(layer, q, k, v)
            if layer not in self.cache.buffers:
                continue
            pruned = self.cache.buffers[layer].first(len(q)).pruned
            parts = (q, out, pruned.exact.tokens, pruned.exact.counts, pruned.mass)
            seen[layer] = Seen(*(x.detach().cpu().clone() for x in parts))
        self.decode.end_step()
        self.seen.append(seen)

    def expected(self, b: int, step: int, layer: int, head: int) -> tuple[float, float, Tensor]:
        """Mean and least mass, and the relative error of each head, of sequence b."""
        sequence, m = self.run.sequences[b], self.run.shape
        seen = self.seen[step - self.first(b)][layer]
        rows = self.cache.layers[layer].host[head, sequence.pages].flatten(0, 1).double()
        window = m.sliding_windows[layer] or step
        start = max(0, step - window)
        k, v = rows[start:step].chunk(2, dim=1)
        group = m.num_q_heads // m.num_kv_heads
        heads = slice(head * group, (head + 1) * group)
        weights = (seen.q[b, heads].double() @ k.T * m.softmax_scale).softmax(-1)
        recent = max(0, (step - KV.num_recent) // KV.page_size * KV.page_size)
        inside = set(range(KV.num_sink)) | set(range(recent, step))
        inside |= set(seen.tokens[b, head, : seen.counts[b, head]].tolist())
        kept = torch.tensor([t in inside for t in range(start, step)])
        mass, exact = weights[:, kept].sum(-1), weights @ v
        error = (seen.out[b, heads].double() - exact).norm(dim=-1) / exact.norm(dim=-1)
        return mass.mean().item(), mass.min().item(), error

    def first(self, b: int) -> int:
        """The length of a sequence in its first step."""
        return self.run.sequences[b].length - len(self.seen) + 1

    def assert_right(self, b: int) -> Audits:
        found = self.auditor.take(self.run.sequences[b].sequence_id)
        assert found is not None
        for i in range(found.count):
            layer, head = int(found.layer[i]), int(found.kv_head[i])
            mean, least, error = self.expected(b, int(found.step[i]), layer, head)
            assert found.realised_mass[i] == pytest.approx(mean, abs=1e-9)
            assert found.weakest_head_mass[i] == pytest.approx(least, abs=1e-9)
            assert found.output_error[i] == pytest.approx(error.mean().item(), rel=1e-4)
            assert found.worst_head_error[i] == pytest.approx(error.max().item(), rel=1e-4)
            seen = self.seen[int(found.step[i]) - self.first(b)][layer]
            if found.p[i] < 1:
                assert found.estimated_mass[i] == seen.mass[b, head].item()
        return found


@pytest.mark.parametrize("chunk", [32, audit.CHUNK_TOKENS])
@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("balanced", {"attn_top_p": 0.5, "index_top_p": 0.7}),
        ("lean", {}),
        ("lean", {"attn_top_p": 0.1, "group_rule": "union", "fetch": "page"}),
        ("balanced", {"selector": "quest", "tail": "renormalise", "index_top_p": None}),
    ],
)
def test_an_audit_is_a_plain_softmax_over_the_host_rows(
    preset, changes, chunk, device, monkeypatch
):
    monkeypatch.setattr(audit, "CHUNK_TOKENS", chunk)
    config = SparseConfig.preset(preset, audit_every=1, **changes)
    with make_cache(device, KV, shape=SHAPE) as cache:
        run = AuditedRun(cache, [300, 130], [config, config])
        for _ in range(6):
            run.step()
        for b in range(2):
            found = run.assert_right(b)
            assert found.count == 6
            assert (found.realised_mass < 1).all() and (found.output_error > 0.0005).all()
            assert (found.weakest_head_mass <= found.realised_mass).all()
            assert (found.p == config.attn_top_p).all()


@pytest.mark.parametrize("window", [40, 150])
def test_a_sliding_window_is_the_whole_context(window, device, monkeypatch):
    monkeypatch.setattr(audit, "CHUNK_TOKENS", 32)
    shape = Shape(num_layers=3, windows=(None, window, None))
    with make_cache(device, KV, shape=shape) as cache:
        run = AuditedRun(cache, [300, 20], [EVERY, EVERY])
        for _ in range(8):
            run.step()
        for b in range(2):
            assert {1, 2} == set(run.assert_right(b).layer)


def test_keeping_every_row_has_all_mass_and_no_error(device):
    config = SparseConfig(attn_top_p=1.0, audit_every=1)
    with make_cache(device, KV, shape=SHAPE) as cache:
        run = AuditedRun(cache, [200], [config])
        for _ in range(5):
            run.step()
        found = run.auditor.take(run.run.sequences[0].sequence_id)
        assert found.count == 5 and found.share_kept == 1.0
        assert found.realised_mass == pytest.approx(1.0, abs=1e-12)
        assert found.weakest_head == pytest.approx(1.0, abs=1e-12)
        assert (found.estimated_mass == 1).all()
        assert (found.worst_head_error < (1e-5 if device.type == "cpu" else 1e-4)).all()


def test_a_list_that_misses_its_heaviest_row_is_found_out(device):
    """Breaks a list after the layer ran: the audit reads what attention read, not the scores."""
    with make_cache(device, KV, shape=SHAPE) as cache:
        run = AuditedRun(cache, [300], [EVERY])
        graded = run.decode._graded
        for layer, attend in list(graded.items()):

            def cut(q, meta, new_rows, attend=attend, layer=layer):
                out = attend(q, meta, new_rows)
                cache.buffers[layer].first(1).pruned.exact.counts.zero_()
                return out

            cut.appends = attend.appends
            graded[layer] = cut
        run.step()
        found = run.assert_right(0)
        assert found.realised_mass[0] < EVERY.attn_top_p - 0.05 < found.estimated_mass[0]
        assert found.share_kept == 0.0


def test_budgets_have_no_p_and_the_dense_policy_no_audits(device):
    config = SparseConfig(attn_top_k=40, index_top_p=None, audit_every=1)
    with make_cache(device, KV, shape=SHAPE) as cache:
        run = AuditedRun(cache, [200], [config])
        run.step()
        found = run.assert_right(0)
        assert np.isnan(found.p).all() and found.share_kept is None
    with make_cache(device, KV, shape=SHAPE) as cache:
        run = AuditedRun(cache, [40], [SparseConfig(policy="dense", audit_every=1)])
        run.step()
        assert run.auditor.take(run.run.sequences[0].sequence_id) is None


def test_the_layer_has_its_own_p_and_the_request_its_own_rate(device):
    by_layer = {2: SparseConfig(attn_top_p=0.9)}
    configs = [EVERY.replace(by_layer=by_layer), EVERY.replace(audit_every=3), SparseConfig()]
    with make_cache(device, KV, shape=SHAPE, max_num_seqs=3) as cache:
        run = AuditedRun(cache, [100, 100, 100], configs)
        for _ in range(12):
            run.step()
        often, seldom = run.assert_right(0), run.assert_right(1)
        assert (often.p == np.where(often.layer == 2, 0.9, 0.5)).all()
        assert often.count == 12 and 3 <= seldom.count <= 5
        assert run.auditor.take(run.run.sequences[2].sequence_id) is None


def test_audits_are_read_before_their_places_run_out(device, monkeypatch):
    monkeypatch.setattr(audit, "NUM_RESULTS", 2)
    with make_cache(device, KV, shape=SHAPE) as cache:
        run = AuditedRun(cache, [100, 60], [EVERY, EVERY])
        for _ in range(7):
            run.step()
        assert run.assert_right(0).count == run.assert_right(1).count == 7


def test_bytes_are_the_pages_that_were_read_and_no_decode_traffic(device):
    with make_cache(device, KV, shape=SHAPE) as cache:
        run = AuditedRun(cache, [300], [EVERY])
        run.step()
        before = cache.log.counters.clone()
        found = run.auditor.take(run.run.sequences[0].sequence_id)
        pages = -(-301 // KV.page_size)
        assert found.bytes.tolist() == [pages * KV.page_size * cache.row_bytes]
        assert torch.equal(before, cache.log.counters)
    with make_cache(device, KV, shape=SHAPE) as cache:
        plain = AuditedRun(cache, [300], [EVERY.replace(audit_every=None)])
        plain.step()
        assert torch.equal(before.cpu(), cache.log.counters.cpu())


def test_closing_a_sequence_waits_for_its_audits(device):
    with make_cache(device, KV, shape=SHAPE, max_num_seqs=1, max_model_len=320) as cache:
        free = cache.free_tokens
        for _ in range(4):  # the next sequence takes the same pages and overwrites them
            run = AuditedRun(cache, [300], [EVERY])
            run.step()
            sequence = run.run.sequences[0]
            mean, least, _ = run.expected(0, 301, *audited(sequence.sequence_id, 301))
            cache.close_sequence(sequence)
            assert cache.free_tokens == free
            again = Run(cache, [310], seed=9)
            found = run.auditor.take(sequence.sequence_id)
            assert found.realised_mass[0] == pytest.approx(mean, abs=1e-9)
            assert found.weakest_head_mass[0] == pytest.approx(least, abs=1e-9)
            cache.close_sequence(again.sequences[0])


def audited(sequence_id: int, length: int) -> tuple[int, int]:
    """Layer and head that a step of audit_every=1 audits in SHAPE and KV."""
    pair = audited_pair(sequence_id, length, 1, 4)
    assert pair is not None
    return 1 + pair // 2, pair % 2


@pytest.mark.parametrize("every", [1, 2, 7, 64])
def test_one_step_of_every_n_and_every_pair_in_turn(every):
    steps = [(n, audited_pair(5, n, every, 12)) for n in range(every * 100, every * 136)]
    taken = [(n, pair) for n, pair in steps if pair is not None]
    assert [n // every for n, _ in taken] == list(range(100, 136))
    for first in range(len(taken) - 11):
        assert {pair for _, pair in taken[first : first + 12]} == set(range(12))
    phases = {n % every for n, _ in taken}
    assert len(phases) > every // 4
    assert steps == [(n, audited_pair(5, n, every, 12)) for n, _ in steps]
    assert taken != [(n, p) for n, _ in steps if (p := audited_pair(6, n, every, 12)) is not None]


def test_joining_nothing_is_none():
    assert join_audits([]) is None and join_audits([None, None]) is None
