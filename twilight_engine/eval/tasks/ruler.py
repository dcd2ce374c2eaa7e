"""Our own generators of RULER's categories: needles, variable tracking, word counting.

Wording, words and haystacks are our own, so scores compare methods and models here, not with
published RULER scores.

Source: the task design of RULER (Hsieh et al. 2024), without its question answering.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from twilight_engine.eval.items import Item
from twilight_engine.eval.tasks import ruler_needles, ruler_tracking, ruler_words
from twilight_engine.eval.tasks.hay import Texts, hays
from twilight_engine.eval.tasks.prompter import Prompter
from twilight_engine.eval.tasks.ruler_prompt import Generator
from twilight_engine.loaders.tokenizer import Tokenizer

GENERATORS: dict[str, Generator] = {
    "niah_single": ruler_needles.single,
    "niah_multikey": ruler_needles.multikey,
    "niah_multivalue": ruler_needles.multivalue,
    "niah_multiquery": ruler_needles.multiquery,
    "variable_tracking": ruler_tracking.variable_tracking,
    "common_words": ruler_words.common_words,
    "frequent_words": ruler_words.frequent_words,
}
GROUPS = tuple(GENERATORS)


def ruler_items(
    tokenizer: Tokenizer,
    texts: Texts,
    *,
    length: int,
    per_group: int,
    groups: Sequence[str] = GROUPS,
    seed: int = 0,
) -> list[Item]:
    """`per_group` items of each group, whose prompt and answer take `length` tokens.

    A prompt of common_words or frequent_words may be a list entry shorter.

    Args:
        texts: (name, text) pairs, taken in turn: the haystack of needles and assignments, and the
            words that common_words lists.
        length: tokens of the prompt and of max_new_tokens.
    Raises: ValueError for an unknown group; for a text with too few tokens, naming both numbers;
        for a length too short for a group.
    """
    unknown = [group for group in groups if group not in GENERATORS]
    if unknown or not groups:
        raise ValueError(f"groups are {list(groups)}; allowed: {', '.join(GROUPS)}")
    prompter = Prompter(tokenizer)
    items = []
    for group in groups:
        rng = random.Random(f"ruler/{group}/{seed}")
        for number, hay in enumerate(hays(tokenizer, texts, per_group, rng)):
            own = random.Random(f"ruler/{group}/{seed}/{number}")
            prompt = GENERATORS[group](prompter, hay, length, own)
            item = Item(
                item_id=f"ruler/{group}/{length}/{number}",
                task="ruler",
                group=group,
                context_ids=tuple(prompt.context_ids),
                question_ids=tuple(prompt.question_ids),
                answers=prompt.answers,
                metric="contains_all",
                max_new_tokens=prompt.max_new_tokens,
                details={"length": length, "text": hay.source.name, **prompt.details},
            )
            items.append(item)
    return items
