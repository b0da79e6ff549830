"""ID3 against traces of the authors' code: the same masks at every step, and the same weights.

Each trace holds what https://github.com/Aradhye2002/selective-peft-toolkit (0.2) did with given gradients: weights at
the start, then gradients, mask and weights of every step. It gives the remainder of the budget to the first steps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from apportion.callbacks import ID3
from apportion.driver import SelectiveTuning
from apportion.effects import Hold
from apportion.optim import Selective

GOLDEN = Path(__file__).parent / "golden"
TRACES = ["adamw", "sgd"]


def trace(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((GOLDEN / f"id3_official_{name}.json").read_text())
    return loaded


def tensors(values: list[Any]) -> list[Tensor]:
    return [torch.tensor(value) for value in values]


class Replayed(nn.Module):
    """Weights whose gradients are what the trace says."""

    def __init__(self, values: list[Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(value.clone()) for value in values])

    def loss(self, grads: list[Tensor]) -> Tensor:
        return torch.stack([(p * g).sum() for p, g in zip(self.weights, grads, strict=True)]).sum()


def run(name: str, effect: Any = None, **options: Any) -> tuple[Replayed, Selective, dict[str, Any]]:
    """Our ID3, set up as the trace was made: every tensor is a candidate. ``effect`` stands in for its own."""
    told = trace(name)
    config = told["config"]
    model = Replayed(tensors(told["initial"]))
    base: optim.Optimizer
    if name == "adamw":
        base = optim.AdamW(model.parameters(), lr=config["lr"], weight_decay=config["weight_decay"], **options)
    else:
        base = optim.SGD(model.parameters(), lr=config["lr"], **options)
    method: SelectiveTuning = ID3(
        config["budget"], config["exp"], config["eps"], form="front", max_steps=config["max_steps"], bias="unit"
    )
    if effect is not None:
        slots = method.slots
        method = SelectiveTuning(
            slots.units, slots.score, slots.budget, slots.rule, effect, select_when=slots.select_when
        )
    return model, Selective(base, model, method), told


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", TRACES)
def test_masks_and_weights_are_those_of_the_authors_code_at_every_step(name: str, foreach: bool) -> None:
    model, optimizer, told = run(name, foreach=foreach)
    assert len(told["steps"]) == told["config"]["max_steps"] == 10
    for step in told["steps"]:
        grads = tensors(step["grads"])
        model.loss(grads).backward()
        optimizer.step()
        optimizer.zero_grad()
        for p, mask, value in zip(model.weights, step["mask"], tensors(step["params"]), strict=True):
            index = optimizer.owner.narrow(p).index
            found = torch.zeros(p.numel(), dtype=torch.bool)
            found[index.long()] = True
            assert torch.equal(found.view(p.shape), torch.tensor(mask).bool()), step["t"]
            assert torch.allclose(p, value, rtol=0.0, atol=1e-6), step["t"]
        assert int(optimizer.selection.history.counts[-1].sum()) == step["unmasked"]
    assert step["unmasked"] == told["config"]["budget"]


@pytest.mark.parametrize("name", TRACES)
def test_the_trace_has_no_ties_so_that_its_order_of_equals_plays_no_part(name: str) -> None:
    told = trace(name)
    config = told["config"]
    values, taken = tensors(told["initial"]), [torch.tensor(m).bool() & False for m in told["steps"][0]["mask"]]
    for step in told["steps"]:
        scores = torch.cat(
            [
                (g.abs() / (w.abs() + config["eps"]) ** config["exp"])[~t]
                for g, w, t in zip(tensors(step["grads"]), values, taken, strict=True)
            ]
        )
        joined = step["unmasked"] - sum(int(t.sum()) for t in taken)
        assert joined > 0
        ranked = scores.sort(descending=True).values
        assert ranked[joined - 1] > ranked[joined]  # the cut lies between two scores, with room for rounding
        assert ranked[joined - 1] / ranked[joined] > 1 + 1e-5
        values, taken = tensors(step["params"]), [torch.tensor(m).bool() for m in step["mask"]]


@pytest.mark.parametrize("name", TRACES)
def test_the_trace_tells_our_schedules_and_exponents_apart(name: str) -> None:
    """What parity shows: with another exponent, or the other order of remainders, masks would differ."""
    told = trace(name)
    config = told["config"]
    masks = [[torch.tensor(m).bool() for m in step["mask"]] for step in told["steps"]]
    others = [{"exp": config["exp"] + 1.0}, {"exp": -config["exp"]}]
    if config["budget"] % config["max_steps"]:
        others.append({"form": "even"})
    for changed in others:
        model = Replayed(tensors(told["initial"]))
        options = {
            "exp": config["exp"], "eps": config["eps"], "form": "front", "max_steps": config["max_steps"], **changed
        }  # fmt: skip
        method = ID3(config["budget"], bias="unit", **options)
        optimizer = Selective(optim.SGD(model.parameters(), lr=0.0), model, method)
        same = True
        for step, expected in zip(told["steps"], masks, strict=True):
            with torch.no_grad():
                for p, value in zip(model.weights, tensors(step["params"]), strict=True):
                    p.copy_(value)
            model.loss(tensors(step["grads"])).backward()
            optimizer.step()
            optimizer.zero_grad()
            for p, mask in zip(model.weights, expected, strict=True):
                index = optimizer.owner.narrow(p).index.tolist()
                same = same and index == mask.flatten().nonzero().flatten().tolist()
        assert not same, changed


@pytest.mark.parametrize("name", TRACES)
def test_the_dense_twin_comes_to_the_same(name: str) -> None:
    one, compact, told = run(name)
    two, dense, _ = run(name, Hold())
    for step in told["steps"]:
        for model, optimizer in ((one, compact), (two, dense)):
            model.loss(tensors(step["grads"])).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
