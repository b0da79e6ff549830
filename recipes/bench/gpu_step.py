"""The compact optimizer step alone: how much of a device's memory bandwidth it gets out of the bytes that it must move.

For each selected entry of bf16 weights, with fp32 value, gradient and moments, AdamW moves

    gather          index 4 + gradient 2 read, fp32 gradient 4 written                            10 bytes
    AdamW           gradient 4, value 4, moments 8 read, value 4, moments 8 written               28
    write-through   index 4, value 4 read, weight 2 written                                       10

48 bytes. Memory is read and written in sectors of 32 bytes, 16 bf16 entries: with a share s selected at random, a
share 1 - (1 - s)^16 of the sectors of a weight is touched, read once in the gather, read and written once in the
write-through, which is the bytes ``by sectors`` in place of the three times 2. The bandwidth is that of a copy of the
same device, read and written.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SECTOR = 32
WAYS = ("eager", "foreach", "fused", "compiled")
_LR, _BETAS, _EPS, _DECAY = 1e-4, (0.9, 0.999), 1e-8, 0.01


def moved(entries: int, share: float) -> tuple[float, float]:
    """Bytes of a step: of the entries alone, and by sectors.

    Example:
        >>> moved(1000, 1.0)
        (48000.0, 48000.0)
        >>> round(moved(1000, 0.01)[1] / 1000)
        131
    """
    size = 2
    touched = (1.0 - (1.0 - share) ** (SECTOR // size)) / share  # sectors' worth of weights for each selected entry
    return 48.0 * entries, (42.0 + 3 * size * touched) * entries


def bandwidth(device: str, size: int, turns: int) -> float:
    """Bytes a second of a copy of ``size`` bytes, read and written."""
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    return 2.0 * size / _median(lambda: target.copy_(source), device, turns)


def _median(run: Callable[[], Any], device: str, turns: int) -> float:
    seconds = []
    for turn in range(turns + 2):
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        if turn >= 2:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def stepper(way: str, shape: tuple[int, int], share: float, device: str) -> tuple[Callable[[], None], int, Tensor]:
    """A step on one matrix, the number of its entries, and the matrix, in one of `WAYS`.

    Args:
        way: ``eager`` (the loop form), ``foreach`` and ``fused`` are torch's AdamW between gather and write-through,
            as `apportion.compact` has them; ``compiled`` is all of it in one graph of torch.compile.
        shape: Of the weight.
        share: Of its entries that are selected.
        device: Where it is.
    """
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(shape, generator=generator).to(device, torch.bfloat16)
    dense = torch.randn(shape, generator=generator).to(device, torch.bfloat16)
    index = (torch.rand(p.numel(), generator=generator) < share).nonzero().flatten().to(device)
    place = index.to(torch.int32)
    leaf = torch.nn.Parameter(p.view(-1)[index].float())
    if way == "compiled":
        return _compiled(p, dense, place, leaf), len(index), p
    option = {} if way == "eager" else {way: True}
    adamw = torch.optim.AdamW([leaf], lr=_LR, betas=_BETAS, eps=_EPS, weight_decay=_DECAY, **option)

    @torch.no_grad()
    def step() -> None:
        leaf.grad = dense.view(-1).index_select(0, place).float()
        adamw.step()
        p.view(-1).index_copy_(0, place.long(), leaf.detach().to(p.dtype))

    return step, len(index), p


def _compiled(p: Tensor, dense: Tensor, place: Tensor, leaf: Tensor) -> Callable[[], None]:
    first, second = torch.zeros_like(leaf), torch.zeros_like(leaf)
    count = torch.zeros((), device=leaf.device)

    def body(p: Tensor, dense: Tensor, value: Tensor, first: Tensor, second: Tensor, count: Tensor) -> None:
        grad = dense.view(-1)[place].float()
        count.add_(1.0)
        value.mul_(1.0 - _LR * _DECAY)
        first.lerp_(grad, 1.0 - _BETAS[0])
        second.mul_(_BETAS[1]).addcmul_(grad, grad, value=1.0 - _BETAS[1])
        size = (second / (1.0 - _BETAS[1] ** count)).sqrt() + _EPS
        value.sub_(_LR / (1.0 - _BETAS[0] ** count) * first / size)
        p.view(-1)[place] = value.to(p.dtype)

    graph = torch.compile(body)

    @torch.no_grad()
    def step() -> None:
        graph(p, dense, leaf, first, second, count)

    return step


def compared(
    device: str,
    shape: tuple[int, int] = (4096, 11008),
    shares: tuple[float, ...] = (0.001, 0.01, 0.05),
    turns: int = 20,
    ways: tuple[str, ...] = WAYS,
    copied: int = 2**30,
) -> dict[str, Any]:
    """Times of a step each way, with the share of the bandwidth that their bytes are; a way that fails says why."""
    speed = bandwidth(device, copied, turns)
    rows = []
    for share in shares:
        for way in ways:
            found: dict[str, Any] = {"way": way, "share": share, "shape": list(shape)}
            try:
                run, entries, _ = stepper(way, shape, share, device)
                seconds = _median(run, device, turns)
            except Exception as error:  # of the compiler, where there is none
                found |= {"run": False, "reason": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            else:
                alone, sectors = moved(entries, share)
                of = {"of_bandwidth": alone / seconds / speed, "of_bandwidth_by_sectors": sectors / seconds / speed}
                found |= {"run": True, "entries": entries, "seconds": seconds, "bytes": alone, "sectors": sectors, **of}
            rows.append(found)
    return {"bandwidth": speed, "rows": rows}
