"""Questions about a text that holds the answer, in windows that a model can read."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from apportion.recipes.tasks.columns import BadRow, short, text, value
from apportion.recipes.tasks.data import RowData, Sample
from apportion.recipes.tasks.formats import Row
from apportion.recipes.tasks.source import Split
from apportion.recipes.tasks.tokens import Padding, load_tokenizer, padding

Span = tuple[int, int]


class QuestionAnsweringData(RowData):
    """Questions, texts and the places of the answers, as in SQuAD.

    A long text is cut into windows that overlap. A window in which the answer does not lie whole, and a question
    without an answer, have both labels on the window's null token: its first, or the tokenizer's class token. In
    training each window is a sample; in validation and test all windows of a question are one, so that the best answer
    among them is found.

    Args:
        train: Split of ``path``, file, or list of rows, as in `apportion.recipes.tasks.source.Source`.
        val: The same for validation; None to hold training samples out.
        test: The same for the test; None to test on the validation samples.
        question: Name of the column with the question.
        context: Name of the column with the text.
        answers: Name of the column with ``{"text": [...], "answer_start": [...]}``, places in characters; empty lists
            where there is no answer. A text and a place that are not in lists are one answer.
        tokenizer: Folder of a saved tokenizer of the fast kind, or its id on the hub; None for bytes.
        length: Tokens of a window, with the question.
        stride: Tokens that two windows share.
        **options: Of `apportion.recipes.tasks.data.RowData`: ``batch_size``, ``seed``, ``bucket``, ``path`` ...

    Raises:
        ValueError: If ``stride`` is not below ``length``; at set-up, if the tokenizer does not tell where tokens stand.
    """

    def __init__(
        self,
        train: Split,
        val: Split = None,
        test: Split = None,
        question: str = "question",
        context: str = "context",
        answers: str = "answers",
        tokenizer: str | None = None,
        length: int = 384,
        stride: int = 128,
        batch_size: int = 16,
        **options: Any,
    ) -> None:
        super().__init__(train, val, test, batch_size, **options)
        if not 0 <= stride < length:
            raise ValueError(f"`data.stride={stride}` must lie in [0, `data.length={length}`): windows share so much.")
        self.question, self.context, self.answers = question, context, answers
        self.tokenizer, self.length, self.stride = tokenizer, length, stride
        self._tokenizer: Any = None

    def prepare(self) -> None:
        """Loads the tokenizer."""
        self._tokenizer = load_tokenizer(self.tokenizer)
        if not self._tokenizer.is_fast:
            raise ValueError(
                f"`data.tokenizer={self.tokenizer}` does not tell where its tokens stand in the text: save the model's "
                "fast tokenizer (`tokenizer.json`) beside it."
            )
        self.collate = Windows(padding(self._tokenizer))

    def samples(self, row: Row, split: str) -> Iterable[Sample]:
        """The windows of a question."""
        question, context = text(row, self.question), text(row, self.context)
        answers = _answers(row, self.answers, context)
        windows = self._windows(question, context, answers[0] if answers else None)
        if split == "train":
            return [{key: window[key] for key in window if key != "offsets"} for window in windows]
        texts = [context[start:end] for start, end in answers] or [""]
        return [{"windows": windows, "context": context, "reference": texts, "input_ids": windows[0]["input_ids"]}]

    def _windows(self, question: str, context: str, answer: Span | None) -> list[dict[str, Any]]:
        asked = self._tokenizer(question.strip(), add_special_tokens=False)["input_ids"]
        room = self.length - len(asked) - self._tokenizer.num_special_tokens_to_add(True)
        if room <= self.stride:
            raise BadRow(
                f"has a question that leaves {room} of `data.length={self.length}` tokens for the text, not more than "
                f"`data.stride={self.stride}`"
            )
        encoded = self._tokenizer(
            question.strip(),
            context,
            truncation="only_second",
            max_length=self.length,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        windows = []
        for i, offsets in enumerate(encoded["offset_mapping"]):
            parts = encoded.sequence_ids(i)
            inside = [span if part == 1 else None for span, part in zip(offsets, parts, strict=True)]
            ids = encoded["input_ids"][i]
            null = ids.index(self._tokenizer.cls_token_id) if self._tokenizer.cls_token_id in ids else 0
            start, end = place(inside, answer) or (null, null)
            window = {key: torch.tensor(encoded[key][i]) for key in self._tokenizer.model_input_names if key in encoded}
            places = {"start_positions": torch.tensor(start), "end_positions": torch.tensor(end)}
            windows.append({**window, **places, "offsets": inside, "null": null})
        return windows


def place(offsets: Sequence[Span | None], answer: Span | None) -> Span | None:
    """First and last token of an answer, or None if it does not lie whole in the window.

    Args:
        offsets: Characters of each token, from and up to; None for tokens that are not of the text.
        answer: Characters of the answer, from and up to; None for no answer.

    Example:
        >>> place([None, (0, 3), (4, 7), (7, 9), None], (4, 9))
        (2, 3)
        >>> place([None, (0, 3), (4, 7), None], (4, 9)) is None
        True
    """
    if answer is None:
        return None
    inside = [(i, span) for i, span in enumerate(offsets) if span is not None and span[0] < span[1]]
    if not inside or inside[0][1][0] > answer[0] or inside[-1][1][1] < answer[1]:
        return None
    touched = [i for i, (start, end) in inside if start < answer[1] and end > answer[0]]
    return (touched[0], touched[-1]) if touched else None


class Windows:
    """Batches of windows, also where a sample is all windows of a question.

    Args:
        padding: Joins windows.
    """

    def __init__(self, padding: Padding) -> None:
        self.padding = padding

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """One batch; ``counts`` tells how many windows each question has."""
        if "windows" not in samples[0]:
            return self.padding([{k: v for k, v in sample.items() if k != "null"} for sample in samples])
        joined = self.padding([window for sample in samples for window in sample["windows"]])
        told = {key: [sample[key] for sample in samples] for key in ("context", "reference")}
        return joined | told | {"counts": [len(sample["windows"]) for sample in samples]}


def _answers(row: Row, column: str, context: str) -> list[Span]:
    """Characters of each answer, from and up to."""
    found = value(row, column)
    if not isinstance(found, Mapping) or not {"text", "answer_start"} <= set(found):
        raise BadRow(f"holds no 'text' and 'answer_start' in column {column!r}")
    texts, places = _several(found["text"]), _several(found["answer_start"])
    if len(texts) != len(places):
        raise BadRow(f"has {len(texts)} answers but {len(places)} places in column {column!r}")
    spans = []
    for answer, at in zip(texts, places, strict=True):
        if not isinstance(answer, str):
            raise BadRow(f"holds the answer {short(answer)} in column {column!r}, not text")
        start = _start(at)
        if start is None:
            raise BadRow(f"holds the place {short(at)} in column {column!r}, not an integer")
        # An empty answer at -1 means in some data sets that there is none; elsewhere -1 would count from the end.
        if context[start : start + len(answer)] != answer or (answer and start < 0):
            raise BadRow(f"has the answer {answer[:40]!r} in column {column!r}, which does not stand at {start}")
        spans.append((start, start + len(answer)))
    return spans


def _several(found: Any) -> list[Any]:
    """The items of a list; what is none, such as a text by itself, is one item."""
    return [found] if isinstance(found, str | Mapping) or not isinstance(found, Iterable) else list(found)


def _start(found: Any) -> int | None:
    try:
        return None if isinstance(found, bool) else operator.index(found)
    except TypeError:
        return None
