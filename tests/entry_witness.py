"""Methods that select single entries, and a callback that sees what really happens to every entry at every step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning.pytorch
import pytorch_lightning
import torch
from methods import ENTRY_METHODS
from torch import Tensor, nn
from toys import Net, lora_net, named, weights

from apportion.budgets import Constant, Increment, RankEquivalent
from apportion.calibrated import Fisher
from apportion.candidates import Site
from apportion.driver import SelectiveTuning
from apportion.effects import Blend, Compact, Hold
from apportion.entry_rules import Threshold
from apportion.entry_units import Entries, Rows
from apportion.entrywise import D3, GradientMagnitude, Magnitude, RandomEntries
from apportion.penalties import Nuclear
from apportion.principal import Principal
from apportion.rules import TopK
from apportion.types import When

MATRICES = 1024
"""Entries of the matrices of two layers of the toy net, in 12 tensors; the head, which trains whole, has 104."""


def small(**options: Any) -> nn.Module:
    """The toy net with two layers."""
    return Net(blocks=2, **options)


def adapted(**options: Any) -> nn.Module:
    """The same with low-rank adapters."""
    return lora_net(blocks=2, **options)


def method(*slots: Any, **options: Any) -> Callable[..., SelectiveTuning]:
    """Makes the method of these slots; what is given then goes before ``options``."""
    return lambda **given: SelectiveTuning(*slots, **{**options, **given})


@dataclass(frozen=True)
class Case:
    """A method of entries that selects often, and what must come of it.

    Attributes:
        make: Makes the callback.
        counts: Entries selected at each of the first six steps; None where scores decide.
        net: Makes the model.
        switches: Steps, of the first six, before or in which it selects.
        units: Units selected at every step, where they are not entries.
    """

    make: Callable[..., SelectiveTuning]
    counts: tuple[int, ...] | None
    net: Callable[..., nn.Module] = small
    switches: tuple[int, ...] = (0, 2, 4)
    units: int | None = None

    @property
    def decided_by_gradients(self) -> bool:
        """Whether gradients of the step itself decide."""
        return "grad" in self.make().slots.score.needs


EVERYTHING: dict[str, Any] = {"embeddings": "unit", "head": "unit", "norm": "unit", "bias": "unit"}
EACH = (0, 1, 2, 3, 4, 5)
GROWING = (Entries(), D3(), Increment(300, finish=6), TopK(grow=True))
REFRESHED = (Entries(), GradientMagnitude(), Constant(0.1), TopK())

CASES: dict[str, Case] = {
    "growing": Case(method(*GROWING, Compact()), (50, 100, 150, 200, 250, 300), switches=EACH),
    "growing every 2 steps, ages of entries": Case(
        method(
            Entries(**EVERYTHING),
            D3(exp=2.0),
            Increment(601, "front", finish=5),
            TopK(grow=True),
            Compact(age="entry"),
            select_when=When(every=2),
        ),
        (241, 241, 481, 481, 601, 601),
    ),
    "principal": Case(
        method(Entries(), Principal(2), RankEquivalent(1), TopK(per="tensor"), Compact(), select_when=When(every=2)),
        (2 * (4 * 16 + 2 * 24),) * 6,
    ),
    "gradients, reverting": Case(
        method(*REFRESHED, Compact(leaving="revert"), select_when=When(every=2)), (MATRICES // 10,) * 6
    ),
    "gradients by tiles": Case(
        method(*REFRESHED, Compact(capture="tiled"), select_when=When(every=2)), (MATRICES // 10,) * 6
    ),
    "shrinking": Case(
        method(
            Entries(norm="unit"),
            Magnitude(reverse=True),
            Constant(1.0),
            Threshold(-0.2, within=True),
            Compact(kept="reset", penalty=Nuclear(0.1, min_side=8)),
            select_when=When(every=2),
        ),
        None,
    ),
    "drawn": Case(
        method(Entries(embeddings="unit"), RandomEntries(), Constant(150), TopK(), Compact(), select_when=When(end=1)),
        (150,) * 6,
        switches=(0,),
    ),
    "rows": Case(
        method(Rows(), GradientMagnitude(), Constant(0.25), TopK(), Compact(), select_when=When(every=2)),
        None,
        units=28,
    ),
    "fisher": Case(
        method(Entries(), Fisher(batches=2), Constant(0.1), TopK(), Compact(), select_when=When(end=1)),
        (MATRICES // 10,) * 6,
        switches=(0,),
    ),
    "growing, held": Case(method(*GROWING, Hold()), (50, 100, 150, 200, 250, 300), switches=EACH),
    "gradients, held, reverting": Case(
        method(*REFRESHED, Hold(leaving="revert"), select_when=When(every=2)), (MATRICES // 10,) * 6
    ),
    "growing on adapters": Case(
        method(Entries(), D3(), Increment(120, finish=6), TopK(grow=True), Compact()),
        (20, 40, 60, 80, 100, 120),
        net=adapted,
        switches=EACH,
    ),
    "blended": Case(
        method(Rows(norm="unit"), Magnitude(), Constant(1.0), TopK(), Blend(), select_when=When(end=1)),
        (MATRICES + 5 * 16,) * 6,
        switches=(0,),
    ),
}
CASES |= {name: Case(row.make, row.selected, Net, row.switches) for name, row in ENTRY_METHODS.items()}


def names_of(kind: type) -> list[str]:
    """Cases with an effect of this kind."""
    return [name for name, case in CASES.items() if isinstance(case.make().slots.effect, kind)]


@dataclass
class Seen:
    """One optimizer step as seen from outside; everything by parameter name.

    Attributes:
        step: Optimizer steps done before.
        units: Units that the selection names.
        selected: Bool masks of the candidates, of what stands in the optimizers.
        before: Values of all parameters when the last step had ended.
        after: Values when this one has.
        dense: Gradients of the candidates as autograd gave them, summed over micro-batches, without loss scale.
        taken: Gradients that the optimizers hold for the selected entries, before the Trainer clips them.
        full: Gradients that candidates hold themselves when the optimizer steps.
        left: Gradients that any parameter still has when the step has ended.
        state: Entries of state in the optimizers.
        places: Entries in their param groups.
        still: Whether the values that the optimizers hold are the same as before.
    """

    step: int
    units: int = 0
    selected: dict[str, Tensor] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)
    taken: dict[str, Tensor] = field(default_factory=dict)
    full: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)
    state: int = 0
    places: int = 0
    still: bool = False

    @property
    def count(self) -> int:
        """Selected entries."""
        return sum(int(mask.sum()) for mask in self.selected.values())


class EntryWitness(pytorch_lightning.Callback, lightning.pytorch.Callback):  # type: ignore[misc]
    """Watches the selection of entries ``driver``, which stands before it in the list of callbacks.

    Args:
        driver: The selection.
        dense: Whether to see gradients as autograd gives them; that keeps a backward pass from going by tiles.
    """

    def __init__(self, driver: SelectiveTuning, dense: bool = True) -> None:
        self.driver, self.sees_dense = driver, dense
        self.steps: list[Seen] = []
        self.present: Seen | None = None
        self.origin: dict[str, Tensor] = {}
        self.handles: list[Any] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        bound = self.driver.selection.bound
        ids = {id(p): name for name, p in named(pl_module).items()}
        self.candidates = {ids[id(p)]: p for p in bound.tensors}
        self.always = {ids[id(p)] for p in bound.always.values()}
        self.trainable = {name for name, p in named(pl_module).items() if p.requires_grad}
        self.last = weights(pl_module)
        self.sums: dict[str, Tensor] = {}
        if self.sees_dense:
            for name, p in self.candidates.items():
                self.handles.append(p.register_hook(partial(self._met, name)))

    def _met(self, name: str, grad: Tensor) -> None:
        part = grad.detach().double() if grad.dtype == torch.float64 else grad.detach().float()
        self.sums[name] = self.sums[name] + part if name in self.sums else part.clone()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.present is None:
            self.present = Seen(self.driver.selection.step, before=self.last)
            self.sums.clear()
            self.done, self.values = trainer.global_step, {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        seen, owner, effect = self.present, self.driver._owner, self.driver.slots.effect
        assert seen is not None
        assert owner is not None
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        seen.dense = {name: grad / scale for name, grad in self.sums.items()}
        seen.full = {name for name, p in self.candidates.items() if p.grad is not None}
        seen.units = sum(map(len, self.driver.selection.units or ()))
        seen.places = sum(p.numel() for o in trainer.optimizers for g in o.param_groups for p in g["params"])
        for name, p in self.candidates.items():
            store = owner.narrow(p)
            mask = torch.zeros(p.numel(), dtype=torch.bool)
            mask[store.index.long() if not isinstance(effect, Blend) else slice(None)] = True
            seen.selected[name] = mask.view(p.shape)
            if owner.slots[p].optimizer is optimizer:
                self.values[name] = store.leaf.detach().clone()
                if store.leaf.grad is not None:
                    grad = store.leaf.grad.detach()
                    seen.taken[name] = grad[mask.view(p.shape)] if store.leaf is p else grad.clone()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.done:
            return
        seen, owner = self.present, self.driver._owner
        assert seen is not None
        assert owner is not None
        seen.after = self.last = weights(pl_module)
        seen.left = {name for name, p in named(pl_module).items() if p.grad is not None}
        seen.left |= {name for name, p in self.candidates.items() if owner.leaf(p).grad is not None}
        states = [v for o in trainer.optimizers for s in o.state.values() for v in s.values()]
        seen.state = sum(v.numel() for v in states if isinstance(v, Tensor) and v.ndim > 0)
        values = {name: owner.leaf(p).detach() for name, p in self.candidates.items()}
        seen.still = all(torch.equal(v, values[name]) for name, v in self.values.items())
        for name, p in self.candidates.items():
            leaf = values[name]
            if leaf is not p.detach() and leaf.shape != p.shape:
                written = p.detach()[seen.selected[name]]
                assert torch.equal(written, leaf.to(p.dtype)), f"{name} is not written"
        self.steps.append(seen)
        self.present = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    # What must hold ---------------------------------------------------------------------------------------------------

    def check(self, still: tuple[int, ...] = (), exact: bool = True) -> None:
        """Only what is selected has moved, and it has; ``still``: steps (overflows) that move nothing.

        Args:
            still: Which.
            exact: Whether gradients are fp32 and equal bit for bit; otherwise to the precision of bf16.
        """
        assert self.steps, "no optimizer step was seen"
        effect = self.driver.slots.effect
        reverts = getattr(effect, "leaving", "keep") == "revert"
        selected = {name: torch.zeros_like(mask) for name, mask in self.steps[0].selected.items()}
        origin = self.steps[0].before
        for seen in self.steps:
            now = seen.selected
            for name, mask in now.items():
                expected = seen.before[name].clone()
                if reverts:
                    leaving = selected[name] & ~mask
                    expected[leaving] = origin[name][leaving]
                    entering = mask & ~selected[name]
                    origin = {**origin, name: torch.where(entering, seen.before[name], origin[name])}
                same = _bits(seen.after[name]) == _bits(expected)
                assert bool(same[~mask].all()), f"step {seen.step}: {int((~same[~mask]).sum())} unselected of {name}"
                if seen.step in still:
                    assert bool(same.all()), f"step {seen.step}: {name} moved"
                elif exact and not isinstance(effect, Blend):
                    live = mask.clone()
                    live[mask] = seen.taken[name] != 0.0
                    assert not bool(same[live].any()), f"step {seen.step}: {int(same[live].sum())} of {name} stay"
            selected = now
            for name in set(seen.before) - set(now):
                same = torch.equal(seen.before[name], seen.after[name])
                may = name in self.always and seen.step not in still
                assert same != may, f"step {seen.step}: {name} {'stays' if may else 'moved'}"
            assert seen.still == (seen.step in still or seen.count == 0), f"step {seen.step}"
            assert not seen.left, f"step {seen.step}: gradients left: {seen.left}"
            self._check_gradients(seen, exact, skip=seen.step in still)
            self._check_memory(seen, skip=seen.step in still)

    def _check_gradients(self, seen: Seen, exact: bool, skip: bool) -> None:
        """What the optimizers got for the selected entries is what autograd made of them."""
        if skip or not self.sees_dense or getattr(self.driver.slots.effect, "penalty", None) is not None:
            return
        for name, grad in seen.taken.items():
            expected = seen.dense[name][seen.selected[name]]
            if exact:
                assert torch.equal(grad.to(expected.dtype), expected), f"step {seen.step}: gradient of {name}"
            else:
                torch.testing.assert_close(grad.to(expected.dtype), expected, rtol=2e-2, atol=1e-5)

    def _check_memory(self, seen: Seen, skip: bool) -> None:
        """Param groups and state hold what is selected and what trains whole, and nothing else."""
        whole = sum(seen.after[name].numel() for name in self.always)
        if isinstance(self.driver.slots.effect, Compact):
            assert not seen.full, f"step {seen.step}: dense gradients of {seen.full}"
            # At an overflow one entry may stand in for what is not selected yet.
            assert seen.places - seen.count - whole in ((0, 1) if skip else (0,))
            assert seen.state <= 2 * (seen.count + whole)
            assert skip or seen.state == 2 * (seen.count + whole)
        else:
            assert seen.state <= 2 * sum(seen.after[name].numel() for name in self.trainable)

    def check_choices(self) -> None:
        """What was selected is what sorting all scores at once selects, from the gradients that autograd made."""
        slots, bound = self.driver.slots, self.driver.selection.bound
        grows = getattr(slots.rule, "grow", False)
        chosen_at = set(self.driver.history.steps)
        before = [torch.zeros(n, dtype=torch.bool) for n in bound.counts]
        names = list(self.candidates)
        for seen in self.steps:
            masks = [
                seen.selected[name].reshape(n, w)[:, 0]
                for name, n, w in zip(names, bound.counts, bound.widths, strict=True)
            ]
            if seen.step in chosen_at:
                scores = []
                for i, name in enumerate(names):
                    site = Site(bound.names[i], i, seen.before[name], seen.dense.get(name), seen.step, self.driver.seed)
                    scores.append(bound.pooled(i, slots.score.entries(site).float()))
                flat = torch.cat(scores)
                taken = torch.cat(before) if grows else torch.zeros(len(flat), dtype=torch.bool)
                k = seen.units - int(taken.sum())
                expected = taken.clone()
                expected[~taken] = best(flat[~taken], k)
                wrong = int((torch.cat(masks) != expected).sum())
                assert wrong == 0, f"step {seen.step}: {wrong} of {k} choices differ from sorting everything"
            else:
                assert all(torch.equal(a, b) for a, b in zip(masks, before, strict=True)), f"step {seen.step} switches"
            before = masks


def best(scores: Tensor, k: int) -> Tensor:
    """The mask of the k highest scores; equal ones go to the lower index, and those that are not finite come last."""
    clean = torch.where(scores.isfinite(), scores.double(), -math.inf)
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[torch.argsort(-clean, stable=True)[:k]] = True
    return mask


def _bits(tensor: Tensor) -> Tensor:
    """The bits of a floating-point tensor, so that 0 and -0 differ and NaN equals itself."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(kinds[tensor.element_size()])
