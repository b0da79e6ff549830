"""What all tasks share: a transformers model, with or without adapters, its loss, optimizer and schedule.

The modules know nothing of the selection: a callback decides what trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
import transformers
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from apportion.recipes.tasks.metrics import Kept

# Fresh parts of a model with a task, which an adapter must not leave as they are.
_HEADS = ("classifier", "score", "qa_outputs", "classification_head")
Optimizers = Callable[[Iterable[Any]], torch.optim.Optimizer]


class FineTuning(pl.LightningModule):
    """Loss and optimizer that all tasks share; ``forward`` takes the batch of a transformers model.

    The loss of a step of the optimizer is the mean over all tokens (or samples) of its batches on all ranks. Where it
    takes several batches, each has to tell their mean ``weight``, as `apportion.loader.StatefulLoader` does; without
    that it is the mean of their means.

    Args:
        path: Folder of a saved model, or its id on the hub; None for random weights.
        config: With ``path``, values that replace those of the saved configuration, where they are not None. Without, a
            whole configuration: its ``model_type`` and sizes.
        peft: Configuration of an adapter, such as `peft.LoraConfig`; None to train the model's own weights.
        optimizer: From parameters to the optimizer; None for AdamW at 1e-3.
        no_decay: Whether norms and biases are kept out of weight decay, in a group of their own.
        schedule: Name that `transformers.get_scheduler` knows: ``constant``, ``linear``, ``cosine``.
        warmup: Fraction of the steps over which the learning rate rises from 0; not with ``constant``.
        dtype: Of the weights, such as ``bfloat16``; None for that of the file, or float32.
        checkpointing: Whether to recompute activations in the backward pass (non-reentrant).

    Raises:
        ValueError: If neither ``path`` nor ``config`` names a model, or the schedule cannot have this ``warmup``.
    """

    auto: ClassVar[Any]
    """The transformers class that builds the model of the task."""

    objective: str = "val/loss"
    """The metric that a sweep optimizes."""

    def __init__(
        self,
        path: str | None = None,
        config: Mapping[str, Any] | None = None,
        peft: Any = None,
        optimizer: Optimizers | None = None,
        no_decay: bool = False,
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
        self.keep()
        self._optimizer = optimizer
        self.no_decay = no_decay
        self.schedule = schedule
        self.warmup = warmup

    def forward(self, **batch: Any) -> Any:
        """Output of the transformers model, with ``loss`` and ``logits``; what is no tensor or flag is not for it."""
        return self.model(**{key: value for key, value in batch.items() if isinstance(value, Tensor | bool)})

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The batch's part of the mean loss of its step."""
        loss: Tensor = self(**batch).loss
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss * (float(self.count(batch)) / batch["weight"]) if "weight" in batch else loss

    def count(self, batch: dict[str, Any]) -> int | Tensor:
        """Tokens, or samples, that the model's loss is the mean of."""
        return len(batch["labels"])

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Updates the metrics of validation."""
        self.evaluate("val", batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Updates the metrics of the test."""
        self.evaluate("test", batch)

    def evaluate(self, split: str, batch: dict[str, Any]) -> None:
        """Updates the metrics of a split; tasks add theirs to the loss."""
        self.loss(split, batch, self(**batch))

    def finish(self, split: str) -> None:
        """Logs what a task computes once a split is through."""

    def on_validation_epoch_end(self) -> None:
        """Ends the validation."""
        self.finish("val")

    def on_test_epoch_end(self) -> None:
        """Ends the test."""
        self.finish("test")

    def loss(self, split: str, batch: dict[str, Any], output: Any) -> None:
        """Updates and logs the mean loss of a split."""
        mean = self.metric(split, "loss")
        mean.update(output.loss.float(), self.count(batch))
        self.log(f"{split}/loss", mean, prog_bar=True)

    def metric(self, split: str, name: str) -> Any:
        """A metric of a split. Each split has its own: a Trainer may validate between two test runs."""
        return self.metrics[split][name]  # type: ignore[index]

    def tell(self, split: str, name: str) -> Any:
        """Computes a metric of a split over all ranks, and empties it."""
        metric = self.metric(split, name)
        value = metric.compute()
        metric.reset()
        return value

    def keep(self, **metrics: Callable[[], Metric]) -> None:
        """Makes metrics for both splits, and the mean loss."""
        made = {"loss": MeanMetric, **metrics}
        self.metrics = Kept(
            {split: nn.ModuleDict({name: make() for name, make in made.items()}) for split in ("val", "test")}
        )

    def configure_optimizers(self) -> Any:
        """The optimizer over everything that can train, and the schedule per step."""
        trained: Any = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.no_decay:
            vectors = [parameter for parameter in trained if parameter.ndim < 2]
            others = [parameter for parameter in trained if parameter.ndim >= 2]
            trained = [{"params": others}, {"params": vectors, "weight_decay": 0.0}]
            trained = [group for group in trained if group["params"]]
        optimizer = self._optimizer(trained) if self._optimizer else torch.optim.AdamW(trained, lr=1e-3)
        if self.schedule == "constant":
            return optimizer
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = transformers.get_scheduler(self.schedule, optimizer, int(self.warmup * total), total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def build(auto: Any, path: str | None, config: Mapping[str, Any], dtype: str | None = None) -> Any:
    """A transformers model: saved at ``path``, or random from ``config``."""
    kind = getattr(torch, dtype) if dtype else None
    if path is not None:
        given = {key: value for key, value in config.items() if value is not None}
        # A loaded model comes in eval mode, in which Lightning would leave it: without dropout.
        return auto.from_pretrained(path, **given, **({"dtype": kind} if kind else {})).train()
    if "model_type" not in config:
        raise ValueError(
            "`model.path` is None and `model.config` has no `model_type`: give the folder of a saved model "
            "(`model.path=/data/tinyllama`) or a whole configuration (`++model.config.model_type=llama ...`)."
        )
    settings = dict(config)
    model = auto.from_config(transformers.AutoConfig.for_model(settings.pop("model_type"), **settings))
    return model.to(kind) if kind else model


def adapt(model: Any, config: Any) -> Any:
    """``model`` with the adapter that ``config`` describes, and with its classification head trainable."""
    from peft import get_peft_model

    heads = [name for name in _HEADS if isinstance(getattr(model, name, None), nn.Module)]
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
