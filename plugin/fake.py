"""Training steps on fake tensors, which have shapes, types and storages but no values."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

PRECISIONS = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "bf16-mixed": torch.float32}


class FakeRun:
    """A model and a batch without values, and training steps on them.

    Only forward and backward run in the fake mode: optimizers and selections need real step counts and real draws.

    Args:
        build: Makes the model; called on the meta device, so it must not read weights from a file.
        batch: One batch, real or fake; only its shapes count.
        loss_fn: ``loss_fn(model, batch)``; None for a LightningModule's ``training_step`` or ``model(**batch).loss``.
        precision: ``32-true``, ``bf16-true`` or ``bf16-mixed``, as Lightning has them.
        checkpointing: Whether to turn on the model's own activation checkpointing, in its non-reentrant form.

    Raises:
        ValueError: If the precision is unknown, or the model has no checkpointing of its own.
        TypeError: If ``build`` is not a function that makes a module.

    Example:
        >>> run = FakeRun(lambda: nn.Linear(9, 1), torch.ones(2, 9), lambda model, batch: model(batch).sum())
        >>> run.step(torch.optim.SGD(run.model.parameters()))
        >>> run.model.weight
        Parameter(FakeTensor(..., size=(1, 9), requires_grad=True))
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        batch: Any,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        precision: str = "32-true",
        checkpointing: bool = False,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"`precision={precision!r}` must be one of {', '.join(PRECISIONS)}.")
        if isinstance(build, nn.Module) or not callable(build):
            raise TypeError(
                f"`build={type(build).__name__}` must be a function that makes the model: `lambda: Model(...)`."
            )
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.loss_fn = loss_fn or _loss
        self.autocast = precision.endswith("-mixed")
        with _explained():
            with torch.device("meta"):
                self.model = build()
            if not isinstance(self.model, nn.Module):
                raise TypeError(f"`build()` gave a {type(self.model).__name__}, not a module.")
            _to_fake(self.model, self.fake, PRECISIONS[precision])
            self.batch = tree_map_only(Tensor, self.fake.from_tensor, batch)
        _prepare(self.model, checkpointing)

    def step(self, optimizer: Optimizer) -> None:
        """One training step: forward, backward, the optimizer's step, gradients freed."""
        self.backward()
        optimizer.step()
        optimizer.zero_grad()

    def backward(self) -> None:
        """Forward and backward."""
        with _explained(), self.fake, _as_on_an_accelerator():
            self._loss().backward()

    def probe(self) -> Tensor:
        """A forward pass whose loss is forgotten, as fake tensors have no values to compare; always 0."""
        with _explained(), self.fake, _as_on_an_accelerator():
            self._loss()
        return torch.zeros(())

    def _loss(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext():
            loss: Tensor = self.loss_fn(self.model, self.batch)
        return loss


def _loss(model: Any, batch: Any) -> Tensor:
    if hasattr(model, "training_step"):
        from apportion.probing import muted, training_step_loss

        with muted(model):
            return training_step_loss(model, batch)
    output = model(**batch) if isinstance(batch, dict) else model(batch)
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"`{type(model).__name__}` gives no `.loss` on this batch: pass `loss_fn=lambda model, batch: ...`."
        )
    return loss


def _prepare(model: nn.Module, checkpointing: bool) -> None:
    model.train()
    hosts: list[Any] = [m for m in model.modules() if hasattr(m, "gradient_checkpointing_enable")]
    for host in hosts:
        if getattr(getattr(host, "config", None), "use_cache", False):
            host.config.use_cache = False  # keys and values of earlier tokens have no use in training
    if not checkpointing:
        return
    if not hosts:
        raise ValueError(
            f"`checkpointing=True`: {type(model).__name__} holds no module with `gradient_checkpointing_enable`: call "
            "`torch.utils.checkpoint` in its forward pass, as the real run does, and leave the flag out."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a new name for the method, which peft does not know yet
        hosts[0].gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _to_fake(model: nn.Module, fake: FakeTensorMode, dtype: torch.dtype) -> None:
    """Gives every tensor of the modules a fake one on the CPU in its place; what was one tensor stays one tensor."""
    new: dict[int, Tensor] = {}

    def faked(old: Tensor) -> Tensor:
        if id(old) not in new:
            kind = dtype if old.is_floating_point() else old.dtype
            with fake:
                tensor = torch.empty_like(old, device="cpu", dtype=kind, requires_grad=False)
            new[id(old)] = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
        return new[id(old)]

    for module in model.modules():
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)
        for tensors in places:
            for name, value in list(tensors.items()):
                if isinstance(value, Tensor):
                    tensors[name] = faked(value)


@contextmanager
def _as_on_an_accelerator() -> Iterator[None]:
    """Attention keeps its output and one log-sum-exp per row, as fused kernels on accelerators do, also with dropout.

    The CPU has such a kernel too, but it refuses dropout and then falls back to one that keeps the matrix of all pairs.
    And transformers reads off the values of the positions that a row is one sequence, which fake tensors cannot tell.
    """
    masks: Any = sys.modules.get("transformers.masking_utils")
    packed = getattr(masks, "find_packed_sequence_indices", None)
    fused = functional.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        named = dict(zip(("attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
        return fused(query, key, value, **{**named, "dropout_p": 0.0})

    functional.scaled_dot_product_attention = attend
    if packed is not None:
        masks.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = fused
        if packed is not None:
            masks.find_packed_sequence_indices = packed


@contextmanager
def _explained() -> Iterator[None]:
    """Turns what fake tensors cannot do into an error with a way out."""
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        ours = str(Path(__file__).parent)
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [f for f in frames if "/torch/" not in f.filename and not f.filename.startswith(ours)]
        where = f"{theirs[-1].filename}:{theirs[-1].lineno} (`{theirs[-1].line}`)" if theirs else "the step"
        raise ValueError(
            f"The step reads a value (`{error}`), but an estimate runs on tensors that have none, at {where}. Pass "
            "`loss_fn=lambda model, batch: ...` that computes the loss without it: no `.item()`, no logging of values, "
            "no shape that depends on data."
        ) from error
