"""Any torch optimizer and any scheduler under a changing selection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn, optim
from torch.optim import lr_scheduler as schedules
from toys import BLOCKS, ManualTask, Task, adamw, fit, trainable, two_groups
from witness import Witness

from apportion.budgets import Constant
from apportion.driver import SelectiveTuning
from apportion.effects import Freeze
from apportion.rules import Cycle
from apportion.scores import Uniform
from apportion.types import When
from apportion.units import Layers


def method(state: str = "drop", every: int = 2, **options: Any) -> SelectiveTuning:
    return SelectiveTuning(
        Layers(), Uniform(), Constant(2), Cycle(), Freeze(state=state), select_when=When(every=every), **options
    )


OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "adamw loop": lambda p: adamw(p, foreach=False),
    "adamw foreach": lambda p: adamw(p, foreach=True),
    "adamw fused": lambda p: adamw(p, fused=True),
    "adamw amsgrad": lambda p: adamw(p, amsgrad=True),
    "adam": lambda p: optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: optim.SGD(p, lr=0.5, weight_decay=0.1),
    "sgd momentum": lambda p: optim.SGD(p, lr=0.5, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd fused": lambda p: optim.SGD(p, lr=0.5, weight_decay=0.1, fused=True),
    "adafactor": lambda p: optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
    "nadam": lambda p: optim.NAdam(p, lr=1e-2, weight_decay=0.1),
    "radam": lambda p: optim.RAdam(p, lr=1e-2, weight_decay=0.1),
    "adamax": lambda p: optim.Adamax(p, lr=1e-2, weight_decay=0.1),
    "adadelta": lambda p: optim.Adadelta(p, lr=1.0, weight_decay=0.1),
    "rmsprop": lambda p: optim.RMSprop(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "asgd": lambda p: optim.ASGD(p, lr=1e-1, weight_decay=0.1),
    "rprop": lambda p: optim.Rprop(p, lr=1e-2),
}


@pytest.mark.parametrize("state", ["drop", "keep", "offload"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_what_is_selected_moves_under(name: str, state: str) -> None:
    driver = method(state)
    witness = Witness(driver)
    run = fit(Task(optimizer=lambda m: OPTIMIZERS[name](trainable(m))), [driver, witness], steps=7)
    witness.check()
    assert len({frozenset(step.chosen) for step in witness.steps}) > 1
    if name in ("sgd", "sgd fused"):  # without momentum there is no state to speak of
        return
    assert all(step.state == step.chosen for step in witness.steps)
    held = sum(bool(s) for s in run.optimizers[0].state.values())
    assert held == (len(witness.steps[-1].chosen) if state == "drop" else len(list(run.lightning_module.parameters())))


@pytest.mark.parametrize("state", ["keep", "offload"])
def test_only_what_is_selected_moves_under_adagrad(state: str) -> None:
    driver = method(state)
    witness = Witness(driver)
    fit(Task(optimizer=lambda m: optim.Adagrad(trainable(m), lr=1e-2, weight_decay=0.1)), [driver, witness])
    witness.check()


def test_fused_sgd_with_momentum_is_refused_as_it_cannot_mix_old_and_new_parameters() -> None:
    with pytest.raises(ValueError, match=r"`SGD\(fused=True\)`.*foreach=True"):
        fit(Task(optimizer=lambda m: optim.SGD(trainable(m), lr=0.5, momentum=0.9, fused=True)), method())


def test_state_that_is_made_once_at_construction_cannot_be_dropped() -> None:
    with pytest.raises(ValueError, match=r"`Adagrad`.*state='keep' or 'offload'"):
        fit(Task(optimizer=lambda m: optim.Adagrad(trainable(m))), method("drop"))


def test_muon_for_matrices_and_adamw_for_the_rest() -> None:
    def both(module: nn.Module) -> list[optim.Optimizer]:
        matrices = [p for n, p in module.named_parameters() if p.ndim == 2 and ".layers." in n]
        ids = {id(p) for p in matrices}
        return [optim.Muon(matrices, lr=1e-2), adamw([p for p in module.parameters() if id(p) not in ids])]

    driver = method("offload")
    witness = Witness(driver)
    fit(ManualTask(optimizer=both), [driver, witness], steps=12)
    assert len(witness.steps) == 6  # Lightning counts the steps of all optimizers
    witness.check()
    assert all(step.state == step.chosen for step in witness.steps)


def test_lbfgs_is_refused_at_the_start_of_a_fit() -> None:
    with pytest.raises(ValueError, match="`LBFGS`"):
        fit(Task(optimizer=lambda m: optim.LBFGS(trainable(m))), method())


def test_an_optimizer_without_all_parameters_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"No optimizer holds .* such as net\.layers\.0\.input_norm\.weight"):
        fit(Task(optimizer=lambda m: adamw(m.net.lm_head.parameters())), method())


@pytest.mark.parametrize("state", ["drop", "keep", "offload"])
def test_a_group_may_lose_all_its_parameters(state: str) -> None:
    def per_layer(module: Any) -> optim.Optimizer:
        layers = [{"params": list(layer.parameters()), "lr": 10**-i} for i, layer in enumerate(module.net.layers)]
        held = {id(p) for group in layers for p in group["params"]}
        return adamw([*layers, {"params": [p for p in module.parameters() if id(p) not in held]}])

    driver = method(state)
    witness = Witness(driver)
    fit(Task(optimizer=per_layer), [driver, witness])
    for step in witness.steps:
        assert len(step.shapes[0]) == BLOCKS + 1
        assert step.shapes[0].count(0) == 2
        assert not step.moved - step.chosen


def test_named_parameters_keep_their_names() -> None:
    driver = method()
    witness = Witness(driver)
    task = Task(optimizer=lambda m: adamw(m.named_parameters()))
    run = fit(task, [driver, witness])
    witness.check()
    assert run.optimizers[0].param_groups[0]["param_names"] == [name for name, _ in task.named_parameters()]


def test_manual_optimization_switches_between_batches_of_a_window() -> None:
    driver = method(every=1)
    witness = Witness(driver)
    fit(ManualTask(accumulate=3, clip=0.5), [driver, witness], steps=4)
    witness.check()
    assert driver.history.steps == [0, 1, 2, 3]


def test_manual_optimization_with_two_optimizers_steps_each_on_its_share() -> None:
    def halves(module: nn.Module) -> list[optim.Optimizer]:
        groups = two_groups(module)
        return [adamw(groups[0]["params"]), optim.SGD(groups[1]["params"], lr=0.5, momentum=0.9, weight_decay=0.1)]

    driver = method(every=1)
    witness = Witness(driver)
    fit(ManualTask(optimizer=halves, accumulate=2), [driver, witness], steps=8)
    witness.check()
    assert driver.history.steps == [0, 1, 2, 3]


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: schedules.StepLR(o, 2),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: schedules.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: schedules.LinearLR(o, 0.1, total_iters=5),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.8),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 6),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 1e-3, 1e-2, 2, cycle_momentum=False),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.ConstantLR(o, 0.1, 2), schedules.ExponentialLR(o, 0.9)], [2]
    ),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 1e-2, total_steps=8),
    "ReduceLROnPlateau": lambda o: schedules.ReduceLROnPlateau(o, patience=0, threshold=10.0),
}


class Rates(Witness):
    """Notes learning rates, too."""

    def __init__(self, *drivers: Any) -> None:
        super().__init__(*drivers)
        self.rates: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self.rates.append([group["lr"] for group in optimizer.param_groups])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_learning_rates_are_those_of_a_run_without_selection_under(name: str) -> None:
    def run(*drivers: SelectiveTuning) -> Rates:
        witness = Rates(*drivers)
        config = lambda o: {"scheduler": SCHEDULERS[name](o), "interval": "step", "monitor": "loss"}  # noqa: E731
        fit(Task(optimizer=lambda m: adamw(two_groups(m)), scheduler=config), [*drivers, witness])
        return witness

    plain, selective = run(), run(method(every=1))
    assert selective.rates == plain.rates
    assert len({tuple(rates) for rates in plain.rates}) > 1
    for step in selective.steps:
        assert not step.moved - step.chosen
