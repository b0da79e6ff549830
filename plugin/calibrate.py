"""Calibration: what gradients of a few batches say about each entry, gathered before any step of the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from apportion import sync
from apportion.candidates import Calibration
from apportion.probe import quiet

Term = Callable[[Tensor, Tensor], Tensor]
"""``term(grad, weight)``: what one gradient (fp32) contributes, both in the weight's shape."""


def gather(
    module: nn.Module,
    loss_fn: Callable[[Any], Tensor],
    batches: Iterable[Any],
    params: Mapping[str, nn.Parameter],
    term: Term,
    calibration: Calibration | None,
    mean: Callable[[Tensor], Tensor] = sync.mean,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Averages ``term`` over the gradients of some batches and leaves everything as it was.

        G_p = (1 / N) sum_i term(dL_i / dp, p)      over the N batches, or samples, of all ranks

    With the square for a term, batches and samples give different things: gradients of 1 and 3 have squares of mean 5,
    their mean has the square 4.

    A gradient is added to its sum and freed as soon as it is final, so that one at most is alive beside the sums, which
    are fp32 and as large as the candidates. No optimizer steps: hooks that the parameters carry, which may step one,
    are put aside meanwhile. Train flags, buffers, random number states, ``requires_grad``, gradients and hooks are put
    back, also after an exception. Batches are taken from the front of ``batches``; an iterator does not get them back.

    Args:
        module: The whole model behind ``loss_fn``.
        loss_fn: ``loss_fn(batch)`` gives the loss, a tensor with one element; it may open an autocast context itself.
        batches: An iterable of batches. For ``per="sample"`` their tensors (in tuples, lists, dictionaries) have one
            row for each sample; scalars and whatever is no tensor go with every sample.
        params: Parameters to look at, by name; frozen ones get a gradient too. The same names on all ranks.
        term: What one gradient contributes, in the weight's shape.
        calibration: How many batches, whole or sample by sample, with dropout (``train``: flags stay as they are if
            ``module`` is in train mode, and are all set if not) or without. None takes all batches, whole, in eval
            mode.
        mean: Averages a tensor over ranks.
        progress: Whether to draw a progress bar.

    Returns:
        fp32 tensors in the shapes of ``params``, in their order, equal on all ranks; zeros where no gradient arrived.

    Raises:
        ValueError: If there are too few batches, a batch cannot be split into samples, ``loss_fn`` gives no finite loss
            with a gradient, or no gradient reaches any of ``params``.
        RuntimeError: If a gradient comes in parts, or another rank failed.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> loss = lambda x: model(x).mean()
        >>> square = lambda grad, weight: grad.square()
        >>> batches = [torch.tensor([[1.0], [3.0]])]
        >>> weights = dict(model.named_parameters())
        >>> gather(model, loss, batches, weights, square, Calibration(1, per="sample"))
        {'weight': tensor([[5.]])}
        >>> gather(model, loss, batches, weights, square, Calibration(1, per="batch"))
        {'weight': tensor([[4.]])}
    """
    _check(params)
    collector = _Collector(params, term)
    failure: Exception | None = None
    count = 0
    try:
        with _ready(module, calibration.mode if calibration else "eval"), _listening(module, params, collector):
            for batch in _drawn(batches, calibration, progress):
                for part in _samples(batch) if calibration and calibration.per == "sample" else (batch,):
                    _backward(loss_fn(part), collector)
                    count += 1
        if not collector.names:
            raise ValueError(
                f"None of the {len(params)} parameters, such as {next(iter(params))}, got a gradient: `loss_fn` must "
                "run through `module` itself, not through a copy of it, and detach nothing on the way."
            )
    except Exception as error:  # other ranks wait below
        failure = error
    told = mean(torch.tensor([float(failure is not None), float(count)], dtype=torch.float64))
    if failure is not None:
        raise failure
    if float(told[0]) > 0.0:
        raise RuntimeError("Calibration failed on another rank, whose error says why.")
    # The mean count, not this rank's own, so that ranks with fewer samples do not weigh more.
    return {name: mean(collector.sums.pop(p).div_(float(told[1]))) for name, p in params.items()}


class _Collector:
    """A post-accumulate hook: adds a term to the parameter's sum and frees the gradient."""

    def __init__(self, params: Mapping[str, nn.Parameter], term: Term) -> None:
        self.term = term
        self.known = {p: name for name, p in params.items()}
        self.sums = {p: torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for p in params.values()}
        self.names: set[str] = set()  # of those that ever got a gradient
        self.met: set[Tensor] = set()  # in the present backward pass

    @torch.no_grad()
    def __call__(self, p: Tensor) -> None:
        grad, p.grad = p.grad, None
        if grad is None or p not in self.sums:
            return
        name = self.known[p]  # type: ignore[index]
        if p in self.met:
            raise RuntimeError(
                f"The gradient of {name} came in parts, of which no score can be made: it is used in several places "
                "under reentrant activation checkpointing. Pass `use_reentrant=False` to the checkpointing."
            )
        self.met.add(p)
        self.names.add(name)
        dense = grad.to_dense() if grad.is_sparse else grad
        value = self.term(dense.float(), p.detach())
        if value.shape != p.shape:
            raise ValueError(
                f"`term` gave {tuple(value.shape)} for {name} of {tuple(p.shape)}: it must keep the weight's shape."
            )
        self.sums[p].add_(value)  # type: ignore[index]


def _backward(loss: Any, collector: _Collector) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(
            f"`loss_fn` gave {loss!r:.100}, which is no loss with a gradient: return a tensor with one element, such "
            "as a mean, that was not detached."
        )
    if not bool(loss.detach().isfinite()):
        raise ValueError(
            f"`loss_fn` gave a loss of {float(loss.detach())}, which would spoil all scores: leave that batch out, or "
            "compute the loss in higher precision."
        )
    collector.met.clear()
    loss.backward()


@contextmanager
def _ready(module: nn.Module, mode: str) -> Iterator[None]:
    """With gradients and in ``mode``; random numbers, flags and buffers are put back."""
    flags = [(m, m.training or not module.training) for m in module.modules()]
    with quiet(module), torch.enable_grad():
        if mode == "train":
            for m, flag in flags:
                m.training = flag
        yield


@contextmanager
def _listening(module: nn.Module, params: Mapping[str, nn.Parameter], collector: _Collector) -> Iterator[None]:
    """Hands every gradient to ``collector``; gradients, hooks and ``requires_grad`` are put back."""
    # What trains beside the candidates keeps its gradient, which is thrown away: without it, reentrant checkpointing
    # over a frozen embedding would cut the layers off.
    all_params = dict.fromkeys([*module.parameters(), *params.values()])
    before = [(p, p.requires_grad, p.grad) for p in all_params]
    with _put_aside(all_params), ExitStack() as stack:
        try:
            for p in params.values():
                p.requires_grad_(True)
            for p in all_params:
                p.grad = None
                if p.requires_grad:
                    stack.callback(p.register_post_accumulate_grad_hook(collector).remove)
            yield
        finally:
            for p, requires_grad, grad in before:
                p.grad = grad
                p.requires_grad_(requires_grad)


@contextmanager
def _put_aside(params: Iterable[nn.Parameter]) -> Iterator[None]:
    """Without the post-accumulate hooks of ``params``."""
    # Their dictionaries are emptied in place: a graph that is still alive runs what is in them, whatever the attribute.
    held = [(hooks, dict(hooks)) for p in params if (hooks := p._post_accumulate_grad_hooks)]
    for hooks, _ in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, content in held:
            hooks.update(content)


def _drawn(batches: Iterable[Any], calibration: Calibration | None, progress: bool) -> Iterator[Any]:
    """The first batches, as many as asked for."""
    wanted = None if calibration is None else calibration.batches
    met = 0
    for batch in track(islice(batches, wanted), "Calibrating", total=wanted, disable=not progress):
        met += 1
        yield batch
    if met < (wanted or 1):
        asked = "at least one batch" if wanted is None else f"`{calibration!r}`"
        raise ValueError(f"{asked} was asked for, but `batches` has {met}: give more data, or lower `batches`.")


def _samples(batch: Any) -> Iterator[Any]:
    """Each sample of ``batch`` as a batch of one."""
    leaves, structure = tree_flatten(batch)
    lengths = [leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim > 0]
    if len(set(lengths)) != 1 or lengths[0] == 0:
        found = f"tensors of lengths {lengths}" if lengths else "no tensor in a tuple, list or dictionary"
        raise ValueError(
            f"A batch of type `{type(batch).__name__}` cannot be split into samples along the first dimension: it has "
            f"{found}. Give batches whose tensors have one row for each sample, or use `Calibration(per='batch')`."
        )
    for i in range(lengths[0]):
        parts = [leaf[i : i + 1] if isinstance(leaf, Tensor) and leaf.ndim > 0 else leaf for leaf in leaves]
        yield tree_unflatten(parts, structure)


def _check(params: Mapping[str, nn.Parameter]) -> None:
    if not params:
        raise ValueError("`gather(params={})` has nothing to look at: give parameters by name.")
    if len(set(params.values())) < len(params):
        raise ValueError("`gather(params=...)` holds one tensor under two names: name a tied weight once.")
    for name, p in params.items():
        if not p.is_floating_point():
            raise ValueError(
                f"`gather(params=...)`: {name} is {p.dtype}, which has no gradient (quantized?): leave it out."
            )
