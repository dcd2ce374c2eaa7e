"""The gradings that `twilight eval frontier` tries, by name."""

from __future__ import annotations

from twilight_engine.config import PRESETS, KVConfig, SparseConfig
from twilight_engine.eval.methods import parse_method
from twilight_engine.eval.simulation.grading import Grading

WHOLE_MASSES = (0.8, 0.9, 0.95)  # the masses that the promise is checked at
PLAIN = ("quest:1024", "top_k:1024", "streaming:1024")  # exact within a budget, the rest dropped


def gradings(num_layers: int) -> dict[str, Grading]:
    """The sweep: the presets, each knob around the default, and what peers would do."""
    base = Grading.of(KVConfig(), SparseConfig(), num_layers)
    found = {
        name: Grading.of(KVConfig.preset(name), SparseConfig.preset(name), num_layers)
        for name in PRESETS
    }
    paper, lean = found["paper"], found["lean"]
    found["dense"] = Grading(dense_layers=tuple(range(num_layers)))
    found["paper@0.85"] = paper.replace(attn_top_p=0.85)
    found["paper, K per channel"] = paper.replace(k_index="int4_channel", selector="all")
    for name in ("dense-int4", *PLAIN):
        method = parse_method(name)
        found[name] = Grading.of(method.kv, method.sparse, num_layers)
    found["dense-int4, K per token"] = found["dense-int4"].replace(k_index="int4_token")
    for p in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95):
        found[f"balanced@{p}"] = base.replace(attn_top_p=p)
    for p in (0.8, 0.85, 0.9, 0.98):
        found[f"lean@{p}"] = lean.replace(attn_top_p=p)
    for p in (0.9, 0.95, 0.98, 0.995, 1.0):
        found[f"index {p}"] = base.replace(index_top_p=p)
    found["union"] = base.replace(group_rule="union")
    found["renormalise"] = base.replace(tail="renormalise")
    found["V int2"] = base.replace(v_index="int2")
    found["V int8"] = base.replace(v_index="int8")
    found["K per token"] = base.replace(k_index="int4_token")
    found["K int2"] = base.replace(k_index="int2_channel")
    found["K int8"] = base.replace(k_index="int8_token")
    found["V only, K int8"] = base.replace(k_index="int8_token", value_only=True)
    found["V only, K int8, lean"] = lean.replace(k_index="int8_token", value_only=True)
    found["no dense layer"] = base.replace(dense_layers=())
    found["dense layer 0"] = base.replace(dense_layers=(0,))
    for p in WHOLE_MASSES:
        for margin in (0.0, 2.0):
            found[f"margin {margin:g} @{p}"] = base.replace(attn_top_p=p, mass_margin=margin)
    return found
