"""The suppression reward: worked numbers of both updates, candidate sets, and what a real probe teaches it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import Net, lora_net

from apportion.bandit import SuppressionReward, candidate_sets, updated
from apportion.probe import BatchProbe
from apportion.types import Bound, Unit, View


def sets_of(n: int, *chosen: tuple[int, ...]) -> Tensor:
    sets = torch.zeros(len(chosen), n, dtype=torch.bool)
    for row, units in zip(sets, chosen, strict=True):
        row[list(units)] = True
    return sets


FIRST = sets_of(4, (0, 1), (1, 2), (2, 3)), (1.0, 1.2, 0.9)
SECOND = sets_of(4, (0, 2), (0, 1), (1, 3)), (0.8, 1.1, 0.7)
ZEROS = torch.zeros(4, dtype=torch.float64)


def test_two_released_updates_have_the_worked_values() -> None:
    first = updated(ZEROS, *FIRST, rate=10.0)
    assert (-first).tolist() == pytest.approx([0.02332918, -0.12005472, -0.02332918, 0.12005472], abs=5e-9)
    second = updated(first, *SECOND, rate=10.0)
    assert (-second).tolist() == pytest.approx([-0.15245571, -0.17751538, 0.03433093, 0.29523155], abs=5e-9)


def test_the_score_function_update_has_the_values_computed_by_hand() -> None:
    # Rewards 1 and 1/2, advantages 1/4 and -1/4, units suppressed with probabilities 1/4 and 1/2: the gradient of the
    # expected reward in the importance of unit i is -sum A_k (a_ik - P(suppressed)).
    sets, losses = sets_of(2, (0,), (1,)), (0.0, math.log(2.0))
    score = torch.tensor([math.log(3.0), 0.0], dtype=torch.float64)
    after = updated(score, sets, losses, rate=2.0, form="score_function")
    first = math.log(3.0) - 2.0 * (0.25 * (1 - 0.25) - 0.25 * (0 - 0.25))
    second = 0.0 - 2.0 * (0.25 * (0 - 0.5) - 0.25 * (1 - 0.5))
    assert after.tolist() == pytest.approx([first, second], abs=1e-12)
    released = updated(score, sets, losses, rate=2.0)
    assert released.tolist() == pytest.approx([math.log(3.0) - 0.5 * 3 / 16, 0.5 / 4], abs=1e-12)


def test_units_missed_when_damped_gain_importance() -> None:
    after = updated(torch.zeros(2, dtype=torch.float64), sets_of(2, (0,), (1,)), [5.0, 1.0], rate=1.0)
    assert after[0] > 0.0 > after[1]


def test_units_in_all_sets_or_in_none_keep_their_importance() -> None:
    score = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)
    after = updated(score, sets_of(4, (0, 1), (0, 2)), [1.0, 2.0], rate=10.0)
    assert after[0].item() == pytest.approx(0.3, abs=1e-15)
    assert after[3].item() == 0.0
    assert after[1] != -1.0


def test_a_rate_of_zero_moves_nothing() -> None:
    for form in ("released", "score_function"):
        assert updated(ZEROS, *FIRST, rate=0.0, form=form).tolist() == [0.0] * 4


def test_a_set_whose_loss_is_nan_is_left_out() -> None:
    sets, losses = FIRST
    expected = updated(ZEROS, sets[:2], losses[:2], rate=10.0)
    assert torch.equal(updated(ZEROS, sets, (*losses[:2], math.nan), rate=10.0), expected)
    assert torch.equal(updated(ZEROS, sets, (1.0, math.nan, math.nan), rate=10.0), ZEROS)
    assert updated(ZEROS, sets, (1.0, math.inf, 2.0), rate=10.0).isfinite().all()


# Candidate sets
# ----------------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 9), count=st.integers(1, 6), scale=st.sampled_from([0.0, 1.0, 12.0, 800.0]), data=st.data())
@settings(max_examples=80)
def test_candidate_sets_are_distinct_and_of_the_asked_size(
    n: int, count: int, scale: float, data: st.DataObject
) -> None:
    size = data.draw(st.integers(1, n))
    score = scale * torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    sets = candidate_sets(score, size, count, torch.Generator().manual_seed(0))
    assert len(sets) == min(count, math.comb(n, size))
    assert set(sets.sum(1).tolist()) == {size}
    assert len({tuple(row) for row in sets.tolist()}) == len(sets)


def test_few_units_give_the_sets_there_are() -> None:
    generator = torch.Generator().manual_seed(0)
    assert len(candidate_sets(torch.zeros(2, dtype=torch.float64), 1, 3, generator)) == 2
    assert len(candidate_sets(torch.zeros(1, dtype=torch.float64), 1, 3, generator)) == 1


def test_saturated_scores_still_give_distinct_sets_within_the_tries() -> None:
    score = torch.tensor([800.0] * 4 + [-800.0] * 4, dtype=torch.float64)
    sets = candidate_sets(score, 4, 3, torch.Generator().manual_seed(0), tries=20)
    assert len(sets) == 3
    assert sets[0].tolist() == [False] * 4 + [True] * 4  # the unimportant ones are suppressed first


def test_unimportant_units_are_suppressed_more_often() -> None:
    score, generator = torch.tensor([2.0, 0.0, -2.0], dtype=torch.float64), torch.Generator().manual_seed(0)
    counts = sum(candidate_sets(score, 1, 1, generator)[0].double() for _ in range(2000))
    assert isinstance(counts, Tensor)
    weights = torch.sigmoid(-score)
    assert torch.allclose(counts / 2000, weights / weights.sum(), atol=0.04)


# The slot
# ----------------------------------------------------------------------------------------------------------------


def test_updates_are_due_at_the_period_and_never_at_step_zero() -> None:
    assert [step for step in range(41) if SuppressionReward(every=20).due(step)] == [20, 40]


@pytest.mark.parametrize(("n", "size"), [(32, 16), (40, 20), (28, 14), (1, 1), (2, 1), (3, 1), (5, 2)])
def test_half_of_the_units_are_suppressed_at_least_one_and_never_all(n: int, size: int) -> None:
    assert SuppressionReward().size(n) == size
    assert SuppressionReward(suppressed=1.0 - 1e-12).size(n) == max(1, n - 1)


@pytest.mark.parametrize(
    "options",
    [
        {"every": 0},
        {"candidates": 1},
        {"suppressed": 0.0},
        {"suppressed": 1.0},
        {"factor": 1.0},
        {"factor": -0.1},
        {"rate": -1.0},
        {"rate": math.nan},
        {"form": "reinforce"},
        {"adapter_form": "series"},
    ],
    ids=str,
)
def test_nonsense_is_refused_at_construction(options: dict[str, object]) -> None:
    ((key, value),) = options.items()
    with pytest.raises(ValueError, match=rf"`SuppressionReward\({key}="):
        SuppressionReward(**{key: value})  # type: ignore[arg-type]


def bound_of(model: nn.Module, path: str) -> Bound:
    """The layers of a toy network as units."""
    layers = model.get_submodule(path)
    return Bound(
        tuple(
            Unit(
                f"{path}.{i}", {f"{path}.{i}.{n}": p for n, p in layer.named_parameters() if p.requires_grad}, layer, i
            )
            for i, layer in enumerate(layers.children())
        )
    )


def lora_layers() -> tuple[nn.Module, Bound]:
    model = lora_net()
    return model, bound_of(model, "base_model.model.layers")


class Losses:
    """A probe that gives losses of the test's choice and records what it was asked."""

    def __init__(self, losses: list[float], model: nn.Module) -> None:
        self.losses, self.model, self.refreshed, self.asked = losses, model, 0, 0

    def refresh(self) -> None:
        self.refreshed += 1

    def loss(self) -> float:
        self.model(torch.zeros(1, 3, dtype=torch.long))
        self.asked += 1
        return self.losses[self.asked - 1]


def test_an_update_takes_one_batch_and_one_loss_per_set_and_follows_the_formula() -> None:
    model, bound = lora_layers()
    score, probe = SuppressionReward(), Losses([1.0, 1.2, 0.9], model)
    state = score.update(score.init(4), View(10, bound, torch.Generator().manual_seed(0), probe))
    assert (probe.refreshed, probe.asked) == (1, 3)
    sets = candidate_sets(ZEROS, 2, 3, torch.Generator().manual_seed(0))
    assert torch.equal(score.read(state), updated(ZEROS, sets, probe.losses, 10.0))
    assert score.read(state).dtype == torch.float64


def test_two_units_compare_the_two_sets_there_are() -> None:
    model = lora_net(blocks=2)
    bound = bound_of(model, "base_model.model.layers")
    score, probe = SuppressionReward(candidates=5), Losses([1.0, 2.0], model)
    after = score.read(score.update(score.init(2), View(10, bound, torch.Generator(), probe)))
    assert probe.asked == 2
    assert after.abs().min() > 0


def test_one_unit_is_left_alone() -> None:
    model = lora_net(blocks=1)
    bound = bound_of(model, "base_model.model.layers")
    score = SuppressionReward()
    probe = Losses([], model)
    assert score.update(score.init(1), View(10, bound, torch.Generator(), probe))["score"].tolist() == [0.0]


def test_units_without_adapters_are_refused_before_any_loss_is_asked_for() -> None:
    model = Net(adapter=True)
    bound, probe = bound_of(model, "layers"), Losses([], model)
    score = SuppressionReward(adapters=r"layers\.[012]\.adapter$")
    with pytest.raises(ValueError, match=r"layers\.3 has no adapter.*matches no module.*Wrap every layer by PEFT"):
        score.check(bound)
    for seed in range(8):  # whichever units the first set holds
        with pytest.raises(ValueError, match=r"layers\.3 has no adapter"):
            score.update({"score": ZEROS}, View(10, bound, torch.Generator().manual_seed(seed), probe))
    assert probe.asked == 0


def test_a_probe_loss_that_never_meets_the_adapters_is_refused() -> None:
    model, bound = lora_layers()
    probe = BatchProbe(lambda batch: torch.tensor(1.0), [None], model)
    with pytest.raises(ValueError, match="never ran through them"):
        SuppressionReward().update({"score": ZEROS}, View(10, bound, torch.Generator(), probe))


def test_a_missing_probe_is_refused() -> None:
    _, bound = lora_layers()
    with pytest.raises(ValueError, match="needs a probe"):
        SuppressionReward().update({"score": ZEROS}, View(10, bound, torch.Generator()))


def test_the_layer_whose_adapter_carries_the_task_becomes_the_most_important() -> None:
    model, bound = lora_layers()
    ids = torch.randint(0, 13, (4, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.mul_(50.0 if ".layers.2." in name else 0.0)
        target = model.eval()(ids)
    probe = BatchProbe(lambda batch: 20.0 * (model(batch) - target).square().mean(), [ids], model)
    score = SuppressionReward(rate=10.0)
    state, generator = score.init(4), torch.Generator().manual_seed(0)
    for step in itertools.count(10, 10):
        state = score.update(state, View(step, bound, generator, probe))
        if step == 100:
            break
    importance = score.read(state)
    assert int(importance.argmax()) == 2
    assert importance[2] > 0 > importance[[0, 1, 3]].mean()
