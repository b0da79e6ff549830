"""What ranks must agree on, and how: gradients, losses, choices.

Gradients of what trains are averaged by one flat all-reduce per dtype and bucket, after the last micro-batch of a
window. Averaging what is already equal on all ranks changes it by rounding at most, and alike on all of them, so a
repeated reduction does no harm.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def mean(value: Tensor) -> Tensor:
    """The average of ``value`` over ranks, equal on all of them. Shapes: argument and result alike."""
    ranks = world_size()
    if ranks == 1:
        return value
    total = value.detach().to(_device(), copy=True)
    dist.all_reduce(total)
    return (total / ranks).to(value.device)


def agree(what: str, value: str) -> None:
    """Compares ``value`` across ranks.

    Raises:
        RuntimeError: On every rank, if any two ranks differ.
    """
    if world_size() == 1:
        return
    number = int.from_bytes(hashlib.sha256(value.encode()).digest()[:7], "big")
    extremes = torch.tensor([number, -number], dtype=torch.int64, device=_device())
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    if int(extremes[0]) != -int(extremes[1]):
        raise RuntimeError(
            f"Ranks disagree on {what}; this rank has {value[:200]}. Give every rank the same configuration and seed: "
            "in a sweep, start one job per process group, so that no rank draws a trial of its own."
        )


def gather(value: Any) -> list[Any]:
    """Every rank's ``value`` in rank order, on all ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Copies rank 0's values into ``tensors`` on all ranks."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


class Reducer:
    """Averages gradients over ranks.

        g_r <- (1 / R) sum_r g_r      for tensors with a gradient on some rank; a missing one counts as zero

    Args:
        bucket_bytes: Upper bound on the flat buffer, in bytes; a larger tensor has a buffer of its own.

    Attributes:
        bytes: Bytes handed to the process group so far, by this rank.
    """

    def __init__(self, bucket_bytes: int = 25 * 2**20) -> None:
        self.bucket_bytes = bucket_bytes
        self.bytes = 0

    @torch.no_grad()
    def reduce(self, params: Sequence[nn.Parameter]) -> None:
        """Averages the gradients of ``params``, which are the same tensors in the same order on all ranks."""
        ranks = world_size()
        if ranks == 1:
            return
        for bucket in self._buckets(params):
            self._reduce_bucket(bucket, ranks)

    def _buckets(self, params: Sequence[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
        bucket: list[nn.Parameter] = []
        size = 0
        for p in params:
            bytes_ = p.numel() * p.element_size()
            if bucket and (
                size + bytes_ > self.bucket_bytes or p.dtype != bucket[0].dtype or p.device != bucket[0].device
            ):
                yield bucket
                bucket, size = [], 0
            bucket.append(p)
            size += bytes_
        if bucket:
            yield bucket

    def _reduce_bucket(self, bucket: list[nn.Parameter], ranks: int) -> None:
        # One flag per tensor rides along: a tensor without a gradient on any rank must stay so, or decay moves it.
        missing = any(p.grad is None for p in bucket)
        flags = bucket[0].new_ones(len(bucket))
        if missing:  # values of the host's make the device wait, and reading them the host: only where needed
            flags = bucket[0].new_tensor([0.0 if p.grad is None else 1.0 for p in bucket])
        parts = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in bucket]
        flat = torch.cat([*parts, flags]).div_(ranks)  # before the sum, which may overflow in half precision
        dist.all_reduce(flat)
        self.bytes += flat.numel() * flat.element_size()
        *parts, flags = torch.split(flat, [p.numel() for p in bucket] + [len(bucket)])
        seen = flags.tolist() if missing else [1.0] * len(bucket)
        for p, part, flag in zip(bucket, parts, seen, strict=True):
            if p.grad is not None:
                p.grad.copy_(part.view_as(p))
            elif flag > 0.0:
                p.grad = part.view_as(p).clone()


class IgnoredNames:
    """Names of the parameters that DistributedDataParallel must leave alone, worked out when it wraps the module.

    It iterates over this at wrap time, when a model built in ``configure_model`` exists already. The smallest trainable
    parameter stays with it, since it refuses a module without any.

    Args:
        module: The module that will be wrapped.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __iter__(self) -> Iterator[str]:
        trainable = {name: p for name, p in self.module.named_parameters(remove_duplicate=False) if p.requires_grad}
        if trainable:
            anchor = min(trainable.values(), key=lambda p: p.numel())
            yield from (name for name, p in trainable.items() if p is not anchor)


def take_over(wrapper: nn.Module, params: Iterable[nn.Parameter]) -> None:
    """Makes a DistributedDataParallel wrapper leave gradients to a `Reducer`, and gives ``params`` rank 0's values.

    Args:
        wrapper: The wrapped model. Its own reduction would cover what was trainable when it was wrapped, whatever is
            frozen since; it keeps synchronising buffers.
        params: Every parameter that was trainable when the model was wrapped.
    """
    hold_back(wrapper, fresh=True)
    broadcast(p.data for p in params)


def hold_back(wrapper: nn.Module, fresh: bool) -> None:
    """Keeps a DistributedDataParallel wrapper from reducing gradients, and lets it synchronise buffers once per window.

    Lightning switches the reduction on again after every batch of manual optimization, and a forward pass without
    reduction switches the buffers' synchronisation off: both are set anew before each batch.

    Args:
        wrapper: The wrapped model.
        fresh: Whether the coming batch is the first of an optimizer step.
    """
    wrapper.require_backward_grad_sync = False  # type: ignore[assignment]
    if fresh:
        wrapper.require_forward_param_sync = True  # type: ignore[assignment]
