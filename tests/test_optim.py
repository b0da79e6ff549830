"""Selective: the same selection in a loop of one's own."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import nn, optim
from toys import Net, Task, adamw, fit, loader, lora_net, moved, tokens, trainable, two_groups, weights

import apportion
from apportion import clips
from apportion.callbacks import FISH, HFT, IST, LISA, BAdam, Random
from apportion.optim import Selective

BATCHES = list(tokens(24).split(2))


def loop(net: Any, optimizer: Any, batches: list[torch.Tensor], accumulate: int = 1) -> None:
    for i, batch in enumerate(batches):
        net.loss(batch).backward()
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


def test_it_is_an_optimizer_at_the_top_of_the_package() -> None:
    assert apportion.Selective is Selective
    assert issubclass(Selective, optim.Optimizer)


@pytest.mark.parametrize("state", ["drop", "keep", "offload"])
def test_only_what_is_selected_moves_in_every_step(state: str) -> None:
    net = Net()
    base = adamw(net.parameters())
    optimizer = Selective(base, net, LISA(1, 2, state=state))
    for batch in BATCHES:
        chosen = {n for n, p in net.named_parameters() if p.requires_grad}
        expected = optimizer.selection.bound.spread(optimizer.selection.mask)
        assert chosen == {*expected, *optimizer.selection.bound.always}
        before = weights(net)
        net.loss(batch).backward()
        optimizer.step()
        assert moved(before, weights(net)) == chosen
        assert all(p.grad is None for p in net.parameters() if not p.requires_grad)
        optimizer.zero_grad()
    optimizer.close()
    assert all(p.requires_grad for p in net.parameters())
    assert [id(p) for p in base.param_groups[0]["params"]] == [id(p) for p in net.parameters()]


def test_accumulated_gradients_belong_to_one_set() -> None:
    a, b = Net(dropout=0.0), Net(dropout=0.0)
    one, two = (Selective(adamw(n.parameters()), n, LISA(1, 1)) for n in (a, b))
    for i in range(0, 12, 2):
        loop(a, one, BATCHES[i : i + 2], accumulate=2)
        (b.loss(BATCHES[i]) + b.loss(BATCHES[i + 1])).backward()
        two.step()
        two.zero_grad()
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_closure_gives_the_weights_of_a_loop() -> None:
    a, b = Net(dropout=0.0), Net(dropout=0.0)
    one, two = (Selective(adamw(n.parameters()), n, LISA(1, 2)) for n in (a, b))
    loop(a, one, BATCHES[:6])
    for batch in BATCHES[:6]:

        def closure(batch: torch.Tensor = batch) -> torch.Tensor:
            two.zero_grad()
            loss = b.loss(batch)
            loss.backward()
            return loss

        assert isinstance(two.step(closure), torch.Tensor)
    assert not moved(weights(a), weights(b))


@pytest.mark.parametrize("name", ["lisa", "badam"])
def test_a_gradient_scaler_gives_the_weights_of_the_callback(name: str) -> None:
    def method() -> Any:
        return LISA(2, 2) if name == "lisa" else BAdam(2)

    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)

    task, twin = Task(), Task()
    fit(task, method(), plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler())])
    scale = scaler()
    optimizer = Selective(adamw(trainable(twin)), twin, method())
    torch.manual_seed(11)
    for _, batch in zip(range(6), loader(), strict=False):
        with torch.autocast("cpu", torch.float16):
            loss = twin.loss(batch)
        scale.scale(loss).backward()
        scale.step(optimizer)
        scale.update()
        optimizer.zero_grad()
    assert not moved(weights(task), weights(twin))


def test_an_overflow_moves_nothing_and_keeps_the_selection() -> None:
    net = Net()
    optimizer = Selective(adamw(net.parameters()), net, LISA(1, 1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before, mask = weights(net), optimizer.selection.mask
    scaler.scale(net.loss(BATCHES[0]) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert not moved(before, weights(net))
    assert optimizer.selection.mask is mask
    assert scaler.get_scale() == 2.0**7
    scaler.scale(net.loss(BATCHES[0])).backward()
    scaler.step(optimizer)
    assert moved(before, weights(net))


def test_a_scheduler_takes_it_as_it_takes_any_optimizer() -> None:
    net = Net()
    optimizer = Selective(adamw(two_groups(net)), net, LISA(1, 1))
    scheduler = optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for batch in BATCHES[:3]:
        loop(net, optimizer, [batch])
        scheduler.step()
    assert [group["lr"] for group in optimizer.base.param_groups] == [2e-2 / 8, 1e-2 / 8]


@pytest.mark.parametrize("state", ["drop", "keep", "offload"])
@pytest.mark.parametrize("stop", [0, 1, 3, 4])
def test_saved_and_loaded_it_goes_on_bit_for_bit(state: str, stop: int, tmp_path: Path) -> None:
    def build() -> tuple[Net, Selective]:
        net = Net(dropout=0.0)
        return net, Selective(adamw(two_groups(net)), net, LISA(1, 2, state=state, without_replacement=True))

    whole, optimizer = build()
    loop(whole, optimizer, BATCHES[:8])
    first, before = build()
    loop(first, before, BATCHES[:stop])
    torch.save({"model": first.state_dict(), "optimizer": before.state_dict()}, tmp_path / "a.pt")
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    second, after = build()
    second.load_state_dict(saved["model"])
    after.load_state_dict(saved["optimizer"])
    loop(second, after, BATCHES[stop:8])
    assert not moved(weights(whole), weights(second))
    assert torch.equal(optimizer.selection.history.masks, after.selection.history.masks)


def test_a_run_without_selection_loads_the_optimizers_part() -> None:
    net = Net()
    optimizer = Selective(adamw(net.parameters()), net, LISA(1, 2, state="keep"))
    loop(net, optimizer, BATCHES[:5])
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["selection"]
    plain = adamw(Net().parameters())
    plain.load_state_dict(saved)
    assert len(plain.state) == len(set(saved["state"])) > 0


def test_named_parameters_and_state_are_those_of_the_wrapped_optimizer() -> None:
    net = Net()
    base = adamw(net.named_parameters())
    optimizer = Selective(base, net, LISA(1, 2))
    loop(net, optimizer, BATCHES[:3])
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.param_groups[0]["param_names"] == [n for n, p in net.named_parameters() if p.requires_grad]


def test_a_probe_is_asked_for_where_the_method_needs_one() -> None:
    net = lora_net()
    optimizer = Selective(adamw(trainable(net)), net, IST(2, probe_interval=1))
    net.base_model.model.loss(BATCHES[0]).backward()
    with pytest.raises(ValueError, match="needs a probe: pass `probe=`"):
        optimizer.step()


def test_an_epoch_clock_asks_for_the_length_of_an_epoch() -> None:
    net = Net()
    with pytest.raises(ValueError, match=r"`Selective\(\.\.\.\)` of `HFT`.*pass `epoch_steps=`"):
        Selective(adamw(net.parameters()), net, HFT(redraw="epoch"))
    with pytest.raises(ValueError, match=r"`Selective\(epoch_steps=0\)` must be at least 1"):
        Selective(adamw(net.parameters()), net, HFT(redraw="epoch"), epoch_steps=0)
    optimizer = Selective(adamw(net.parameters()), net, HFT(redraw="epoch"), epoch_steps=3)
    loop(net, optimizer, BATCHES[:8])
    assert optimizer.selection.history.steps == [0, 3, 6]


def test_a_unit_without_gradients_is_an_error_that_names_it() -> None:
    net = Net()
    optimizer = Selective(adamw(net.parameters()), net, LISA(4))
    net.lm_head(net.layers[0](net.embed_tokens(BATCHES[0]))).sum().backward()
    with pytest.raises(RuntimeError, match=r"selected layers\.1, but none of its"):
        optimizer.step()


def test_what_cannot_work_is_refused_at_the_start() -> None:
    net = Net()
    with pytest.raises(ValueError, match="`LBFGS`"):
        Selective(optim.LBFGS(net.parameters()), net, LISA(1))
    with pytest.raises(ValueError, match="No optimizer holds"):
        Selective(adamw(net.lm_head.parameters()), net, LISA(1))
    with pytest.raises(ValueError, match=r"must lie in \[1, 4\]"):
        Selective(adamw(net.parameters()), net, LISA(9))
    assert all(p.requires_grad for p in net.parameters())


def test_one_method_serves_several_runs() -> None:
    method = LISA(1, 1, seed=4)
    nets = [Net(dropout=0.0), Net(dropout=0.0)]
    for net in nets:
        loop(net, Selective(adamw(net.parameters()), net, method), BATCHES[:4])
    assert not moved(weights(nets[0]), weights(nets[1]))


def test_a_frozen_model_without_any_trainable_parameter_is_refused() -> None:
    net = Net()
    optimizer = adamw(net.parameters())
    for p in net.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="`Layers"):
        Selective(optimizer, net, LISA(1))


def test_plain_modules_work_without_lightning() -> None:
    layers = nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)])
    optimizer = Selective(optim.SGD(layers.parameters(), lr=0.1, momentum=0.9), layers, LISA(2, 1))
    for _ in range(5):
        layers(torch.ones(2, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.close()
    assert optimizer.selection.history.masks.sum(1).tolist() == [2] * 6


@pytest.mark.parametrize("when", ["choosing", "interrupted"])
def test_a_wrapper_that_cannot_be_made_leaves_nothing_behind(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    model = Net(dropout=0.0)
    base = adamw(trainable(model))
    if when == "interrupted":
        monkeypatch.setattr(clips, "in_loop", interrupted)
    with pytest.raises(ValueError if when == "choosing" else KeyboardInterrupt):
        Selective(base, model, FISH(0.3) if when == "choosing" else Random(0.1))  # FISH has no batches here
    monkeypatch.undo()
    assert not base._optimizer_step_pre_hooks
    assert "zero_grad" not in vars(model)
    assert not any("forward" in vars(m) for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    Selective(adamw(trainable(model)), model, Random(0.1)).close()  # and another try is none too many


@pytest.mark.parametrize("method", [LISA(active_layers=2), Random(0.1)])
def test_a_wrapper_that_is_dropped_ends_as_if_it_were_closed(method: Any) -> None:
    model = Net(dropout=0.0)
    base = adamw(trainable(model))
    optimizer = Selective(base, model, method, total_steps=4)
    told = weakref.ref(optimizer)
    nn.functional.cross_entropy(model(tokens()[:, :-1]).flatten(0, 1), tokens()[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()
    del optimizer
    gc.collect()
    assert told() is None
    assert len(base.param_groups[0]["params"]) == len(list(model.parameters()))
    assert all(p.requires_grad for p in model.parameters())
    assert "zero_grad" not in vars(model)
    Selective(adamw(trainable(model)), model, method).close()
