"""TwilightLM: a model and a method as lm-evaluation-harness asks for them.

Needs the extra `lm-eval`.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from twilight_engine.eval.items import Item, Passage
from twilight_engine.eval.methods import Method
from twilight_engine.eval.respond import Responder

MAX_GEN_TOKS = 256  # what lm-evaluation-harness's own models take where a task does not say
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Without meaning where the most probable token is always taken.
SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "min_p")


class TwilightLM(LM):
    """A model under one method, for `lm_eval.simple_evaluate(model=...)`.

    Prompts are prefilled densely; answers, and the tokens of a continuation whose likelihood is
    asked for, go through the method's decode steps one by one.

    Args:
        responder: answers; shared by the models of several methods, which then share prefills.
        method: one of the responder's.
        name: of the model, for request caches.
        max_length: most tokens of prompt and answer; a longer prompt loses its beginning, with a
            warning, as in lm-evaluation-harness's own models. None: the model's context.
        max_gen_toks: most tokens of an answer where a task does not say.
    Raises: ValueError for a model without tokenizer.
    """

    def __init__(
        self,
        responder: Responder,
        method: Method,
        *,
        name: str = "twilight",
        max_length: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
    ) -> None:
        super().__init__()
        if responder.loaded.tokenizer is None:
            raise ValueError(f"the model {name} has no tokenizer; lm-eval needs one")
        self.responder, self.method, self.name = responder, method, name
        self.encoder = responder.loaded.tokenizer
        self.max_length = max_length or responder.loaded.config.max_position_embeddings
        self.max_gen_toks = max_gen_toks

    @property
    def eot_token_id(self) -> int | None:
        return self.encoder.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text that has no context: BOS, else EOS.

        Raises: ValueError for a model that has neither.
        """
        for token in (self.encoder.bos_token_id, self.encoder.eos_token_id):
            if token is not None:
                return token
        raise ValueError(
            f"the model {self.name} has no BOS and no EOS token; the likelihood of a text without "
            "context needs one"
        )

    @property
    def tokenizer_name(self) -> str:
        return self.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, which results keep; "" where there is none."""
        template = self.encoder.chat_template
        return template.source if template is not None and chat_template is not False else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as a prompt; without generation prompt its last message goes on.

        Raises: ValueError for a model without template.
        """
        rendered = self.encoder.apply_chat_template(
            chat_history, add_generation_prompt=add_generation_prompt
        )
        if add_generation_prompt:
            return rendered
        last = chat_history[-1]["content"].strip()
        return rendered[: rendered.rindex(last) + len(last)]

    def tok_encode(self, string: str, add_special_tokens: bool = True) -> list[int]:
        return self.encoder.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log p, natural, and whether greedy would say it."""
        pairs = [self._encode_pair(*request.args) for request in requests]
        found = self._likelihoods([r.task_name for r in requests], pairs)
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return found

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Log p of each whole text, in windows of max_length that don't overlap."""
        groups, pairs, counts = [], [], []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [make_disjoint_window(window) for window in windows]
            pairs += own
            groups += [request.task_name] * len(own)
            counts.append(len(own))
        each = iter(self._likelihoods(groups, pairs))
        found = [sum(next(each)[0] for _ in range(count)) for count in counts]
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return found

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The most probable answer to each (context, gen_kwargs), up to a text of `until`.

        Raises: ValueError for sampling, and for other arguments that would change the answer.
        """
        items, cut = [], 0
        for request in requests:
            context, kwargs = request.args
            max_new_tokens, stop = read_gen_kwargs(kwargs, self.max_gen_toks)
            room = self.max_length - max_new_tokens
            if room < 1:
                raise ValueError(
                    f"max_gen_toks is {max_new_tokens}; max_length {self.max_length} leaves no "
                    "room for a prompt"
                )
            ids = self.tok_encode(context)
            cut += len(ids) > room
            ids = ids[-room:]
            item = Item(
                item_id=_digest("generate", ids, max_new_tokens, stop),
                task="lm-eval",
                group=str(request.task_name),
                context_ids=tuple(ids),
                question_ids=(),
                answers=(),
                metric=None,
                max_new_tokens=max_new_tokens,
                stop=stop,
            )
            items.append(item)
        self._warn_of(cut, len(items))
        found = [record["text"] for record in self.responder.respond(items, self.method)]
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, result)
        return found

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both, encoded together; blanks between them are the continuation's."""
        bare = context.rstrip()
        if not bare:
            ids = self.tok_encode(context + continuation, add_special_tokens=False)
            prefix = self.prefix_token_id
            return ([prefix], ids) if ids[:1] != [prefix] else (ids[:1], ids[1:])
        known = self.tok_encode(bare)
        return known, self.tok_encode(context + continuation)[len(known) :]

    def _likelihoods(
        self, groups: Sequence[str], pairs: Sequence[tuple[list[int], list[int]]]
    ) -> list[tuple[float, bool]]:
        passages, cut = [], 0
        for group, (context, targets) in zip(groups, pairs, strict=True):
            room = self.max_length + 1 - len(targets)  # the last target is not fed
            if not targets or not context or room < 1:
                raise ValueError(
                    f"a request of {group} has a context of {len(context)} tokens and a "
                    f"continuation of {len(targets)}; each needs one, and max_length "
                    f"{self.max_length} must hold the continuation"
                )
            cut += len(context) > room
            known, wanted = tuple(context[-room:]), tuple(targets)
            digest = _digest("likelihood", known, wanted)
            passages.append(Passage(digest, known, wanted, group=str(group)))
        self._warn_of(cut, len(passages))
        records = self.responder.respond(passages, self.method)
        return [(-record["nll"] * record["targets"], record["all_top"]) for record in records]

    def _warn_of(self, cut: int, count: int) -> None:
        if cut:
            warnings.warn(
                f"{cut} of {count} prompts are longer than max_length {self.max_length} allows and "
                "lose their beginning",
                stacklevel=3,
            )


def read_gen_kwargs(
    kwargs: Mapping[str, Any], max_gen_toks: int = MAX_GEN_TOKS
) -> tuple[int, tuple[str, ...]]:
    """A request's arguments of generation -> most new tokens, and the texts that end it.

    Raises: ValueError for sampling and for unknown arguments.
    """
    given = dict(kwargs)
    temperature = float(given.get("temperature") or 0.0)
    if temperature > 0 and given.get("do_sample", True):
        raise ValueError(
            f"temperature is {temperature} with do_sample; answers are greedy here, so that "
            "methods compare: set do_sample to false or temperature to 0"
        )
    for name in SAMPLING:
        given.pop(name, None)
    lengths = [given.pop(name, None) for name in LENGTHS]
    length = next((int(n) for n in lengths if n is not None), max_gen_toks)
    until = given.pop("until", None) or ()
    stop = (until,) if isinstance(until, str) else tuple(until)
    if given:
        allowed = ", ".join(("until", *LENGTHS, *SAMPLING))
        raise ValueError(f"generation arguments {sorted(given)} are unknown; allowed: {allowed}")
    if length < 1:
        raise ValueError(f"max_gen_toks is {length}; it must be at least 1")
    return length, tuple(text for text in stop if text)


def _digest(*parts: object) -> str:
    text = repr([list(part) if isinstance(part, (list, tuple)) else part for part in parts])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
