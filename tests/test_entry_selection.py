"""Five slots at work on single entries: exactly as many as the budget says, when it says so, and exact resume."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from narrow import ALL, Everything, backward, index_of, snapshot, windows
from test_collector import growing
from torch import Tensor, nn, optim
from toys import Net, Task, adamw, fit, tokens, weights

from apportion.budgets import Constant, Increment, Polynomial, RankEquivalent
from apportion.candidates import Candidates, Site
from apportion.driver import SelectiveTuning
from apportion.effects import Compact, Freeze
from apportion.entry_rules import Threshold
from apportion.entry_selection import EntrySelection
from apportion.entry_units import Entries, Rows
from apportion.entrywise import D3, GradientMagnitude, Magnitude, RandomEntries
from apportion.optim import Selective
from apportion.rules import Sample, TopK
from apportion.scores import Uniform
from apportion.types import When
from apportion.units import Layers


def selecting(
    score: Any = None,
    budget: Any = None,
    rule: Any = None,
    units: Any = ALL,
    when: When | None = None,
    effect: Any = None,
    **options: Any,
) -> SelectiveTuning:
    return SelectiveTuning(
        units,
        score or Magnitude(),
        budget or Constant(20),
        rule or TopK(),
        effect or Compact(capture="hook"),
        select_when=when or When(every=1),
        **options,
    )


def bound(method: SelectiveTuning, model: nn.Module | None = None) -> tuple[EntrySelection, Candidates]:
    """The method's selection, met with a model, without any training."""
    selection = method.new_selection()
    assert isinstance(selection, EntrySelection)
    selection.bind(Everything() if model is None else model)
    return selection, selection.bound


def chosen(selection: EntrySelection) -> list[int]:
    """How many units of each tensor are selected."""
    assert selection.units is not None
    return [len(units) for units in selection.units]


def steps(
    selection: EntrySelection, n: int, total: int | None = None, grad: Callable[[int], Tensor] | None = None
) -> list[int]:
    """Goes through ``n`` optimizer steps with gradients of one's own; what was selected at each."""
    counts = []
    for _ in range(n):
        selection.advance(total=total)
        if selection.awaits:
            chooser, score = selection.open()
            for i, p in enumerate(selection.bound.tensors):
                chooser.push(i, score(i, torch.ones_like(p) if grad is None else grad(i)))
            selection.settle(chooser)
        counts.append(0 if selection.units is None else sum(map(len, selection.units)))
        selection.step += 1
    return counts


class Counting:
    """A score that counts how often it is asked."""

    needs: ClassVar[frozenset[str]] = frozenset({"grad"})

    def __init__(self, value: float = 1.0, needs: str = "grad") -> None:
        self.value, self.calls = value, 0
        self.__dict__["needs"] = frozenset({needs})

    def entries(self, site: Site) -> Tensor:
        self.calls += 1
        return torch.full(site.weight.shape, self.value)


# How many -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1.0, 0.0, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("needs", ["grad", "weight"])
def test_exactly_as_many_as_the_budget_says_whatever_the_scores(value: float, needs: str) -> None:
    selection, _ = bound(selecting(Counting(value, needs), Constant(20)))
    assert steps(selection, 3) == [20, 20, 20]
    assert chosen(selection)[:3] == [1, 1, 18]  # of equals, the first in model order
    selection, _ = bound(selecting(Counting(value, needs), Increment(23), TopK(grow=True)))
    assert steps(selection, 12, total=10) == [(t * 23) // 10 for t in range(1, 11)] + [23, 23]


@pytest.mark.parametrize("form", ["even", "front"])
@pytest.mark.parametrize(("amount", "total"), [(3, 5), (10, 4), (7, 7), (1, 9), (100, 3)])
def test_growth_is_nested_and_follows_its_schedule(form: str, amount: int, total: int) -> None:
    budget = Increment(amount, form)
    selection, _ = bound(selecting(RandomEntries(redraw=True), budget, TopK(grow=True)))
    before: list[set[int]] = []
    for step in range(total + 2):
        counts = steps(selection, 1, total)
        assert counts == [budget.at(step, total)]
        now = [set(units.tolist()) for units in selection.units or ()]
        assert all(old <= new for old, new in zip(before, now, strict=False))
        before = now or before
    assert sum(map(len, before)) == amount


def test_growth_every_few_steps_takes_at_once_what_those_steps_would() -> None:
    """So that the last choice of the run, some steps before its end, still comes to the whole budget."""
    every = selecting(RandomEntries(), Increment(100), TopK(grow=True), when=When(every=4))
    selection, _ = bound(every)
    assert steps(selection, 12, total=12) == [33] * 4 + [66] * 4 + [100] * 4
    assert selection.history.steps == [0, 4, 8]
    late = selecting(RandomEntries(), Increment(100), TopK(grow=True), when=When(every=4, begin=6))
    selection, _ = bound(late)
    assert steps(selection, 12, total=12) == [0] * 6 + [83] * 4 + [100] * 2


def test_growth_catches_up_with_choices_that_were_put_off() -> None:
    selection, _ = bound(selecting(D3(), Increment(100), TopK(grow=True)))
    counts = []
    for step in range(10):
        selection.advance(total=10)
        assert selection.awaits
        if step in (0, 3, 4):
            selection.postpone()
        else:
            chooser, score = selection.open()
            for i, p in enumerate(selection.bound.tensors):
                chooser.push(i, score(i, torch.ones_like(p)))
            selection.settle(chooser)
        counts.append(sum(map(len, selection.units or ())))
        selection.step += 1
    assert counts == [0, 20, 30, 30, 30, 60, 70, 80, 90, 100]


def test_a_choice_that_was_put_off_is_made_at_the_next_step_whatever_the_period() -> None:
    selection, _ = bound(selecting(D3(), Constant(10), when=When(every=5)))
    selection.advance()
    assert selection.awaits
    selection.postpone()
    selection.step += 1
    assert steps(selection, 2) == [10, 10]
    assert selection.history.steps == [1]


def test_budgets_can_fall_where_the_selection_is_made_anew() -> None:
    selection, _ = bound(selecting(Magnitude(), Polynomial(40, 10, finish=3)))
    assert steps(selection, 5) == [40, 30, 20, 10, 10]


def test_a_fraction_is_of_the_candidates() -> None:
    selection, candidates = bound(selecting(Magnitude(), Constant(0.1)))
    assert steps(selection, 1) == [int(0.1 * candidates.n)]
    selection, candidates = bound(selecting(Magnitude(), Increment(0.1), TopK(grow=True)))
    assert steps(selection, 4, total=4)[-1] == int(0.1 * candidates.n)


def test_counts_that_the_budget_fixes_tensor_by_tensor_hold_at_every_choice() -> None:
    budget = RankEquivalent(1)
    for grow in (False, True):
        selection, candidates = bound(selecting(RandomEntries(redraw=True), budget, TopK(per="tensor", grow=grow)))
        quotas = list(budget.quotas([p.shape for p in candidates.tensors]))
        for _ in range(3):
            steps(selection, 1)
            assert chosen(selection) == quotas


def test_a_rule_can_do_without_a_budget() -> None:
    selection, candidates = bound(selecting(Magnitude(), Constant(1), Threshold(above=0.5)))
    steps(selection, 1)
    assert chosen(selection) == [int((p.abs() > 0.5).sum()) for p in candidates.tensors]


def test_a_budget_beyond_the_candidates_is_an_error_that_names_it() -> None:
    selection, _ = bound(selecting(Magnitude(), Constant(10_000)))
    with pytest.raises(ValueError, match=r"`Constant\(amount=10000\)` of `SelectiveTuning`.*10000 over \d+ units"):
        selection.advance()


# What the budget pays for ---------------------------------------------------------------------------------------------

HEAD = 13 * 8  # entries of the head of `Net`


@pytest.mark.parametrize("budget", [Constant(HEAD + 30), Increment(HEAD + 30)])
def test_a_budget_can_pay_for_what_trains_whole(budget: Any) -> None:
    rule = TopK(grow=isinstance(budget, Increment))
    for charge, expected in ((True, 30), (False, HEAD + 30)):
        selection, candidates = bound(selecting(Magnitude(), budget, rule, Entries(charge=charge)), Net())
        assert candidates.charged == (HEAD if charge else 0)
        assert steps(selection, 5, total=5)[-1] == expected


@pytest.mark.parametrize("budget", [Constant(HEAD - 1), Increment(HEAD - 1)])
def test_a_budget_that_does_not_pay_for_what_trains_whole_is_an_error(budget: Any) -> None:
    rule = TopK(grow=isinstance(budget, Increment))
    selection, _ = bound(selecting(Magnitude(), budget, rule, Entries(charge=True)), Net())
    with pytest.raises(ValueError, match=rf"of {HEAD - 1} entries does not pay for the {HEAD}.*`charge=False`"):
        selection.advance(total=5)


# Rows -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["sum", "mean", "abs_sum"])
@pytest.mark.parametrize("score", [Magnitude(), GradientMagnitude()])
def test_rows_train_whole(score: Any, pool: str) -> None:
    model = Everything()
    units = Rows(embeddings="unit", norm="unit", bias="unit", pool=pool)
    optimizer = Selective(
        optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1),
        model,
        selecting(score, Constant(9), units=units, when=When(every=2)),
    )
    for batches in windows(4):
        before = snapshot(model)
        backward(model, batches)
        optimizer.step()
        optimizer.zero_grad()
        rows = 0
        for name, p in model.named_parameters():
            moved = (p != before[name]).reshape(p.shape[0] if p.ndim else 1, -1)
            assert torch.equal(moved.all(1), moved.any(1)), name
            rows += int(moved.any(1).sum())
        assert rows == 9


def test_rows_are_chosen_by_what_their_entries_come_to() -> None:
    weight = torch.tensor([[3.0, -3.0, 0.0], [1.0, 1.0, 1.5], [-2.0, -2.0, 0.5]])
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    model[0].weight.data.copy_(weight)

    class Signed(Magnitude):
        def entries(self, site: Site) -> Tensor:
            return site.weight.clone()

    for pool, expected in (("sum", [1]), ("mean", [1]), ("abs_sum", [1]), ("abs_sum", [1, 2])):
        selection, _ = bound(selecting(Signed(), Constant(len(expected)), units=Rows(pool=pool)), model)
        steps(selection, 1)
        assert selection.units is not None
        assert selection.units[0].tolist() == expected
        choice = selection.choice
        assert choice is not None
        assert choice.indices[0].tolist() == [3 * row + j for row in expected for j in range(3)]


# When -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
def test_steps_without_a_choice_pay_nothing_for_the_score(every: int) -> None:
    model = Everything()
    score = Counting()
    tensors = len(list(model.parameters()))
    method = selecting(score, Constant(20), when=When(every=every))
    optimizer = Selective(adamw(model.parameters()), model, method)
    asked = []
    for batches in windows(7):
        score.calls = 0
        backward(model, batches)
        optimizer.step()
        optimizer.zero_grad()
        asked.append(score.calls)
        assert (score.calls > 0) == (optimizer.selection.history.steps[-1] == len(asked) - 1)
    assert asked == [tensors if step % every == 0 else 0 for step in range(7)]


def test_a_step_that_adds_nothing_pays_nothing_for_the_score() -> None:
    """Fewer entries than steps: most steps add none. And none after the schedule has ended."""
    score = Counting()
    selection, candidates = bound(selecting(score, Increment(2, finish=6), TopK(grow=True)))
    asked = []
    for _ in range(9):
        score.calls = 0
        steps(selection, 1)
        asked.append(score.calls // len(candidates.tensors))
    assert asked == [0, 0, 1, 0, 0, 1, 0, 0, 0]
    assert selection.history.steps == [2, 5]


def test_nothing_trains_before_the_first_choice() -> None:
    model = Everything()
    method = selecting(GradientMagnitude(), Constant(20), when=When(every=1, begin=2))
    optimizer = Selective(adamw(model.parameters()), model, method)
    assert optimizer.selection.metrics() == {"selected_entries": 0.0, "churn": 0.0}
    moved = []
    for batches in windows(4):
        before = snapshot(model)
        backward(model, batches)
        optimizer.step()
        optimizer.zero_grad()
        moved.append(sum(int((p != before[name]).sum()) for name, p in model.named_parameters()))
    assert moved == [0, 0, 20, 20]


def test_the_choice_is_made_once_a_step() -> None:
    selection, _ = bound(selecting())
    assert selection.advance()
    assert not selection.advance()
    selection.step += 1
    assert selection.advance()


# State ----------------------------------------------------------------------------------------------------------------


class Remembering(Magnitude):
    """Adds up what it has seen of each tensor."""

    def entries(self, site: Site) -> Tensor:
        total = site.memory.get("sum", torch.zeros_like(site.weight)) + site.weight
        site.memory["sum"] = total
        return total.abs()


METHODS: dict[str, Callable[[], SelectiveTuning]] = {
    "growth by gradients": lambda: growing(60),
    "growth every two steps": lambda: growing(60, every=2),
    "growth with ages": lambda: growing(60, Compact(age="entry", capture="hook")),
    "refresh by weights": lambda: selecting(Magnitude(), Constant(30), when=When(every=3)),
    "refresh that reverts": lambda: selecting(
        RandomEntries(redraw=True), Constant(30), effect=Compact(leaving="revert", capture="hook")
    ),
    "refresh that resets": lambda: selecting(
        RandomEntries(redraw=True), Constant(30), when=When(every=2), effect=Compact(kept="reset", capture="hook")
    ),
    "a score with a memory": lambda: selecting(Remembering(), Constant(30)),
    "rows": lambda: selecting(RandomEntries(redraw=True), Constant(9), units=Rows(bias="unit", norm="unit")),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [0, 1, 4])
@pytest.mark.parametrize("name", METHODS)
def test_saved_and_loaded_it_goes_on_bit_for_bit(name: str, stop: int, dtype: torch.dtype, tmp_path: Path) -> None:
    def build() -> tuple[Everything, Selective]:
        model = Everything(dtype=dtype)
        return model, Selective(adamw(model.parameters()), model, METHODS[name](), total_steps=8)

    def train(model: Everything, optimizer: Selective, batches: list[list[Tensor]]) -> None:
        for window in batches:
            backward(model, window)
            optimizer.step()
            optimizer.zero_grad()

    whole, straight = build()
    train(whole, straight, windows(8))
    first, before = build()
    train(first, before, windows(8)[:stop])
    torch.save({"model": first.state_dict(), "optimizer": before.state_dict()}, tmp_path / "a.pt")
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    second, after = build()
    second.load_state_dict(saved["model"])
    after.load_state_dict(saved["optimizer"])
    train(second, after, windows(8)[stop:])
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), second.parameters(), strict=True))
    names = straight.selection.bound.names
    for key, p, q in zip(names, straight.selection.bound.tensors, after.selection.bound.tensors, strict=True):
        assert torch.equal(index_of(straight, p), index_of(after, q)), key
        assert torch.equal(straight.owner.leaf(p), after.owner.leaf(q)), key
    assert straight.selection.history.steps == after.selection.history.steps
    assert torch.equal(straight.selection.history.counts, after.selection.history.counts)


def test_masters_of_bf16_weights_keep_their_digits_in_a_checkpoint() -> None:
    def build() -> tuple[Everything, Selective]:
        model = Everything(dtype=torch.bfloat16)
        return model, Selective(adamw(model.parameters(), lr=1e-4), model, METHODS["refresh by weights"]())

    model, optimizer = build()
    backward(model, windows(1)[0])
    optimizer.step()
    other, second = build()
    other.load_state_dict(model.state_dict())
    second.load_state_dict(optimizer.state_dict())
    digits = 0
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        master = optimizer.owner.leaf(p)
        assert torch.equal(master, second.owner.leaf(q))
        digits += int((master != master.bfloat16().float()).sum())
    assert digits > 0


def test_what_is_remembered_is_saved() -> None:
    selection, _ = bound(selecting(Remembering(), Constant(5)))
    steps(selection, 2)
    state = selection.state_dict()
    assert set(state["memory"]) == set(selection.bound.names)
    fresh, _ = bound(selecting(Remembering(), Constant(5)))
    fresh.load_state_dict(state)
    assert fresh.state_dict()["memory"].keys() == state["memory"].keys()
    steps(selection, 1)
    steps(fresh, 1)
    assert all(torch.equal(a, b) for a, b in zip(selection.units or (), fresh.units or (), strict=True))


def test_another_model_is_refused() -> None:
    selection, _ = bound(selecting(Magnitude(), Constant(5)))
    steps(selection, 1)
    fresh, _ = bound(selecting(Magnitude(), Constant(5), units=Entries()), Net())
    with pytest.raises(ValueError, match=r"saved state of `SelectiveTuning` is about other units \(scale, gain"):
        fresh.load_state_dict(selection.state_dict())
    unbound = selecting(Magnitude(), Constant(5), units=Entries()).new_selection()
    unbound.load_state_dict(selection.state_dict())
    with pytest.raises(ValueError, match=r"made on 11 units \(scale, gain.*resume with the same model"):
        unbound.bind(Net())


def test_the_state_of_another_selection_is_refused_by_the_optimizer() -> None:
    model = Everything()
    optimizer = Selective(adamw(model.parameters()), model, selecting(Magnitude(), Constant(5)))
    backward(model, windows(1)[0])
    optimizer.step()
    state = optimizer.state_dict()
    del state["selection"]
    other = Everything()
    second = Selective(adamw(other.parameters()), other, selecting(Magnitude(), Constant(50)))
    with pytest.raises(ValueError, match=r"of a tensor of shape .* are selected: load the selection that was saved"):
        second.load_state_dict(state)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda driver: pickle.loads(pickle.dumps(driver))])
def test_a_driver_that_has_run_can_be_copied_and_goes_on(how: Callable[[Any], Any]) -> None:
    driver = growing(60, units=Entries())
    task = Task()
    fit(task, driver, steps=3)
    again = how(driver)
    assert again.slots == driver.slots
    assert again.history.steps == driver.history.steps == [0, 1, 2]
    assert torch.equal(again.history.counts, driver.history.counts)
    assert again.history.names == driver.history.names
    assert again.history.counts.sum(1).tolist() == [20, 40, 60]
    fit(Task(), again, steps=2)  # as it was: it has done its three steps
    assert again.history.counts[-1].sum() == 60


def test_a_fit_selects_what_a_loop_of_ones_own_selects() -> None:
    from toys import loader

    task, twin = Task(Net(dropout=0.0)), Task(Net(dropout=0.0))
    driver = growing(60, units=Entries())
    fit(task, driver, steps=5)
    optimizer = Selective(adamw(twin.parameters()), twin, growing(60, units=Entries()), total_steps=5)
    torch.manual_seed(11)
    for _, batch in zip(range(5), loader(), strict=False):
        twin.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(driver.history.counts, optimizer.selection.history.counts)
    after = weights(twin)
    assert all(torch.equal(value, after[name]) for name, value in weights(task).items())


def test_a_history_counts_entries_tensor_by_tensor() -> None:
    net = Net()
    optimizer = Selective(adamw(net.parameters()), net, growing(40, units=Entries()), total_steps=4)
    for batch in tokens(8).split(2):
        net.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    history = optimizer.selection.history
    assert history.steps == [0, 1, 2, 3]
    assert history.counts.shape == (4, len(history.names))
    assert history.counts.sum(1).tolist() == [10, 20, 30, 40]
    assert history.sizes.tolist() == [dict(net.named_parameters())[name].numel() for name in history.names]
    assert history.counts[-1].tolist() == [
        len(index_of(optimizer, dict(net.named_parameters())[name])) for name in history.names
    ]


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (
            (Entries(), Uniform(), Constant(1), TopK(), Compact()),
            r"`score=Uniform\(\)` is not for entries.*`Magnitude\(\)`",
        ),
        (
            (Entries(), Magnitude(), Constant(1), Sample(), Compact()),
            r"`rule=Sample\(.*\)` is not for entries.*`TopK\(\)`",
        ),
        (
            (Entries(), Magnitude(), Constant(1), TopK(), Freeze()),
            r"`effect=Freeze\(.*\)` is not for entries.*`Compact\(\)`",
        ),
        (
            (Layers(), Magnitude(), Constant(1), TopK(), Freeze()),
            r"`score=Magnitude\(.*\)` is not for whole parameters.*`Uniform\(\)`",
        ),
        (
            (Layers(), Uniform(), Constant(1), TopK(), Compact()),
            r"`effect=Compact\(.*\)` is not for whole parameters.*`Freeze\(\)`",
        ),
        ((Entries, Magnitude(), Constant(1), TopK(), Compact()), r"`units=.*Entries.*` is not a units"),
    ],
)
def test_slots_for_entries_and_for_layers_do_not_mix(slots: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        SelectiveTuning(*slots)
