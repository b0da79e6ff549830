"""Tokenizers, the one of bytes among them, and batches of sequences of unequal length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from apportion.recipes.tasks.data import Sample

IGNORED = -100  # label that transformers' losses leave out


class Padding:
    """Stacks samples, padding sequences on the right to the longest of the batch; what is no tensor becomes a list.

    Args:
        values: What each key is padded with; tensors that are not named are stacked as they are.
    """

    def __init__(self, values: Mapping[str, int]) -> None:
        self.values = dict(values)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """One batch. Shapes: (length_i,) each to (batch, longest)."""
        return {key: self._joined(key, [sample[key] for sample in samples]) for key in samples[0]}

    def _joined(self, key: str, values: list[Any]) -> Any:
        if not isinstance(values[0], Tensor):
            return values
        if key in self.values and values[0].ndim:
            return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=self.values[key])
        return torch.stack(values)


def padding(tokenizer: Any, token: int | None = None) -> Padding:
    """The padding of what a tokenizer makes, and of labels for each token.

    Args:
        tokenizer: The tokenizer.
        token: What tokens are padded with; None for the tokenizer's own, or 0.
    """
    values = {
        "input_ids": (tokenizer.pad_token_id or 0) if token is None else token,
        "attention_mask": 0,
        "token_type_ids": 0,
    }
    return Padding({**values, "labels": IGNORED, "position_ids": 0})


def tensors(encoded: Mapping[str, Any]) -> dict[str, Tensor]:
    """The encoding of one text as tensors."""
    return {key: torch.tensor(values) for key, values in encoded.items()}


def load_tokenizer(path: str | None) -> Any:
    """The tokenizer saved at ``path`` or named so on the hub, or one whose tokens are bytes, which needs no file."""
    from transformers import AutoTokenizer

    return byte_tokenizer() if path is None else AutoTokenizer.from_pretrained(path)


@cache
def byte_tokenizer() -> Any:
    """A tokenizer whose tokens are the bytes of UTF-8, numbered as in ByT5, and that knows where each stands.

    Padding is 0, the end of a text 1; byte ``b`` is ``b + 3``.

    Example:
        >>> byte_tokenizer()("ab", return_offsets_mapping=True)["input_ids"]
        [100, 101, 1]
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    # Byte-level BPE writes a byte as a printable character: its own if it is one, else the next free one from 256 on.
    own = {*range(33, 127), *range(161, 173), *range(174, 256)}
    free = iter(range(256, 512))
    letters = [chr(byte) if byte in own else chr(next(free)) for byte in range(256)]
    special = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    tokenizer = Tokenizer(models.BPE({**special, **{letter: i + 3 for i, letter in enumerate(letters)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=10**9
    )
