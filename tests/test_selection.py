"""Five slots at work: when a selection is made, what it remembers, what it refuses."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from toys import BLOCKS, Net

from apportion.budgets import Constant
from apportion.effects import Freeze
from apportion.rules import Cycle, Sample, TopK
from apportion.scores import Uniform, WeightNorm
from apportion.selection import Selection, Slots
from apportion.types import Draw, State, View, When
from apportion.units import Layers


def selection(seed: int = 0, every: int = 2, budget: int | float = 2) -> Selection:
    slots = Slots(Layers(), Uniform(), Constant(budget), Sample(), Freeze(), When(every=every))
    return Selection(slots, seed)


def walk(chosen: Selection, steps: int) -> list[bool]:
    made = []
    for _ in range(steps):
        made.append(chosen.advance())
        chosen.step += 1
    return made


def test_a_selection_is_made_when_due_and_once_per_step() -> None:
    chosen = selection()
    chosen.bind(Net())
    assert walk(chosen, 5) == [True, False, True, False, True]
    assert chosen.history.steps == [0, 2, 4]
    chosen.step = 6
    assert chosen.advance() is True
    before = chosen.mask
    assert chosen.advance() is False
    assert chosen.mask is before


def test_the_first_step_selects_even_where_no_selection_is_due() -> None:
    chosen = Selection(Slots(Layers(), Uniform(), Constant(1), Sample(), Freeze(), When(every=10, begin=4)))
    chosen.bind(Net())
    assert walk(chosen, 6) == [True, False, False, False, True, False]


def test_history_has_every_selection_with_its_names() -> None:
    chosen = selection(every=1)
    chosen.bind(Net())
    walk(chosen, 7)
    history = chosen.history
    assert history.masks.shape == (7, BLOCKS)
    assert history.masks.dtype == torch.bool
    assert history.masks.sum(1).tolist() == [2] * 7
    assert history.names == tuple(f"layers.{i}" for i in range(BLOCKS))


def test_an_empty_history_is_a_history() -> None:
    history = selection().history
    assert history.steps == []
    assert history.masks.numel() == 0


@pytest.mark.parametrize("stop", range(7))
def test_saved_and_loaded_it_draws_what_it_would_have_drawn(stop: int) -> None:
    whole, first, second = (selection(seed=3, every=1) for _ in range(3))
    for chosen in (whole, first, second):
        chosen.bind(Net())
    walk(whole, 7)
    walk(first, stop)
    state = pickle.loads(pickle.dumps(first.state_dict()))
    second.load_state_dict(state)
    walk(second, 7 - stop)
    assert torch.equal(whole.history.masks, second.history.masks)
    assert torch.equal(whole.draws.get_state(), second.draws.get_state())


def test_names_are_kept_before_the_model_is_met_again() -> None:
    first, second = selection(), selection()
    first.bind(Net())
    first.advance()
    second.load_state_dict(first.state_dict())
    assert second.history.names == first.history.names
    with pytest.raises(
        ValueError, match=r"made on 4 units \(layers\.0, layers\.1, layers\.2 \.\.\.\), this model has 6"
    ):
        second.bind(Net(blocks=6))


def test_a_saved_state_of_other_units_is_refused() -> None:
    first, second = selection(), selection()
    first.bind(Net())
    second.bind(Net(blocks=6))
    with pytest.raises(ValueError, match="about other units"):
        second.load_state_dict(first.state_dict())


def test_a_pickled_selection_does_not_carry_the_model() -> None:
    chosen = selection()
    chosen.bind(Net(width=256))
    walk(chosen, 3)
    data = pickle.dumps(chosen)
    assert len(data) < 100_000  # two generators of 5 kB each, not two million weights
    again = pickle.loads(data)
    again.bind(Net())
    walk(chosen, 4)
    walk(again, 4)
    assert torch.equal(again.history.masks, chosen.history.masks)


def test_draws_and_probes_have_streams_of_their_own() -> None:
    chosen = selection()
    assert not torch.equal(torch.rand(4, generator=chosen.draws), torch.rand(4, generator=chosen.probes))


def test_metrics_are_shares_and_churn() -> None:
    chosen = Selection(Slots(Layers(), Uniform(), Constant(1), Cycle("ascending"), Freeze()))
    chosen.bind(Net())
    walk(chosen, 1)
    assert chosen.metrics() == {"selected_units": 0.25, "selected_entries": 0.25, "churn": 0.0}
    walk(chosen, 1)
    assert chosen.metrics()["churn"] == 1.0


def test_a_rule_that_breaks_its_count_is_an_error() -> None:
    @dataclass(frozen=True)
    class Greedy:
        def select(self, draw: Draw) -> tuple[Tensor, State]:
            return torch.ones(len(draw.scores), dtype=torch.bool), {}

    chosen = Selection(Slots(Layers(), Uniform(), Constant(2), Greedy(), Freeze()))
    chosen.bind(Net())
    with pytest.raises(RuntimeError, match="selected 4 of 4 units where the budget is 2"):
        chosen.advance()


def test_a_gradient_score_cannot_be_paired_with_an_effect_that_hides_gradients() -> None:
    @dataclass(frozen=True)
    class Slope(Uniform):
        needs: ClassVar[frozenset[str]] = frozenset({"grad"})

    with pytest.raises(ValueError, match=r"`Slope` needs the grad of every unit, but `Freeze` removes it"):
        Slots(Layers(), Slope(), Constant(2), TopK(), Freeze())


def test_a_score_that_needs_a_loss_asks_for_a_probe() -> None:
    @dataclass(frozen=True)
    class Asks(Uniform):
        needs: ClassVar[frozenset[str]] = frozenset({"loss"})

        def due(self, step: int) -> bool:
            return step == 1

    chosen = Selection(Slots(Layers(), Asks(), Constant(2), TopK(), Freeze()))
    chosen.bind(Net())
    assert not chosen.needs_probe
    walk(chosen, 1)
    assert chosen.needs_probe
    with pytest.raises(ValueError, match="needs a probe"):
        chosen.advance()


def test_a_score_is_updated_before_it_is_read() -> None:
    net = Net()
    with torch.no_grad():
        for p in net.layers[2].parameters():
            p.mul_(100.0)
    chosen = Selection(Slots(Layers(), WeightNorm(), Constant(1), TopK(), Freeze()))
    chosen.bind(net)
    chosen.advance()
    assert chosen.mask is not None
    assert chosen.mask.tolist() == [False, False, True, False]


def test_a_selection_without_a_model_says_so() -> None:
    with pytest.raises(RuntimeError, match="has not met a model yet"):
        _ = selection().bound


def test_state_is_plain_data_and_tensors_on_the_cpu() -> None:
    def plain(value: object) -> bool:
        if isinstance(value, dict):
            return all(isinstance(k, str) and plain(v) for k, v in value.items())
        if isinstance(value, list):
            return all(plain(v) for v in value)
        if isinstance(value, Tensor):
            return value.device.type == "cpu"
        return value is None or type(value) in (int, float, str, bool)

    chosen = selection()
    chosen.bind(Net())
    walk(chosen, 3)
    assert plain(chosen.state_dict())


def test_a_score_sees_the_step_the_units_and_its_own_stream() -> None:
    seen: list[View] = []

    @dataclass(frozen=True)
    class Notes(Uniform):
        def due(self, step: int) -> bool:
            return True

        def update(self, state: State, view: View) -> State:
            seen.append(view)
            return state

    chosen = Selection(Slots(Layers(), Notes(), Constant(2), TopK(), Freeze()))
    bound = chosen.bind(Net())
    walk(chosen, 3)
    assert [view.step for view in seen] == [0, 1, 2]
    assert all(view.bound is bound and view.generator is chosen.probes for view in seen)
