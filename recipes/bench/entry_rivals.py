"""What choosing entries takes, beside others who choose the same ones: ID3's growth and LIFT's refresh."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apportion.callbacks import ID3
from apportion.candidates import Site
from apportion.collector import Collector
from apportion.optim import Selective
from apportion.principal import Principal
from apportion.recipes.bench import packages
from apportion.recipes.bench.entry_bars import LR, Size, adamw, backward, candidates, trainable
from apportion.topk import best
from apportion.windows import Window

RIVAL = packages.SELECTIVE_OPTIMIZERS.requirement
EPS = 1e-3


def fetched(cache: Path = packages.CACHE) -> Any:
    """The function of selective-optimizers that makes an optimizer, from the cache or from PyPI.

    Raises:
        RuntimeError: If it is neither there nor to be had.
    """
    return packages.module(packages.SELECTIVE_OPTIMIZERS, "selective_optimizers.wrap", cache).get_selective_optimizer


def selection_step(size: Size, share: float, turns: int, make: Any, growth: int = 100) -> dict[str, Any]:
    """ID3's steps, without forward and backward, beside those of selective-optimizers on the same gradients.

    A step is all that comes after the gradients: scores, choice, masks and AdamW, and what we do as gradients arrive.

    Args:
        size: The model.
        share: Share of the entries that train in the end.
        turns: Steps that the medians are over.
        make: What `fetched` gives.
        growth: Steps in which the share is reached.
    """
    ours, theirs = size.build(), size.build()
    n = sum(p.numel() for p in trainable(ours))
    budget = int(share * n) // growth * growth
    method = ID3(budget, exp=1.0, eps=EPS, form="front", max_steps=growth, train_head="unit")  # type: ignore[arg-type]
    compact = Selective(adamw(ours, weight_decay=0.0), ours, method)
    kind = make(torch.optim.AdamW, "id3")
    rival = kind(
        trainable(theirs), lr=LR, weight_decay=0.0, budget=budget, max_steps=growth, eps=EPS, exp=1.0, verify=False
    )
    batches, measured, same = size.batches(), [], True
    for turn in range(turns + 1):
        tokens = next(batches)
        with watched((Collector, "_look"), (Window, "_choose")) as chosen:
            backward(ours, tokens)
            in_backward = sum(chosen)
            step = in_backward + _seconds(compact.step)
        compact.zero_grad()
        backward(theirs, tokens)
        with watched((kind, "update_chosen")) as chosen_rival:
            step_rival = _seconds(rival.step)
        rival.zero_grad()
        same = same and _same(compact, rival)
        if turn:
            measured.append((step, step_rival, sum(chosen), sum(chosen_rival)))
    medians = [statistics.median(column) for column in zip(*measured, strict=True)]
    return {
        "run": True,
        "rival": RIVAL,
        "entries": n,
        "budget": budget,
        "growth": growth,
        "turns": turns,
        **dict(zip(("step", "rival_step", "choosing", "rival_choosing"), medians, strict=True)),
        "step_ratio": statistics.median(a / b for a, b, _, _ in measured),
        "choosing_ratio": statistics.median(a / b for _, _, a, b in measured),
        "same_masks": same,
    }


def _same(compact: Selective, rival: Any) -> bool:
    """Whether both have chosen the same entries."""
    for p, mask in zip(candidates(compact).tensors, rival.param_groups[0]["chosen_masks"], strict=True):
        if not torch.equal(compact.owner.narrow(p).index.long(), mask.flatten().nonzero().flatten()):
            return False
    return True


def _seconds(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


@contextmanager
def watched(*methods: tuple[type, str]) -> Iterator[list[float]]:
    """Notes the seconds of every call of these methods of classes; of calls within calls, those of the outer one."""
    seconds: list[float] = []
    inside = False

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return method(*args, **kwargs)
            inside, began = True, time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                inside = False
                seconds.append(time.perf_counter() - began)

        return run

    before = [(kind, name, getattr(kind, name)) for kind, name in methods]
    for kind, name, method in before:
        setattr(kind, name, timed(method))
    try:
        yield seconds
    finally:
        for kind, name, method in before:
            setattr(kind, name, method)


def refresh(shape: tuple[int, int], rank: int, share: float, turns: int, decaying: bool) -> dict[str, Any]:
    """LIFT's choice for one matrix by subspace iteration, cold and warm, beside that by an exact SVD.

    Args:
        shape: Of the matrix.
        rank: Rank of the approximation.
        share: Share of the entries that are chosen.
        turns: Choices that the medians are over.
        decaying: Whether its singular values fall as j^-0.35, or are those of noise, which has no leading part.
    """
    seconds: list[tuple[float, float, float]] = []
    overlaps: list[tuple[float, float]] = []
    k = int(share * shape[0] * shape[1])
    for turn in range(turns):
        generator = torch.Generator().manual_seed(turn)
        weight = _matrix(shape, decaying, generator)
        site = Site("w", 0, weight, seed=turn)
        score = Principal(rank)
        _, cold = _clocked(score, site, k)
        chosen, exact = _clocked(Principal(rank, exact=True), site, k)
        first = best(score.entries(Site("w", 0, weight, seed=turn)).flatten(), k)
        moved = weight.clone()
        moved.view(-1)[chosen] += 0.05 * weight.std() * torch.randn(k, generator=generator)
        again = Site("w", 0, moved, seed=turn, memory=site.memory)
        second, warm = _clocked(score, again, k)
        truth, _ = _clocked(Principal(rank, exact=True), again, k)
        seconds.append((cold, warm, exact))
        overlaps.append((_overlap(first, chosen), _overlap(second, truth)))
    cold_s, warm_s, exact_s = (statistics.median(column) for column in zip(*seconds, strict=True))
    return {
        "shape": list(shape),
        "rank": rank,
        "values": "j^-0.35" if decaying else "noise",
        "share": share,
        "turns": turns,
        "exact_seconds": exact_s,
        "cold_seconds": cold_s,
        "warm_seconds": warm_s,
        "cold_ratio": statistics.median(c / e for c, _, e in seconds),
        "warm_ratio": statistics.median(w / e for _, w, e in seconds),
        "cold_overlap": min(c for c, _ in overlaps),
        "warm_overlap": min(w for _, w in overlaps),
    }


def _matrix(shape: tuple[int, int], decaying: bool, generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if not decaying:
        return noise
    u, _, vh = torch.linalg.svd(noise, full_matrices=False)
    decaying_values = torch.arange(1.0, min(shape) + 1).pow(-0.35)
    return torch.mm(u * decaying_values, vh)


def _clocked(score: Principal, site: Site, k: int) -> tuple[Tensor, float]:
    began = time.perf_counter()
    chosen = best(score.entries(site).flatten(), k)
    return chosen, time.perf_counter() - began


def _overlap(one: Tensor, two: Tensor) -> float:
    return float(torch.isin(one, two).float().mean())
