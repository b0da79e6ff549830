"""LightningModules of the tasks: sorting texts and images, next tokens, encoder and decoder."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from torchmetrics import MeanMetric, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchmetrics.text import ROUGEScore

from apportion.recipes.tasks import packing
from apportion.recipes.tasks.answers import Answer, continued, decoded, written_by
from apportion.recipes.tasks.finetuning import FineTuning
from apportion.recipes.tasks.metrics import Majority, Matthews
from apportion.recipes.tasks.tokens import IGNORED, load_tokenizer


class Classification(FineTuning):
    """Accuracy and more beside the loss, for models that give one row of logits per sample.

    Logs accuracy; the share of the most frequent class, which it has to beat; F1, of class 1 if there are two classes,
    else the mean over classes; and Matthews' correlation.
    """

    objective = "val/accuracy"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.begin(self.model.config.num_labels)

    def begin(self, classes: int) -> None:
        """Makes the metrics."""
        self.keep(
            accuracy=lambda: MulticlassAccuracy(classes, average="micro"),
            majority=lambda: Majority(classes),
            f1=lambda: MulticlassF1Score(classes, average="macro" if classes > 2 else "none"),
            matthews=lambda: Matthews(classes),
        )

    def evaluate(self, split: str, batch: dict[str, Any]) -> None:
        """Updates the loss and what compares classes."""
        output = self(**batch)
        self.loss(split, batch, output)
        chosen, labels = output.logits.argmax(-1), batch["labels"]
        self.metric(split, "majority").update(labels)
        for name in ("accuracy", "f1", "matthews"):
            self.metric(split, name).update(chosen, labels)
        self.log(f"{split}/accuracy", self.metric(split, "accuracy"), prog_bar=True)

    def finish(self, split: str) -> None:
        """Logs what belongs beside the accuracy."""
        for name in ("majority", "f1", "matthews"):
            value = self.tell(split, name)
            self.log(f"{split}/{name}", (value[-1] if value.ndim else value).float())


class ImageClassification(Classification):
    """Fine-tunes a model that sorts images into classes."""

    auto = transformers.AutoModelForImageClassification


class SequenceClassification(Classification):
    """Fine-tunes a model that sorts texts into classes, or gives each a number.

    Args:
        regression: Whether labels are numbers: the loss is the squared error, and Pearson's and Spearman's correlation
            are logged. The model has one output then.
        **kwargs: Of `apportion.recipes.tasks.finetuning.FineTuning`.

    Raises:
        ValueError: If ``regression`` does not fit the number of outputs.
    """

    auto = transformers.AutoModelForSequenceClassification

    def __init__(self, regression: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        outputs = self.model.config.num_labels
        if regression != (outputs == 1):
            raise ValueError(
                f"`model.regression={str(regression).lower()} model.config.num_labels={outputs}`: a model that gives a "
                "number has one output, one that sorts has two or more."
            )

    def begin(self, classes: int) -> None:
        """Makes the metrics of classes, or of numbers if there is one output."""
        self.regression = classes == 1
        if self.regression:
            self.objective = "val/pearson"
            self.keep(pearson=PearsonCorrCoef, spearman=SpearmanCorrCoef)
        else:
            super().begin(classes)

    def evaluate(self, split: str, batch: dict[str, Any]) -> None:
        """Updates the loss and what compares classes or numbers."""
        if not self.regression:
            return super().evaluate(split, batch)
        output = self(**batch)
        self.loss(split, batch, output)
        for name in ("pearson", "spearman"):
            self.metric(split, name).update(output.logits.float().squeeze(-1), batch["labels"].float())
        return None

    def finish(self, split: str) -> None:
        """Logs what needs the whole split."""
        if not self.regression:
            return super().finish(split)
        for name in ("pearson", "spearman"):
            self.log(f"{split}/{name}", self.tell(split, name), prog_bar=name == "pearson")
        return None


class CausalLM(FineTuning):
    """Fine-tunes a model that predicts the next token; the loss is in nats per token, perplexity is its exponential.

    Args:
        tokenizer: Folder or id of the tokenizer of what is generated; None for bytes.
        answer: How final answers are found, as in `apportion.recipes.tasks.answers.Answer`; the model writes after each
            prompt in validation and test then, and the share of right answers is logged. None does not generate.
        new_tokens: At most so many for an answer.
        **kwargs: Of `apportion.recipes.tasks.finetuning.FineTuning`.
    """

    auto = transformers.AutoModelForCausalLM

    def __init__(
        self, tokenizer: str | None = None, answer: str | None = None, new_tokens: int = 256, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.answer = None if answer is None else Answer(answer)
        self.new_tokens = new_tokens
        if self.answer:
            self.tokenizer = load_tokenizer(tokenizer)
            self.objective = "val/exact_match"
            self.keep(exact_match=MeanMetric)

    def on_fit_start(self) -> None:
        """Refuses to train on packed rows with a model that looks from one text into another."""
        if getattr(self.trainer.datamodule, "packing", False):  # type: ignore[attr-defined]
            packing.check(self.model, self)

    def forward(self, **batch: Any) -> Any:
        """Output of the transformers model; with a cache it would not look at positions that begin anew in a row."""
        return super().forward(**batch, **({"use_cache": False} if "position_ids" in batch else {}))

    def count(self, batch: dict[str, Any]) -> Tensor:
        """Tokens that are predicted."""
        predicted: Tensor = batch["labels"][:, 1:] != IGNORED
        return predicted.sum()

    def evaluate(self, split: str, batch: dict[str, Any]) -> None:
        """Updates the loss, and the answers if the model is to write them."""
        self.loss(split, batch, self(**batch))
        if self.answer:
            if "prompt" not in batch:
                raise ValueError(
                    f"`model.answer={self.answer.form}` compares what the model writes after a prompt, and these data "
                    "have no prompts: use `data=instructions` or `data=alpaca`, or `model.answer=null`."
                )
            prompts = [row[:length] for row, length in zip(batch["input_ids"], batch["prompt"], strict=True)]
            written = continued(self.model, self.tokenizer, prompts, self.new_tokens)
            right = [self.answer.same(*pair) for pair in zip(written, batch["reference"], strict=True)]
            self.metric(split, "exact_match").update(torch.tensor(right, dtype=torch.float32, device=self.device))

    def finish(self, split: str) -> None:
        """Logs the perplexity of the whole split, not the mean of those of its batches."""
        self.log(f"{split}/perplexity", self.metric(split, "loss").compute().exp())
        if self.answer:
            self.log(f"{split}/exact_match", self.tell(split, "exact_match"), prog_bar=True)


class Seq2SeqLM(FineTuning):
    """Fine-tunes a model with an encoder and a decoder; the loss is in nats per target token.

    Args:
        tokenizer: Folder or id of the tokenizer of what is generated; None for bytes.
        generate: Whether to write in validation and test, and log ROUGE-1, -2 and -L (F) and exact match. There is no
            stemming.
        new_tokens: At most so many are written.
        beams: Of the search.
        **kwargs: Of `apportion.recipes.tasks.finetuning.FineTuning`.
    """

    auto = transformers.AutoModelForSeq2SeqLM

    def __init__(
        self, tokenizer: str | None = None, generate: bool = True, new_tokens: int = 64, beams: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.generate, self.new_tokens, self.beams = generate, new_tokens, beams
        if generate:
            self.tokenizer = load_tokenizer(tokenizer)
            self.objective = "val/rougeL"
            self.keep(rouge=lambda: ROUGEScore(rouge_keys=("rouge1", "rouge2", "rougeL")), exact_match=MeanMetric)

    def count(self, batch: dict[str, Any]) -> Tensor:
        """Tokens of the targets."""
        predicted: Tensor = batch["labels"] != IGNORED
        return predicted.sum()

    def evaluate(self, split: str, batch: dict[str, Any]) -> None:
        """Updates the loss, and what compares texts if the model is to write them."""
        self.loss(split, batch, self(**batch))
        if not self.generate or "reference" not in batch:
            return
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}
        tokens = written_by(self.model, self.tokenizer, self.new_tokens, self.beams, **inputs)
        written = decoded(self.tokenizer, tokens)
        self.metric(split, "rouge").update(written, batch["reference"])
        right = [Answer("text").same(*pair) for pair in zip(written, batch["reference"], strict=True)]
        self.metric(split, "exact_match").update(torch.tensor(right, dtype=torch.float32, device=self.device))

    def finish(self, split: str) -> None:
        """Logs what was written."""
        if not self.generate:
            return
        rouge = self.tell(split, "rouge")
        self.log_dict({f"{split}/{name}": rouge[f"{name}_fmeasure"] for name in ("rouge1", "rouge2", "rougeL")})
        self.log(f"{split}/exact_match", self.tell(split, "exact_match"))
