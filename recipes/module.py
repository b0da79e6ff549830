"""LightningModules that fine-tune transformers models: sequences, images, next tokens.

They know nothing of the selection: a callback decides what trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
import transformers
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

Optimizers = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class FineTuning(pl.LightningModule):
    """Loss and optimizer that the three tasks share; ``forward`` takes the batch of a transformers model.

    Args:
        path: Folder of a saved model; None for random weights.
        config: With ``path``, values that replace those of the saved configuration. Without, a whole configuration: its
            ``model_type`` and sizes.
        peft: Configuration of an adapter, such as `peft.LoraConfig`; None to train the model's own weights.
        optimizer: From parameters to the optimizer; None for AdamW at 1e-3.
        schedule: Name that `transformers.get_scheduler` knows: ``constant``, ``linear``, ``cosine``.
        warmup: Fraction of the steps over which the learning rate rises from 0; not with ``constant``.
        dtype: Of the weights, such as ``bfloat16``; None for that of the file, or float32.
        checkpointing: Whether to recompute activations in the backward pass (non-reentrant).

    Raises:
        ValueError: If neither ``path`` nor ``config`` names a model, or the schedule cannot have this ``warmup``.
    """

    auto: ClassVar[Any]
    """The transformers class that builds the model of the task."""

    objective: ClassVar[str] = "val/loss"
    """The metric that a sweep optimizes."""

    def __init__(
        self,
        path: str | None = None,
        config: Mapping[str, Any] | None = None,
        peft: Any = None,
        optimizer: Optimizers | None = None,
        schedule: str = "constant",
        warmup: float = 0.0,
        dtype: str | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not 0.0 <= warmup < 1.0:
            raise ValueError(
                f"`{type(self).__name__}(warmup={warmup})` must lie in [0, 1): it is a fraction of the steps."
            )
        if warmup and schedule == "constant":
            raise ValueError("`schedule='constant'` has no warm-up: use 'constant_with_warmup', 'linear' or 'cosine'.")
        self.model = build(self.auto, path, config or {}, dtype)
        if peft:
            self.model = adapt(self.model, peft)
        if checkpointing:
            recompute(self.model)
        self._optimizer = optimizer
        self.schedule = schedule
        self.warmup = warmup

    def forward(self, **batch: Tensor) -> Any:
        """Output of the transformers model, with ``loss`` and ``logits``."""
        return self.model(**batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean loss of the batch."""
        loss: Tensor = self(**batch).loss
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """The optimizer over everything that can train, and the schedule per step."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = self._optimizer(trained) if self._optimizer else torch.optim.AdamW(trained, lr=1e-3)
        if self.schedule == "constant":
            return optimizer
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = transformers.get_scheduler(self.schedule, optimizer, int(self.warmup * total), total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Classification(FineTuning):
    """Accuracy beside the loss, for models that give one row of logits per sample."""

    objective: ClassVar[str] = "val/accuracy"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        classes = self.model.config.num_labels
        # Metrics of their own per split: a Trainer may validate between two test runs.
        self.metrics = nn.ModuleDict(
            {
                split: nn.ModuleDict(
                    {"loss": MeanMetric(), "accuracy": MulticlassAccuracy(num_classes=classes, average="micro")}
                )
                for split in ("val", "test")
            }
        )

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Updates loss and accuracy."""
        self._evaluate("val", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Updates loss and accuracy."""
        self._evaluate("test", batch)

    def _evaluate(self, split: str, batch: dict[str, Tensor]) -> None:
        output = self(**batch)
        loss, accuracy = _pair(self.metrics[split], "loss", "accuracy")
        loss.update(output.loss, len(batch["labels"]))
        accuracy.update(output.logits, batch["labels"])
        self.log_dict({f"{split}/loss": loss, f"{split}/accuracy": accuracy}, prog_bar=True)


class SequenceClassification(Classification):
    """Fine-tunes a model that sorts texts into classes."""

    auto = transformers.AutoModelForSequenceClassification


class ImageClassification(Classification):
    """Fine-tunes a model that sorts images into classes."""

    auto = transformers.AutoModelForImageClassification


class CausalLM(FineTuning):
    """Fine-tunes a model that predicts the next token; the loss is in nats per token, perplexity is its exponential."""

    auto = transformers.AutoModelForCausalLM

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.metrics = nn.ModuleDict({"val": MeanMetric(), "test": MeanMetric()})

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Updates the loss."""
        self._evaluate("val", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Updates the loss."""
        self._evaluate("test", batch)

    def _evaluate(self, split: str, batch: dict[str, Tensor]) -> None:
        mean = self.metrics[split]
        assert isinstance(mean, MeanMetric)
        tokens = (batch["labels"][:, 1:] != -100).sum()
        mean.update(self(**batch).loss, tokens)
        self.log(f"{split}/loss", mean, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        """Logs the perplexity of the whole split, not the mean of those of its batches."""
        self._perplexity("val")

    def on_test_epoch_end(self) -> None:
        """Logs the perplexity of the whole split, not the mean of those of its batches."""
        self._perplexity("test")

    def _perplexity(self, split: str) -> None:
        mean = self.metrics[split]
        assert isinstance(mean, MeanMetric)
        self.log(f"{split}/perplexity", mean.compute().exp())


def build(auto: Any, path: str | None, config: Mapping[str, Any], dtype: str | None = None) -> Any:
    """A transformers model: saved at ``path``, or random from ``config``."""
    kind = getattr(torch, dtype) if dtype else None
    if path is not None:
        return auto.from_pretrained(path, **config, **({"dtype": kind} if kind else {}))
    if "model_type" not in config:
        raise ValueError(
            "`model.path` is None and `model.config` has no `model_type`: give the folder of a saved model "
            "(`model.path=/data/tinyllama`) or a whole configuration (`model.config.model_type=llama ...`)."
        )
    settings = dict(config)
    model = auto.from_config(transformers.AutoConfig.for_model(settings.pop("model_type"), **settings))
    return model.to(kind) if kind else model


def adapt(model: Any, config: Any) -> Any:
    """``model`` with the adapter that ``config`` describes, and with its classification head trainable."""
    from peft import get_peft_model

    heads = [name for name in ("classifier", "score") if isinstance(getattr(model, name, None), nn.Module)]
    if heads and not getattr(config, "modules_to_save", None):
        config.modules_to_save = heads
    return get_peft_model(model, config)


def recompute(model: Any) -> None:
    """Switches non-reentrant activation checkpointing on; transformers 5 renamed the method on its way."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def _pair(metrics: Any, *names: str) -> list[Metric]:
    return [metrics[name] for name in names]
