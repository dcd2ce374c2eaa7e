"""LongBench's datasets: how each is asked, how long an answer may be, and what judges it.

The wording is our own, so scores compare methods and models here, not with published ones. Answer
lengths, metrics, and which sets are completions are LongBench's.

Source: LongBench (Bai et al. 2024), the 21 sets of its first version.
"""

# ruff: noqa: RUF001 - Chinese prompts have Chinese punctuation.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FIRST_LINE = {"first_line": True}  # a completion goes on with examples of its own
CHINESE = {"language": "zh"}


@dataclass(frozen=True)
class LongBenchSet:
    """One dataset.

    Attributes:
        opening: comes before the context.
        question: comes behind it; {input} stands for the record's.
        metric: a name of eval.metrics.METRICS.
        chat: whether the model is asked as a chat; else it completes the text.
        details: of the metric.
    """

    opening: str
    question: str
    metric: str
    max_new_tokens: int
    chat: bool = True
    details: Mapping[str, Any] = field(default_factory=dict)


BRIEFLY = "\n\n{input}\nReply with a few words and no explanation."
BRIEFLY_ZH = "\n\n{input}\n请根据上面的内容简短作答，不要附加说明。"
SEVERAL = "Passages from different sources follow, and then a question that draws on them.\n\n"
PAPER = "A research paper follows, and then a question about it.\n\n"
PAPER_QUESTION = (
    "\n\n{input}\nReply with a few words or one sentence and no explanation. If it can be answered "
    'by "yes" or "no", reply with that alone; if the paper does not tell, with "unanswerable".'
)
NUMBERED = "Numbered paragraphs follow; some may be there more than once.\n\n"
WHICH = (
    "\n\nThis summary was written of one of the paragraphs above:\n\n{input}\n\nWhich one? Reply "
    'with its name alone, as in "Paragraph 7".'
)
WHICH_ZH = "\n\n下面的摘要概括了上述某一个段落：\n\n{input}\n\n是哪一段？只写段落名，例如“段落7”。"
LABELS = "The examples below show how questions are labelled; label the last one.\n\n"
TRIVIA = "Passages with questions and answers follow; answer the last one alike.\n\n"
CHATS = "The examples below show how chats are summed up; sum up the last one.\n\n"
NEWS_ZH = "以下是一些新闻及其类别，请给最后一条新闻标出类别。\n\n"
CODE = "The following code breaks off; write the line that comes next.\n\n"
NEXT_LINE = "{input}The next line:\n"


def _summary(what: str) -> tuple[str, str]:
    return f"{what} follows, to be summed up.\n\n", "\n\nSum up the text above in one page."


SETS: dict[str, LongBenchSet] = {
    "narrativeqa": LongBenchSet(
        "A novel or film script follows, and then a question about it.\n\n", BRIEFLY, "f1", 128
    ),
    "qasper": LongBenchSet(PAPER, PAPER_QUESTION, "f1", 128),
    "multifieldqa_en": LongBenchSet(
        "A text follows, and then a question about it.\n\n", BRIEFLY, "f1", 64
    ),
    "multifieldqa_zh": LongBenchSet(
        "请阅读以下文字，然后回答问题。\n\n", BRIEFLY_ZH, "f1", 64, details=CHINESE
    ),
    "hotpotqa": LongBenchSet(SEVERAL, BRIEFLY, "f1", 32),
    "2wikimqa": LongBenchSet(SEVERAL, BRIEFLY, "f1", 32),
    "musique": LongBenchSet(SEVERAL, BRIEFLY, "f1", 32),
    "dureader": LongBenchSet(
        "请阅读以下几篇文章，然后回答问题。\n\n",
        "\n\n{input}\n请根据上面的文章作答。",
        "rouge_l",
        128,
        details=CHINESE,
    ),
    "gov_report": LongBenchSet(*_summary("A report by a government agency"), "rouge_l", 512),
    "qmsum": LongBenchSet(
        "The transcript of a meeting follows, and then a request about it.\n\n",
        "\n\n{input}\nReply in a few sentences.",
        "rouge_l",
        512,
    ),
    "multi_news": LongBenchSet(*_summary("A set of news reports of one event"), "rouge_l", 512),
    "vcsum": LongBenchSet(
        "以下是一次会议的记录，稍后请写出总结。\n\n",
        "\n\n请总结上面的会议记录。",
        "rouge_l",
        512,
        details=CHINESE,
    ),
    "trec": LongBenchSet(LABELS, "\n{input}", "classification", 64, chat=False, details=FIRST_LINE),
    "triviaqa": LongBenchSet(TRIVIA, "\n\n{input}", "f1", 32, chat=False, details=FIRST_LINE),
    "samsum": LongBenchSet(CHATS, "\n\n{input}", "rouge_l", 128, chat=False, details=FIRST_LINE),
    "lsht": LongBenchSet(
        NEWS_ZH, "\n{input}", "classification", 64, chat=False, details={**FIRST_LINE, **CHINESE}
    ),
    "passage_count": LongBenchSet(
        NUMBERED,
        "\n\nHow many different paragraphs are there, if equal ones count once? Reply with the "
        "number alone.",
        "count",
        32,
    ),
    "passage_retrieval_en": LongBenchSet("Paragraphs follow.\n\n", WHICH, "retrieval", 32),
    "passage_retrieval_zh": LongBenchSet(
        "以下是若干段落。\n\n", WHICH_ZH, "retrieval", 32, details=CHINESE
    ),
    "lcc": LongBenchSet(CODE, NEXT_LINE, "edit_similarity", 64, chat=False),
    "repobench-p": LongBenchSet(CODE, NEXT_LINE, "edit_similarity", 64, chat=False),
}
