"""A probe leaves no trace: weights, logs, metrics, buffers, flags and random numbers are as without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import pytorch_lightning
import torch
import torchmetrics
from toys import ManualTask, Net, Task, fit, loader, moved, weights

from apportion.budgets import Constant
from apportion.driver import SelectiveTuning
from apportion.effects import Freeze
from apportion.probing import TrainerProbe, muted
from apportion.rules import Sample
from apportion.scores import Uniform
from apportion.types import State, View
from apportion.units import Layers

SEEN: list[float] = []


@dataclass(frozen=True)
class Curious(Uniform):
    """Probes before every step and learns nothing."""

    needs: ClassVar[frozenset[str]] = frozenset({"loss"})
    refreshes: int = 1

    def due(self, step: int) -> bool:
        return True

    def update(self, state: State, view: View) -> State:
        assert view.probe is not None
        for _ in range(self.refreshes):
            view.probe.refresh()
            SEEN.append(view.probe.loss())
            SEEN.append(view.probe.loss())
        return state


class Measured(Task):  # type: ignore[misc, valid-type]
    """With a metric, a batch norm, a part that stays in eval mode, a buffer that counts, and noise of its own."""

    def __init__(self) -> None:
        super().__init__(Net(dropout=0.3, batch_norm=True))
        self.metric = torchmetrics.MeanMetric()
        self.net.layers[0].dropout.eval()
        self.register_buffer("calls", torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls += 1
        loss = self.loss(batch) * (1 + 0.1 * torch.rand(()))
        self.metric(loss.detach())
        self.log("loss", loss)
        self.log_dict({"twice": 2 * loss})
        self.log("mean", self.metric)
        return loss


class Trace(pytorch_lightning.Callback):
    """Everything that a probe might leave behind, after every batch."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(("random", torch.get_rng_state().clone()))
        self.seen.append(("flags", [m.training for m in pl_module.modules()]))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen += [("weight", p.detach().clone()) for p in pl_module.parameters()]
        self.seen += [("buffer", b.clone()) for b in pl_module.buffers()]
        self.seen.append(("metric", pl_module.metric.metric_state))
        self.seen.append(("updates", pl_module.metric._update_count))
        self.seen.append(("log", {k: float(v) for k, v in trainer.callback_metrics.items() if "/" not in k}))
        self.seen.append(("attributes", sorted(k for k in vars(pl_module) if k in ("log", "log_dict"))))


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return bool(a == b)


def run(score: Any, **options: Any) -> Trace:
    driver = SelectiveTuning(Layers(), score, Constant(2), Sample(), Freeze(), seed=3, **options)
    trace = Trace()
    task = Measured()
    with pytest.warns(UserWarning, match="running statistics"):
        fit(task, [driver, trace])
    return trace


@pytest.mark.parametrize("own_data", [False, True])
def test_a_probe_leaves_no_trace(own_data: bool) -> None:
    SEEN.clear()
    plain = run(Uniform())
    probed = run(Curious(refreshes=2), **({"probe_data": loader(8)} if own_data else {}))
    assert len(SEEN) == 6 * 2 * 2
    assert all(torch.isfinite(torch.tensor(SEEN)))
    assert SEEN[::2] == SEEN[1::2]  # one batch until the next refresh
    assert len(plain.seen) == len(probed.seen)
    for (what, a), (_, b) in zip(plain.seen, probed.seen, strict=True):
        assert equal(a, b), what


def test_a_probe_sees_the_model_in_eval_mode_without_gradients_and_in_the_precision_of_training() -> None:
    seen: list[tuple[bool, bool, bool]] = []

    def loss(module: Any, batch: Any) -> Any:
        seen.append((module.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return module.loss(batch)

    driver = SelectiveTuning(Layers(), Curious(), Constant(2), Sample(), Freeze(), probe_loss=loss)
    fit(Task(), driver, precision="bf16-mixed")
    assert set(seen) == {(False, False, True)}


def test_a_probe_of_its_own_data_goes_through_it_again_and_again() -> None:
    batches: list[int] = []

    def loss(module: Any, batch: Any) -> Any:
        batches.append(int(batch.sum()))
        return module.loss(batch)

    data = loader(6, shuffle=False)
    driver = SelectiveTuning(Layers(), Curious(), Constant(2), Sample(), Freeze(), probe_data=data, probe_loss=loss)
    fit(Task(), driver)
    assert len(batches) == 12
    assert batches[0:6] == batches[6:12]  # 3 batches, each probed twice, in every pass
    assert len(set(batches)) == 3
    assert driver.state_dict()["drawn"] == 6


def test_probe_data_without_a_batch_is_an_error() -> None:
    driver = SelectiveTuning(Layers(), Curious(), Constant(2), Sample(), Freeze(), probe_data=[])
    with pytest.raises(ValueError, match="`probe_data` has no batch"):
        fit(Task(), driver)


@pytest.mark.parametrize("value", [None, "a loss", torch.zeros(3)])
def test_a_probe_loss_that_is_no_loss_is_an_error(value: Any) -> None:
    driver = SelectiveTuning(
        Layers(), Curious(), Constant(2), Sample(), Freeze(), probe_loss=lambda module, batch: value
    )
    with pytest.raises(ValueError, match=r"`probe_loss` gave .*which is not a loss"):
        fit(Task(), driver)


def test_manual_optimization_must_say_what_its_loss_is() -> None:
    driver = SelectiveTuning(Layers(), Curious(), Constant(2), Sample(), Freeze())
    with pytest.raises(ValueError, match="`probe_loss` is needed under manual optimization"):
        fit(ManualTask(), driver)


def test_a_training_step_without_a_loss_cannot_be_probed() -> None:
    class Silent(Task):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

    driver = SelectiveTuning(Layers(), Curious(), Constant(2), Sample(), Freeze())
    with pytest.raises(ValueError, match="returned no loss to probe with"):
        fit(Silent(), driver)


@pytest.mark.parametrize("form", ["one argument", "dictionary"])
def test_training_steps_of_all_forms_can_be_probed(form: str) -> None:
    class One(Task):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Any) -> Any:
            return self.loss(batch)

    class Mapping(Task):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": self.loss(batch), "more": 1}

    SEEN.clear()
    fit(
        One() if form == "one argument" else Mapping(),
        SelectiveTuning(Layers(), Curious(), Constant(2), Sample(), Freeze()),
    )
    assert len(SEEN) == 12


def test_all_is_put_back_after_a_probe_that_fails() -> None:
    calls = 0

    def loss(module: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyError("no such batch")
        return module.loss(batch)

    task = Task()
    driver = SelectiveTuning(Layers(), Curious(), Constant(2), Sample(), Freeze(), probe_loss=loss)
    with pytest.raises(KeyError):
        fit(task, driver)
    assert task.training
    assert "log" not in vars(task)
    assert all(p.requires_grad for p in task.parameters())


def test_logging_is_silent_only_inside() -> None:
    task = Task()
    with muted(task):
        task.log("loss", torch.ones(()))  # without a Trainer this would raise
        task.log_dict({"a": 1.0})
    assert "log" not in vars(task)
    assert "log_dict" not in vars(task)


def test_probing_in_between_does_not_change_the_weights() -> None:
    a, b = Task(), Task()
    fit(a, SelectiveTuning(Layers(), Uniform(), Constant(2), Sample(), Freeze()))
    fit(b, SelectiveTuning(Layers(), Curious(), Constant(2), Sample(), Freeze()))
    assert not moved(weights(a), weights(b))


def test_a_trainer_probe_passes_over_what_was_drawn_before() -> None:
    class Pretend:
        class strategy:
            batch_to_device = staticmethod(lambda batch, device: batch)

        class precision_plugin:
            convert_input = staticmethod(lambda batch: batch)

            @staticmethod
            def forward_context() -> Any:
                return torch.no_grad()

    task = Task()
    seen: list[int] = []

    def loss(module: Any, batch: Any) -> Any:
        seen.append(int(batch.sum()))
        return module.loss(batch)

    def draw(drawn: int, count: int) -> None:
        probe = TrainerProbe(Pretend(), task, loader(10), loss, drawn)
        for _ in range(count):
            probe.refresh()
            probe.loss()

    draw(0, 8)
    draw(3, 5)
    assert seen[3:8] == seen[8:]
