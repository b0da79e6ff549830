"""A Trainer on the field of `apportion.recipes.bench.field`, for callbacks that freeze and thaw."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from apportion.recipes.bench.entry_bars import DECAY, LR
from apportion.recipes.bench.field import After, Trained, loss_of, moments, training


class _Tokens(IterableDataset[Tensor]):
    def __init__(self, batches: Sequence[Tensor]) -> None:
        self.batches = iter(batches)

    def __iter__(self) -> Iterator[Tensor]:
        return self.batches  # goes on in the next epoch


class InLightning:
    """Training by a Trainer, with callbacks that freeze and thaw at the beginning of epochs.

    Args:
        model: The model.
        lightning: ``pytorch_lightning`` or ``lightning.pytorch``, whichever the callbacks belong to.
        callbacks: Makes them, for one run.
        epoch: Optimizer steps in an epoch.
    """

    def __init__(self, model: Any, lightning: Any, callbacks: Callable[[], list[Any]], epoch: int) -> None:
        self.model, self.lightning, self.callbacks, self.epoch = model, lightning, callbacks, epoch
        self.optimizers: list[Optimizer] = []

    def run(self, batches: Sequence[Tensor], after: After, look: bool = False) -> None:
        """See `Rival`."""
        ours = self
        module_class: Any = self.lightning.LightningModule
        callback_class: Any = self.lightning.Callback

        class Module(module_class):
            def __init__(self) -> None:
                super().__init__()
                self.model = ours.model

            def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
                return loss_of(self.model, batch)

            def configure_optimizers(self) -> Optimizer:
                params = [p for p in self.parameters() if p.requires_grad]
                return torch.optim.AdamW(params, lr=LR, weight_decay=DECAY)

        class Watch(callback_class):
            seen: Trained | None = None

            def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
                ours.optimizers = trainer.optimizers
                self.seen = training(ours.model) if look else None

            def on_train_batch_end(self, *_: Any) -> None:
                after(self.seen)

        with tempfile.TemporaryDirectory() as folder:
            self._trainer(batches, [*self.callbacks(), Watch()], folder).fit(
                Module(), DataLoader(_Tokens(batches), batch_size=None)
            )

    def _trainer(self, batches: Sequence[Tensor], callbacks: list[Any], folder: str) -> Any:
        return self.lightning.Trainer(
            max_steps=len(batches),
            max_epochs=-1,
            limit_train_batches=self.epoch,
            callbacks=callbacks,
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu" if batches[0].device.type == "cpu" else "gpu",
            devices=1,
        )

    def state(self) -> Iterator[Tensor]:
        """See `Rival`."""
        return moments(self.optimizers)
