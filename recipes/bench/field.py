"""The field on which methods meet: one model, one stream of tokens, and one way to watch a step of any of them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn

from apportion.optim import Selective
from apportion.recipes.bench.entry_bars import DECAY, LR, Size, backward

Trained = Mapping[str, Tensor | None]
"""What a step was to train: the names of parameters, with a bool mask, or None for all of one."""

After = Callable[[Trained | None], None]


class Rival(Protocol):
    """A model in training, by whatever method."""

    model: nn.Module

    def run(self, batches: Sequence[Tensor], after: After, look: bool = False) -> None:
        """Trains on each batch, and calls ``after`` when its step is done, with what it trained if ``look``."""

    def state(self) -> Iterator[Tensor]:
        """The optimizer's moments that are on the device."""


@dataclass(frozen=True)
class Contender:
    """Someone who enters the field.

    Attributes:
        name: As it is called in the table.
        group: Those of one group select alike.
        kind: ``ours``, ``package``, ``twin`` (of our own, see `apportion.recipes.bench.twins`) or ``torch``.
        make: Makes the rival of a model, for so many steps; raises if it cannot be had.
        build: Makes the model.
        kept: Whether "the unselected does not move" means anything for it.
        note: What the reader must know of it.
    """

    name: str
    group: str
    kind: str
    make: Callable[[Any, int], Rival]
    build: Callable[[Size], nn.Module]
    kept: bool = True
    note: str = ""


def whole(size: Size) -> nn.Module:
    """The model with everything trainable."""
    return size.build().requires_grad_(True)


def matrices(size: Size) -> nn.Module:
    """The model of which embeddings, norms and head are frozen."""
    model = size.build()
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and "lm_head" not in name)
    return model


def layers_of(model: Any) -> list[nn.Module]:
    """The transformer layers."""
    return next(list(m) for m in model.modules() if isinstance(m, nn.ModuleList))


def training(model: nn.Module) -> dict[str, Tensor | None]:
    """The names of what requires gradients."""
    return {name: None for name, p in model.named_parameters() if p.requires_grad}


def moments(optimizers: Iterable[Any]) -> Iterator[Tensor]:
    """State of the size of what it belongs to: not the counts of steps."""
    for optimizer in optimizers:
        for state in optimizer.state.values():
            yield from (v for v in state.values() if isinstance(v, Tensor) and v.ndim > 0)


class Loop:
    """A plain training loop.

    Args:
        model: The model.
        step: All of a step that comes after the backward pass, gradients freed.
        trained: What a step trains, asked between the backward pass and the step.
        optimizers: Whose state counts.
        before: Called before the forward pass, with the number of the step and the batch.
        late: Whether ``trained`` is known only after the step.
    """

    def __init__(
        self,
        model: nn.Module,
        step: Callable[[], Any],
        trained: Callable[[], Trained],
        optimizers: Callable[[], Iterable[Any]],
        before: Callable[[int, Tensor], None] | None = None,
        late: bool = False,
    ) -> None:
        self.model, self.step, self.trained, self.optimizers = model, step, trained, optimizers
        self.before, self.late, self.done = before, late, 0

    def run(self, batches: Sequence[Tensor], after: After, look: bool = False) -> None:
        """See `Rival`."""
        for tokens in batches:
            if self.before is not None:
                self.before(self.done, tokens)
            backward(self.model, tokens)
            early = self.trained() if look and not self.late else None
            self.step()
            self.done += 1
            after(self.trained() if look and self.late else early)

    def state(self) -> Iterator[Tensor]:
        """See `Rival`."""
        return moments(self.optimizers())


def plain(model: nn.Module, steps: int = 0) -> Loop:
    """AdamW over all that requires gradients."""
    del steps
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=DECAY)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Loop(model, step, lambda: training(model), lambda: [optimizer])


class Ours(Loop):
    """A method of ours around AdamW."""

    def __init__(self, model: Any, method: Any, steps: int, probe: bool = False) -> None:
        params = [p for p in model.parameters() if p.requires_grad]
        self._batch: Tensor | None = None
        base = torch.optim.AdamW(params, lr=LR, weight_decay=DECAY)
        asked = (lambda: loss_of(model, self._batch)) if probe else None
        self.optimizer = Selective(base, model, method, probe=asked, total_steps=steps)
        self._seen: Trained = {}
        self._look = False
        base.register_step_pre_hook(self._note)
        super().__init__(model, self._step, lambda: self._seen, lambda: [base], self._keep, late=True)

    def run(self, batches: Sequence[Tensor], after: After, look: bool = False) -> None:
        """See `Rival`."""
        self._look = look
        self._batch = batches[0]
        super().run(batches, after, look)

    def _keep(self, step: int, tokens: Tensor) -> None:
        self._batch = tokens

    def _step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _note(self, *_: Any) -> None:
        """What is selected when the optimizer steps: right after it, the next selection may have been made."""
        if not self._look:
            return
        stores = self.optimizer.owner
        entries = self.optimizer.method.slots.grain == "entry"
        kept = {id(p) for p in self.optimizer.selection.bound.tensors} if entries else set()  # type: ignore[attr-defined]
        found: dict[str, Tensor | None] = {}
        for name, p in self.model.named_parameters():
            if id(p) in kept:
                mask = torch.zeros(p.numel(), dtype=torch.bool, device=p.device)
                mask[stores.narrow(p).index.long()] = True
                found[name] = mask.view(p.shape)
            elif p.requires_grad:
                found[name] = None
        self._seen = found


def loss_of(model: Any, tokens: Any) -> Tensor:
    """The loss on a batch."""
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


def quiet() -> None:
    """Keeps transformers from saying what everybody who fetches a random model knows."""
    transformers.logging.set_verbosity_error()


@contextmanager
def hushed() -> Iterator[None]:
    """Keeps Trainers from greeting inside, and everybody from warning of loaders, precision and the like."""
    quiet()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
