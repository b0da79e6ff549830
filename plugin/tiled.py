"""The gradient of selected entries of a linear map, tile by tile: the whole gradient never exists.

    y = x W^T + b:   dL/dW [rows] = (dL/dy)[:, rows]^T x        [rows]: a tile, of which the selected entries are taken

A hook at the parameter takes the entries out of a gradient that autograd has made whole. It works for any tensor, but
what it takes them out of is as large as the weight; a tile is at most `TILE` entries, and rows without a selected entry
are not computed at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from apportion.stores import Watch

CAPTURES = ("auto", "hook", "tiled")

TILE = 2**21
"""Entries of a tile: 8 MiB in fp32. Smaller ones repeat the packing of x, larger ones fall out of the cache."""


@dataclass(frozen=True, eq=False)
class Tiles:
    """How the selected entries of a matrix lie in tiles of whole rows.

    Where at most half of the rows have a selected entry, tiles are made of these rows alone.

    Attributes:
        index: Sorted flat indices of the selected entries, shape (k,).
        width: Entries of a row.
        rows: Rows that have a selected entry, or None for all of them.
        counts: How many each of ``rows`` has.
        cuts: Of each tile that has any: its first row and the one after its last, counted in ``rows`` where there are
            such, and its first entry and the one after its last.

    Example:
        >>> tiles = Tiles.of(torch.tensor([1, 2, 7]), (4, 2), size=4)
        >>> tiles.cuts
        ((0, 2, 0, 2), (2, 4, 2, 3))
        >>> gy, x = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[10.0, 1.0]])
        >>> tiles.take(gy, x)  # of [[10, 1], [20, 2], [30, 3], [40, 4]]
        tensor([ 1., 20.,  4.])
    """

    index: Tensor
    width: int
    rows: Tensor | None
    counts: Tensor | None
    cuts: tuple[tuple[int, int, int, int], ...]

    @classmethod
    def of(cls, index: Tensor, shape: Sequence[int], size: int) -> Tiles:
        """The tiles, of ``size`` entries at most but of one row at least, of a matrix of ``shape``."""
        height, width = shape
        each = max(1, size // max(1, width))
        if isinstance(index, FakeTensor):  # without values: spread evenly
            starts = range(0, height, each)
            bounds = [len(index) * start // max(1, height) for start in starts] + [len(index)]
            return cls(index, width, None, None, _cuts(height, each, bounds))
        rows, counts = torch.unique_consecutive(index // width, return_counts=True)
        if 2 * len(rows) <= height:
            height, edges = len(rows), rows[::each] * width
        else:
            edges = torch.arange(0, height, each, dtype=index.dtype, device=index.device) * width
            rows = counts = None
        bounds = [*torch.searchsorted(index, edges).tolist(), len(index)]
        return cls(index, width, rows, counts, _cuts(height, each, bounds))

    def take(self, gy: Tensor, x: Tensor) -> Tensor:
        """The selected entries of ``gy^T x``, without forming it.

        Args:
            gy: Gradient of the output, shape (n, height).
            x: The input, shape (n, width), in the same precision.

        Returns:
            The entries in the order of `index`, shape (k,), in that precision.
        """
        found = gy.new_empty(len(self.index))
        most = max((stop - start for start, stop, _, _ in self.cuts), default=0)
        room = gy.new_empty(most, self.width)  # one for all tiles, which stays in the cache
        for start, stop, first, last in self.cuts:
            tile = room[: stop - start]
            index = self.index[first:last]
            if self.rows is None or self.counts is None:
                torch.mm(gy[:, start:stop].t(), x, out=tile)
                index = index - start * self.width
            else:
                rows, counts = self.rows[start:stop], self.counts[start:stop]
                torch.mm(gy.index_select(1, rows).t(), x, out=tile)
                left_out = rows - torch.arange(stop - start, dtype=rows.dtype, device=rows.device)
                shift = left_out * self.width
                index = index - shift.repeat_interleave(counts, output_size=last - first)
            found[first:last] = tile.view(-1).index_select(0, index)
        return found


def _cuts(height: int, each: int, bounds: Sequence[int]) -> tuple[tuple[int, int, int, int], ...]:
    starts = range(0, height, each)
    tiles = zip(starts, bounds, bounds[1:], strict=False)
    return tuple((at, min(at + each, height), first, last) for at, first, last in tiles if last > first)


class Taker(Protocol):
    """The store of entries that a tiled backward pass works for."""

    index: Tensor
    leaf: nn.Parameter
    watch: Watch | None


class TiledForward:
    """Stands as ``forward`` on one linear layer, with a backward pass that goes tile by tile.

    The weight takes part without its history, and the leaf of the selected entries as an input beside it, so that
    autograd adds up their gradients over micro-batches, uses and recomputations. The hook of the store stays, for uses
    of the weight elsewhere, as of a tied one. Whoever else wants the gradient of the weight, by a hook or by a store's
    ``watch``, gets it whole: then the layer works as always, as it does for weights that are frozen, exchanged
    (`torch.func`), or compiled.

    A gradient of the gradient does not exist, nor does `torch.autograd.grad` towards the weight.

    Args:
        module: The layer, whose weight is ``p``.
        p: The weight.
        store: Takes the entries.
        hook: Number of the store's own hook at the weight.
        always: Whether to go by tiles although it does not pay; see `pays`.
    """

    def __init__(self, module: nn.Linear, p: nn.Parameter, store: Taker, hook: int, always: bool = False) -> None:
        self.module, self.p, self.store, self.hook, self.always = module, p, store, hook, always
        self._tiles: Tiles | None = None
        module.forward = self  # type: ignore[method-assign]

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the layer, or a saved one, has its class's own forward pass."""
        return getattr, (self.module, "forward")

    def detach(self) -> None:
        """Gives the layer its own forward pass back."""
        if vars(self.module).get("forward") is self:
            del self.module.forward

    def __call__(self, input: Tensor) -> Tensor:
        """As the layer's own forward pass; the name of the argument is its."""
        tiles = self._now()
        if tiles is None:
            return nn.Linear.forward(self.module, input)
        kind = input.device.type
        if torch.is_autocast_enabled(kind) and input.dtype != torch.float64:
            input = input.to(torch.get_autocast_dtype(kind))  # here, so that what is kept for backward is the cast one
        out: Tensor = _Linear.apply(input, self.p.detach(), self.module.bias, self.store.leaf, tiles, self.store)
        return out

    def _now(self) -> Tiles | None:
        """The tiles, if the coming backward pass can do with the selected entries alone, and if that pays."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return None
        p, store = self.p, self.store
        if not p.requires_grad or self.module._parameters.get("weight") is not p or store.watch is not None:
            return None
        if p._backward_hooks or list(p._post_accumulate_grad_hooks or ()) != [self.hook]:
            return None
        if self._tiles is None or self._tiles.index is not store.index:
            self._tiles = Tiles.of(store.index, p.shape, TILE)
        return self._tiles if self.always or pays(self._tiles, p) else None


def pays(tiles: Tiles, p: Tensor) -> bool:
    """Whether tiles cost less than the whole gradient of ``p``, in memory without costing more time, or in both."""
    return tiles.rows is not None or p.numel() >= 2 * TILE


def layer_of(capture: str, module: nn.Module, p: nn.Parameter) -> nn.Linear | None:
    """``module`` if ``capture`` lets the gradient of its weight ``p`` go by tiles: a plain linear layer, untouched."""
    if capture == "hook" or type(module) is not nn.Linear or "forward" in vars(module):
        return None
    return module if module._parameters.get("weight") is p else None


class _Linear(torch.autograd.Function):
    """x W^T + b, with a gradient for the selected entries of W in the place of W's own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, leaf: Tensor, tiles: Tiles, store: Taker
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tiles, ctx.store = tiles, store
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "A gradient of the gradient (`create_graph=True`) was asked for, which the backward pass by tiles does "
                "not have: use `Compact(capture='hook')`."
            )
        if ctx.store.watch is not None:
            raise RuntimeError(
                "The coming selection reads whole gradients, but this forward pass ran before it was prepared, when "
                "the step before had not been taken: run forward after `step`, or use `Compact(capture='hook')`."
            )
        (gy,) = grads
        x, weight = ctx.saved_tensors
        wants_x, _, wants_bias, wants_leaf, _, _ = ctx.needs_input_grad
        # Gradients in half precision become what the leaf, the bias and the input are on their way to them.
        gx = gy @ weight.to(gy.dtype) if wants_x else None
        flat = gy.reshape(-1, gy.shape[-1]).contiguous()
        gb = flat.sum(0) if wants_bias else None
        found = ctx.tiles.take(flat, x.reshape(-1, x.shape[-1]).contiguous()) if wants_leaf else None
        return gx, None, gb, found, None, None
