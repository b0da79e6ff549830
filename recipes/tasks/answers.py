"""What a language model writes, and whether its final answer is the right one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor

_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_MARK = "####"  # GSM8K's, before the final number


@dataclass(frozen=True)
class Answer:
    """The final answer of a text, and when two of them are the same.

    Args:
        form: ``number`` for the number after the last ``####``, or the last number; ``text`` for the whole text but
            for blanks; or a regular expression, whose first match is the answer, in upper or lower case.

    Raises:
        ValueError: If it is no regular expression.

    Example:
        >>> Answer("number").same("So 5 + 67.0 = $72.00 in all.", "48/2 = 24 ... #### 72")
        True
        >>> Answer("true|false").same("The answer is False.", "the correct answer is true")
        False
    """

    form: str = "number"

    def __post_init__(self) -> None:
        try:
            re.compile(self.form)
        except re.error as error:
            raise ValueError(
                f"`model.answer={self.form!r}` must be 'number', 'text' or a regular expression: {error}."
            ) from error

    def of(self, text: str) -> str | Decimal | None:
        """The answer, or None where there is none.

        Example:
            >>> print(Answer("number").of("He has 3 apples, then 1,250."))
            1250
        """
        if self.form == "text":
            return " ".join(text.split())
        if self.form == "number":
            _, mark, after = text.rpartition(_MARK)
            marked = _NUMBER.search(after) if mark else None
            found = [marked.group()] if marked else _NUMBER.findall(text)
            return Decimal(found[-1].replace(",", "")) if found else None
        match = re.search(self.form, text, re.IGNORECASE)
        return match.group().lower() if match else None

    def same(self, written: str, reference: str) -> bool:
        """Whether ``written`` has an answer, and it is that of ``reference``."""
        answer = self.of(written)
        return answer is not None and answer == self.of(reference)


def continued(model: Any, tokenizer: Any, prompts: Sequence[Tensor], new_tokens: int) -> list[str]:
    """What a causal language model writes after each prompt, always taking the likeliest token.

    Args:
        model: With transformers' ``generate``.
        tokenizer: Of the model.
        prompts: Tokens of each prompt, int64 of shape (length_i,).
        new_tokens: At most so many for each.
    """
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), tokenizer.pad_token_id or 0, device=prompts[0].device)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):  # on the left, so that all go on at the same place
        ids[i, longest - len(prompt) :] = prompt
        mask[i, longest - len(prompt) :] = 1
    written = written_by(model, tokenizer, new_tokens, input_ids=ids, attention_mask=mask)
    return decoded(tokenizer, written[:, longest:])


def written_by(model: Any, tokenizer: Any, new_tokens: int, beams: int = 1, **inputs: Tensor) -> Tensor:
    """Tokens that a model with transformers' ``generate`` writes, without drawing any at random."""
    with torch.no_grad():
        tokens: Tensor = model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            num_beams=beams,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or 0,
            eos_token_id=tokenizer.eos_token_id,
        )
    return tokens


def decoded(tokenizer: Any, tokens: Tensor) -> list[str]:
    """The texts of some rows of tokens."""
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
