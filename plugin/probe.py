"""Probes: a loss between two steps, with the adapters of some units damped, that leaves no trace."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from apportion import randomness
from apportion.types import Bound, Unit


@contextmanager
def quiet(module: nn.Module) -> Iterator[None]:
    """Runs a block without gradients and in eval mode, and puts everything back.

    Train flags are set and restored module by module, without calling ``train`` or ``eval``, which models override.
    Random number states (Python, NumPy, PyTorch, CUDA) and buffers are restored, also after an exception. Gradients
    are off by `torch.no_grad`: what a model caches lazily under ``inference_mode`` could not enter a graph later.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with quiet(norm):
        ...     _ = norm(torch.randn(4, 2))
        >>> norm.training, norm.num_batches_tracked.item()
        (True, 0)
    """
    flags = [(m, m.training) for m in module.modules()]
    buffers = [
        (m, k, b, b._version, b.clone()) for m in module.modules() for k, b in m._buffers.items() if b is not None
    ]
    states = randomness.capture()
    try:
        for m, _ in flags:
            m.training = False
        with torch.no_grad():
            yield
    finally:
        for m, flag in flags:
            m.training = flag
        for m, key, buffer, version, value in buffers:
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(value)
            m._buffers[key] = buffer
        randomness.restore(states)


@contextmanager
def suppressed(
    bound: Bound, mask: Tensor, factor: float, adapters: str | None = None, form: str = "residual"
) -> Iterator[dict[str, int]]:
    """Damps what the adapters add in the selected units, for as long as it is open.

        out' = base + factor (out - base)

    PEFT layers are known by having both ``base_layer`` and ``disable_adapters``; their base is what the base layer
    gives to the same input, whatever the kind of adapter, their number and their scales. All other adapters are
    named by ``adapters``. It works through forward hooks, which are removed at the end; no attribute of the model is
    written. Compiled modules run eagerly meanwhile, as their graphs would not meet the hooks.

    Args:
        bound: The units.
        mask: Units whose adapters are damped, bool, shape (n,).
        factor: What is left of the adapters' part; 1 changes nothing, 0 leaves the base model.
        adapters: Regex searched in the full names of modules that are adapters but not of PEFT.
        form: Of those: ``residual`` modules return their first input plus something, ``delta`` modules what is to be
            added.

    Yields:
        How often adapters of each selected unit ran so far, by unit name.

    Raises:
        ValueError: If a selected unit has no adapter, or its adapters are merged into the weights.
    """
    calls: dict[str, int] = {}
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # nothing is compiled before that is imported
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for unit, chosen in zip(bound.units, mask.tolist(), strict=True):
            if chosen:
                calls[unit.name] = 0
                for module, is_peft in find_adapters(unit, adapters):
                    damp = _PeftDamper(factor) if is_peft else _Damper(factor, form)
                    damp.attach(module, stack)
                    stack.callback(module.register_forward_hook(_Counter(calls, unit.name)).remove)
        yield calls


def find_adapters(unit: Unit, adapters: str | None = None) -> list[tuple[nn.Module, bool]]:
    """The adapter modules of a unit, each with whether it is a PEFT layer; arguments as in `suppressed`.

    Raises:
        ValueError: If there is none, or one is merged into the weights.
    """
    found = []
    for name, module in unit.module.named_modules():
        is_peft = hasattr(module, "base_layer") and hasattr(module, "disable_adapters")
        if is_peft and getattr(module, "merged", False):
            raise ValueError(
                f"The adapters of {unit.name}.{name} are merged into its weights and cannot be damped: unmerge first."
            )
        full = f"{unit.name}.{name}" if name else unit.name
        if is_peft or (adapters is not None and re.search(adapters, full) is not None):
            found.append((module, is_peft))
    if not found:
        hint = "" if adapters is None else f" `adapters={adapters!r}` matches no module of it."
        raise ValueError(
            f"The unit {unit.name} has no adapter whose part could be damped.{hint} Wrap every layer by PEFT, name "
            "your own adapter modules by `adapters=` (a regex over module names), leave the unit out by `exclude=`, "
            "or use a score that needs none."
        )
    return found


class _Counter:
    """Counts forward passes under a name."""

    def __init__(self, calls: dict[str, int], name: str) -> None:
        self.calls, self.name = calls, name

    def __call__(self, module: nn.Module, args: Any, out: Any) -> None:
        self.calls[self.name] += 1


class _Damper:
    """Scales the output of an adapter module towards its base."""

    def __init__(self, factor: float, form: str) -> None:
        self.factor, self.form = factor, form

    def attach(self, module: nn.Module, stack: ExitStack) -> None:
        stack.callback(module.register_forward_hook(self.scale, with_kwargs=True).remove)

    def scale(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        if self.form == "delta":
            return _blend(None, out, self.factor)
        return _blend(args[0] if args else next(iter(kwargs.values())), out, self.factor)


class _PeftDamper(_Damper):
    """The same for a PEFT layer; its base is the output of the base layer, kept when it was called with the same "
    "input."""

    def __init__(self, factor: float) -> None:
        super().__init__(factor, "residual")
        self.kept: tuple[Any, Any, int] | None = None

    def attach(self, module: nn.Module, stack: ExitStack) -> None:
        base: Any = module.base_layer
        stack.callback(base.register_forward_hook(self.keep).remove)
        super().attach(module, stack)

    def keep(self, base: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        self.kept = (args[0], out, out._version) if args and isinstance(out, Tensor) else None

    def scale(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        kept, self.kept = self.kept, None
        if getattr(module, "disable_adapters", False):
            return out
        # Kept only if the very same input went in (some adapters scale it) and nothing was written into the result
        # since; a result passed on as it is comes from weights that the adapter has changed, so it is no base either.
        if kept is not None and args and kept[0] is args[0] and kept[2] == kept[1]._version and kept[1] is not out:
            return _blend(kept[1], out, self.factor)
        layer: Any = module.base_layer
        try:
            base = layer(*args, **_taken(layer, kwargs))
        except (AttributeError, TypeError) as error:
            raise ValueError(
                f"The part of a `{type(module).__name__}` cannot be told from that of its base layer, which does not "
                f"take what it takes itself ({error}): use a score that damps no adapters, such as `Uniform()`."
            ) from error
        self.kept = None
        return _blend(base, out, self.factor)


def _taken(layer: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of ``kwargs`` that ``layer`` takes; others, such as the task of each row, are the adapter's own."""
    known = inspect.signature(layer.forward).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values()):
        return kwargs
    return {key: value for key, value in kwargs.items() if key in known}


def _blend(base: Any, out: Any, factor: float) -> Any:
    if isinstance(out, tuple):
        bases = base if isinstance(base, tuple) else (base, *[None] * (len(out) - 1))
        return tuple(
            _blend(b, o, factor) if isinstance(o, Tensor) and o.is_floating_point() else o
            for b, o in zip(bases, out, strict=False)
        )
    if base is None:
        return factor * out
    return base + factor * (out - base)


def endless(batches: Iterable[Any], error: str) -> Iterator[Any]:
    """Goes through ``batches`` again and again.

    Args:
        batches: Gone through from its start each time.
        error: What to say if a pass gives no batch.

    Raises:
        ValueError: If a pass gives no batch: it is empty, or can be gone through once only.
    """
    met = True
    while met:
        met = False
        for batch in batches:
            met = True
            yield batch
    raise ValueError(error)


_NO_BATCH = (
    "`BatchProbe(batches=...)` has no batch left: give a function, or an iterable that can be gone through again."
)


class BatchProbe:
    """Asks a function for the loss on batches of its own, as `apportion.types.Probe`.

    Args:
        loss_fn: ``loss_fn(batch)`` gives the loss, a tensor with one element or a number.
        batches: A function that returns the next batch, or an iterable that is gone through again and again.
        module: The model behind ``loss_fn``, whose modes and buffers are left as they are.
        mean: Averages a tensor over ranks.

    Raises:
        TypeError: If ``batches`` is neither.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> batches = [torch.ones(1, 1), torch.full((1, 1), 2.0)]
        >>> probe = BatchProbe(lambda x: 0.0 * model(x).sum() + x.sum(), batches, model)
        >>> probe.loss(), probe.loss(), probe.refresh(), probe.loss()
        (1.0, 1.0, None, 2.0)
    """

    def __init__(
        self,
        loss_fn: Callable[[Any], Tensor | float],
        batches: Iterable[Any] | Callable[[], Any],
        module: nn.Module,
        mean: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> None:
        if not callable(batches) and not isinstance(batches, Iterable):
            raise TypeError(
                f"`BatchProbe(batches={batches!r:.60})` must be a function that returns a batch, or an iterable of "
                "batches."
            )
        self.loss_fn, self.batches, self.module, self.mean = loss_fn, batches, module, mean
        self._next = batches if callable(batches) else partial(next, endless(batches, _NO_BATCH))
        self._batch: Any = None
        self._fresh = False

    def refresh(self) -> None:
        """Moves on to the next batch; random number states stay, though a shuffling loader draws from them."""
        states = randomness.capture()
        try:
            self._batch, self._fresh = self._next(), True
        finally:
            randomness.restore(states)

    def loss(self) -> float:
        """The loss on the present batch in eval mode, float64, averaged over ranks."""
        if not self._fresh:
            self.refresh()
        with quiet(self.module):
            value = torch.as_tensor(self.loss_fn(self._batch)).detach()
        if value.numel() != 1:
            raise ValueError(
                f"`loss_fn` gave a tensor of shape {tuple(value.shape)}: return one number, such as a mean."
            )
        return float(self.mean(value.cpu().double().flatten()))
