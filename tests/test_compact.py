"""Compact: the optimizer sees only what is selected, and trains it as if it had seen everything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from narrow import (
    ALL,
    Everything,
    Masked,
    Masks,
    backward,
    drawn,
    index_of,
    listed,
    snapshot,
    state_of,
    stepped,
    windows,
)
from torch import Tensor, nn, optim

from apportion.compact import Fate, Gathered
from apportion.effects import Compact
from apportion.optim import Selective

OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "adamw loop": lambda p: optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=False),
    "adamw foreach": lambda p: optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw fused": lambda p: optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "adamw amsgrad": lambda p: optim.AdamW(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "adam coupled": lambda p: optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: optim.SGD(p, lr=1e-1, weight_decay=0.1),
    "sgd nesterov": lambda p: optim.SGD(p, lr=1e-1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "nadam": lambda p: optim.NAdam(p, lr=1e-2, weight_decay=0.1),
    "radam": lambda p: optim.RAdam(p, lr=1e-2, weight_decay=0.1),
    "rmsprop": lambda p: optim.RMSprop(p, lr=1e-2, momentum=0.9, centered=True, weight_decay=0.1),
    "adamax": lambda p: optim.Adamax(p, lr=1e-2, weight_decay=0.1),
    "adadelta": lambda p: optim.Adadelta(p, lr=1.0, weight_decay=0.1),
}


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Three groups, each with a learning rate or a decay of its own."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0, "lr": 2e-2},
        {"params": [p for p in params if p.ndim == 2]},
        {"params": [p for p in params if p.ndim > 2], "weight_decay": 0.3},
    ]


def with_scalar(masks: dict[str, Tensor], scalar: bool) -> dict[str, Tensor]:
    """The scalar selected and the vector of one entry not, or the other way round."""
    return {**masks, "scale": torch.tensor(scalar), "gain": torch.tensor([not scalar])}


def race(
    make: Callable[[Any], optim.Optimizer],
    masks: Masks,
    steps: int = 50,
    accumulate: int = 1,
    clip: Callable[[list[Tensor]], Any] | None = None,
    checkpointing: str | None = None,
    dtype: torch.dtype = torch.float32,
    schedule: bool = True,
    exact: bool = True,
) -> None:
    """Both ways from the same start, compared after every step, bit for bit if ``exact``; the rest never moves."""
    one, two = Everything(checkpointing, dtype), Everything(checkpointing, dtype)
    compact = Selective(make(groups(one)), one, listed([masks]), micro_batches=accumulate)
    masked = Masked(two, make(groups(two)))
    rates = [optim.lr_scheduler.OneCycleLR(o, 3e-2, total_steps=steps + 1) for o in (compact, masked.base) if schedule]
    start = snapshot(one)
    for micro_batches in windows(steps, accumulate):
        before = snapshot(one)
        backward(one, micro_batches)
        assert all(p.grad is None for p in one.parameters())
        if clip is not None:
            clip(stepped(compact))
        compact.step()
        compact.zero_grad()
        backward(two, micro_batches)
        masked.step(masks, clip)
        for rate in rates:
            rate.step()
        after, other = snapshot(one), snapshot(two)
        for name, mask in masks.items():
            assert torch.allclose(after[name], other[name], rtol=0.0, atol=0.0 if exact else 1e-5), name
            assert torch.equal(after[name][~mask], start[name][~mask]), name
            assert bool((after[name] != before[name])[mask].all()), name


@pytest.mark.parametrize("scalar", [True, False])
@pytest.mark.parametrize("name", ["adamw loop", "adamw foreach", "adam coupled", "sgd nesterov"])
def test_it_equals_masked_dense_training_bit_for_bit(name: str, scalar: bool) -> None:
    race(OPTIMIZERS[name], with_scalar(drawn(Everything()), scalar))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_equals_masked_dense_training_under_any_elementwise_optimizer(name: str) -> None:
    race(OPTIMIZERS[name], drawn(Everything(), seed=1), steps=8, schedule=False, exact=name != "adamw fused")


def test_it_equals_masked_dense_training_in_fused_steps() -> None:
    """Fused AdamW on a CPU rounds the last few entries of a tensor, those that fill no vector, in its own way."""
    sizes = {"0.weight": 64, "0.bias": 16, "2.weight": 128, "2.bias": 16}

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))

    one, two = model(), model()
    masks = {}
    for name, p in one.named_parameters():
        masks[name] = torch.zeros(p.numel(), dtype=torch.bool)
        masks[name][torch.randperm(p.numel())[: sizes[name]]] = True
        masks[name] = masks[name].view(p.shape)
    compact = Selective(OPTIMIZERS["adamw fused"](groups(one)), one, listed([masks]))
    masked = Masked(two, OPTIMIZERS["adamw fused"](groups(two)))
    for _ in range(50):
        batch = torch.randn(8, 16)
        for net in (one, two):
            net(batch).square().mean().backward()
        compact.step()
        compact.zero_grad()
        masked.step(masks)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_equals_masked_dense_training_with_accumulation_and_checkpointing(
    accumulate: int, checkpointing: str | None
) -> None:
    masks = drawn(Everything())
    race(OPTIMIZERS["adamw foreach"], masks, steps=12, accumulate=accumulate, checkpointing=checkpointing)


def test_it_equals_masked_dense_training_in_double_precision() -> None:
    race(OPTIMIZERS["adamw loop"], drawn(Everything()), steps=12, dtype=torch.float64)


def test_it_equals_masked_dense_training_with_values_clipped() -> None:
    clipped = []

    def clip(params: list[Tensor]) -> None:
        clipped.append(any(bool((p.grad.abs() > 1e-2).any()) for p in params if p.grad is not None))
        nn.utils.clip_grad_value_(params, 1e-2)

    race(OPTIMIZERS["adamw foreach"], drawn(Everything()), steps=12, clip=clip)
    assert all(clipped)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_and_everything_can_be_selected(share: float) -> None:
    race(OPTIMIZERS["adamw foreach"], drawn(Everything(), share), steps=5)


def test_norms_are_clipped_over_what_is_selected() -> None:
    masks = drawn(Everything())
    one, two = Everything(), Everything()
    compact = Selective(OPTIMIZERS["adamw foreach"](groups(one)), one, listed([masks]))
    masked = Masked(two, OPTIMIZERS["adamw foreach"](groups(two)))
    norms: list[float] = []

    def clip(params: list[Tensor]) -> None:
        norms.append(float(nn.utils.clip_grad_norm_(params, 0.05)))

    for micro_batches in windows(10):
        backward(one, micro_batches)
        norm = nn.utils.clip_grad_norm_(stepped(compact), 0.05)
        compact.step()
        compact.zero_grad()
        backward(two, micro_batches)
        masked.step(masks, clip)
        assert float(norm) > 0.05
        assert float(norm) == pytest.approx(norms[-1], rel=1e-6)
        for name, value in snapshot(one).items():
            # Both start a step from values that differ by as little, so the bar is that of the whole run.
            assert torch.allclose(value, snapshot(two)[name], rtol=1e-6, atol=1e-6), name


def test_masters_are_as_many_as_what_is_selected_and_so_is_the_state() -> None:
    model = Everything()
    masks = drawn(model)
    optimizer = Selective(OPTIMIZERS["adamw loop"](groups(model)), model, listed([masks]))
    backward(model, windows(1)[0])
    optimizer.step()
    for name, p in model.named_parameters():
        k = int(masks[name].sum())
        store = optimizer.owner.narrow(p)
        assert store.index.dtype == torch.int32
        assert store.index.tolist() == masks[name].flatten().nonzero().flatten().tolist()
        assert store.leaf.shape == (k,)
        assert store.leaf.dtype == torch.float32
        assert p not in optimizer.base.state
        assert {key: v.numel() for key, v in state_of(optimizer, p).items()} == {
            "step": 1,
            "exp_avg": k,
            "exp_avg_sq": k,
        }
    optimizer.close()
    assert {id(p) for p in stepped(optimizer)} == {id(p) for p in model.parameters()}
    assert not optimizer.base.state
    backward(model, windows(1)[0])
    assert all(p.grad is not None for p in model.parameters())


def test_one_dense_gradient_is_alive_at_a_time() -> None:
    model = Everything()
    alive: list[int] = []
    for p in model.parameters():  # before the stores: hooks run in the order in which they were registered
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad is not None for q in model.parameters()))
        )
    optimizer = Selective(OPTIMIZERS["adamw loop"](groups(model)), model, listed([drawn(model)]), micro_batches=2)
    for micro_batches in windows(3, 2):
        backward(model, micro_batches)
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
    assert alive == [1] * (3 * 2 * len(list(model.parameters())))


class Slopes(nn.Module):
    """A loss whose gradients are given: the sum of parameters times what they shall be."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values.clone())

    def loss(self, grad: Tensor) -> Tensor:
        return (self.weight * grad).sum()


@pytest.mark.parametrize("value", [0.04, 0.1, -1.0])
def test_large_weights_in_bf16_move_where_plain_bf16_training_leaves_them(value: float) -> None:
    start = torch.full((2, 4), value, dtype=torch.bfloat16)
    grad = torch.ones(2, 4, dtype=torch.bfloat16)
    plain, narrow = Slopes(start), Slopes(start)
    dense = optim.AdamW(plain.parameters(), lr=1e-4, weight_decay=0.0)
    mask = {"weight": torch.arange(8).view(2, 4) % 2 == 0}
    compact = Selective(optim.AdamW(narrow.parameters(), lr=1e-4, weight_decay=0.0), narrow, listed([mask], units=ALL))
    for _ in range(80 if abs(value) >= 1.0 else 20):
        for model, optimizer in ((plain, dense), (narrow, compact)):
            model.loss(grad).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(plain.weight, start)  # what is tested can happen
    assert bool((narrow.weight != start)[mask["weight"]].all())
    assert torch.equal(narrow.weight[~mask["weight"]], start[~mask["weight"]])
    steps = 80 if abs(value) >= 1.0 else 20
    master = optimizer.owner.narrow(narrow.weight).leaf
    assert torch.allclose(master, start.float()[mask["weight"]] - steps * 1e-4, rtol=1e-5, atol=1e-6)
    assert torch.equal(narrow.weight[mask["weight"]], master.bfloat16())


def test_bf16_gradients_of_micro_batches_are_summed_in_fp32() -> None:
    model = Slopes(torch.ones(4, dtype=torch.bfloat16))
    optimizer = Selective(
        optim.SGD(model.parameters(), lr=1.0), model, listed([{"weight": torch.ones(4) > 0}]), micro_batches=2
    )
    for grad in (1.0, 2.0**-10):  # the sum needs 11 bits, bf16 has 8
        model.loss(torch.full((4,), grad, dtype=torch.bfloat16)).backward()
    assert optimizer.owner.narrow(model.weight).leaf.grad.tolist() == [1.0 + 2.0**-10] * 4


# Refresh --------------------------------------------------------------------------------------------------------------


def moved_on(fate: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Slopes, Selective, dict[str, Any]]:
    """Entries 0 and 1 for two steps, then 1 and 3; with what there was right before the change."""
    model = Slopes(torch.tensor([0.5, -0.3, 0.2, 0.9], dtype=dtype))
    first, second = torch.tensor([True, True, False, False]), torch.tensor([False, True, False, True])
    base = optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    optimizer = Selective(
        base, model, listed([{"weight": first}, {"weight": first}, {"weight": second}], Compact(**fate))
    )
    told: dict[str, Any] = {}
    for step in range(2):
        if step == 1:
            told["origin"] = torch.tensor([0.5, -0.3, 0.2, 0.9], dtype=dtype)
        model.loss(torch.tensor([1.0, -2.0, 3.0, 4.0], dtype=dtype) * (step + 1)).backward()
        if step == 1:  # the step whose end brings the change: note what the optimizer makes of it first
            optimizer.owner.slots[model.weight].optimizer.register_step_post_hook(
                lambda o, *_: told.update(
                    value=model.weight.detach().clone(),
                    master=o.param_groups[0]["params"][0].detach().clone(),
                    **{k: v.clone() for k, v in o.state[o.param_groups[0]["params"][0]].items()},
                )
            )
        optimizer.step()
        optimizer.zero_grad()
    assert index_of(optimizer, model.weight).tolist() == [1, 3]
    return model, optimizer, told


def test_kept_entries_keep_moments_entering_ones_start_with_none_and_leaving_ones_keep_their_value() -> None:
    model, optimizer, told = moved_on({})
    state = state_of(optimizer, model.weight)
    for key in ("exp_avg", "exp_avg_sq"):
        assert state[key].tolist() == [told[key][1].item(), 0.0]
        assert told[key][1] != 0.0
    assert float(state["step"]) == 2.0
    assert torch.equal(model.weight, told["value"])
    assert told["value"][0] != told["origin"][0]
    assert optimizer.owner.narrow(model.weight).leaf.tolist() == [told["master"][1].item(), told["origin"][3].item()]


def test_kept_entries_can_start_anew() -> None:
    model, optimizer, told = moved_on({"kept": "reset"})
    assert not optimizer.base.state.get(optimizer.owner.leaf(model.weight))
    assert torch.equal(model.weight, told["value"])


def test_leaving_entries_can_go_back_to_where_they_entered() -> None:
    model, optimizer, told = moved_on({"leaving": "revert"})
    assert model.weight[0] == told["origin"][0] != told["value"][0]
    assert torch.equal(model.weight[1:], told["value"][1:])
    store = optimizer.owner.narrow(model.weight)
    assert isinstance(store, Gathered)
    assert store.origin is not None
    assert store.origin.tolist() == [told["origin"][1].item(), told["origin"][3].item()]


def test_an_entry_that_comes_back_reverts_to_the_value_it_came_back_with() -> None:
    model = Slopes(torch.tensor([0.5, -0.3]))
    first, second = {"weight": torch.tensor([True, False])}, {"weight": torch.tensor([False, True])}
    base = optim.SGD(model.parameters(), lr=0.1)
    optimizer = Selective(base, model, listed([first, second, first, second], Compact(leaving="revert")))
    seen = []
    for _ in range(3):
        model.loss(torch.tensor([1.0, 1.0])).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(model.weight.tolist())
    assert torch.equal(torch.tensor(seen), torch.tensor([[0.5, -0.3]] * 3))


def test_masters_keep_their_digits_over_a_refresh() -> None:
    model, optimizer, told = moved_on({}, torch.bfloat16)
    leaf = optimizer.owner.narrow(model.weight).leaf
    assert leaf[0] == told["master"][1]
    assert leaf[0] != leaf[0].bfloat16().float()  # which the weight itself could not hold
    assert leaf[1] == told["origin"][3].float()


def test_ages_count_the_steps_of_each_entry() -> None:
    model, optimizer, _ = moved_on({"age": "entry"})
    store = optimizer.owner.narrow(model.weight)
    assert isinstance(store, Gathered)
    assert store.age is not None
    assert store.age.tolist() == [2, 0]
    assert moved_on({"age": "entry", "kept": "reset"})[1].owner.narrow is not None
    model, optimizer, _ = moved_on({"age": "entry", "kept": "reset"})
    reset = optimizer.owner.narrow(model.weight)
    assert isinstance(reset, Gathered)
    assert reset.age is not None
    assert reset.age.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kept": "drop"}, r"`Compact\(kept='drop'\)` must be 'keep' or 'reset'"),
        ({"leaving": "reset"}, r"`Compact\(leaving='reset'\)` must be 'keep' or 'revert'"),
        ({"age": 3}, r"`Compact\(age=3\)` must be 'tensor' or 'entry'"),
    ],
)
def test_unknown_fates_are_refused_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Compact(**options)
    with pytest.raises(ValueError, match=message):
        Fate(**options)


def test_a_sparse_gradient_is_refused_with_advice() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    model = nn.Sequential(embedding)
    optimizer = Selective(optim.SGD(model.parameters(), lr=0.1), model, listed([{"0.weight": torch.ones(5, 2) > 0}]))
    assert optimizer.selection.bound.names == ("0.weight",)
    with pytest.raises(RuntimeError, match=r"shape \(5, 2\) got a sparse gradient.*`sparse=False`"):
        model(torch.tensor([1])).sum().backward()


# Optimizers -----------------------------------------------------------------------------------------------------------


class TrustRatio(optim.Optimizer):
    """Steps by a share of the norm of the whole tensor, as layerwise rates do."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.norm() * p.grad)


class Sign(TrustRatio):
    """Elementwise, and no optimizer of torch."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad.sign())


def transformers_adafactor(params: Any) -> optim.Optimizer:
    from transformers.optimization import Adafactor

    made: optim.Optimizer = Adafactor(params, lr=None, relative_step=True, warmup_init=True)
    return made


REFUSED: dict[str, tuple[Callable[[Any], optim.Optimizer], str]] = {
    "adafactor": (lambda p: optim.Adafactor(p, lr=1e-2), "`Adafactor` gives single entries of a matrix other values"),
    "adafactor of transformers": (transformers_adafactor, "`Adafactor` gives single entries of a matrix other values"),
    "muon": (lambda p: optim.Muon(p, lr=1e-2), "`Muon` does not step a vector of entries"),
    "trust ratio": (TrustRatio, "`TrustRatio` gives single entries of a matrix other values.*such as AdamW or SGD"),
    "adagrad": (lambda p: optim.Adagrad(p, lr=1e-2), "`Adagrad` makes its state once, at construction"),
    "lbfgs": (lambda p: optim.LBFGS(p), "`LBFGS` keeps its own list of parameters"),
}


def matrices() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))


@pytest.mark.parametrize("name", REFUSED)
def test_an_optimizer_that_is_not_elementwise_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    model = matrices()
    with pytest.raises(ValueError, match=message):
        Selective(make(model.parameters()), model, listed([drawn(model)]))


def test_an_optimizer_is_tried_at_a_rate_that_shows_something() -> None:
    """Schedules that warm up set the rate to zero before the first step, at which any two optimizers agree."""
    for make in (lambda p: optim.Adafactor(p, lr=1e-2), TrustRatio):
        model = matrices()
        base = make(model.parameters())
        optim.lr_scheduler.LambdaLR(base, lambda step: step / 10)
        assert base.param_groups[0]["lr"] == 0.0
        with pytest.raises(ValueError, match="gives single entries of a matrix other values"):
            Selective(base, model, listed([drawn(model)]))
        assert base.param_groups[0]["lr"] == 0.0


ACCEPTED: dict[str, Callable[[Any], optim.Optimizer]] = {
    **OPTIMIZERS,
    "asgd": lambda p: optim.ASGD(p, lr=1e-1),
    "rprop": lambda p: optim.Rprop(p, lr=1e-2),
    "sgd fused": lambda p: optim.SGD(p, lr=1e-1, weight_decay=0.1, fused=True),
    "adamw with a rate in a tensor": lambda p: optim.AdamW(p, lr=torch.tensor(1e-2), foreach=False),
    "sign": Sign,
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_elementwise_optimizer_is_tried_without_a_trace(name: str) -> None:
    model = matrices()
    base = ACCEPTED[name](model.parameters())
    calls = []
    base.register_step_post_hook(lambda *_: calls.append(1))
    before, rate = snapshot(model), float(base.param_groups[0]["lr"])
    optimizer = Selective(base, model, listed([drawn(model)]))
    assert not calls
    assert not base.state
    assert float(base.param_groups[0]["lr"]) == rate
    assert all(torch.equal(before[name], value) for name, value in snapshot(model).items())
    model(torch.ones(3, 4)).square().sum().backward()
    optimizer.step()
    assert calls == [1]
    mask = drawn(model)
    for key, value in snapshot(model).items():
        assert torch.equal(value == before[key], ~mask[key])


def test_ages_need_adams_bias_correction() -> None:
    model = matrices()
    with pytest.raises(ValueError, match=r"`Compact\(age='entry'\)` corrects Adam's bias.*`SGD` has none"):
        Selective(optim.SGD(model.parameters(), lr=0.1), model, listed([drawn(model)], Compact(age="entry")))


def test_state_that_is_quantized_in_blocks_is_not_carried_to_another_selection() -> None:
    p = nn.Parameter(torch.arange(8.0))
    store = Gathered(p, Fate())
    store.move(p, torch.tensor([1, 2]), {})
    with pytest.raises(ValueError, match=r"keeps 'exp_avg' .* torch.uint8.*made once"):
        store.move(p, torch.tensor([2, 3]), {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2, dtype=torch.uint8)})
