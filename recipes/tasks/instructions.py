"""Instructions with their answers, for a language model that learns to answer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from string import Formatter
from typing import Any

import torch

from apportion.recipes.tasks.columns import text
from apportion.recipes.tasks.data import RowData, Sample
from apportion.recipes.tasks.formats import Row
from apportion.recipes.tasks.packing import join, pack
from apportion.recipes.tasks.source import Split
from apportion.recipes.tasks.tokens import IGNORED, load_tokenizer, padding

PROMPT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
ALONE = "### Instruction:\n{instruction}\n\n### Response:\n"


class InstructionData(RowData):
    """Prompts and answers: prompt tokens, answer tokens, end of text; the loss counts the answer and the end.

    Prompt and answer are tokenized apart, so that the border between them is exact. An answer that is too long is cut,
    and a row whose prompt leaves no room for an answer is left out; warnings count both. Validation and test samples
    are never packed and carry the length of their prompt and the text of their answer, for a model that generates.

    Args:
        train: Split of ``path``, file, or list of rows, as in `apportion.recipes.tasks.source.Source`.
        val: The same for validation; None to hold training samples out.
        test: The same for the test; None to test on the validation samples.
        instruction: Name of the column with the instruction.
        input: Name of a column with what the instruction is about, missing or empty in some rows; None for none.
        output: Name of the column with the answer.
        prompt: Template with ``{instruction}`` and ``{input}``.
        prompt_alone: Template for rows without input; None for the same, with nothing in place of the input.
        mask_prompt: Whether the loss leaves the prompt out.
        packing: Whether several training samples share a row, each blind to the others; the model must be one that
            takes positions.
        tokenizer: Folder of a saved tokenizer, or its id on the hub; None for bytes.
        length: Longest sequence in tokens, prompt and answer.
        **options: Of `apportion.recipes.tasks.data.RowData`: ``batch_size``, ``seed``, ``bucket``, ``path`` ...

    Raises:
        ValueError: If a template names anything else, or does not name the instruction.

    Example:
        >>> data = InstructionData([{"instruction": "2+2", "output": "4"}], val=[], prompt_alone="{instruction}=")
        >>> data.setup("fit")
        >>> bytes(token - 3 for token in data.train[0]["input_ids"][:-1]), data.train[0]["labels"].tolist()
        (b'2+2=4', [-100, -100, -100, -100, 55, 1])
    """

    def __init__(
        self,
        train: Split,
        val: Split = None,
        test: Split = None,
        instruction: str = "instruction",
        input: str | None = "input",
        output: str = "output",
        prompt: str = PROMPT,
        prompt_alone: str | None = ALONE,
        mask_prompt: bool = True,
        packing: bool = False,
        tokenizer: str | None = None,
        length: int = 512,
        batch_size: int = 8,
        **options: Any,
    ) -> None:
        super().__init__(train, val, test, batch_size, **options)
        for name, template in (("prompt", prompt), ("prompt_alone", prompt_alone)):
            _check(name, template)
        self.instruction, self.input, self.output = instruction, input, output
        self.prompt, self.prompt_alone = prompt, prompt if prompt_alone is None else prompt_alone
        self.mask_prompt, self.packing = mask_prompt, packing
        self.tokenizer, self.length = tokenizer, length
        self._tokenizer: Any = None
        self._start: list[int] = []
        self._cut = self._long = 0

    def prepare(self) -> None:
        """Loads the tokenizer."""
        self._tokenizer = load_tokenizer(self.tokenizer)
        self.collate = padding(self._tokenizer)
        begin = self._tokenizer.bos_token_id
        begins = begin is not None and self._tokenizer("a")["input_ids"][:1] == [begin]
        self._start = [begin] if begins else []

    def samples(self, row: Row, split: str) -> Iterable[Sample]:
        """The tokens of prompt and answer."""
        given = text(row, self.input, empty=True) if self.input else ""
        template = self.prompt if given.strip() else self.prompt_alone
        prompt = self._start + self._ids(template.format(instruction=text(row, self.instruction), input=given))
        answer = text(row, self.output)
        tokens = prompt + self._ids(answer)
        if self._tokenizer.eos_token_id is not None:
            tokens.append(self._tokenizer.eos_token_id)
        if len(prompt) >= self.length:
            self._long += 1
            return
        self._cut += len(tokens) > self.length
        ids = torch.tensor(tokens[: self.length])
        labels = ids.clone()
        labels[: len(prompt) if self.mask_prompt else 0] = IGNORED
        sample: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        yield sample if split == "train" else sample | {"prompt": len(prompt), "reference": answer}

    def arrange(self, samples: list[Sample], split: str) -> list[Sample]:
        """Packs training samples, if they are to be."""
        told = {"answers are cut": self._cut, "prompts leave no room for an answer and are left out": self._long}
        for what, count in told.items():
            if count:
                total = len(samples) + self._long
                where = self.source.where(split)
                warnings.warn(
                    f"{where}: {count} of {total} {what} at `data.length={self.length}` tokens.", stacklevel=2
                )
        self._cut = self._long = 0
        if not self.packing or split != "train":
            return samples
        rows = pack([self.extent(sample) for sample in samples], self.length)
        return [join([samples[i] for i in row]) for row in rows]

    def tokens(self, sample: Sample) -> int:
        """Tokens of the answers."""
        return int((sample["labels"][1:] != IGNORED).sum())

    def _ids(self, words: str) -> list[int]:
        return list(self._tokenizer(words, add_special_tokens=False)["input_ids"])


def _check(name: str, template: str | None) -> None:
    if template is None:
        return
    named = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    if "instruction" not in named or set(named) - {"instruction", "input"}:
        raise ValueError(
            f"`data.{name}={template!r}` must name {{instruction}} and may name {{input}}, nothing else; write a brace "
            "of its own twice."
        )
