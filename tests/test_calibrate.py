"""Calibration: the right means, and a model, its gradients, hooks and random numbers that are left as they were."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import Net

from apportion.calibrate import gather
from apportion.candidates import Calibration

IDS = torch.arange(10).view(2, 5) % 13


def square(grad: Tensor, weight: Tensor) -> Tensor:
    return grad.square()


def plain(grad: Tensor, weight: Tensor) -> Tensor:
    return grad


def mean_output(model: nn.Module) -> Callable[[Any], Tensor]:
    return lambda x: model(x).mean()


class Noisy(nn.Module):
    """Everything that a forward pass can leave a trace in: dropout, running statistics, all generators."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(4, 2)
        self.frozen = nn.Linear(2, 2)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.norm(self.first(x)))
        return self.frozen(self.last(h)) * (1.0 + 0.1 * random.random() + 0.1 * float(np.random.rand()))


def scalar(weight: float = 1.0) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, weight)
    return model


def test_squares_per_sample_and_per_batch_differ() -> None:
    model = scalar()
    batches = [torch.tensor([[1.0], [3.0]])]
    weights = dict(model.named_parameters())
    per_sample = gather(model, mean_output(model), batches, weights, square, Calibration(1, per="sample"))
    per_batch = gather(model, mean_output(model), batches, weights, square, Calibration(1, per="batch"))
    assert float(per_sample["weight"]) == 5.0
    assert float(per_batch["weight"]) == 4.0


def test_the_mean_is_over_samples_of_all_batches_however_they_are_cut() -> None:
    model = scalar()
    x = torch.tensor([[1.0], [2.0], [3.0], [6.0]])
    weights = dict(model.named_parameters())
    for cut in ([2, 2], [1, 3], [4], [1, 1, 1, 1]):
        score = gather(
            model, mean_output(model), torch.split(x, cut), weights, square, Calibration(len(cut), per="sample")
        )
        assert float(score["weight"]) == (1 + 4 + 9 + 36) / 4


@given(st.lists(st.integers(-8, 8), min_size=2, max_size=8), st.data())
def test_sums_add_up_over_parts_of_the_data(values: list[int], data: st.DataObject) -> None:
    model = scalar()
    weights = dict(model.named_parameters())
    batches = [torch.tensor([[float(v)]]) for v in values]
    cut = data.draw(st.integers(1, len(values) - 1))

    def total(part: list[Tensor]) -> float:
        mean = gather(model, mean_output(model), part, weights, square, Calibration(len(part), per="sample"))
        return float(mean["weight"]) * len(part)

    assert total(batches) == pytest.approx(total(batches[:cut]) + total(batches[cut:]), rel=1e-6)
    assert total(batches) == pytest.approx(sum(v * v for v in values), rel=1e-6)


def test_batches_of_a_network_give_the_mean_of_what_autograd_gives() -> None:
    model = Net().eval()
    batches = [(IDS + i) % 13 for i in range(3)]
    weights = dict(model.named_parameters())
    expected = {name: torch.zeros_like(p) for name, p in weights.items()}
    for batch in batches:
        grads = torch.autograd.grad(model(batch).square().mean(), list(weights.values()))
        for name, grad in zip(weights, grads, strict=True):
            expected[name] += grad.square() / 3
    found = gather(model, lambda x: model(x).square().mean(), batches, weights, square, Calibration(3))
    assert list(found) == list(weights)
    for name, value in found.items():
        assert torch.allclose(value, expected[name], rtol=1e-5, atol=1e-12), name
        assert value.dtype == torch.float32
        assert not value.requires_grad


def test_only_as_many_batches_as_asked_for_are_taken() -> None:
    model = scalar()
    batches = iter([torch.tensor([[v]]) for v in (1.0, 2.0, 30.0)])
    found = gather(model, mean_output(model), batches, dict(model.named_parameters()), plain, Calibration(2))
    assert float(found["weight"]) == 1.5
    assert float(next(batches)) == 30.0


def test_without_a_number_all_batches_are_taken() -> None:
    model = scalar()
    batches = (torch.tensor([[v]]) for v in (1.0, 2.0, 30.0))
    found = gather(model, mean_output(model), batches, dict(model.named_parameters()), plain, None)
    assert float(found["weight"]) == 11.0


def test_terms_see_fp32_gradients_of_half_precision_weights() -> None:
    model = scalar().to(torch.float16)
    x = torch.tensor([[1e-4]], dtype=torch.float16)  # its square is 0 in half precision
    found = gather(model, mean_output(model), [x], dict(model.named_parameters()), square, Calibration(1))
    assert float(found["weight"]) == float(x) ** 2 > 0.0


def test_small_terms_are_not_lost_beside_a_large_sum() -> None:
    model = scalar().to(torch.bfloat16)
    batches = [torch.ones(1, 1, dtype=torch.bfloat16)] * 600  # a bf16 sum of ones stops at 256
    found = gather(model, mean_output(model), batches, dict(model.named_parameters()), plain, Calibration(600))
    assert float(found["weight"]) == 1.0


def test_eval_turns_dropout_off_and_train_leaves_it_on() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Dropout(0.5))
    x = torch.rand(1, 64) + 1.0
    weights = dict(model.named_parameters())
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(64))  # type: ignore[union-attr, operator]
    for training in (True, False):
        model.train(training)
        off = gather(model, lambda x: model(x).sum(), [x], weights, plain, Calibration(1, mode="eval"))["0.weight"]
        on = gather(model, lambda x: model(x).sum(), [x], weights, plain, Calibration(1, mode="train"))["0.weight"]
        assert torch.equal(off, x.expand(64, 64))
        dropped = (on == 0.0).all(1)
        assert 10 < int(dropped.sum()) < 54
        assert torch.equal(on[~dropped], 2.0 * off[~dropped])


def test_train_keeps_the_modules_that_were_put_into_eval_mode() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.9))
    model.train()
    model[1].eval()
    x = torch.rand(2, 8)
    weights = {"0.weight": model[0].weight}
    found = gather(model, mean_output(model), [x], weights, plain, Calibration(1, mode="train"))  # type: ignore[arg-type]
    assert (found["0.weight"] != 0.0).all()


class Probe:
    """Copies of all that must not change, to compare with later."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.flags = [m.training for m in model.modules()]
        self.buffers = {k: b.clone() for k, b in model.named_buffers()}
        self.weights = {k: p.detach().clone() for k, p in model.named_parameters()}
        self.needs = [p.requires_grad for p in model.parameters()]
        self.grads = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
        self.hooks = [dict(p._post_accumulate_grad_hooks or {}) for p in model.parameters()]
        self.random = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())  # type: ignore[index, union-attr]

    def check(self) -> None:
        model = self.model
        assert [m.training for m in model.modules()] == self.flags
        assert all(torch.equal(b, self.buffers[k]) for k, b in model.named_buffers())
        assert all(torch.equal(p, self.weights[k]) for k, p in model.named_parameters())
        assert [p.requires_grad for p in model.parameters()] == self.needs
        for p, (grad, value) in zip(model.parameters(), self.grads, strict=True):
            assert p.grad is grad
            assert grad is None or torch.equal(grad, value)
        assert [dict(p._post_accumulate_grad_hooks or {}) for p in model.parameters()] == self.hooks
        assert random.getstate() == self.random[0]
        assert (np.random.get_state()[1] == self.random[1]).all()  # type: ignore[index]
        assert torch.equal(torch.get_rng_state(), self.random[2])


def lived_in() -> Noisy:
    """A model in the middle of a training: gradients, hooks, modules in different modes, something frozen."""
    model = Noisy()
    model(torch.rand(4, 3)).sum().backward()
    model.norm.eval()
    return model


def shuffled() -> Iterator[Tensor]:
    while True:
        yield torch.rand(4, 3) + random.random()


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("fails", [None, "loss", "term", "data"])
def test_nothing_is_left_behind(mode: str, fails: str | None) -> None:
    model = lived_in()
    live = model(torch.rand(4, 3)).sum()  # a graph that is alive keeps hold of the hooks
    stepped: list[Tensor] = []
    model.first.weight.register_post_accumulate_grad_hook(stepped.append)  # type: ignore[no-untyped-call]
    before = Probe(model)
    names = ("first.weight", "last.weight", "frozen.weight")
    weights = {name: model.get_parameter(name) for name in names}
    calls = 0

    def loss_fn(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3 and fails == "loss":
            raise RuntimeError("third batch")
        return model(x).sum()

    def term(grad: Tensor, weight: Tensor) -> Tensor:
        if calls == 3 and fails == "term":
            raise RuntimeError("third batch")
        return grad.abs()

    data = [next(shuffled()) for _ in range(2)] if fails == "data" else shuffled()
    before.random = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())  # type: ignore[index, union-attr]
    if fails is None:
        found = gather(model, loss_fn, data, weights, term, Calibration(4, mode=mode))
        assert all(bool((value > 0.0).any()) for value in found.values())
    else:
        with pytest.raises((RuntimeError, ValueError), match=r"third batch|`batches` has 2"):
            gather(model, loss_fn, data, weights, term, Calibration(4, mode=mode))
    before.check()
    assert stepped == []  # the user's hook may step an optimizer
    live.backward()
    assert len(stepped) == 1  # and it runs again now


def test_it_works_under_no_grad() -> None:
    model = scalar()
    with torch.no_grad():
        found = gather(
            model, mean_output(model), [torch.ones(1, 1)], dict(model.named_parameters()), plain, Calibration(1)
        )
        assert not torch.is_grad_enabled()
    assert float(found["weight"]) == 1.0


def test_one_gradient_at_most_is_alive() -> None:
    model = Net()  # embeddings and norms train beside the candidates
    matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name}
    alive: list[int] = []

    def term(grad: Tensor, weight: Tensor) -> Tensor:
        alive.append(sum(p.grad is not None for p in model.parameters()))
        return grad

    gather(model, lambda x: model(x).square().mean(), [IDS, IDS], matrices, term, Calibration(2))
    assert len(matrices) > 8
    assert alive == [0] * (2 * len(matrices))  # the one at hand has left `.grad` already


def test_a_parameter_without_gradient_is_zero() -> None:
    model = Noisy()
    other = nn.Parameter(torch.ones(2, 2))
    found = gather(
        model, mean_output(model), [torch.rand(4, 3)], {"last": model.last.weight, "other": other}, plain, None
    )
    assert torch.equal(found["other"], torch.zeros(2, 2))
    assert bool(found["last"].any())


def test_a_parameter_that_some_batches_reach_is_averaged_over_all() -> None:
    experts = nn.ModuleList([scalar(), scalar()])
    found = gather(
        experts,
        lambda batch: experts[batch[0]](batch[1]).sum(),
        [(0, torch.ones(1, 1)), (1, torch.full((1, 1), 6.0)), (1, torch.zeros(1, 1))],
        dict(experts.named_parameters()),
        plain,
        Calibration(3),
    )
    assert [float(value) for value in found.values()] == [pytest.approx(1 / 3), pytest.approx(2.0)]


def test_sparse_gradients_are_made_dense_for_the_term() -> None:
    model = nn.Embedding(4, 2, sparse=True)

    def term(grad: Tensor, weight: Tensor) -> Tensor:
        return grad.clamp(max=1.5)  # sparse tensors have none

    ids = torch.tensor([1, 1, 3])
    found = gather(model, lambda x: model(x).sum(), [ids], {"weight": model.weight}, term, Calibration(1))
    assert torch.equal(found["weight"], torch.tensor([[0.0, 0.0], [1.5, 1.5], [0.0, 0.0], [1.0, 1.0]]))


class Tied(nn.Module):
    """One matrix used twice, each time under activation checkpointing."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.linear, self.reentrant = nn.Linear(2, 2, bias=False), reentrant

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(self.linear, x, use_reentrant=self.reentrant)
        return x


def test_a_gradient_that_comes_in_parts_is_refused() -> None:
    x = torch.ones(1, 2, requires_grad=True)
    model = Tied(reentrant=True)
    with pytest.raises(RuntimeError, match=r"linear\.weight came in parts.*use_reentrant=False"):
        gather(model, mean_output(model), [x], dict(model.named_parameters()), square, Calibration(1))
    assert model.linear.weight.grad is None
    whole = Tied(reentrant=False)
    whole.load_state_dict(model.state_dict())
    found = gather(whole, mean_output(whole), [x], dict(whole.named_parameters()), square, Calibration(1))
    expected = torch.autograd.grad(whole.linear(whole.linear(x)).mean(), whole.linear.weight)[0].square()
    assert torch.allclose(found["linear.weight"], expected)


def test_trees_of_tensors_are_split_along_the_first_dimension() -> None:
    model = scalar()
    seen: list[Any] = []

    def loss_fn(batch: Any) -> Tensor:
        seen.append(batch)
        return (model(batch["x"]) * batch["rest"][0]).sum() * batch["temperature"]

    batch = {
        "x": torch.tensor([[1.0], [2.0], [3.0]]),
        "rest": (torch.tensor([1.0, 10.0, 100.0]), None),
        "temperature": torch.tensor(2.0),
        "name": "abc",
    }
    found = gather(model, loss_fn, [batch], dict(model.named_parameters()), plain, Calibration(1, per="sample"))
    assert float(found["weight"]) == pytest.approx(2 * (1 + 20 + 300) / 3)
    assert [tuple(one["x"].shape) for one in seen] == [(1, 1)] * 3
    assert [one["rest"][0].tolist() for one in seen] == [[1.0], [10.0], [100.0]]
    assert all(one["name"] == "abc" and one["rest"][1] is None for one in seen)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.ones(2, 1), torch.ones(3)), r"lengths \[2, 3\]"),
        ((torch.ones(0, 1),), r"lengths \[0\]"),
        ("text", "no tensor in a tuple"),
        ({"scalar": torch.tensor(1.0)}, "no tensor in a tuple"),
    ],
)
def test_batches_that_cannot_be_split_are_refused(batch: Any, message: str) -> None:
    model = scalar()
    with pytest.raises(ValueError, match=message):
        gather(
            model,
            lambda _: model(torch.ones(1, 1)).sum(),
            [batch],
            {"w": model.weight},
            plain,
            Calibration(1, "sample"),
        )


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda y: y.detach().sum(), "no loss with a gradient"),
        (lambda y: y, "no loss with a gradient"),
        (lambda y: 3.0, "no loss with a gradient"),
        (lambda y: y.sum() / 0.0, "a loss of inf"),
        (lambda y: y.sum() * float("nan"), "a loss of nan"),
    ],
)
def test_what_is_no_loss_is_refused(loss: Callable[[Tensor], Any], message: str) -> None:
    model = nn.Linear(2, 2, bias=False)
    nn.init.ones_(model.weight)
    with pytest.raises(ValueError, match=message):
        gather(model, lambda x: loss(model(x)), [torch.ones(1, 2)], {"w": model.weight}, plain, Calibration(1))


def test_a_loss_that_misses_all_candidates_is_refused() -> None:
    model, copy = scalar(), scalar()
    with pytest.raises(ValueError, match="None of the 1 parameters, such as weight"):
        gather(model, mean_output(copy), [torch.ones(1, 1)], dict(model.named_parameters()), plain, Calibration(1))


def test_too_few_batches_are_refused() -> None:
    model = scalar()
    weights = dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"Calibration\(batches=3, .*`batches` has 2"):
        gather(model, mean_output(model), [torch.ones(1, 1)] * 2, weights, plain, Calibration(3))
    with pytest.raises(ValueError, match="at least one batch"):
        gather(model, mean_output(model), [], weights, plain, None)


def test_parameters_that_cannot_be_looked_at_are_refused() -> None:
    model = scalar()
    with pytest.raises(ValueError, match="nothing to look at"):
        gather(model, mean_output(model), [], {}, plain, None)
    with pytest.raises(ValueError, match="under two names"):
        gather(model, mean_output(model), [], {"a": model.weight, "b": model.weight}, plain, None)
    whole = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"b is torch\.int8"):
        gather(model, mean_output(model), [], {"b": whole}, plain, None)


def test_a_term_of_another_shape_is_refused() -> None:
    model = nn.Linear(2, 3, bias=False)
    with pytest.raises(ValueError, match=r"gave \(3,\) for weight of \(3, 2\)"):
        gather(model, mean_output(model), [torch.ones(1, 2)], {"weight": model.weight}, lambda g, w: g.sum(1), None)


class Ranks:
    """Two ranks, one after the other: the first writes down what it sends, the second averages with that."""

    def __init__(self) -> None:
        self.sent: list[Tensor] = []

    def first(self, value: Tensor) -> Tensor:
        self.sent.append(value.clone())
        return value

    def second(self, value: Tensor) -> Tensor:
        other = self.sent.pop(0)
        assert other.shape == value.shape, "ranks send different things"
        return (value + other) / 2


def test_the_mean_over_ranks_is_the_mean_over_all_their_batches() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    x = list(torch.rand(6, 4, 2))
    weights = dict(reversed(list(model.named_parameters())))
    ranks = Ranks()
    gather(model, mean_output(model), x[:3], weights, square, Calibration(3), mean=ranks.first)
    both = gather(model, mean_output(model), x[3:], weights, square, Calibration(3), mean=ranks.second)
    assert ranks.sent == []
    whole = gather(model, mean_output(model), x, weights, square, Calibration(6))
    assert list(both) == list(weights)
    assert all(torch.allclose(both[name], whole[name]) for name in weights)


def test_ranks_with_fewer_samples_do_not_weigh_more() -> None:
    model = scalar()
    weights = dict(model.named_parameters())
    told = iter([torch.tensor([0.0, 2.0], dtype=torch.float64), None])  # this rank has 1 sample, the other has 3

    def mean(value: Tensor) -> Tensor:
        counts = next(told)
        return value if counts is None else counts

    found = gather(model, mean_output(model), [torch.full((1, 1), 4.0)], weights, plain, Calibration(1, "sample"), mean)
    assert float(found["weight"]) == 2.0  # 4 / 2: its part of the average over two ranks of sums over mean counts


def test_all_ranks_fail_when_one_does() -> None:
    model = scalar()
    weights = dict(model.named_parameters())
    ranks = Ranks()
    with pytest.raises(ValueError, match="`batches` has 0"):
        gather(model, mean_output(model), [], weights, plain, Calibration(1), mean=ranks.first)
    with pytest.raises(RuntimeError, match="failed on another rank"):
        gather(model, mean_output(model), [torch.ones(1, 1)], weights, plain, Calibration(1), mean=ranks.second)


def test_progress_is_drawn_only_if_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    model = scalar()
    for progress in (False, True):
        gather(
            model, mean_output(model), [torch.ones(1, 1)], {"w": model.weight}, plain, Calibration(1), progress=progress
        )
        assert ("Calibrating" in capsys.readouterr().out) == progress
