"""Data modules over local text files: labelled texts for classification, running text for language modelling."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apportion.recipes.data import Sample, Samples


class TextClassificationData(Samples):
    """Labelled sentences from local files: TSV with a header, or JSON lines.

    Args:
        train: Path of the training file, ``.tsv`` or ``.jsonl``.
        val: Path of the validation file.
        test: Path of the test file; None to test on ``val``.
        text: Name of the column with the text.
        pair: Name of a column with a second text; None for single texts.
        label: Name of the column with the class, an integer from 0.
        tokenizer: Folder of a saved tokenizer; None for bytes.
        length: Longest sequence in tokens; longer ones are cut.
        batch_size: Samples per batch and rank.
        seed: Of the order of the training samples.
        num_workers: Processes that load training batches.

    Raises:
        FileNotFoundError: If a file is missing, at set-up.
    """

    def __init__(
        self,
        train: str,
        val: str,
        test: str | None = None,
        text: str = "text",
        pair: str | None = None,
        label: str = "label",
        tokenizer: str | None = None,
        length: int = 128,
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, num_workers)
        self.paths = {"train": train, "val": val, "test": test}
        self.text, self.pair, self.label = text, pair, label
        self.tokenizer, self.length = tokenizer, length

    def setup(self, stage: str) -> None:
        """Reads and tokenizes the files."""
        tokenizer = load_tokenizer(self.tokenizer)
        self.collate = Padding({"input_ids": tokenizer.pad_token_id or 0, "attention_mask": 0})
        self.train = self._samples("train", tokenizer)
        self.val = self._samples("val", tokenizer)
        self.test = self._samples("test", tokenizer)

    def _samples(self, split: str, tokenizer: Any) -> list[dict[str, Tensor]]:
        path = self.paths[split]
        if path is None:
            return []
        rows = read_rows(path, f"`TextClassificationData({split}={path!r})`")
        columns = [self.text, self.label] + ([self.pair] if self.pair else [])
        samples = []
        for number, row in enumerate(rows):
            if missing := [column for column in columns if column not in row]:
                raise ValueError(f"Row {number} of {path} has no column {missing[0]!r}; it has {sorted(row)}.")
            texts = (row[self.text], row[self.pair]) if self.pair else (row[self.text],)
            encoded = tokenizer(*texts, truncation=True, max_length=self.length)
            sample = {key: torch.tensor(encoded[key]) for key in ("input_ids", "attention_mask")}
            samples.append(sample | {"labels": torch.tensor(int(row[self.label]))})
        return samples


class CausalTextData(Samples):
    """Running text from local files, cut into blocks of equal length for next-token prediction.

    Args:
        train: Path of the training file, ``.txt``, or ``.jsonl`` with a column of texts.
        val: Path of the validation file.
        test: Path of the test file; None to test on ``val``.
        text: Name of the column with the text in a ``.jsonl`` file.
        tokenizer: Folder of a saved tokenizer; None for bytes.
        length: Tokens per block; a rest shorter than a block is dropped.
        batch_size: Samples per batch and rank.
        seed: Of the order of the training samples.
        num_workers: Processes that load training batches.

    Raises:
        FileNotFoundError: If a file is missing, at set-up.
        ValueError: If a file holds less than one block, at set-up.
    """

    def __init__(
        self,
        train: str,
        val: str,
        test: str | None = None,
        text: str = "text",
        tokenizer: str | None = None,
        length: int = 128,
        batch_size: int = 8,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, num_workers)
        self.paths = {"train": train, "val": val, "test": test}
        self.text, self.tokenizer, self.length = text, tokenizer, length

    def setup(self, stage: str) -> None:
        """Reads, tokenizes and cuts the files."""
        tokenizer = load_tokenizer(self.tokenizer)
        self.train = self._blocks("train", tokenizer)
        self.val = self._blocks("val", tokenizer)
        self.test = self._blocks("test", tokenizer)

    def _blocks(self, split: str, tokenizer: Any) -> list[dict[str, Tensor]]:
        path = self.paths[split]
        if path is None:
            return []
        call = f"`CausalTextData({split}={path!r})`"
        if path.endswith(".txt"):
            texts = [existing(path, call).read_text(encoding="utf-8")]
        else:
            texts = [row[self.text] for row in read_rows(path, call)]
        tokens = torch.tensor([token for text in texts for token in tokenizer(text)["input_ids"]])
        blocks = tokens[: len(tokens) // self.length * self.length].view(-1, self.length)
        if not len(blocks):
            raise ValueError(
                f"{call} holds {len(tokens)} tokens, too few for a block of {self.length}: lower `length`."
            )
        return [{"input_ids": block, "labels": block} for block in blocks]


class Padding:
    """Stacks samples, padding sequences on the right to the longest of the batch.

    Args:
        values: What each key is padded with; keys that are not named are stacked as they are.
    """

    def __init__(self, values: Mapping[str, int]) -> None:
        self.values = dict(values)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """One batch. Shapes: (length_i,) each to (batch, longest)."""
        padded = {
            key: torch.nn.utils.rnn.pad_sequence([s[key] for s in samples], batch_first=True, padding_value=value)
            for key, value in self.values.items()
        }
        return padded | {k: torch.stack([s[k] for s in samples]) for k in samples[0] if k not in padded}


def existing(path: str, call: str) -> Path:
    """The path, or an error that says from which folder a relative path was looked up."""
    found = Path(path).expanduser()
    if not found.is_file():
        raise FileNotFoundError(
            f"{call}: there is no file {found.absolute()}. Give an absolute path, or one relative to the folder "
            "in which the command was started."
        )
    return found


def read_rows(path: str, call: str) -> list[dict[str, Any]]:
    """Rows of a ``.tsv`` file with a header or of a ``.jsonl`` file."""
    found = existing(path, call)
    if found.suffix == ".jsonl":
        return [json.loads(line) for line in found.read_text(encoding="utf-8").splitlines() if line.strip()]
    if found.suffix == ".tsv":
        with found.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    raise ValueError(f"{call}: the file must end in .tsv or .jsonl, not {found.suffix!r}.")


def load_tokenizer(path: str | None) -> Any:
    """The tokenizer saved at ``path``, or one whose tokens are bytes, which needs no file."""
    from transformers import AutoTokenizer, ByT5Tokenizer

    return ByT5Tokenizer() if path is None else AutoTokenizer.from_pretrained(path)
