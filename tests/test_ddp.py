"""Ranks agree: the same selection and the same weights on all of them, and those of one process on the joined batch."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from alike import assert_equal
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys import BLOCKS, ManualTask, Net, Task, adamw, lora_net, tokens, trainable, trainer, weights
from workers import RanksFailed, ranks

from apportion.callbacks import HFT, IST, LISA, RST, BAdam, OwLore
from apportion.loader import StatefulLoader
from apportion.optim import Selective

pytestmark = pytest.mark.xdist_group("ranks")

LORA = ("ist", "rst", "ist-data")
METHODS: dict[str, Callable[[], Any]] = {
    "lisa": lambda: LISA(active_layers=2, interval=2),
    "ist": lambda: IST(active=2, probe_interval=2, rate=50.0),
    "ist-data": lambda: IST(active=2, probe_interval=2, rate=50.0, probe_data=loader(1)),
    "rst": lambda: RST(active=2),
    "hft": lambda: HFT(redraw="epoch"),
    "badam": lambda: BAdam(interval=2),
    "owlore": lambda: OwLore(active_layers=2, interval=2, threshold=1.5, state="keep"),
    "full": lambda: LISA(active_layers=BLOCKS, interval=2),
}
PRECISIONS = {"64-true": torch.float64, "bf16-true": torch.bfloat16}


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(trainable(module), lr=0.1, momentum=0.9, weight_decay=0.1)


def smooth_adamw(module: nn.Module) -> torch.optim.Optimizer:
    """AdamW whose eps keeps it from following the sign of gradients that are all but zero."""
    return adamw(trainable(module), eps=1e-3)


class Exact(Task):  # type: ignore[misc, valid-type]
    """Takes the loss in the precision of the weights."""

    def loss(self, batch: Tensor) -> Tensor:
        net: Any = self.net
        return F.cross_entropy(net(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


OPTIMIZERS = {"sgd": sgd, "adamw": smooth_adamw}


def net(name: str, **options: Any) -> nn.Module:
    return lora_net(dropout=0.0, **options) if name in LORA else Net(dropout=0.0, **options)


def loader(processes: int, world: int = 1, batch: int = 2) -> StatefulLoader:
    """Batches that are ``processes`` times as large, of which each of ``world`` ranks draws its share."""
    data: Any = tokens(12 * processes * world)
    return StatefulLoader(data, batch_size=batch * processes, shuffle=True, seed=5)


def result(module: Any, driver: Any, run: Any = None) -> dict[str, Any]:
    """What is compared, as plain tensors."""
    found = {"weights": weights(module), "buffers": {k: b.clone() for k, b in module.named_buffers()}}
    if driver is not None:
        history = driver.history
        found |= {"steps": history.steps, "masks": history.masks, "scores": driver.selection.state_dict()["score"]}
    return found


def train(
    name: str,
    joined: int = 1,
    precision: Any = "32-true",
    optimizer: str = "sgd",
    steps: int = 6,
    accumulate: int = 1,
    seed: int = 0,
    task: str = "Task",
    model: Any = None,
    plain: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """One fit, alone or as a rank: ``joined`` processes' batches in one, in one process."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    torch.manual_seed(seed)  # differing seeds must not matter: rank 0's weights count
    make = globals()[model] if isinstance(model, str) else model or net  # ranks import this file under another name
    module = globals()[task](make(name), OPTIMIZERS[optimizer])
    driver = None if plain else METHODS[name]()
    more = {"strategy": "ddp", "devices": world} if world > 1 else {"devices": 1}
    run = trainer(
        [] if driver is None else [driver],
        steps,
        precision=precision,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        **{**more, **options},
    )
    run.fit(module, loader(joined, world))
    return result(module, driver, run)


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference relative to the largest entry of its tensor."""
    return max(
        float((found[k].double() - v.double()).abs().max() / v.double().abs().max()) for k, v in expected.items()
    )


def moved(found: dict[str, Any], name: str) -> bool:
    """Whether training did something at all."""
    return distance(found["weights"], weights(Task(net(name)))) > 1e-3


# Same on all ranks, and same as one process ---------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", ["lisa", "ist", "hft", "owlore", "rst"])
def test_ranks_hold_the_weights_of_one_process_on_the_joined_batch(name: str, accumulate: int) -> None:
    found = ranks(2).run(train_as_rank, name, {"accumulate": accumulate})
    expected = train(name, joined=2, accumulate=accumulate)
    assert_equal(found[1], found[0])
    assert_equal(found[0]["masks"], expected["masks"])
    assert found[0]["steps"] == expected["steps"]
    assert moved(expected, name)
    assert distance(found[0]["weights"], expected["weights"]) < 1e-6


def train_as_rank(name: str, options: dict[str, Any]) -> dict[str, Any]:
    return train(name, **{"seed": dist.get_rank(), **options})


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ["lisa", "ist", "badam"])
def test_in_double_precision_the_difference_to_one_process_is_rounding(name: str, size: int) -> None:
    options = {"precision": "64-true", "optimizer": "adamw", "task": "Exact"}
    found = ranks(size).run(train_as_rank, name, options)
    expected = train(name, joined=size, **options)
    for rank in found[1:]:
        assert_equal(rank, found[0])
    assert_equal(found[0]["masks"], expected["masks"])
    assert moved(expected, name)
    assert distance(found[0]["weights"], expected["weights"]) < 1e-12
    assert distance(found[0]["scores"], expected["scores"]) < 1e-10


@pytest.mark.parametrize("size", [2, 3])
def test_importance_learned_from_probes_is_that_of_the_joined_probe_batch(size: int) -> None:
    options = {"precision": "64-true", "steps": 8, "task": "Exact"}
    found = ranks(size).run(train_as_rank, "ist", options)
    expected = train("ist", joined=size, **options)
    assert expected["scores"]["score"].abs().max() > 1e-4
    for rank in found:
        assert torch.equal(rank["scores"]["score"], found[0]["scores"]["score"])
    torch.testing.assert_close(found[0]["scores"]["score"], expected["scores"]["score"], rtol=1e-9, atol=1e-12)


def test_probe_data_of_their_own_keeps_ranks_together() -> None:
    found = ranks(2).run(train_as_rank, "ist-data", {"optimizer": "adamw", "steps": 8})
    assert_equal(found[1], found[0])
    assert found[0]["scores"]["score"].abs().max() > 1e-4


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_half_precision_ranks_with_masters_agree(size: int, accumulate: int) -> None:
    options = {"precision": "bf16-true", "optimizer": "adamw", "accumulate": accumulate}
    found = ranks(size).run(train_as_rank, "badam", options)
    for rank in found[1:]:
        assert_equal(rank, found[0])
    expected = train("badam", joined=size, **options)
    assert_equal(found[0]["masks"], expected["masks"])
    assert moved(expected, "badam")
    start, end, ours = (
        torch.cat([w.double().flatten() for w in group.values()])
        for group in (weights(Task(net("badam"))), expected["weights"], found[0]["weights"])
    )
    assert (ours - end).norm() < 0.1 * (end - start).norm()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_full_budget_is_plain_ddp_bit_for_bit(accumulate: int, optimizer: str) -> None:
    options = {"accumulate": accumulate, "optimizer": optimizer}
    found = ranks(2).run(train_as_rank, "full", options)
    plain = ranks(2).run(train_as_rank, "full", {**options, "plain": True})
    for ours, theirs in zip(found, plain, strict=True):
        assert_equal(ours["weights"], theirs["weights"])


# What is exchanged ----------------------------------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Counts the bytes of every collective, DistributedDataParallel's own C++ ones among them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sent = {t.data_ptr(): t.numel() * t.element_size() for t in tree_leaves(args) if isinstance(t, Tensor)}
            name = func.__name__.split(".")[0]
            self.bytes[name] = self.bytes.get(name, 0) + sum(sent.values())
        return func(*args, **(kwargs or {}))


class Meter(pl.Callback):
    """Traffic of each step, between the start of its first batch and the end of its last."""

    def __init__(self, driver: Any) -> None:
        self.driver, self.steps, self.expected = driver, [], []
        self.traffic: Traffic | None = None

    def on_before_optimizer_step(self, run: Any, module: Any, optimizer: Any) -> None:
        chosen = [p for p in module.parameters() if p.grad is not None]
        self.expected.append((sum(p.numel() * p.element_size() for p in chosen), len(chosen)))

    def open(self) -> None:
        self.traffic = Traffic()
        self.traffic.__enter__()

    def close(self) -> None:
        assert self.traffic is not None
        self.traffic.__exit__(None, None, None)
        self.steps.append(dict(self.traffic.bytes))


def count_traffic(name: str, accumulate: int, wrong: bool = False) -> dict[str, Any]:
    driver = METHODS[name]()
    meter = Meter(driver)
    module = Task(net(name), sgd)

    class Early(pl.Callback):
        def on_train_batch_start(self, run: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx % accumulate == 0:
                meter.open()

        def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if (batch_idx + 1) % accumulate == 0:
                meter.close()

    run = trainer(
        [Early(), driver, meter],
        6,
        accumulate_grad_batches=accumulate,
        strategy="ddp",
        devices=dist.get_world_size(),
        use_distributed_sampler=False,
    )
    run.fit(module, loader(1, dist.get_world_size()))
    return {"traffic": meter.steps, "selected": meter.expected, "counted": driver._reducer.bytes}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", ["lisa", "rst", "hft"])
def test_only_selected_gradients_are_exchanged_and_once_per_step(name: str, accumulate: int) -> None:
    for rank in ranks(2).run(count_traffic, name, accumulate):
        assert len(rank["traffic"]) == len(rank["selected"]) == 6
        whole = sum(p.numel() * p.element_size() for p in trainable(net(name)))
        compared = 16  # what ranks compare at a selection: two numbers
        for traffic, (selected, tensors) in zip(rank["traffic"], rank["selected"], strict=True):
            flags = 4 * tensors
            assert set(traffic) <= {"allreduce_", "broadcast_"}
            assert traffic.get("broadcast_", 0) <= 8 * (accumulate - 1)  # Lightning's question whether to stop
            assert traffic["allreduce_"] in (selected + flags, selected + flags + compared)
            assert 0 < selected < 0.8 * whole
        assert rank["counted"] == sum(selected + 4 * tensors for selected, tensors in rank["selected"])


def count_plain_traffic() -> dict[str, int]:
    """What the meter sees of plain DDP: the meter itself is tested by this."""
    with Traffic() as traffic:
        train("lisa", plain=True, steps=4)
    return traffic.bytes


def test_the_meter_sees_the_wrappers_own_reduction() -> None:
    whole = sum(p.numel() * p.element_size() for p in trainable(net("lisa")))
    for traffic in ranks(2).run(count_plain_traffic):
        assert 4 * whole <= traffic["allreduce_"] < 5 * whole


# Settings -------------------------------------------------------------------------------------------------------------


class OverflowOnce(Task):  # type: ignore[misc, valid-type]
    """An infinite loss at one step of rank 1, and nowhere else."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 2 and dist.get_rank() == 1:
            return loss * float("inf")
        return loss


def train_scaled() -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    taken = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, run: Any, module: Any, batch: Any, batch_idx: int) -> None:
            self.before = weights(module)

        def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            taken.append(any(not torch.equal(v, self.before[k]) for k, v in weights(module).items()))

    driver = METHODS["lisa"]()
    module = OverflowOnce(net("lisa"), smooth_adamw)
    run = trainer(
        [driver, Watch()],
        6,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
        strategy="ddp",
        devices=dist.get_world_size(),
        use_distributed_sampler=False,
    )
    run.fit(module, loader(1, dist.get_world_size()))
    return {**result(module, driver), "taken": taken, "scale": scaler.get_scale()}


def test_an_overflow_on_one_rank_skips_the_step_on_all() -> None:
    found = ranks(2).run(train_scaled)
    assert found[0]["taken"] == [True, True, False, True, True, True]
    assert found[0]["scale"] == 2.0**9
    assert_equal(found[1], found[0])


class TwoOptimizers(ManualTask):  # type: ignore[misc, valid-type]
    """Manual optimization; layers and the rest have an optimizer each."""

    def configure_optimizers(self) -> Any:
        inside = [p for n, p in self.named_parameters() if ".layers." in n]
        outside = [p for n, p in self.named_parameters() if ".layers." not in n]
        return [torch.optim.SGD(inside, lr=0.1, momentum=0.9), torch.optim.SGD(outside, lr=0.05)]


class ManualOverTwo(ManualTask):  # type: ignore[misc, valid-type]
    """Manual optimization with a step at every second batch."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args, accumulate=2)


@pytest.mark.parametrize("task", ["ManualTask", "ManualOverTwo", "TwoOptimizers"])
@pytest.mark.parametrize("name", ["lisa", "badam"])
def test_manual_optimization_reduces_what_is_selected(task: str, name: str) -> None:
    options = {"task": task, "steps": 12 if task == "TwoOptimizers" else 6}
    found = ranks(2).run(train_as_rank, name, options)
    expected = train(name, joined=2, **options)
    assert_equal(found[1], found[0])
    assert_equal(found[0]["masks"], expected["masks"])
    assert moved(expected, name)
    assert distance(found[0]["weights"], expected["weights"]) < 1e-6


def with_batch_norm(name: str) -> nn.Module:
    return Net(dropout=0.0, batch_norm=True)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_running_statistics_are_those_of_plain_ddp(accumulate: int) -> None:
    options = {"model": "with_batch_norm", "accumulate": accumulate}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = ranks(2).run(train_as_rank, "full", options)
        plain = ranks(2).run(train_as_rank, "full", {**options, "plain": True})
    initial = dict(Net(batch_norm=True).named_buffers())
    for ours, theirs in zip(found, plain, strict=True):
        assert_equal(ours["buffers"], theirs["buffers"])
        assert_equal(ours["weights"], theirs["weights"])
        assert not torch.equal(
            ours["buffers"]["net.layers.0.batch_norm.running_mean"], initial["layers.0.batch_norm.running_mean"]
        )


@pytest.mark.parametrize("options", [{"find_unused_parameters": True}, {"gradient_as_bucket_view": True}], ids=str)
def test_options_of_ddp_change_nothing(options: dict[str, Any]) -> None:
    found = ranks(2).run(train_as_rank, "lisa", {"strategy": DDPStrategy(**options)})
    plain = ranks(2).run(train_as_rank, "lisa", {})
    for ours, theirs in zip(found, plain, strict=True):
        assert_equal(ours, theirs)


def bucket_entries(task: str) -> int:
    """Entries for which the wrapper holds buffers to reduce gradients in."""

    class Look(pl.Callback):
        def on_train_start(self, run: Any, module: Any) -> None:
            buckets = run.strategy.model.reducer._get_zeros_like_grad_buckets()
            self.entries = sum(bucket.buffer().numel() for bucket in buckets)

    look = Look()
    run = trainer([METHODS["lisa"](), look], 1, strategy="ddp", devices=2, use_distributed_sampler=False)
    run.fit(globals()[task](net("lisa"), sgd), loader(1, 2))
    return look.entries


@pytest.mark.parametrize("task", ["Task", "BuiltLate"])
def test_the_wrapper_holds_buffers_for_one_small_parameter_only(task: str) -> None:
    smallest = min(p.numel() for p in trainable(net("lisa")))
    assert ranks(2).run(bucket_entries, task) == [smallest, smallest]


class Experts(Net):
    """In each layer one extra matrix for even samples, one for odd ones, and one for nobody."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        torch.manual_seed(2)
        for layer in self.layers:
            layer.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def routed(self, ids: Tensor, expert: int) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
            x = x + 0.1 * layer.experts[expert](x)
        return self.lm_head(self.norm(x))


class Routed(Task):  # type: ignore[misc, valid-type]
    """Rank r sends its samples to expert r; one process sends every second sample to each."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        net: Any = self.net
        world = dist.get_world_size() if dist.is_initialized() else 1
        parts = [(dist.get_rank(), batch)] if world > 1 else [(r, batch[r::2]) for r in range(2)]
        losses = [
            F.cross_entropy(net.routed(part[:, :-1], expert).flatten(0, 1), part[:, 1:].flatten())
            for expert, part in parts
        ]
        return torch.stack(losses).mean()


def experts(name: str) -> nn.Module:
    return Experts()


@pytest.mark.filterwarnings("ignore:`LISA` trains units of which some parameters got no gradient")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_gradient_on_one_rank_only_counts_and_one_on_no_rank_moves_nothing(accumulate: int) -> None:
    options = {"task": "Routed", "model": "experts", "accumulate": accumulate}
    found = ranks(2).run(train_as_rank, "lisa", options)
    expected = train("lisa", joined=2, **options)
    assert_equal(found[1], found[0])
    assert distance(found[0]["weights"], expected["weights"]) < 1e-6
    before = weights(Task(Experts()))
    for key, value in before.items():
        if ".experts.2." in key:  # momentum and decay would move it if it had a gradient of zero
            assert torch.equal(found[0]["weights"][key], value), key
        if ".experts.0.weight" in key or ".experts.1.weight" in key:
            layer = int(key.split(".layers.")[1].split(".")[0])
            assert torch.equal(found[0]["weights"][key], value) != bool(expected["masks"][:, layer].any()), key


class BuiltLate(Task):  # type: ignore[misc, valid-type]
    """Its model is made in ``configure_model``, after callbacks were set up."""

    def __init__(self, net: nn.Module, optimizer: Any) -> None:
        super().__init__(nn.Identity(), optimizer)
        self.made = [net]  # in a list, so that it is no submodule yet

    def configure_model(self) -> None:
        if self.made:
            self.net = self.made.pop()


@pytest.mark.parametrize("name", ["lisa", "rst"])
def test_a_model_that_is_built_late_is_taken_over_as_well(name: str) -> None:
    found = ranks(2).run(train_as_rank, name, {"task": "BuiltLate"})
    expected = train(name, joined=2)
    assert_equal(found[1], found[0])
    assert distance(found[0]["weights"], expected["weights"]) < 1e-6


def train_from_other_weights() -> dict[str, Any]:
    def model(name: str) -> nn.Module:
        return Net(dropout=0.0, seed=dist.get_rank())

    return train("lisa", model=model)


def test_ranks_start_from_the_weights_of_rank_0() -> None:
    found = ranks(2).run(train_from_other_weights)
    assert_equal(found[1], found[0])
    assert distance(found[0]["weights"], train("lisa", joined=2)["weights"]) < 1e-6


def train_pair() -> dict[str, Any]:
    """Two selections on one run: one over the lower layers, one over the upper."""
    lower = LISA(active_layers=1, interval=2, pattern=r"layers\.[01]", name="lower")
    upper = LISA(active_layers=1, interval=1, pattern=r"layers\.[23]", name="upper", seed=1)
    world = dist.get_world_size() if dist.is_initialized() else 1
    module = Task(net("lisa"), sgd)
    more = {"strategy": "ddp", "devices": world} if world > 1 else {"devices": 1}
    run = trainer([lower, upper], 6, use_distributed_sampler=False, **more)
    run.fit(module, loader(2 // world, world))
    return {
        **result(module, lower),
        "upper": upper.history.masks,
        "bytes": [lower._reducer.bytes, upper._reducer.bytes],
    }


def test_two_selections_on_one_run_reduce_once() -> None:
    found = ranks(2).run(train_pair)
    expected = train_pair()
    assert_equal(found[1], found[0])
    assert_equal(found[0]["upper"], expected["upper"])
    assert distance(found[0]["weights"], expected["weights"]) < 1e-6
    assert found[0]["bytes"][0] > 0
    assert found[0]["bytes"][1] == 0


def fit_again_without() -> dict[str, Any]:
    """A fit with the method, then one of the same module without it."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    module = Exact(net("lisa"), sgd)
    more = {"strategy": "ddp", "devices": world} if world > 1 else {"devices": 1}
    for callbacks in ([METHODS["lisa"]()], []):
        run = trainer(callbacks, 3, precision="64-true", use_distributed_sampler=False, **more)
        run.fit(module, loader(2 // world, world))
    return result(module, None)


def test_a_later_fit_without_the_callback_is_plain_ddp() -> None:
    found = ranks(2).run(fit_again_without)
    assert_equal(found[1], found[0])
    assert distance(found[0]["weights"], fit_again_without()["weights"]) < 1e-12


class Validated(Task):  # type: ignore[misc, valid-type]
    """With a validation loop inside the fit."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def val_dataloader(self) -> Any:
        return loader(1)


def test_validation_inside_the_fit_changes_nothing() -> None:
    found = ranks(2).run(train_as_rank, "lisa", {"task": "Validated"})
    plain = ranks(2).run(train_as_rank, "lisa", {})
    for ours, theirs in zip(found, plain, strict=True):
        assert_equal(ours["weights"], theirs["weights"])


# Refusals -------------------------------------------------------------------------------------------------------------


def train_differently(what: str) -> None:
    rank = dist.get_rank()
    options: dict[str, Any] = {"active_layers": 2, "interval": 2}
    options[what] = {"seed": rank, "interval": 2 + rank, "active_layers": 1 + rank}[what]
    run = trainer([LISA(**options)], 4, strategy="ddp", devices=dist.get_world_size(), use_distributed_sampler=False)
    run.fit(Task(net("lisa"), sgd), loader(1, 2))


@pytest.mark.parametrize("what", ["seed", "interval", "active_layers"])
def test_ranks_with_other_settings_stop_with_an_error_on_all(what: str) -> None:
    with pytest.raises(RanksFailed) as failed:
        ranks(2).run(train_differently, what)
    for error in failed.value.errors:
        assert error is not None
        assert error.startswith("RuntimeError: Ranks disagree on the configuration of `LISA`")
        assert "same configuration and seed" in error


def train_with_another_draw() -> None:
    driver = METHODS["lisa"]()
    if dist.get_rank() == 1:
        driver.selection.draws.manual_seed(99)
    run = trainer([driver], 4, strategy="ddp", devices=2, use_distributed_sampler=False)
    run.fit(Task(net("lisa"), sgd), loader(1, 2))


def test_ranks_that_draw_other_units_stop_with_an_error_on_all() -> None:
    with pytest.raises(RanksFailed) as failed:
        ranks(2).run(train_with_another_draw)
    for error in failed.value.errors:
        assert error is not None
        assert error.startswith("RuntimeError: Ranks disagree on the selection of `LISA` at step 0")


@pytest.mark.parametrize(
    ("options", "words"),
    [({"static_graph": True}, "static_graph"), ({"ddp_comm_hook": print}, "ddp_comm_hook")],
)
def test_settings_of_ddp_that_cannot_work_are_refused_in_words(options: dict[str, Any], words: str) -> None:
    run = trainer([METHODS["lisa"]()], 2, strategy=DDPStrategy(**options), devices=1)
    with pytest.raises(ValueError, match=words):
        run.fit(Task(net("lisa"), sgd), loader(1))


# Without Lightning ----------------------------------------------------------------------------------------------------


def pairs(source: StatefulLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """Each batch with the one after it, epoch after epoch."""
    stream = itertools.chain.from_iterable(itertools.repeat(source))
    return itertools.pairwise(stream)


def train_plainly(name: str, joined: int = 1) -> dict[str, Any]:
    """The ten-line loop, in a process group without a DDP wrapper, or in one process."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    module = Task(net(name), sgd)
    if world > 1 and dist.get_rank() == 1:
        with torch.no_grad():
            for p in trainable(module):
                p.add_(1.0)  # rank 0's weights count
    current: list[Tensor] = []
    method = METHODS[name]()
    optimizer = Selective(sgd(module), module, method, probe=lambda: module.loss(current[0]), epoch_steps=6)
    for batch, following in itertools.islice(pairs(loader(joined, world)), 6):
        current[:] = [following]
        module.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    masks = optimizer.selection.history.masks
    optimizer.close()
    return {"weights": weights(module), "masks": masks}


@pytest.mark.parametrize("name", ["lisa", "hft", "rst", "ist"])
def test_the_plain_loop_gives_the_weights_of_the_callback_on_every_rank(name: str) -> None:
    plain = ranks(2).run(train_plainly, name)
    callback = ranks(2).run(train_as_rank, name, {})
    steps = len(callback[0]["steps"])  # the loop has prepared one more step than it made
    assert_equal(plain[1], plain[0])
    assert_equal(plain[0]["masks"][:steps], callback[0]["masks"])
    assert_equal(plain[0]["weights"], callback[0]["weights"])
    assert distance(plain[0]["weights"], train_plainly(name, joined=2)["weights"]) < 1e-6
