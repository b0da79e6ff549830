"""Texts and what to write for them, for a model with an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from apportion.recipes.tasks.columns import text
from apportion.recipes.tasks.data import RowData, Sample
from apportion.recipes.tasks.formats import Row
from apportion.recipes.tasks.source import Split
from apportion.recipes.tasks.tokens import load_tokenizer, padding, tensors


class Seq2SeqData(RowData):
    """Source and target texts.

    Args:
        train: Split of ``path``, file, or list of rows, as in `apportion.recipes.tasks.source.Source`.
        val: The same for validation; None to hold training samples out.
        test: The same for the test; None to test on the validation samples.
        source: Name of the column with the text to read.
        target: Name of the column with the text to write.
        prefix: Put before every source, such as ``summarize: ``.
        tokenizer: Folder of a saved tokenizer, or its id on the hub; None for bytes.
        length: Longest source in tokens; longer ones are cut.
        target_length: Longest target in tokens; longer ones are cut.
        **options: Of `apportion.recipes.tasks.data.RowData`: ``batch_size``, ``seed``, ``bucket``, ``path`` ...
    """

    def __init__(
        self,
        train: Split,
        val: Split = None,
        test: Split = None,
        source: str = "source",
        target: str = "target",
        prefix: str = "",
        tokenizer: str | None = None,
        length: int = 512,
        target_length: int = 128,
        batch_size: int = 16,
        **options: Any,
    ) -> None:
        super().__init__(train, val, test, batch_size, **options)
        self.columns, self.prefix, self.tokenizer = (source, target), prefix, tokenizer
        self.length, self.target_length = length, target_length
        self._tokenizer: Any = None

    def prepare(self) -> None:
        """Loads the tokenizer."""
        self._tokenizer = load_tokenizer(self.tokenizer)
        self.collate = padding(self._tokenizer)

    def samples(self, row: Row, split: str) -> Iterable[Sample]:
        """The tokens of both texts; outside training also the target itself, for the metrics."""
        source, target = (text(row, column) for column in self.columns)
        encoded = self._tokenizer(self.prefix + source, truncation=True, max_length=self.length)
        written = self._tokenizer(text_target=target, truncation=True, max_length=self.target_length)
        sample: dict[str, Any] = tensors(encoded) | {"labels": torch.tensor(written["input_ids"])}
        yield sample if split == "train" else sample | {"reference": target}

    def tokens(self, sample: Sample) -> int:
        """Tokens of the target."""
        return len(sample["labels"])
