"""Ranks in a fit: budgets arrive without a call in the loop; the penalty acts once; memory goes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from pytorch_lightning.callbacks import Timer
from pytorch_lightning.plugins import MixedPrecision
from rank_methods import CASES, GROWING_LORA, svd_net
from settings import two_optimizers
from test_adalora_parity import peft_penalty
from torch import Tensor, nn
from toys import ManualTask, Net, Task, ValidatedTask, adamw, fit, lora_net, trainable, two_groups, weights
from transformers import BertConfig, BertForSequenceClassification

from apportion.adapters import find
from apportion.callbacks import AdaLoRA
from apportion.driver import SelectiveTuning
from apportion.optim import Selective
from apportion.orthogonality import Orthogonality
from apportion.prune import Prune
from apportion.rank_budgets import Decay
from apportion.rank_selection import RankSelection
from apportion.rank_units import Ranks
from apportion.rules import TopK
from apportion.scores import Uniform
from apportion.selection import Slots
from apportion.sensitivity import Sensitivity

PRUNING = [name for name, case in CASES.items() if not case.grows]
SCHEDULE: dict[str, Any] = {"warmup": 1, "final": 3, "every": 2}


def gates(model: nn.Module) -> list[Tensor]:
    """Which ranks of each adapter can act, as state dicts have them."""
    state = model.state_dict()
    values = [v.flatten() != 0 for k, v in state.items() if ".lora_E." in k]
    return values or [(v.flatten(1) != 0).any(0) for k, v in state.items() if ".lora_B." in k]


class Watch(pl.Callback):
    """Notes after every optimizer step how many ranks are in and what they weigh."""

    def __init__(self, driver: SelectiveTuning) -> None:
        self.driver = driver
        self.selected: list[int] = []
        self.alive: list[int] = []
        self.entries: list[int] = []
        self.state: list[int] = []
        self.progress: list[float] = []
        self.grads: list[int] = []
        self._seen = 0

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.grads.append(sum(p.grad.numel() for p in pl_module.parameters() if p.grad is not None))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        assert isinstance(self.driver.selection, RankSelection)
        assert self.driver.selection.mask is not None
        self.selected.append(int(self.driver.selection.mask.sum()))
        self.progress.append(self.driver.selection.progress)
        self.alive.append(sum(int(g.sum()) for g in gates(pl_module)))
        self.entries.append(sum(p.numel() for p in pl_module.parameters() if p.requires_grad))
        held = [v for o in trainer.optimizers for s in o.state.values() for k, v in s.items() if k != "step"]
        self.state.append(sum(v.numel() for v in held if isinstance(v, Tensor)))


def scaler(scale: float) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=2.0**-112))


SETTINGS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "accumulation of 2": lambda: {"accumulate_grad_batches": 2},
    "accumulation of 3, short last window": lambda: {"accumulate_grad_batches": 3, "limit_train_batches": 5},
    "clip": lambda: {"gradient_clip_val": 0.05},
    "bf16-true": lambda: {"precision": "bf16-true"},
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "16-mixed": lambda: {"plugins": [scaler(2.0**10)]},
    "16-mixed, a step overflows": lambda: {"plugins": [scaler(2.0**120)]},
    "two groups": dict,
    "manual": dict,
    "two optimizers": dict,
}


def task_for(net: nn.Module, setting: str) -> Any:
    if setting in ("manual", "two optimizers"):
        return ManualTask(net, two_optimizers if setting == "two optimizers" else None, accumulate=2)
    return Task(net, (lambda m: adamw(two_groups(m))) if setting == "two groups" else None)


# The budget
# --------------------------------------------------------------------------------------------------------------------


PAIRS = [
    (name, setting)
    for name in CASES
    for setting in SETTINGS
    if name not in GROWING_LORA or setting in ("plain", "bf16-true", "16-mixed", "two optimizers")
]


@pytest.mark.parametrize(("name", "setting"), PAIRS)
def test_the_budget_holds_at_every_step_without_a_call_in_the_loop(name: str, setting: str) -> None:
    case = CASES[name]
    driver = case.make()
    watch = Watch(driver)
    task = task_for(case.net(), setting)
    before = weights(task)
    fit(task, [driver, watch], steps=16 if setting == "two optimizers" else 8, **SETTINGS[setting]())
    assert driver.selection.step == 8
    assert tuple(watch.selected) == case.selected
    if case.grows:  # those that come in act from the next step on
        first = 0 if setting == "16-mixed, a step overflows" else case.selected[0]
        assert watch.alive == [first, *case.selected[:-1]]
    else:  # those that are put out grow again until the choice is final
        chosen = driver.history.steps[1:]
        assert [watch.alive[t - 1] for t in chosen] == [case.selected[t - 1] for t in chosen]
        assert watch.alive[4:] == list(case.selected[4:])
    assert driver.history.masks[-1].tolist() == torch.cat(gates(task)).tolist()
    state = driver.selection.state_dict()
    assert (state["final"], state["forced"], state["score"]) == (True, False, {})
    after = weights(task)
    assert {n: w.shape for n, w in after.items()} == {n: w.shape for n, w in before.items()}  # as they were found
    assert all(torch.equal(after[n], w.to(after[n].dtype)) for n, w in before.items() if "lora_" not in n)
    assert all(bool(w.isfinite().all()) for w in after.values())


@pytest.mark.parametrize("setting", ["plain", "accumulation of 3, short last window", "manual", "two optimizers"])
def test_every_step_is_scored_once_with_its_gradient_and_the_weights_it_led_to(setting: str) -> None:
    seen: list[dict[nn.Parameter, Tensor]] = []

    class Spy(pl.Callback):
        """Looks at each optimizer's step, and at the averages after four steps."""

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            for optimizer in trainer.optimizers:
                optimizer.register_step_post_hook(self.look)

        def look(self, optimizer: Any, *args: Any) -> None:
            held = [p for group in optimizer.param_groups for p in group["params"]]
            seen.append({p: (p * p.grad).abs().detach() for p in held if p.grad is not None})

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if driver.selection.step == 4:
                self.scores = {k: v.clone() for k, v in driver.selection.state_dict()["score"].items()}
                self.steps = len(seen)

    driver, spy = AdaLoRA(target=20, warmup=4, final=1), Spy()
    task = task_for(svd_net(), setting)
    double = setting == "two optimizers"
    fit(task, [driver, spy], steps=12 if double else 6, **SETTINGS[setting]())
    assert spy.steps == (8 if double else 4)
    averages = {
        p: (spy.scores[f"mean.{i}"][j], spy.scores[f"doubt.{i}"][j])
        for i, stack in enumerate(Ranks().bind(task.net).stacks)
        for j, p in enumerate(stack.params)
    }
    assert len(averages) == 36
    for p, found in averages.items():
        mean, doubt = torch.zeros_like(p), torch.zeros_like(p)
        for now in seen[: spy.steps]:
            if p in now:
                mean = 0.85 * mean + 0.15 * now[p]
                doubt = 0.85 * doubt + 0.15 * (now[p] - mean).abs()
        assert mean.abs().max() > 0
        torch.testing.assert_close(found, (mean, doubt), rtol=1e-5, atol=1e-9)


def test_a_step_that_a_scaler_skips_is_not_scored() -> None:
    driver = AdaLoRA(target=20, warmup=2, final=1)
    scores: list[Tensor] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            state = driver.selection.state_dict()["score"]
            scores.append(torch.cat([v.flatten() for v in state.values()]) if state else torch.zeros(1))

    fit(Task(svd_net()), [driver, Look()], steps=4, plugins=[scaler(2.0**120)])
    assert not scores[0].any()
    assert bool(scores[1].any())
    assert bool(scores[1].isfinite().all())


def test_a_run_that_stops_early_makes_its_final_choice_and_says_so() -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 5

    driver = AdaLoRA(target=20, warmup=2, final=10, every=4)
    task = Task(svd_net())
    with pytest.warns(UserWarning, match=r"`AdaLoRA`: the run ended after 5 steps, .* final 20 of 48 ranks"):
        fit(task, [driver, Stop()], steps=40)
    assert sum(int(g.sum()) for g in gates(task)) == 20
    state = driver.selection.state_dict()
    assert (state["final"], state["forced"], driver.history.steps) == (True, True, [0, 4, 5])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "`AdaLoRA` resumes|.*does not have many workers|.*LeafSpec|.*max_epochs")
        fit(Task(svd_net()), [AdaLoRA(target=20, warmup=1, final=2)], steps=6)


def test_an_interrupted_run_is_left_as_it_is() -> None:
    class Interrupt(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 7:
                raise RuntimeError("stop")

    driver = AdaLoRA(target=20, **SCHEDULE)
    task = Task(svd_net())
    with pytest.raises(RuntimeError, match="stop"):
        fit(task, [driver, Interrupt()], steps=8)
    assert not driver.selection.state_dict()["forced"]
    assert [p.shape for p in task.parameters()] == [p.shape for p in Task(svd_net()).parameters()]
    assert sum(int(g.sum()) for g in gates(task)) == 20


class Clock(Timer):
    """A timer whose elapsed seconds the test sets."""

    now = 0.0

    def time_elapsed(self, stage: Any = "train") -> float:
        return self.now


@pytest.mark.parametrize("steps", [100, -1])
def test_under_a_time_limit_the_budget_follows_what_is_nearer_to_its_end(steps: int) -> None:
    clock = Clock({"seconds": 100})

    class Tick(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            Clock.now = [0, 5, 30, 20, 45, 62, 80, 99, 100][min(trainer.global_step, 8)]

    driver = AdaLoRA(target=20, warmup=0.1, final=0.4, every=1)
    watch = Watch(driver)
    fit(Task(svd_net()), [clock, Tick(), driver, watch], steps=steps, max_epochs=-1 if steps == -1 else None)
    Clock.now = 0.0
    assert watch.progress[:8] == sorted(watch.progress[:8])
    expected = [0.0, 0.05, 0.3, 0.3, 0.45, 0.62]
    assert watch.progress[:6] == pytest.approx(
        [max(e, (i + 1) / 100 if steps > 0 else 0) for i, e in enumerate(expected)]
    )
    assert watch.selected == sorted(watch.selected, reverse=True)
    assert watch.selected[1] == 48
    assert watch.selected[2] == int(20 + 28 * (1 - 0.2 / 0.5) ** 3)
    assert watch.selected[5] == 20
    assert driver.selection.state_dict()["final"]


def test_the_progress_of_a_time_limit_is_saved() -> None:
    driver = AdaLoRA(target=20, warmup=0.1, final=0.4, every=1)
    selection = driver.new_selection()
    assert isinstance(selection, RankSelection)
    selection.bind(svd_net())
    selection.advance()
    selection.step = 1
    assert selection.after_step(None, 0.4)
    resumed = driver.new_selection()
    assert isinstance(resumed, RankSelection)
    resumed.load_state_dict(selection.state_dict())
    resumed.bind(svd_net())
    resumed.step = 2
    resumed.after_step(None, 0.01)  # the new process's clock begins again
    assert resumed.progress == 0.4
    assert resumed.mask is not None
    assert selection.mask is not None
    assert int(resumed.mask.sum()) == int(selection.mask.sum()) < 48


# The penalty
# --------------------------------------------------------------------------------------------------------------------


class Sequences(pl.LightningModule):
    """A tiny classifier of transformers, whose outputs hold a loss, in PEFT's hands."""

    def __init__(self, task_type: str | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=13, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        options = AdaLoraConfig(
            task_type=task_type,
            init_r=4,
            target_r=1,
            total_step=9,
            target_modules=["query", "value"],
            orth_reg_weight=7.0,
        )
        self.model = get_peft_model(BertForSequenceClassification(config), options)
        self.losses: list[tuple[float, float]] = []

    def loss(self, batch: Tensor) -> Any:
        labels = batch[:, 0] % 2
        outputs = self.model(input_ids=batch, labels=labels)
        plain = nn.functional.cross_entropy(outputs.logits, labels)
        self.losses.append((outputs.loss.item(), plain.item()))
        return outputs.loss, plain

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.loss(batch)[0]

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.loss(batch)

    def val_dataloader(self) -> Any:
        return ValidatedTask.val_dataloader(self)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(trainable(self), lr=0.1)


class Fined(pl.Callback):
    """Compares the gradients of a step with those of the plain loss and one penalty."""

    def __init__(self, weight: float) -> None:
        self.weight, self.compared = weight, 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batch = batch

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        plain = pl_module.loss(self.batch)[1] + self.weight * peft_penalty(pl_module)
        params = [p for n, p in pl_module.named_parameters() if "lora_" in n and p.requires_grad]
        for p, g in zip(params, torch.autograd.grad(plain, params), strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)
            self.compared += 1


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("task_type", [None, "SEQ_CLS", "FEATURE_EXTRACTION"])
def test_the_penalty_acts_once_whatever_the_kind_of_task(task_type: str | None, weight: float) -> None:
    module, fined = Sequences(task_type), Fined(weight)
    driver = AdaLoRA(target=0.5, orthogonality=weight, shrink=False, warmup=1, final=1, every=1)
    run = fit(module, [driver, fined], steps=5, val_check_interval=2)
    assert fined.compared == 5 * 12
    assert len(module.losses) > 10
    assert all(loss == pytest.approx(plain, rel=1e-5) for loss, plain in module.losses)  # in validation too
    if weight:
        assert float(run.callback_metrics["AdaLoRA/orthogonality"]) > 0
    tuner = module.model.base_model
    assert "forward" not in vars(tuner)
    assert tuner.forward.__func__ is type(tuner).forward
    loss, plain = module.loss(torch.ones(2, 5, dtype=torch.int64))
    assert (float(loss) - float(plain) > 0.1) == (task_type is not None)  # PEFT's own, which is back


def test_several_optimizers_get_the_penalty_once_each() -> None:
    compared = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            params = trainable(pl_module)
            grads = torch.autograd.grad(pl_module.loss(batch) + 3.0 * peft_penalty(pl_module), params)
            self.expected = dict(zip(params, grads, strict=True))

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                torch.testing.assert_close(p.grad, self.expected[p], rtol=1e-4, atol=1e-6)
                compared.append(p)

    task = ManualTask(svd_net(dropout=0.0), two_optimizers)
    fit(task, [AdaLoRA(target=20, orthogonality=3.0, shrink=False, **SCHEDULE), Look()], steps=16)
    assert len(compared) == 8 * 36


def test_the_penalty_is_in_the_log_and_not_in_the_loss() -> None:
    driver = AdaLoRA(target=0.5, orthogonality=0.5, warmup=1, final=1)
    task = Task(svd_net(dropout=0.0))
    start = peft_penalty(task).item()
    run = fit(task, [driver], steps=4)
    logged = float(run.callback_metrics["AdaLoRA/orthogonality"])
    assert 0 < logged < start  # weighted
    assert float(run.callback_metrics["AdaLoRA/ranks"]) == 24


def test_a_penalty_makes_the_factors_orthonormal() -> None:
    distance = []
    for weight in (0.0, 5.0):
        task = Task(svd_net(dropout=0.0))
        fit(task, [AdaLoRA(target=1.0, orthogonality=weight, warmup=1, final=1)], steps=40)
        distance.append(peft_penalty(task).item())
    assert distance[1] < 0.5 * distance[0]


# Memory
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRUNING)
def test_after_the_final_choice_the_run_weighs_what_its_ranks_weigh(name: str) -> None:
    case = CASES[name]
    driver = case.make()
    watch = Watch(driver)
    task = Task(case.net(), lambda m: torch.optim.AdamW(trainable(m)))
    whole = sum(p.numel() for p in trainable(task))
    fit(task, [driver, watch], steps=8)
    sizes, mask = driver.selection.bound.sizes, driver.selection.mask
    assert mask is not None
    vectors = sum(p.numel() for n, p in task.named_parameters() if "magnitude" in n)
    expected = int(sizes[mask].sum()) + vectors
    assert watch.entries == [whole] * 4 + [expected] * 4
    assert watch.state == [2 * whole] * 4 + [2 * expected] * 4
    assert watch.grads == [whole] * 5 + [expected] * 3
    ranks = [int(g.sum()) for g in gates(task)]
    parts = find(task.net)
    wide = int(name == "adalora")
    widths = [p.a[0].numel() + p.b[:, 0].numel() + wide for p in parts]
    assert expected - vectors == sum(r * w for r, w in zip(ranks, widths, strict=True))
    assert 0 in ranks


def test_kept_rows_and_their_moments_survive_the_shrinking_bit_for_bit() -> None:
    runs = []
    for shrink in (True, False):
        driver = AdaLoRA(target=20, shrink=shrink, orthogonality=0.0, **SCHEDULE)
        found: dict[int, Any] = {}

        class Look(pl.Callback):
            def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, found: Any = found) -> None:
                state = trainer.optimizers[0].state_dict()["state"]
                moments = {k: {m: v.clone() for m, v in s.items()} for k, s in state.items()}
                weight = {k: v.clone() for k, v in pl_module.state_dict().items()}
                found[trainer.global_step] = (weight, moments)

        torch.manual_seed(0)
        fit(Task(svd_net(dropout=0.0)), [driver, Look()], steps=8)
        runs.append((found, driver.history.masks))
    (small, masks), (whole, same) = runs
    assert torch.equal(masks, same)
    for t in range(1, 6):
        for key, value in whole[t][0].items():
            gone = (small[t][0][key] != value) if t == 5 else torch.zeros_like(value, dtype=torch.bool)
            assert t == 5 or torch.equal(small[t][0][key], value)
            assert not small[t][0][key][gone].any()  # what is out reads as zero
        for i, moments in whole[t][1].items():
            for m, value in moments.items():
                mine = small[t][1][i][m]
                assert mine.shape == value.shape
                assert torch.equal(mine, value) if t < 5 else not mine[mine != value].any()
    assert bool(any((small[5][1][i]["exp_avg"] == 0).any() for i in small[5][1]))
    for key, value in whole[8][0].items():  # and from there on both train alike
        if ".lora_E." in key:
            torch.testing.assert_close(small[8][0][key], value, rtol=1e-4, atol=1e-5)


# Adapters
# --------------------------------------------------------------------------------------------------------------------


def several(train: str, *others: str) -> nn.Module:
    net = Net()
    model = get_peft_model(net, _config(), adapter_name=others[0])
    for name in (*others[1:], train):
        model.add_adapter(name, _config())
    model.set_adapter(train)
    return model


def _config() -> LoraConfig:
    return LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False)


@pytest.mark.parametrize(
    ("train", "others"), [("task1", ("task10", "xtask1y")), ("a", ("default",)), ("b", ("a", "ab"))]
)
def test_names_that_contain_each_other_are_told_apart(train: str, others: tuple[str, ...]) -> None:
    model = several(train, *others)
    before = weights(model)
    task = Task(model)
    driver = AdaLoRA(target=7, **SCHEDULE)
    fit(task, [driver], steps=8)
    bound = Ranks().bind(model)
    assert bound.n == 24
    assert {part.adapter for part in bound.adapters} == {train}
    assert sum(int((part.b != 0).any(0).sum()) for part in bound.adapters) == 7
    for name, value in weights(model).items():
        if f".{train}." not in name:
            assert torch.equal(value, before[name])


def test_of_two_adaptive_adapters_the_frozen_one_keeps_still() -> None:
    model = svd_net()
    frozen = AdaLoraConfig(init_r=4, target_r=1, total_step=9, target_modules=["q_proj"], inference_mode=True)
    model.add_adapter("task10", frozen)
    before = weights(model)
    fit(Task(model), [AdaLoRA(target=20, **SCHEDULE)], steps=8)
    for name, value in weights(model).items():
        if "task10" in name:
            assert torch.equal(value, before[name])


def test_several_that_train_must_be_named_and_each_may_have_its_own_budget() -> None:
    model = several("task1", "task10")
    model.base_model.set_adapter(["task1", "task10"])
    with pytest.raises(ValueError, match=r"Several adapters train \(task1, task10\).*`Ranks\(adapter='task1'\)`"):
        fit(Task(model), [AdaLoRA(target=7, **SCHEDULE)])
    with pytest.raises(ValueError, match=r"No trainable low-rank adapter 'three' .* adapters met: task1, task10"):
        fit(Task(model), [AdaLoRA(target=7, adapter="three", **SCHEDULE)])
    drivers = [AdaLoRA(t, adapter=a, name=a, **SCHEDULE) for a, t in (("task1", 1), ("task10", 2))]
    fit(Task(model), drivers, steps=8)
    for name, ranks in (("task1", 8), ("task10", 16)):
        parts = Ranks(adapter=name).bind(model).adapters
        assert sum(int((part.b != 0).any(0).sum()) for part in parts) == ranks


class Forked(nn.Module):
    """A net with a layer that its loss never meets."""

    def __init__(self, unused: bool) -> None:
        super().__init__()
        self.embed_tokens, self.lm_head = nn.Embedding(13, 8), nn.Linear(8, 13)
        self.side, self.main = nn.Linear(8, 8), nn.Linear(8, 8)
        self.unused = unused

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        return self.lm_head(x if self.unused else torch.tanh(self.main(x)))


def _forked(unused: bool) -> nn.Module:
    config = AdaLoraConfig(init_r=4, target_r=1, total_step=9, target_modules=["side", "main"])
    return get_peft_model(Forked(unused), config)


def test_ranks_without_a_gradient_go_first_and_are_named() -> None:
    model = _forked(unused=False)
    driver = AdaLoRA(target=3, **SCHEDULE)
    with pytest.warns(UserWarning, match=r"1 of 2 adapted layers, such as \S+side, got no gradient") as told:
        fit(Task(model), [driver], steps=8)
    assert sum("got no gradient at the first step" in str(w.message) for w in told) == 1
    assert driver.history.masks[-1].view(2, 4).sum(1).tolist() == [0, 3]


def test_adapters_that_never_get_a_gradient_are_an_error() -> None:
    model = _forked(unused=True)
    for p in model.get_submodule("base_model.model.lm_head").parameters():
        p.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"2 of 2 adapted layers, .* got no gradient"):
        fit(Task(model), [AdaLoRA(target=3, **SCHEDULE)])


def test_patterns_leave_layers_their_ranks() -> None:
    driver = AdaLoRA(target=5, pattern=r"self_attn\.\w+", exclude="v_proj", **SCHEDULE)
    model = svd_net()
    fit(Task(model), [driver], steps=8)
    ranks = {name: int((p != 0).sum()) for name, p in model.named_parameters() if ".lora_E." in name}
    assert sum(r for name, r in ranks.items() if "q_proj" in name) == 5
    assert {r for name, r in ranks.items() if "q_proj" not in name} == {4}
    with pytest.raises(ValueError, match=r"leaves none of the 12 adapted layers"):
        Ranks(pattern="nothing").bind(model)
    with pytest.raises(ValueError, match=r"`Ranks\(exclude='\('\)` is no regular expression"):
        Ranks(exclude="(")


@pytest.mark.parametrize("form", ["squares", "norms"])
def test_convolutions_have_ranks_too(form: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(16, 2))
    model = get_peft_model(net, LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False))
    optimizer = Selective(
        torch.optim.AdamW(trainable(model)), model, AdaLoRA(target=1, form=form, **SCHEDULE), total_steps=8
    )
    for _ in range(8):
        model(torch.randn(4, 3, 4, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    shapes = [tuple(p.shape) for n, p in model.named_parameters() if "lora_A" in n]
    assert sum(s[0] for s in shapes) == 2  # a convolution keeps a channel, of zeros
    assert sum(int(g.sum()) for g in gates(model)) == 1
    image = torch.randn(2, 3, 4, 4)
    live = model(image)
    optimizer.close()
    assert sum(p.shape[0] for n, p in model.named_parameters() if "lora_A" in n) == 6
    torch.testing.assert_close(model(image), live)


# Refusals
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Decay(mean_rank=-1), r"`Decay\(mean_rank=-1\)` must be at least 0"),
        (lambda: Decay(0.0), r"`Decay\(target=0.0\)` must be a count .* or a fraction in \(0, 1\]"),
        (lambda: Decay(True), r"`Decay\(target=True\)`"),
        (lambda: Decay(-1), r"`Decay\(target=-1\)`"),
        (lambda: Decay(warmup=-1), r"`Decay\(warmup=-1\)` must be a number of steps"),
        (lambda: Decay(final=1.0), r"`Decay\(final=1.0\)`"),
        (lambda: Decay(power=0), r"`Decay\(power=0\)` must be above 0"),
        (lambda: Decay(every=0), r"`Decay\(every=0\)` must be at least 1"),
        (lambda: Sensitivity(beta1=1.0), r"`Sensitivity\(beta1=1.0\)` must lie in \(0, 1\)"),
        (lambda: Orthogonality(-0.1), r"`Orthogonality\(weight=-0.1\)` must be at least 0"),
        (lambda: Orthogonality(form="frd"), r"`Orthogonality\(form='frd'\)` must be 'norms' or 'squares'"),
        (lambda: AdaLoRA(form="frd"), r"`Orthogonality\(form='frd'\)`"),
    ],
)
def test_what_is_out_of_range_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "steps", "message"),
    [
        ({"target": 49}, 8, r"asks for 49 ranks in the end, but the 12 adapters have 48"),
        ({"target_rank": 5}, 8, r"asks for 60 ranks in the end, but the 12 adapters have 48"),
        ({"warmup": 5, "final": 3}, 8, r"leaves no step in between in a run of 8 optimizer steps"),
    ],
)
def test_a_budget_that_cannot_be_is_refused_before_the_first_step(
    options: dict[str, Any], steps: int, message: str
) -> None:
    task = Task(svd_net())
    before = weights(task)
    with pytest.raises(ValueError, match=message):
        fit(task, [AdaLoRA(**{"target": 20, **SCHEDULE, **options})], steps=steps)
    assert all(torch.equal(w, before[n]) for n, w in weights(task).items())
    model = svd_net()
    with pytest.raises(ValueError, match=message):
        Selective(adamw(trainable(model)), model, AdaLoRA(**{"target": 20, **SCHEDULE, **options}), total_steps=steps)
    assert "forward" not in vars(model.base_model)


def test_a_run_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"follows the length of the run, but it has none"):
        fit(Task(svd_net()), [AdaLoRA()], steps=-1, max_epochs=-1)
    model = svd_net()
    with pytest.raises(ValueError, match=r"or the optimizer wrapper `total_steps`"):
        Selective(adamw(trainable(model)), model, AdaLoRA())


def test_slots_of_other_kinds_are_refused() -> None:
    slots = (Ranks(), Sensitivity(), Decay(), TopK(), Prune())
    Slots(*slots)
    with pytest.raises(TypeError, match=r"is not for ranks of adapters"):
        Slots(slots[0], Uniform(), *slots[2:])


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"No trainable low-rank adapter in `Net`: adapters met: none"):
        Ranks().bind(Net())
    with pytest.raises(ValueError, match=r"No trainable low-rank adapter"):
        Ranks().bind(lora_net("ia3"))


def test_sharded_adapters_are_refused() -> None:
    model = svd_net()
    layer: Any = find(model)[0].module
    layer.lora_A["default"].device_mesh = "a mesh"
    with pytest.raises(ValueError, match=r"is sharded over devices .* `strategy='ddp'`"):
        Ranks().bind(model)


def test_sharding_strategies_are_refused() -> None:
    with pytest.raises(ValueError, match=r"does not run under .* `ModelParallelStrategy`"):
        fit(Task(svd_net()), [AdaLoRA()], strategy=pl.strategies.ModelParallelStrategy())
