"""Gates before adapters: their gradients, what is shut, and the contract."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from alike import assert_equal
from gate_methods import ADAPTERS, GATE_METHODS
from interrupted import Interrupted, Stop
from peft import LoraConfig, get_peft_model
from rank_methods import svd_net
from settings import SETTINGS
from test_contract import Case, SaveAtThree, driver_for, equal, task_for
from torch import Tensor, nn
from toys import BLOCKS, Net, Task, adamw, fit, loader, lora_net, moved, tokens, trainable, trainer, weights
from witness import Witness
from workers import ranks

from apportion.callbacks import DiffoRA
from apportion.driver import SelectiveTuning
from apportion.gates import Gate, GateGradient, gates
from apportion.loader import StatefulLoader
from apportion.optim import Selective
from apportion.types import Bound, View
from apportion.units import Modules

ROW = GATE_METHODS["diffora"]
OPTIONS: dict[str, Any] = dict(ROW.options)
CASES: dict[str, Case] = {
    "diffora": Case(ROW.make, lora_net),
    "on adapters that are trained": Case(lambda **o: DiffoRA(**{**OPTIONS, "warmup": 0, **o}), lora_net),
    "on dora, by layer": Case(lambda **o: DiffoRA(**{**OPTIONS, "per": "block", **o}), lambda: lora_net("dora")),
    "on adalora, descending": Case(lambda **o: DiffoRA(**{**OPTIONS, "form": "descent", **o}), svd_net),
}


class Given:
    """A probe that hands out the gradients of a loss on batches of the test."""

    def __init__(self, model: nn.Module, loss: Callable[[Tensor], Tensor], batches: list[Tensor]) -> None:
        self.model, self.loss_fn, self.given = model, loss, batches

    def gather(self, params: Any, term: Any, calibration: Any, present: bool) -> dict[str, Tensor]:
        from apportion.calibrate import gather

        return gather(self.model, self.loss_fn, self.given, params, term, calibration)


def measured(score: GateGradient, model: nn.Module, loss: Any, batches: list[Tensor], times: int = 1) -> Tensor:
    bound = Modules().bind(model)
    state = score.init(bound.n)
    for step in range(times):
        probe: Any = Given(model, loss, batches)
        state = score.update(state, View(step + 1, bound, torch.Generator(), probe))
    return score.read(state)


class Pair(nn.Module):
    """Two layers of one adapted map each, whose outputs are added up with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        weights = iter((1.0, -2.0, 3.0, 0.0))
        return torch.stack([next(weights) * m(x).sum() for layer in self.layers for m in layer.values()]).sum()  # type: ignore[operator]


def pair() -> Any:
    model = get_peft_model(Pair(), LoraConfig(r=1, lora_alpha=2, target_modules=["a", "b"]))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name:
                p.copy_(torch.tensor([[1.0, 2.0]]))
            elif "lora_B" in name:
                p.copy_(torch.tensor([[0.5], [0.25]]))
    return model


def test_the_gradient_of_a_gate_is_what_the_adapter_adds_times_the_gradient_of_the_output() -> None:
    # c B A x = 2 (0.5, 0.25) 3 = (3, 1.5) at x = (1, 1), 4.5 in all; at (1, 0): (1, 0.5), 1.5. The mean is 3.
    batches = [torch.ones(1, 2), torch.tensor([[1.0, 0.0]])]
    signed = torch.tensor([3.0, -6.0, 9.0, 0.0], dtype=torch.float64)
    model = pair()
    loss = lambda x: model(x)  # noqa: E731
    assert torch.equal(measured(GateGradient(batches=2, form="descent"), model, loss, batches), -signed)
    assert torch.equal(measured(GateGradient(batches=2), model, loss, batches, times=3), signed.abs())


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_gates_are_one_at_first_and_their_gradient_is_that_of_scaling_b(kind: str) -> None:
    model: Any = svd_net() if kind == "adalora" else lora_net()
    model = model.double().eval()
    ids = tokens(4)
    loss = lambda ids: model(ids).square().mean()  # noqa: E731
    scores = measured(GateGradient(batches=1, form="descent"), model, loss, [ids])
    bound = Modules().bind(model)
    eps = 1e-4
    for unit, score in zip(bound.units, scores.tolist(), strict=True):
        told = {}
        for sign in (1, -1):
            kept = {k: p.detach().clone() for k, p in gates(unit).items()}
            with torch.no_grad():
                for p in gates(unit).values():
                    p.mul_(1 + sign * eps)
                told[sign] = float(loss(ids))
                for k, p in gates(unit).items():
                    p.copy_(kept[k])
        assert -(told[1] - told[-1]) / (2 * eps) == pytest.approx(score, rel=1e-5, abs=1e-9)


def test_measuring_leaves_no_trace() -> None:
    plain, measuring = Task(lora_net(dropout=0.2)), Task(lora_net(dropout=0.2))
    fit(plain, data=loader())
    driver = DiffoRA(share=1.0, warmup=3, every=1, batches=2)
    fit(measuring, driver, data=loader())
    assert int(driver.selection.state_dict()["score"]["count"]) == 3
    assert not moved(weights(plain), weights(measuring))


def test_a_shut_gate_gives_the_base_model_and_an_open_one_the_adapter() -> None:
    model: Any = lora_net(dropout=0.0)
    ids = tokens(3)
    open_, with_base = model(ids), None
    with model.disable_adapter():
        with_base = model(ids)
    optimizer = Selective(
        adamw(trainable(model)), model, DiffoRA(1.0, warmup=0, batches=1), probe=lambda: model.loss(ids)
    )
    assert torch.equal(model(ids), open_)
    nothing = torch.zeros(optimizer.selection.bound.n, dtype=torch.bool)
    Gate().apply(optimizer.owner, optimizer._key, optimizer.selection.bound, nothing)
    assert torch.equal(model(ids), with_base)
    assert not torch.equal(open_, with_base)
    assert not [p for p in model.parameters() if p.requires_grad]
    everything = ~nothing
    Gate().apply(optimizer.owner, optimizer._key, optimizer.selection.bound, everything)
    assert len(trainable(model)) == 2 * optimizer.selection.bound.n
    assert torch.equal(model(ids), with_base)  # B starts anew
    optimizer.close()


@pytest.mark.parametrize(("share", "kept"), [(0.05, 1), (0.25, 3), (0.5, 6), (0.99, 11), (1.0, 12)])
def test_exactly_the_share_of_the_modules_keeps_its_adapter(share: float, kept: int) -> None:
    driver = DiffoRA(**{**OPTIONS, "share": share})
    task = Task(lora_net())
    fit(task, driver, limit_train_batches=8)
    assert driver.history.masks.sum(1).tolist() == [ADAPTERS, kept]
    alive = [unit.name for unit in driver.selection.bound.units if any(bool(p.any()) for p in gates(unit).values())]
    mask = driver.selection.mask
    assert mask is not None
    assert alive == [n for n, m in zip(driver.selection.names, mask.tolist(), strict=True) if m]


def test_the_modules_of_the_largest_gradients_are_kept_and_each_layer_may_have_its_share() -> None:
    for options in ({}, {"per": "block"}):
        driver = DiffoRA(**{**OPTIONS, "share": 1 / 3, **options})
        fit(Task(lora_net()), driver)
        scores = driver.slots.score.read(driver.selection.state_dict()["score"])
        mask = driver.selection.mask
        assert mask is not None
        if options:
            assert mask.view(BLOCKS, 3).sum(1).tolist() == [1] * BLOCKS
            assert torch.equal(mask.view(BLOCKS, 3).int().argmax(1), scores.view(BLOCKS, 3).argmax(1))
        else:
            assert float(scores[mask].min()) > float(scores[~mask].max())


def test_gates_are_measured_on_validation_batches_if_there_are_any() -> None:
    other = [tokens(2, seed=40 + i) for i in range(3)]
    first, second, again = (DiffoRA(**OPTIONS, probe_data=data) for data in (None, other, other))
    for driver in (first, second, again):
        fit(Task(lora_net()), driver)
    a, b, c = (d.selection.state_dict()["score"]["sum"] for d in (first, second, again))
    assert not torch.allclose(a, b)
    assert torch.equal(b, c)


# The contract
# --------------------------------------------------------------------------------------------------------------------


FEW = ("plain", "clip by norm", "two groups")
PAIRS = [(name, setting) for name in CASES for setting in (SETTINGS if name == "diffora" else FEW)]


@pytest.mark.parametrize(("name", "setting"), PAIRS)
def test_selected_is_trained_and_unselected_does_not_move_by_one_bit(name: str, setting: str) -> None:
    driver = driver_for(CASES[name], setting)
    witness = Witness(driver)
    task = task_for(CASES[name], setting)
    flags = [p.requires_grad for p in task.parameters()]
    steps = 12 if setting == "two optimizers" else 6
    run = fit(task, [driver, Still(driver), witness], steps=steps, limit_train_batches=5, **SETTINGS[setting]())
    witness.check(still=1 if setting == "16-mixed" else 0)
    kept = 4
    after = [kept] if driver.slots.score.last == 0 else [ADAPTERS, kept]
    assert [count for step in witness.steps for count in step.counts] == [after[0]] * 2 + [after[-1]] * 4
    for step in witness.steps:
        assert step.state <= step.chosen
        assert step.state == step.chosen or not step.moved
    assert [p.requires_grad for p in task.parameters()] == flags
    assert not any(p._post_accumulate_grad_hooks for p in task.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in task.modules())
    every = [p for o in run.optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(map(id, every)) == sorted(map(id, trainable(task)))


class Still(Witness):
    """Sees to it that what is shut is shut at every step after the choice."""

    def __init__(self, driver: SelectiveTuning) -> None:
        super().__init__()
        self.driver = driver

    def on_fit_start(self, *args: Any) -> None:
        pass

    def on_train_batch_start(self, *args: Any) -> None:
        pass

    def on_before_optimizer_step(self, *args: Any) -> None:
        pass

    def on_train_batch_end(self, *args: Any) -> None:
        mask, bound = self.driver.selection.mask, self.driver.selection.bound
        assert mask is not None
        shut = [u for u, m in zip(bound.units, mask.tolist(), strict=True) if not m]
        assert not any(bool(p.any()) for unit in shut for p in gates(unit).values())


def test_the_table_is_right_about_units_counts_and_switches() -> None:
    driver = ROW.make()
    fit(Task(ROW.net()), driver)
    assert (driver.selection.bound.n, tuple(driver.history.steps)) == (ROW.units, ROW.switches)
    assert driver.history.masks.sum(1).tolist() == [ROW.selected[s] for s in ROW.switches]


@pytest.mark.parametrize(
    ("name", "setting"), [*((n, "plain") for n in CASES), ("diffora", "accumulation"), ("diffora", "two optimizers")]
)
def test_six_steps_are_three_steps_saved_loaded_and_three_more(name: str, setting: str, tmp_path: Path) -> None:
    case, path = CASES[name], tmp_path / "half.ckpt"
    several = 2 if setting == "two optimizers" else 1
    whole, first, second = (task_for(case, setting) for _ in range(3))
    a, b, c = (driver_for(case, setting, **({} if "trained" in name else {"warmup": 4})) for _ in range(3))
    fit(whole, a, steps=6 * several, **SETTINGS[setting]())
    fit(first, [b, SaveAtThree(path)], steps=4 * several, **SETTINGS[setting]())
    fit(second, c, steps=6 * several, resume=path, seed=99, **SETTINGS[setting]())
    assert not moved(weights(whole), weights(second))
    assert equal(a.state_dict(), c.state_dict())
    assert len(a.history.steps) == (1 if "trained" in name else 2)


@pytest.mark.parametrize("name", CASES)
def test_the_model_is_left_as_found_after_an_exception(name: str) -> None:
    task = Interrupted(CASES[name].net())
    with pytest.raises(Stop):
        fit(task, CASES[name].make())
    task.assert_left_as_found()


def train(batch: int, joined: int = 1) -> dict[str, Any]:
    """One fit, alone or as a rank; ``joined`` processes' batches in one."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    torch.manual_seed(0)
    task = Task(lora_net(dropout=0.0), lambda m: torch.optim.AdamW(trainable(m), lr=1e-2, eps=1e-3))
    source = StatefulLoader(tokens(12 * joined * world), batch_size=batch * joined, shuffle=True, seed=5)  # type: ignore[arg-type]
    driver = ROW.make()
    more = {"strategy": "ddp", "devices": world} if world > 1 else {"devices": 1}
    trainer(driver, 6, use_distributed_sampler=False, **more).fit(task, source)
    return {"weights": weights(task), "selection": driver.selection.state_dict()}


def _ddp() -> dict[str, Any]:
    return train(2)


@pytest.mark.xdist_group("ranks")
def test_two_processes_choose_and_train_alike() -> None:
    first, second = ranks(2).run(_ddp)
    assert_equal(first, second)
    alone = train(2, joined=2)
    assert torch.equal(first["selection"]["masks"], alone["selection"]["masks"])
    for name, value in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-3, atol=1e-4)


# Refusals
# --------------------------------------------------------------------------------------------------------------------


def test_fresh_adapters_have_no_gates_to_compare() -> None:
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"every gate without a gradient before step 0.*Train for some steps first"):
        fit(Task(model), DiffoRA(warmup=0))
    fit(Task(get_peft_model(Net(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))), DiffoRA(warmup=1))  # type: ignore[arg-type]


def test_units_without_low_rank_adapters_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"The unit .*k_proj has no low-rank adapter that trains"):
        fit(Task(lora_net("ia3")), DiffoRA())
    with pytest.raises(ValueError, match="has no low-rank adapter that trains"):
        gates(Modules().bind(Net()).units[0])


@pytest.mark.parametrize(
    "options", [{"every": 0}, {"batches": 0}, {"last": -1}, {"form": "absolute"}], ids=lambda o: next(iter(o))
)
def test_arguments_out_of_range_quote_the_call(options: dict[str, Any]) -> None:
    key, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=rf"`GateGradient\({key}={value!r}\)` must"):
        GateGradient(**options)


def test_measurements_end_at_the_last_or_go_on() -> None:
    assert [s for s in range(9) if GateGradient(every=2, last=5).due(s)] == [1, 3, 5]
    assert [s for s in range(9) if GateGradient(every=2, last=4).due(s)] == [2, 4]
    assert [s for s in range(9) if GateGradient(last=0).due(s)] == [0]
    assert [s for s in range(9) if GateGradient(every=3).due(s)] == [3, 6]


def test_a_measurement_without_a_probe_says_what_is_missing() -> None:
    bound = Bound(Modules().bind(lora_net()).units)
    score = GateGradient()
    with pytest.raises(ValueError, match="needs a probe"):
        score.update(score.init(bound.n), View(1, bound, torch.Generator()))
