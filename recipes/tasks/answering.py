"""The task of marking the answer to a question in a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers
from torch import Tensor
from torchmetrics.text import SQuAD

from apportion.recipes.tasks.finetuning import FineTuning
from apportion.recipes.tasks.spans import Span


class QuestionAnswering(FineTuning):
    """Fine-tunes a model that marks first and last token of an answer; logs SQuAD's exact match and F1, in per cent.

    Args:
        answer_length: Tokens of an answer at most.
        candidates: Starts, and ends, that are combined.
        unanswerable: Whether a question may have no answer, as in SQuAD 2: it has none if the null tokens of all
            windows score above the best answer.
        **kwargs: Of `apportion.recipes.tasks.finetuning.FineTuning`.

    Raises:
        ValueError: If a count is below 1.
    """

    auto = transformers.AutoModelForQuestionAnswering
    objective = "val/f1"

    def __init__(
        self, answer_length: int = 30, candidates: int = 20, unanswerable: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if answer_length < 1 or candidates < 1:
            raise ValueError(
                f"`model.answer_length={answer_length} model.candidates={candidates}` must both be at least 1."
            )
        self.answer_length, self.candidates, self.unanswerable = answer_length, candidates, unanswerable
        self.keep(squad=SQuAD)

    def count(self, batch: dict[str, Any]) -> int:
        """Windows."""
        return len(batch["start_positions"])

    def evaluate(self, split: str, batch: dict[str, Any]) -> None:
        """Updates the loss, and the best answer of each question among its windows."""
        output = self(**batch)
        self.loss(split, batch, output)
        starts, ends = output.start_logits.float().cpu(), output.end_logits.float().cpu()
        done = 0
        for context, references, count in zip(batch["context"], batch["reference"], batch["counts"], strict=True):
            windows = range(done, done + count)
            found = [
                best_span(starts[i], ends[i], batch["offsets"][i], self.answer_length, self.candidates) for i in windows
            ]
            score, span = max(found, key=lambda pair: pair[0])
            none = min(float(starts[i, batch["null"][i]] + ends[i, batch["null"][i]]) for i in windows)
            answer = "" if span is None or (self.unanswerable and none > score) else context[slice(*span)]
            done += count
            asked = {"answers": {"text": references, "answer_start": [0] * len(references)}, "id": "0"}
            self.metric(split, "squad").update([{"prediction_text": answer, "id": "0"}], [asked])

    def finish(self, split: str) -> None:
        """Logs exact match and F1."""
        value = self.tell(split, "squad")
        self.log_dict({f"{split}/{name}": value[name] for name in ("exact_match", "f1")}, prog_bar=True)


def best_span(
    starts: Tensor, ends: Tensor, offsets: Sequence[Span | None], longest: int = 30, candidates: int = 20
) -> tuple[float, Span | None]:
    """Score and place of the likeliest answer in a window.

        max_{i <= j < i + longest} start_i + end_j      over tokens of the text

    Args:
        starts: Logit of each token to be the first, shape (length,).
        ends: Logit of each token to be the last, shape (length,).
        offsets: Characters of each token, from and up to; None for tokens that are not of the text. It may be shorter
            than the logits, whose rest is padding.
        longest: Tokens of an answer at most.
        candidates: Starts, and ends, that are combined.

    Returns:
        Its score, and its characters; minus infinity and None if nothing can be combined.

    Example:
        >>> import torch
        >>> starts, ends = torch.tensor([9.0, 3.0, 1.0, 0.0]), torch.tensor([9.0, 0.0, 2.0, 4.0])
        >>> best_span(starts, ends, [None, (0, 3), (4, 7), (7, 9)])
        (7.0, (0, 9))
        >>> best_span(starts, ends, [None, (0, 3), (4, 7), (7, 9)], longest=2)
        (5.0, (0, 7))
    """
    inside = [(i, span) for i, span in enumerate(offsets) if span is not None]
    firsts = sorted(inside, key=lambda token: -float(starts[token[0]]))[:candidates]
    lasts = sorted(inside, key=lambda token: -float(ends[token[0]]))[:candidates]
    best: tuple[float, Span | None] = (float("-inf"), None)
    for i, (begin, _) in firsts:
        for j, (_, end) in lasts:
            score = float(starts[i] + ends[j])
            if i <= j < i + longest and score > best[0]:
                best = score, (begin, end)
    return best
