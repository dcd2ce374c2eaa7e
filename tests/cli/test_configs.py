"""What options become as configs."""

from __future__ import annotations

from twilight_engine.cli.configs import kv_config


def test_the_selector_lsh_gets_signatures() -> None:
    assert kv_config("lean", page_size=64, dense_layers="0", selector="lsh").lsh == (10, 150)
    assert kv_config("lean", page_size=64, dense_layers="0", selector="quest").lsh is None
    assert kv_config("lean", page_size=64, dense_layers="0").lsh is None
