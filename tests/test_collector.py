"""The collector: gradients of one step, looked at when they are final, one at a time, and gone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from narrow import ALL, Everything, backward, index_of, snapshot, stepped, windows
from pytorch_lightning.plugins import MixedPrecision
from test_compact import Slopes
from torch import Tensor, nn, optim
from toys import ManualTask, Task, adamw, fit, trainable, weights

from apportion.budgets import Constant, Increment
from apportion.candidates import Ask, Candidates
from apportion.collector import Collector
from apportion.compact import Fate, Gathered
from apportion.driver import SelectiveTuning
from apportion.effects import Compact, Freeze, Hold
from apportion.entry_units import Entries
from apportion.entrywise import D3, GradientMagnitude
from apportion.optim import Selective
from apportion.rules import Cycle, TopK
from apportion.scores import Uniform
from apportion.types import When
from apportion.units import Layers


def growing(amount: int = 60, effect: Any = None, every: int = 1, units: Any = ALL, **options: Any) -> SelectiveTuning:
    effect = effect or Compact(capture="hook")
    return SelectiveTuning(
        units, D3(), Increment(amount), TopK(grow=True), effect, select_when=When(every=every), **options
    )


def opened(shapes: list[tuple[int, ...]], k: int, passes: int | None = 1, scale: float = 1.0) -> tuple[Any, ...]:
    """Parameters with stores, and a collector of the ``k`` entries of the largest gradients."""
    net = nn.ParameterDict({f"p{i}": nn.Parameter(torch.zeros(shape)) for i, shape in enumerate(shapes)})
    bound = Entries(bias="unit").bind(net)
    assert isinstance(bound, Candidates)
    stores = [Gathered(p, Fate()) for p in bound.tensors]
    chooser = TopK().open(Ask(bound.counts, tuple(p.shape for p in bound.tensors), k))
    collector = Collector(bound, stores, lambda i, grad: grad.abs().reshape(-1), chooser, passes, scale)
    return list(bound.tensors), stores, chooser, collector


def give(p: nn.Parameter, grad: Tensor) -> None:
    (p * grad).sum().backward()


@settings(max_examples=25)
@given(st.permutations(range(4)), st.integers(0, 100))
def test_the_order_in_which_gradients_come_plays_no_part(order: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (2,), (4, 3), (1,)]
    grads = [torch.randint(-3, 4, shape, generator=generator).float() for shape in shapes]  # many ties
    tensors, _, chooser, collector = opened(shapes, 7)
    collector.final = True
    for i in order:
        give(tensors[i], grads[i])
    collector.flush()
    scores = torch.cat([g.abs().reshape(-1) for g in grads])
    expected = torch.argsort(-scores, stable=True)[:7].sort().values
    starts = torch.tensor([0, 12, 14, 26])
    chosen, payload = chooser.chosen()
    found = torch.cat([chosen[i] + starts[i] for i in sorted(chosen)])
    assert torch.equal(found, expected)
    assert torch.equal(
        torch.cat([payload[i].reshape(-1) for i in sorted(chosen)]), torch.cat([g.reshape(-1) for g in grads])[found]
    )


def test_a_gradient_is_looked_at_and_freed_as_soon_as_it_is_final() -> None:
    tensors, stores, _, collector = opened([(4, 4), (4, 4)], 3)
    give(tensors[0], torch.ones(4, 4))
    assert tensors[0].grad is not None  # there are more micro-batches to come
    collector.final = True
    give(tensors[0], torch.ones(4, 4))
    give(tensors[1], torch.ones(4, 4))
    assert all(p.grad is None for p in tensors)
    assert all(store.leaf.grad is not None for store in stores)


def test_gradients_stay_where_the_last_micro_batch_is_unknown() -> None:
    tensors, _, chooser, collector = opened([(4, 4), (4, 4)], 1, passes=None)
    collector.final = True
    give(tensors[0], torch.ones(4, 4))
    give(tensors[0], torch.ones(4, 4))
    give(tensors[1], torch.full((4, 4), 1.5))
    assert all(p.grad is not None for p in tensors)
    collector.flush()
    assert all(p.grad is None for p in tensors)
    assert list(chooser.chosen()[0]) == [0]  # 1 + 1 against 1.5


def test_more_gradient_than_announced_is_an_error_with_advice() -> None:
    tensors, _, _, collector = opened([(4, 4)], 1)
    collector.final = True
    give(tensors[0], torch.ones(4, 4))
    with pytest.raises(
        RuntimeError, match=r"p0 got more gradient.*use_reentrant=False.*`micro_batches=` to `Selective`"
    ):
        give(tensors[0], torch.ones(4, 4))


def test_more_backward_passes_than_announced_are_an_error_up_to_the_step() -> None:
    model = Everything()
    optimizer = Selective(adamw(model.parameters()), model, growing(), total_steps=4)
    backward(model, windows(1)[0])
    with pytest.raises(RuntimeError, match="more backward passes to a step than were announced"):
        backward(model, windows(1)[0])
    optimizer.close()


def test_reentrant_checkpointing_of_a_weight_that_is_used_twice_is_an_error_with_advice() -> None:
    model = Everything(checkpointing="reentrant")
    optimizer = Selective(adamw(model.parameters()), model, growing(), total_steps=4)
    with pytest.raises(RuntimeError, match=r"got more gradient.*use_reentrant=False"):
        backward(model, windows(1)[0])
    optimizer.close()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_checkpointing_that_is_not_reentrant_selects_what_none_selects(accumulate: int) -> None:
    found = []
    for checkpointing in (None, "non-reentrant"):
        model = Everything(checkpointing)
        optimizer = Selective(adamw(model.parameters()), model, growing(), total_steps=6, micro_batches=accumulate)
        for batches in windows(6, accumulate):
            backward(model, batches)
            optimizer.step()
            optimizer.zero_grad()
        found.append((snapshot(model), [index_of(optimizer, p).tolist() for p in model.parameters()]))
    assert found[0][1] == found[1][1]
    assert all(torch.equal(value, found[1][0][name]) for name, value in found[0][0].items())


def test_a_tensor_without_a_gradient_scores_zero() -> None:
    tensors, stores, chooser, collector = opened([(2,), (2,)], 3)
    collector.final = True
    give(tensors[1], torch.tensor([1.0, 2.0]))
    collector.flush()
    chosen, payload = chooser.chosen()
    assert {i: index.tolist() for i, index in chosen.items()} == {0: [0], 1: [0, 1]}
    assert payload[0].tolist() == [[0.0]]
    assert all(store.watch is None for store in stores)


def test_a_tensor_that_another_selection_holds_frozen_is_not_chosen_from() -> None:
    tensors, _, chooser, collector = opened([(2,), (2,)], 2)
    tensors[0].requires_grad_(False)
    collector.final = True
    give(tensors[1], torch.tensor([1.0, 2.0]))
    collector.flush()
    assert {i: index.tolist() for i, index in chooser.chosen()[0].items()} == {1: [0, 1]}


def test_a_gradient_is_scored_without_its_scale_and_kept_with_it() -> None:
    tensors, _, chooser, collector = opened([(2,)], 1, scale=64.0)
    seen: list[Tensor] = []
    collector.score = lambda i, grad: seen.append(grad.clone()) or grad.abs()
    collector.final = True
    give(tensors[0], torch.tensor([64.0, -128.0]))
    collector.flush()
    assert seen[0].tolist() == [1.0, -2.0]
    assert chooser.chosen()[1][0].tolist() == [[-128.0]]
    assert not collector.overflown


@pytest.mark.parametrize(("scale", "overflown"), [(64.0, True), (1.0, False)])
def test_an_overflow_is_told_where_a_scaler_would_skip_the_step(scale: float, overflown: bool) -> None:
    tensors, _, _, collector = opened([(2,), (2,)], 1, scale=scale)
    collector.final = True
    give(tensors[0], torch.tensor([float("inf"), 1.0]))
    give(tensors[1], torch.tensor([1.0, 1.0]))
    collector.flush()
    assert collector.overflown is overflown


# At work --------------------------------------------------------------------------------------------------------------


def watched(model: nn.Module) -> list[int]:
    """How many dense gradients there are whenever autograd has finished one; to be asked for before the stores are."""
    alive: list[int] = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad is not None for q in model.parameters()))
        )
    return alive


@pytest.mark.parametrize("units", [ALL])
def test_one_dense_gradient_is_alive_at_a_time_at_steps_that_select_and_at_others(units: Any) -> None:
    model = Everything()
    alive = watched(model)
    optimizer = Selective(adamw(model.parameters()), model, growing(every=2, units=units), total_steps=6)
    for batches in windows(6):
        backward(model, batches)
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.selection.history.steps == [0, 2, 4]
    assert alive == [1] * (6 * len(list(model.parameters())))


@pytest.mark.parametrize("micro_batches", [3, None])
def test_dense_gradients_stay_up_to_the_last_micro_batch_of_steps_that_select_and_of_no_others(
    micro_batches: int | None,
) -> None:
    model = Everything()
    alive = watched(model)
    n = len(list(model.parameters()))
    method = growing(every=2)
    optimizer = Selective(adamw(model.parameters()), model, method, total_steps=4, micro_batches=micro_batches)
    for step, batches in enumerate(windows(4, 3)):
        alive.clear()
        for i, batch in enumerate(batches):
            model.loss(batch).backward()
            last = i == 2 and micro_batches is not None
            kept = n if step % 2 == 0 and not last else 0
            assert sum(p.grad is not None for p in model.parameters()) == kept
        if step % 2:
            assert alive == [1] * 3 * n
        elif micro_batches is None:
            assert alive == [*range(1, n + 1), *[n] * 2 * n]
        else:
            assert alive == [*range(1, n + 1), *[n] * n, *range(n, 0, -1)]
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())


def scored(model: nn.Module, batches: list[Tensor], taken: dict[str, Tensor], u: int) -> dict[str, Tensor]:
    """The ``u`` best entries outside ``taken`` by dense gradients, all in one list."""
    names = [name for name, _ in model.named_parameters()]
    loss = sum(model.loss(batch) / len(batches) for batch in batches)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    flat = [(g.abs() / (p.detach().abs() + 1e-3)).reshape(-1) for g, p in zip(grads, model.parameters(), strict=True)]
    free = torch.cat([f.masked_fill(taken[n].reshape(-1), -1.0) for n, f in zip(names, flat, strict=True)])
    best = torch.zeros(len(free), dtype=torch.bool)
    best[torch.argsort(-free, stable=True)[:u]] = True
    parts = best.split([len(f) for f in flat])
    return {n: part.view(p.shape) for (n, p), part in zip(model.named_parameters(), parts, strict=True)}


@pytest.mark.parametrize(("accumulate", "micro_batches"), [(1, 1), (1, None), (2, 2), (2, None)])
@pytest.mark.parametrize("effect", [Compact(capture="hook"), Compact(), Hold()])
def test_what_is_chosen_is_what_dense_scores_choose_and_moves_at_that_very_step(
    effect: Any, accumulate: int, micro_batches: int | None
) -> None:
    model = Everything()
    base = optim.SGD(model.parameters(), lr=0.1)
    optimizer = Selective(base, model, growing(50, effect), total_steps=5, micro_batches=micro_batches)
    taken = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    twin = Everything()
    for step, batches in enumerate(windows(5, accumulate)):
        twin.load_state_dict(model.state_dict())
        fresh = scored(twin, batches, taken, 10)
        assert sum(int(mask.sum()) for mask in fresh.values()) == 10
        taken = {name: taken[name] | mask for name, mask in fresh.items()}
        before = snapshot(model)
        backward(model, batches)
        optimizer.step()
        optimizer.zero_grad()
        for name, p in model.named_parameters():
            assert torch.equal(p != before[name], taken[name]), (step, name)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_loop_of_ones_own_clips_newcomers_too(micro_batches: int) -> None:
    """Between the backward pass and the step, what has joined stands in the param groups, with its gradient."""
    model = Slopes(torch.zeros(4))
    optimizer = Selective(
        optim.SGD(model.parameters(), lr=1.0), model, growing(4), total_steps=2, micro_batches=micro_batches
    )
    for _ in range(micro_batches):
        model.loss(torch.tensor([1.0, 10.0, 2.0, 20.0])).backward()
    assert float(nn.utils.clip_grad_norm_(stepped(optimizer), 0.5)) == pytest.approx(micro_batches * 500.0**0.5)
    optimizer.step()
    assert float(model.weight.detach().norm()) == pytest.approx(0.5, rel=1e-4)


def test_a_gradient_scaler_in_a_loop_of_ones_own_changes_nothing() -> None:
    """Neither at steps that select nor at others; the scale is a power of two."""
    runs = []
    for scaler in (torch.amp.GradScaler("cpu", enabled=False), torch.amp.GradScaler("cpu", init_scale=2.0**12)):
        model = Everything()
        optimizer = Selective(adamw(model.parameters()), model, growing(100, every=2), total_steps=8)
        for (batch,) in windows(8):
            scaler.scale(model.loss(batch)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        runs.append((snapshot(model), [index_of(optimizer, p).tolist() for p in model.parameters()]))
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(value, runs[1][0][name]) for name, value in runs[0][0].items())


class OverflowAt(nn.Module):
    """Makes the loss of one call infinite."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.call, self.calls = call, 0

    def forward(self, loss: Tensor) -> Tensor:
        self.calls += 1
        return loss * float("inf") if self.calls - 1 == self.call else loss


@pytest.mark.parametrize("call", [0, 1, 2, 3])
def test_an_overflow_gives_the_decision_to_the_next_step(call: int) -> None:
    class Overflowing(Task):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.overflow = OverflowAt(call)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.overflow(self.loss(batch))

    task = Overflowing()
    driver = growing(120, every=2, units=Entries(head="unit"))

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    start = weights(task)
    run = fit(task, driver, steps=6, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    assert scaler.get_scale() == 2.0**7
    assert run.global_step == 6
    steps = {0: [1, 2, 4], 1: [0, 2, 4], 2: [0, 3, 4], 3: [0, 2, 4]}[call]
    assert driver.history.steps == steps
    assert driver.history.counts.sum(1).tolist()[-1] == 120
    assert all(bool(value.isfinite().all()) for value in weights(task).values())
    changed = sum(int((value != start[name]).sum()) for name, value in weights(task).items())
    assert changed <= 120


def test_manual_optimization_selects_at_the_step() -> None:
    task = ManualTask(accumulate=2)
    driver = growing(60, units=Entries(head="unit"))
    before = weights(task)
    fit(task, driver, steps=4)
    after = weights(task)
    assert driver.history.counts.sum(1).tolist() == [15, 30, 45, 60]
    assert sum(int((after[n] != before[n]).sum()) for n in after) == 60


def test_layers_that_take_turns_leave_their_entries_out_of_the_choice() -> None:
    """And the growth catches up from what is there."""
    task = Task()
    turns = SelectiveTuning(Layers(), Uniform(), Constant(1), Cycle(), Freeze(state="keep"), name="turns")
    entries = growing(40, units=Entries(head="freeze"))
    fit(task, [turns, entries], steps=4)
    assert entries.history.counts.sum(1).tolist() == [10, 20, 30, 40]
    blocks = [int(name.split(".")[2]) for name in entries.history.names]
    grown = entries.history.counts.diff(dim=0, prepend=torch.zeros(1, len(blocks), dtype=torch.int64))
    for row, mask in zip(grown, turns.history.masks, strict=True):
        assert {block for block, count in zip(blocks, row.tolist(), strict=True) if count} == set(
            mask.nonzero().flatten().tolist()
        )


def test_a_refresh_by_gradients_counts_what_has_joined() -> None:
    model = Slopes(torch.zeros(4))
    method = SelectiveTuning(ALL, GradientMagnitude(), Constant(2), TopK(), Compact(), select_when=When(every=1))
    optimizer = Selective(optim.SGD(model.parameters(), lr=1.0), model, method)
    for grad, churn in (([4.0, 3.0, 2.0, 1.0], 1.0), ([4.0, 1.0, 3.0, 2.0], 0.5), ([4.0, 1.0, 3.0, 2.0], 0.0)):
        model.loss(torch.tensor(grad)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.selection.metrics() == {"selected_entries": 0.5, "churn": churn}
    assert trainable(model) == list(model.parameters())


@pytest.mark.parametrize("micro_batches", [2, None])
def test_gradients_that_are_thrown_away_leave_no_trace(micro_batches: int | None) -> None:
    """A batch whose loss is of no use, say: `zero_grad`, and on to the next."""
    runs = []
    for useless in (False, True):
        model = Everything()
        method = growing(60, every=2)
        optimizer = Selective(adamw(model.parameters()), model, method, total_steps=6, micro_batches=micro_batches)
        for batches in windows(6, 2):
            if useless:
                model.loss(windows(1, seed=9)[0][0]).backward()
                optimizer.zero_grad()
                assert all(p.grad is None for p in model.parameters())
            backward(model, batches)
            optimizer.step()
            optimizer.zero_grad()
        runs.append(snapshot(model))
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_a_step_without_any_gradient_gives_the_decision_to_the_next() -> None:
    """A batch that was left out: nothing moves, nothing is chosen, and the next step chooses, whatever the period."""
    model = Everything()
    optimizer = Selective(adamw(model.parameters()), model, growing(60, every=4), total_steps=8)
    before = snapshot(model)
    optimizer.step()
    assert optimizer.selection.history.steps == []
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())
    for (batch,) in windows(4):
        model.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.selection.history.steps == [1, 4]


def test_entries_of_a_tensor_that_the_loss_leaves_out_wait_for_a_gradient() -> None:
    """They may be chosen, where there is nothing better, but decay does not move them."""
    model = nn.ModuleDict({"used": nn.Linear(3, 1, bias=False), "unused": nn.Linear(3, 1, bias=False)})
    optimizer = Selective(adamw(model.parameters()), model, growing(6), total_steps=2)
    before = snapshot(model)
    for counts in ([3, 0], [3, 3]):
        model["used"](torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.selection.history.counts[-1].tolist() == counts
    assert torch.equal(model["unused"].weight, before["unused.weight"])
    assert bool((model["used"].weight != before["used.weight"]).all())
    (model["used"](torch.ones(1, 3)) * model["unused"](torch.ones(1, 3))).sum().backward()
    optimizer.step()
    assert bool((model["unused"].weight != before["unused.weight"]).all())


@pytest.mark.parametrize("micro_batches", [1, None])
def test_a_gradient_that_is_not_finite_is_taken_as_it_is_where_there_is_no_scaler(micro_batches: int | None) -> None:
    """As any optimizer takes it: what trains steps, and what joins is what is finite."""
    model = Slopes(torch.zeros(4))
    optimizer = Selective(
        optim.SGD(model.parameters(), lr=1.0), model, growing(2), total_steps=2, micro_batches=micro_batches
    )
    for grad in ([4.0, 3.0, 2.0, 1.0], [4.0, float("inf"), 2.0, float("nan")]):
        model.loss(torch.tensor(grad)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.weight.tolist() == [-8.0, 0.0, -2.0, 0.0]
