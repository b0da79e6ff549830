"""`model.zero_grad()` frees what steps in place of parameters, as it frees the parameters' own gradients."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from alike import assert_equal
from torch import Tensor, nn
from toys import ManualTask, Net, adamw, fit, tokens, trainable, weights

from apportion.callbacks import ID3, LISA, BAdam, Random
from apportion.driver import SelectiveTuning
from apportion.optim import Selective
from apportion.zeroing import ZeroGrad

METHODS: dict[str, tuple[Callable[[], SelectiveTuning], torch.dtype]] = {
    "layers": (lambda: LISA(active_layers=2, interval=2), torch.float32),
    "masters": (lambda: BAdam(interval=2, master="fp32"), torch.bfloat16),
    "entries": (lambda: Random(0.1), torch.float32),
    "entries by gradients": (lambda: ID3(60, max_steps=3), torch.float32),
}


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())


def trained(name: str, zero: Callable[[Any, Any], None]) -> dict[str, Tensor]:
    """Weights after steps of two batches each; ``zero(optimizer, model)`` ends them, and throws one batch away."""
    make, dtype = METHODS[name]
    model = Net(dropout=0.0, seed=0).to(dtype)
    optimizer = Selective(adamw(trainable(model)), model, make(), total_steps=6, micro_batches=2)
    data: Any = tokens(20, seed=1)
    batches = torch.stack(list(data)).split(4)
    for step, batch in enumerate(batches):
        if step == 1:
            loss_of(model, batches[0]).backward()
            zero(optimizer, model)
        for half in batch.split(2):
            loss_of(model, half).backward()
        optimizer.step()
        zero(optimizer, model)
    optimizer.close()
    assert "zero_grad" not in vars(model)
    return weights(model)


def model_under(name: str) -> nn.Module:
    """A model while a selection is at work on it."""
    make, dtype = METHODS[name]
    model = Net(dropout=0.0).to(dtype)
    model.kept = Selective(adamw(trainable(model)), model, make(), total_steps=6)  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_the_model_frees_what_the_optimizer_frees(name: str, set_to_none: bool) -> None:
    expected = trained(name, lambda optimizer, model: optimizer.zero_grad())
    assert_equal(trained(name, lambda optimizer, model: model.zero_grad(set_to_none)), expected)
    assert ("zero_grad" in vars(model_under(name))) == (name != "layers")
    if name in ("masters", "entries"):  # the module's own method is not enough
        kept = trained(name, lambda optimizer, model: nn.Module.zero_grad(model))
        assert any(not torch.equal(kept[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", ["layers", "entries", "entries by gradients"])
def test_a_module_in_manual_optimization_frees_what_its_optimizer_frees(name: str) -> None:
    class Itself(ManualTask):  # type: ignore[misc, valid-type]
        """Calls its own ``zero_grad``, or what that stands for; a batch in between is thrown away."""

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            if batch_idx == 3:
                self.manual_backward(self.loss(batch.flip(0)))
                self._free()
            self.manual_backward(self.loss(batch))
            self.optimizers().step()
            self._free()

        def _free(self) -> None:
            if own:
                self.zero_grad()
            else:
                self.optimizers().zero_grad()
                nn.Module.zero_grad(self)  # gradients that wait for a selection are in no param group

    runs = []
    for own in (False, True):  # noqa: B007
        task = Itself(Net(dropout=0.0, seed=0), lambda module: adamw(trainable(module)))
        fit(task, METHODS[name][0]())
        assert "zero_grad" not in vars(task)
        runs.append(weights(task))
    assert_equal(runs[1], runs[0])


def test_a_copy_of_the_model_has_its_class_s_own() -> None:
    model = Net(dropout=0.0)
    optimizer = Selective(adamw(trainable(model)), model, Random(0.1))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        loss_of(twin, torch.stack(list(tokens(4)))).backward()
        twin.zero_grad()
        assert all(p.grad is None for p in twin.parameters())
        assert not isinstance(twin.zero_grad, ZeroGrad)
    optimizer.close()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_several_selections_end_in_any_order(order: tuple[int, int]) -> None:
    model, told = nn.Linear(1, 1), []
    stands = [ZeroGrad(model, lambda *_, i=i: told.append(i)) for i in (0, 1)]  # type: ignore[misc]
    model.zero_grad()
    assert sorted(told) == [0, 1]
    stands[order[0]].detach()
    model.zero_grad()
    assert told[2:] == [order[1]]
    stands[order[1]].detach()
    model.zero_grad()
    assert len(told) == 3
    assert "zero_grad" not in vars(model)


def test_a_part_frees_its_own_gradients_alone() -> None:
    features, head = nn.Linear(4, 4), nn.Linear(4, 1)
    optimizer = Selective(adamw([*features.parameters(), *head.parameters()]), features, Random(0.5))
    before = [p.detach().clone() for p in (*features.parameters(), *head.parameters())]
    head(features(torch.ones(2, 4))).sum().backward()
    features.zero_grad()
    optimizer._unchecked = False  # a first step without gradients is an error, which is not what this is about
    optimizer.step()
    still = [torch.equal(a, b) for a, b in zip(before, (*features.parameters(), *head.parameters()), strict=True)]
    assert still == [True, True, False, False]
    optimizer.close()


def test_two_selections_on_one_optimizer_free_their_own() -> None:
    parts = [nn.Linear(4, 4), nn.Linear(4, 4)]
    base = adamw([p for part in parts for p in part.parameters()])
    first, second = (Selective(base, part, Random(0.5)) for part in parts)
    parts[1](parts[0](torch.ones(2, 4))).sum().backward()
    parts[0].zero_grad()
    for part, freed in zip(parts, (True, False), strict=True):
        assert (first.owner.narrow(part.weight).leaf.grad is None) is freed
    second.close()
    first.close()


def test_what_a_user_put_there_is_called_and_comes_back() -> None:
    class Odd(nn.Linear):
        def zero_grad(self) -> None:  # type: ignore[override]
            told.append("class")

    told: list[str] = []
    odd = Odd(2, 2)
    stands = ZeroGrad(odd, lambda *_: told.append("ours"))
    odd.zero_grad()
    assert told == ["ours", "class"]
    stands.detach()
    mine = lambda *_: told.append("instance")  # noqa: E731
    odd.zero_grad = mine  # type: ignore[method-assign, assignment]
    stands = ZeroGrad(odd, lambda *_: told.append("ours"))
    odd.zero_grad()
    assert told[2:] == ["ours", "instance"]
    stands.detach()
    assert odd.zero_grad is mine  # type: ignore[comparison-overlap]


def test_a_whole_batch_can_be_thrown_away_at_a_step_that_selects_by_gradients() -> None:
    model = Net(dropout=0.0)
    optimizer = Selective(adamw(trainable(model)), model, ID3(60, max_steps=3), total_steps=6)
    batches = torch.stack(list(tokens(8))).split(4)
    loss_of(model, batches[0]).backward()
    optimizer.zero_grad()
    loss_of(model, batches[1]).backward()
    kept = optimizer.selection.bound.tensors  # type: ignore[attr-defined]
    found = [optimizer.owner.narrow(p) for p in kept]
    expected = copy.deepcopy(model)
    expected.requires_grad_(True)
    loss_of(expected, batches[1]).backward()
    names = {id(p): name for name, p in model.named_parameters()}
    twins = dict(expected.named_parameters())
    for p, store in zip(kept, found, strict=True):
        if len(store.index):
            grad = twins[names[id(p)]].grad
            assert grad is not None
            assert store.leaf.grad is not None
            torch.testing.assert_close(store.leaf.grad, grad.view(-1)[store.index.long()], rtol=1e-4, atol=1e-6)
    optimizer.step()
    optimizer.close()
