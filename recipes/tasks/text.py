"""Data modules over texts: labelled texts for classification, running text for language modelling."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from apportion.recipes.tasks.columns import distinct, label, number, text
from apportion.recipes.tasks.data import RowData, Sample
from apportion.recipes.tasks.formats import Row
from apportion.recipes.tasks.source import Split
from apportion.recipes.tasks.tokens import load_tokenizer, padding, tensors


class TextClassificationData(RowData):
    """Texts, or pairs of texts, with a class or a number for each.

    Args:
        train: Path of the training file, or split of ``path``, as in `apportion.recipes.tasks.source.Source`.
        val: The same for validation.
        test: The same for the test; None to test on ``val``.
        text: Name of the column with the text.
        pair: Name of a column with a second text; None for single texts.
        label: Name of the column with the class, or the number.
        labels: Names of the classes in order; None for integers from 0.
        classes: Number of classes, to check labels by; None for that of the model.
        regression: Whether labels are numbers.
        tokenizer: Folder of a saved tokenizer, or its id on the hub; None for bytes.
        length: Longest sequence in tokens; longer ones are cut.
        **options: Of `apportion.recipes.tasks.data.RowData`: ``batch_size``, ``seed``, ``bucket``, ``path`` ...

    Raises:
        ValueError: If ``labels`` are not texts, or not as many as ``classes``.
        FileNotFoundError: If a file is missing, at set-up.
    """

    def __init__(
        self,
        train: Split,
        val: Split = None,
        test: Split = None,
        text: str = "text",
        pair: str | None = None,
        label: str = "label",
        labels: Sequence[str] | None = None,
        classes: int | None = None,
        regression: bool = False,
        tokenizer: str | None = None,
        length: int = 128,
        **options: Any,
    ) -> None:
        super().__init__(train, val, test, **options)
        check_labels(labels, None if regression else classes)
        self.text, self.pair, self.label = text, pair, label
        self.labels, self.classes, self.regression = labels, classes, regression
        self.tokenizer, self.length = tokenizer, length
        self._tokenizer: Any = None

    def prepare(self) -> None:
        """Loads the tokenizer."""
        self._tokenizer = load_tokenizer(self.tokenizer)
        # A decoder reads the class off the last token that is not its own padding, whatever the tokenizer pads with.
        self.collate = padding(self._tokenizer, self.model_setting("pad_token_id"))
        self.classes = self.classes or self.model_setting("num_labels")

    def samples(self, row: Row, split: str) -> Iterable[Sample]:
        """The tokens of the text and its label."""
        texts = [text(row, column) for column in (self.text, self.pair) if column]
        if self.regression:
            target = torch.tensor(number(row, self.label))
        else:
            target = torch.tensor(label(row, self.label, self.labels, self.classes))
        encoded = self._tokenizer(*texts, truncation=True, max_length=self.length)
        yield tensors(encoded) | {"labels": target}


def check_labels(labels: Sequence[str] | None, classes: int | None) -> None:
    """Refuses names of classes that cannot be meant.

    Raises:
        ValueError: If they are not texts, two are the same, or they are not as many as ``classes``.
    """
    if labels is None:
        return
    if odd := [name for name in labels if not isinstance(name, str)]:
        raise ValueError(
            f"`data.labels={list(labels)}` holds {odd[0]!r}, which is no text: quote it (YAML reads a bare yes or no "
            "as true or false), or leave `data.labels` null for integers from 0."
        )
    distinct(labels)
    if classes is not None and len(labels) != classes:
        raise ValueError(f"`data.labels={list(labels)}` names {len(labels)} classes, but the model has {classes}.")


class CausalTextData(RowData):
    """Running text, cut into blocks of equal length for next-token prediction.

    Args:
        train: Path of the training file, or split of ``path``: ``.txt``, or a column of texts in another format.
        val: The same for validation.
        test: The same for the test; None to test on ``val``.
        text: Name of the column with the texts.
        tokenizer: Folder of a saved tokenizer, or its id on the hub; None for bytes.
        length: Tokens per block; a rest shorter than a block is dropped.
        **options: Of `apportion.recipes.tasks.data.RowData`: ``batch_size``, ``seed``, ``path`` ...

    Raises:
        FileNotFoundError: If a file is missing, at set-up.
        ValueError: If a file holds less than one block, at set-up.
    """

    def __init__(
        self,
        train: Split,
        val: Split = None,
        test: Split = None,
        text: str = "text",
        tokenizer: str | None = None,
        length: int = 128,
        batch_size: int = 8,
        **options: Any,
    ) -> None:
        super().__init__(train, val, test, batch_size, running=text, **options)
        self.text, self.tokenizer, self.length = text, tokenizer, length
        self._tokenizer: Any = None

    def prepare(self) -> None:
        """Loads the tokenizer."""
        self._tokenizer = load_tokenizer(self.tokenizer)

    def samples(self, row: Row, split: str) -> Iterable[Sample]:
        """The tokens of a text."""
        yield {"input_ids": torch.tensor(self._tokenizer(text(row, self.text))["input_ids"])}

    def arrange(self, samples: list[Sample], split: str) -> list[Sample]:
        """All texts of a split behind each other, in blocks."""
        if not samples:
            return []
        tokens = torch.cat([sample["input_ids"] for sample in samples])
        blocks = tokens[: len(tokens) // self.length * self.length].view(-1, self.length)
        if not len(blocks):
            raise ValueError(
                f"`data.{split}` ({self.source.where(split)}) holds {len(tokens)} tokens, too few for a block of "
                f"{self.length}: lower `data.length`."
            )
        return [{"input_ids": block, "labels": block} for block in blocks]

    def tokens(self, sample: Sample) -> int:
        """All but the first token of a block are predicted."""
        return self.length - 1
