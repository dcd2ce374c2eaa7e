"""What options become as configs."""

from __future__ import annotations

from typing import get_args

from twilight_engine.attention.selectors import BY_NAME
from twilight_engine.cli import options
from twilight_engine.cli.configs import kv_config


def test_the_selector_lsh_gets_signatures() -> None:
    assert kv_config("lean", page_size=64, dense_layers="0", selector="lsh").lsh == (10, 150)
    assert kv_config("lean", page_size=64, dense_layers="0", selector="quest").lsh is None
    assert kv_config("lean", page_size=64, dense_layers="0").lsh is None


def test_the_help_names_every_selector_that_works_by_name() -> None:
    help_text = get_args(options.Selector)[1].help
    assert [name for name in BY_NAME if f"[b]{name}[/b]" not in help_text] == []
