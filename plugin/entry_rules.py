"""Rules for entries and rows: scores that come tensor by tensor, and what is compared with what."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from apportion.candidates import Ask, Chooser
from apportion.shares import largest_remainder
from apportion.topk import CHUNK, Split, Stream, finite
from apportion.types import resolve


def compared(per: str, ask: Ask, taken: Mapping[int, Tensor], call: str) -> Chooser:
    """A chooser of the ``ask.k`` best units outside ``taken``, compared over the model or within its parts.

    Args:
        per: ``model``, ``block`` or ``tensor``; parts get their share of the units that are not taken, by the largest
            remainder, or what ``ask.quotas`` says.
        ask: What is to be chosen.
        taken: Sorted indices (int64), by tensor, of units that cannot be chosen.
        call: The rule, for errors.

    Raises:
        ValueError: If there are fewer units than asked for, or the parts are not known.
    """
    free = [n - len(taken.get(i, ())) for i, n in enumerate(ask.counts)]
    if ask.k > sum(free):
        raise ValueError(f"`{call}` is asked for {ask.k} units, but only {sum(free)} can be chosen: lower the budget.")
    if ask.quotas is not None and per != "tensor":
        raise ValueError(f"`{call}` does not know the counts per tensor that the budget fixes: use per='tensor'.")
    if per == "model":
        return Stream(ask.k, taken)
    if per == "tensor":
        quotas = ask.quotas if ask.quotas is not None else largest_remainder(free, ask.k)
        for i, (quota, left) in enumerate(zip(quotas, free, strict=True)):
            if quota > left:
                raise ValueError(
                    f"`{call}` is asked for {quota} units of tensor {i}, of shape {tuple(ask.shapes[i])}, but only "
                    f"{left} can be chosen: lower the budget."
                )
        return Split(range(len(free)), quotas, taken)
    if per != "block":
        raise ValueError(f"`{call}` compares groups of layers, which entries do not have: use 'block' or 'tensor'.")
    if len(ask.blocks) != len(free):
        raise ValueError(f"`{call}` needs the layer of each tensor, but {len(ask.blocks)} of {len(free)} are known.")
    names = sorted(set(ask.blocks))
    parts = [names.index(block) for block in ask.blocks]
    sizes = [sum(left for left, home in zip(free, parts, strict=True) if home == part) for part in range(len(names))]
    return Split(parts, largest_remainder(sizes, ask.k), taken)


@dataclass(frozen=True)
class Threshold:
    """Selects every unit with a score above a fixed value, however many there are.

        selected = {i: score_i > above},   with ``within`` only among the selected ones

    The budget is not asked. The value is rounded to the precision of the scores; NaN and infinite scores are never
    above it.

    Args:
        above: The value to exceed.
        within: Chooses only among the units selected now, once there are any: the selection can shrink, not grow.

    Raises:
        ValueError: If ``above`` is not finite.

    Example:
        >>> weight = torch.tensor([1e-3, -5e-4, 1e-2, -3e-3])
        >>> chooser = Threshold(above=-2e-3).open(Ask((4,), (torch.Size([4]),), k=0))
        >>> chooser.push(0, -weight.abs())
        >>> chooser.chosen()[0]
        {0: tensor([0, 1])}

    References:
        Hu et al., *SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation*,
        ICLR 2025, https://arxiv.org/abs/2409.06633
    """

    above: float
    within: bool = False

    grain: ClassVar[str] = "entry"
    budgeted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.above):
            raise ValueError(
                f"`Threshold(above={self.above!r})` must be finite: units with a higher score are selected."
            )

    def open(self, ask: Ask) -> Chooser:
        """A chooser of all units above the value; ``ask.k`` plays no part."""
        shrinks = self.within and any(len(taken) for taken in ask.taken.values())
        return _Above(self.above, ask.taken if shrinks else None)


class _Above:
    """One pass of `Threshold`; ``among``: the units to choose from by tensor, None for all."""

    def __init__(self, above: float, among: Mapping[int, Tensor] | None) -> None:
        self._above = above
        self._among = among
        self._found: dict[int, Tensor] = {}
        self._rows: dict[int, Tensor] = {}

    @torch.no_grad()
    def push(self, i: int, scores: Tensor, payload: Tensor | None = None) -> None:
        if self._among is None:
            parts = [
                part.nonzero().flatten() + j * CHUNK for j, part in enumerate(map(self._passes, scores.split(CHUNK)))
            ]
            index = torch.cat(parts)
        else:
            index = self._among.get(i, torch.empty(0)).to(scores.device, torch.int64)
            index = index[self._passes(scores[index])]
        if len(index):
            self._found[i] = index
            if payload is not None:
                self._rows[i] = payload[index]

    def _passes(self, scores: Tensor) -> Tensor:
        return (scores > self._above) & (scores < math.inf)

    def chosen(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        return dict(sorted(self._found.items())), dict(sorted(self._rows.items()))


def connections(shares: Sequence[float], least: int) -> list[int]:
    """Entries that train in every row of each tensor, from how much of what matters most lies in the tensor.

        C_l = max(1, floor(least w_l / min of the positive w))

    Args:
        shares: Share w_l of each tensor, or counts in proportion to them; at least 0.
        least: Entries per row where the positive share is smallest.

    Example:
        >>> connections([0.5, 0.3, 0.2], least=1), connections([0.5, 0.3, 0.2, 0.0], least=2)
        ([2, 1, 1], [5, 3, 2, 1])
    """
    low = min((share for share in shares if share > 0), default=1.0)
    return [max(1, math.floor(least * share / low + 1e-9)) for share in shares]  # 0.6 / 0.2 is 2.9999999999999996


@dataclass(frozen=True)
class PerRow:
    """Selects the best few entries of every row, more of them in tensors that hold more of the best entries overall.

        w_l = share of the best ``share`` of all entries that lies in tensor l
        C_l = max(1, floor(least w_l / min of the positive w));   every row of tensor l trains its C_l best entries

    A row is what the first dimension counts (a neuron's incoming weights); a row shorter than C_l trains as a whole, as
    do all vectors, whose rows are single entries. The budget is not asked. The counts are known only once all tensors
    were seen, so the fp32 scores of all candidates, and the whole payload, are kept until then: 4 bytes per candidate,
    for a choice that is made once.

    Args:
        share: Fraction of all entries that tensors are measured by, in (0, 1].
        least: Entries per row in the tensor with the smallest positive share.

    Raises:
        ValueError: If an argument is out of its range, or at ``open`` if units are not single entries.

    Example:
        >>> chooser = PerRow(share=0.25).open(Ask((4, 4), (torch.Size([2, 2]),) * 2, k=0))
        >>> chooser.push(1, torch.tensor([4.0, 3.0, 9.0, 9.0]))
        >>> chooser.push(0, torch.tensor([0.0, 1.0, 2.0, 2.0]))
        >>> chooser.chosen()[0]
        {0: tensor([1, 2]), 1: tensor([0, 2])}

    Differences:
        Reconstructed from accounts of the paper, without code to compare with. That shares are not divided by the
        tensors' sizes, that ratios are rounded down, and that tensors without a share train one entry per row is ours.

    References:
        Luo et al., *TR-PTS: Task-Relevant Parameter and Token Selection for Efficient Tuning*, ICCV 2025,
        https://arxiv.org/abs/2507.22872
    """

    share: float = 0.05
    least: int = 1

    grain: ClassVar[str] = "entry"
    budgeted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"`PerRow(share={self.share!r})` must lie in (0, 1]: it is a fraction of all entries.")
        if self.least < 1:
            raise ValueError(f"`PerRow(least={self.least!r})` must be at least 1: every row trains that many entries.")

    def open(self, ask: Ask) -> Chooser:
        """A chooser of a few entries of every row; ``ask.k`` and what is selected now play no part."""
        for count, shape in zip(ask.counts, ask.shapes, strict=True):
            if count != shape.numel():
                raise ValueError(
                    f"`{self!r}` chooses single entries of each row, but a tensor of shape {tuple(shape)} has {count} "
                    "units: use entries as units, or `TopK(per='tensor')` for rows."
                )
        return _Rowwise(self, ask)


class _Rowwise:
    """One pass of `PerRow`."""

    def __init__(self, rule: PerRow, ask: Ask) -> None:
        self._rule = rule
        self._shapes = ask.shapes
        self._scores: dict[int, Tensor] = {}
        self._payloads: dict[int, Tensor] = {}

    def push(self, i: int, scores: Tensor, payload: Tensor | None = None) -> None:
        self._scores[i] = scores.detach()
        if payload is not None:
            self._payloads[i] = payload

    @torch.no_grad()
    def chosen(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        order = sorted(self._scores)
        stream = Stream(resolve(self._rule.share, sum(len(scores) for scores in self._scores.values())))
        for i in order:
            stream.push(i, self._scores[i])
        best = stream.chosen()[0]
        counts = connections([len(best.get(i, ())) for i in order], self._rule.least)
        chosen = {}
        for i, count in zip(order, counts, strict=True):
            shape = self._shapes[i]
            rows = shape[0] if shape else 1
            chosen[i] = best_of_rows(self._scores[i].reshape(rows, shape.numel() // max(1, rows)), count)
        return chosen, {i: payload[chosen[i]] for i, payload in sorted(self._payloads.items())}


def best_of_rows(scores: Tensor, count: int) -> Tensor:
    """Flat sorted indices (int64) of the ``count`` best of every row, in the order of importance of `Stream`.

    Args:
        scores: Shape (rows, width).
        count: How many; whole rows from the width on.

    Example:
        >>> best_of_rows(torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]]), 2)
        tensor([1, 2, 3, 4])
    """
    width = scores.shape[1]
    if count >= width:
        return torch.arange(scores.numel(), device=scores.device)
    step = max(1, CHUNK // width)
    found = []
    for start in range(0, len(scores), step):
        keys = finite(scores[start : start + step])
        cut = keys.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True)
        above, ties = keys > cut, keys == cut
        spare = count - above.sum(1, keepdim=True)
        chosen = above | (ties & (ties.cumsum(1) <= spare))
        found.append(chosen.flatten().nonzero().flatten() + start * width)
    return torch.cat(found)
