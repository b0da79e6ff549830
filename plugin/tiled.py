"""The gradient of selected entries of a linear map, without the whole gradient.

    y = x W^T + b:   dL/dW = gy^T x,   gy = dL/dy

hook      autograd makes it whole, and a hook at the weight takes the entries out: any tensor, any use
tiled     (gy^T x)[rows] = gy[:, rows]^T x    a tile of rows at a time, without rows that have no selected entry
sampled   (gy^T x)_ij = sum_t gy_ti x_tj      one dot product for each entry (`apportion.sampled`)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from apportion import sampled
from apportion.sampled import Dots
from apportion.stores import Watch

CAPTURES = ("auto", "hook", "tiled", "sampled")

TILE = 2**21
"""Entries of a tile, 8 MiB in fp32: smaller ones repeat the packing of x too often."""


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
    """The store of entries that a backward pass works for."""

    index: Tensor
    leaf: nn.Parameter
    watch: Watch | None


class SparseForward:
    """Stands as ``forward`` on one linear layer, whose backward pass works out the selected entries alone.

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
        capture: See `layout`.
    """

    def __init__(self, module: nn.Linear, p: nn.Parameter, store: Taker, hook: int, capture: str = "auto") -> None:
        self.module, self.p, self.store, self.hook, self.capture = module, p, store, hook, capture
        self._known: tuple[Tensor, torch.dtype] | None = None
        self._layout: Tiles | Dots | None = None
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
        kind = input.device.type
        cast = torch.is_autocast_enabled(kind) and input.dtype != torch.float64
        dtype = torch.get_autocast_dtype(kind) if cast else input.dtype
        layout = self._now(dtype)
        if layout is None:
            return nn.Linear.forward(self.module, input)
        # Cast here, so that what is kept for the backward pass is the cast one.
        out: Tensor = _Linear.apply(
            input.to(dtype), self.p.detach(), self.module.bias, self.store.leaf, layout, self.store
        )
        return out

    def _now(self, dtype: torch.dtype) -> Tiles | Dots | None:
        """The layout, if the coming backward pass can do with the selected entries alone, and if that pays."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return None
        p, store = self.p, self.store
        if not p.requires_grad or self.module._parameters.get("weight") is not p or store.watch is not None:
            return None
        if p._backward_hooks or list(p._post_accumulate_grad_hooks or ()) != [self.hook]:
            return None
        if self._known is None or self._known[0] is not store.index or self._known[1] != dtype:
            self._known = (store.index, dtype)
            self._layout = layout(self.capture, store.index, p.shape, dtype)
        return self._layout


def layout(capture: str, index: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tiles | Dots | None:
    """How the gradients of the entries at ``index`` are got: by tiles, by dot products, or by the hook, if None.

    ``auto`` takes what costs least. Forward and backward of one layer on 1024 tokens, one thread of a CPU, as shares of
    the time with the hook, and the temporaries that hold the gradient of the input in any case:

        weight         selected         tiled   sampled    hook MiB   tiled   sampled
        512 x 1376     5%               1.01    0.78            8.2     8.5       5.6
        512 x 1376     5% of the rows   0.72    0.76            8.2     6.1       5.6
        2048 x 5504    1%               0.99    0.67             65      30        22
        2048 x 5504    5%               0.85    0.64             67      33        26
        4096 x 11008   5%               0.94    0.67            224      60        60

    (`python -m apportion.recipes.bench.entries`.) So dot products are taken in fp32 and fp64 on the CPU, from
    `sampled.LEAST` entries on and up to the share `sampled.MOST`; tiles where at most half of the rows are selected
    from, and elsewhere from two tiles on, to save memory; else the hook.

    Args:
        capture: ``auto``, ``tiled``, or ``sampled``, which is left to the hook where it is not possible.
        index: Sorted flat indices of the selected entries.
        shape: Of the weight.
        dtype: Of the gradient.
    """
    size = shape[0] * shape[1]
    dots = sampled.possible(index, dtype) and (capture == "sampled" or sampled.pays(index, size))
    if capture == "sampled":
        return Dots.of(index, shape) if dots else None
    tiles = Tiles.of(index, shape, TILE)
    if capture == "tiled":
        return tiles
    rows = None if tiles.rows is None else len(tiles.rows)
    if dots and (rows is None or rows * shape[1] > 4 * len(index)):  # a dot product takes the time of several entries
        return Dots.of(index, shape)
    return tiles if rows is not None or size >= 2 * TILE else None


def layer_of(capture: str, module: nn.Module, p: nn.Parameter) -> nn.Linear | None:
    """``module`` if ``capture`` may leave out the gradient of its weight ``p``: a plain linear layer, untouched."""
    if capture == "hook" or type(module) is not nn.Linear or "forward" in vars(module):
        return None
    return module if module._parameters.get("weight") is p else None


class _Linear(torch.autograd.Function):
    """x W^T + b, with a gradient for the selected entries of W in the place of W's own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, leaf: Tensor, layout: Tiles | Dots, store: Taker
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layout, ctx.store = layout, store
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "A gradient of the gradient (`create_graph=True`) was asked for, which the backward pass of selected "
                "entries alone does not have: use `Compact(capture='hook')`."
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
        found = ctx.layout.take(flat, x.reshape(-1, x.shape[-1]).contiguous()) if wants_leaf else None
        return gx, None, gb, found, None, None
