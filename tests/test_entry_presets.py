"""Presets of entries: each selects what its paper says, worked out by hand on tiny models, and trains exactly that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from methods import ENTRY_METHODS
from torch import Tensor, nn
from torch.utils.data import DataLoader
from toys import Net, Task, adamw, fit, loader, named, tokens, weights
from transformers import LlamaConfig, LlamaForCausalLM

from apportion.budgets import Constant, Increment, RankEquivalent
from apportion.callbacks import (
    FISH,
    ID3,
    LIFT,
    SIFT,
    SPIDER,
    TRPTS,
    TTC,
    BitFit,
    PaFI,
    Random,
    SaRA,
    SPIDERHard,
)
from apportion.callbacks.sara import learning_rate
from apportion.discrepancy import blend_mask
from apportion.driver import SelectiveTuning
from apportion.effects import Blend, Compact
from apportion.entry_rules import Threshold
from apportion.entrywise import D3
from apportion.optim import Selective
from apportion.principal import Principal
from apportion.rules import TopK
from apportion.types import When

Matrices = Mapping[str, list[list[float]]]


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


class Given(pl.LightningModule):
    """Matrices ``a``, ``b`` ... whose gradients are given: the loss is the mean of the batch times sum w g."""

    def __init__(
        self, values: Matrices, grads: Matrices, optimizer: Callable[[Any], torch.optim.Optimizer] = sgd
    ) -> None:
        super().__init__()
        self.w = nn.ParameterDict({name: nn.Parameter(torch.tensor(value)) for name, value in values.items()})
        self.grads = {name: torch.tensor(grads[name]) for name in values}
        self.optimizer = optimizer

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return batch.mean() * sum((self.w[name] * grad).sum() for name, grad in self.grads.items())

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())

    def values(self) -> dict[str, Tensor]:
        """Copies of the matrices."""
        return {name: p.detach().clone() for name, p in self.w.items()}


class Seen(pl.Callback):
    """Weights around every step, what is selected at it, and the batches; stands behind the preset."""

    def __init__(self, method: SelectiveTuning) -> None:
        self.method = method
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []
        self.chosen: list[dict[str, list[int]]] = []
        self.batches: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before.append(weights(pl_module))
        self.batches.append(batch.clone())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        selection: Any = self.method.selection
        self.after.append(weights(pl_module))
        names = {id(p): name for name, p in named(pl_module).items()}
        tensors, indices = selection.bound.tensors, selection.choice.indices
        self.chosen.append({names[id(p)]: index.tolist() for p, index in zip(tensors, indices, strict=True)})

    def moved(self, step: int) -> dict[str, list[int]]:
        """Flat indices of the entries that step ``step`` moved."""
        before, after = self.before[step], self.after[step]
        return {name: (before[name] != after[name]).flatten().nonzero().flatten().tolist() for name in before}


def follow(method: SelectiveTuning, module: Any, steps: int = 1, data: Any = None, **options: Any) -> Seen:
    """Fits ``module`` with ``method`` for some steps and tells what happened."""
    seen = Seen(method)
    data = DataLoader(torch.ones(steps, 1)) if isinstance(module, Given) and data is None else data
    fit(module, [method, seen], steps, data, **options)
    return seen


def first(method: SelectiveTuning, values: Matrices, grads: Matrices | None = None, **options: Any) -> dict[str, Any]:
    """Flat indices that ``method`` selects at the first step of a fit, by matrix; those without one are left out."""
    seen = follow(method, Given(values, grads or values), **options)
    assert {name: moved for name, moved in seen.moved(0).items() if moved} == {
        name: index for name, index in seen.chosen[0].items() if index
    }
    return {name.removeprefix("w."): index for name, index in seen.chosen[0].items() if index}


# In a real fit
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ENTRY_METHODS))
def test_exactly_the_selected_entries_move_and_their_number_is_the_one_worked_out_by_hand(name: str) -> None:
    row = ENTRY_METHODS[name]
    method, module = row.make(), Task()
    seen = follow(method, module, 6)
    bound: Any = method.selection.bound
    assert (len(bound.names), bound.n) == (row.tensors, row.units)
    assert sum(p.numel() for p in bound.always.values()) == row.always
    assert tuple(method.history.steps) == row.switches
    assert tuple(sum(map(len, chosen.values())) for chosen in seen.chosen) == row.selected
    whole = [id(p) for p in bound.always.values()]
    always = {name: list(range(p.numel())) for name, p in named(module).items() if id(p) in whole}
    for step in range(6 if row.moves else 0):
        expected = {**seen.chosen[step], **always}
        assert seen.moved(step) == {name: expected.get(name, []) for name in seen.before[0]}


def test_id3_only_adds_and_sara_only_takes_away() -> None:
    for method, grows in ((ENTRY_METHODS["id3"].make(), True), (ENTRY_METHODS["sara"].make(threshold=0.05), False)):
        chosen = follow(method, Task(), 6).chosen
        for one, two in pairwise(chosen):
            small, large = (one, two) if grows else (two, one)
            assert all(set(small[key]) <= set(large[key]) for key in one)
        assert chosen[0] != chosen[-1]


# ID3
# --------------------------------------------------------------------------------------------------------------------

THETA, GRADS = {"a": [[0.5, -0.1], [0.0, 2.0]]}, {"a": [[0.1, -0.2], [0.05, -0.4]]}


@pytest.mark.parametrize(("exp", "best"), [(0.0, [3]), (1.0, [1]), (2.0, [1]), (-1.0, [3])])
@pytest.mark.parametrize("schedule", ["increment", "static", "repeat"])
def test_id3_takes_large_gradients_on_weights_that_the_sign_of_the_exponent_favours(
    exp: float, best: list[int], schedule: str
) -> None:
    method = ID3(budget=1, exp=exp, eps=0.1, schedule=schedule, max_steps=1)
    assert first(method, THETA, GRADS)["a"] == best


def dense_id3(steps: int, grows: Callable[[int], int] | None, budget: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """The masks of `ID3`, worked out on all gradients at once, with the present weights of a run beside it."""
    torch.manual_seed(seed)
    model, twin = Net(dropout=0.0), Net(dropout=0.0)
    method = ID3(budget, exp=1.0, eps=0.01, schedule="increment" if grows else "repeat", train_head=False)
    optimizer = Selective(adamw(model.parameters()), model, method, total_steps=steps)
    selection: Any = optimizer.selection
    names = selection.bound.names
    masks: dict[str, Tensor] = {name: torch.zeros(model.get_parameter(name).shape, dtype=torch.bool) for name in names}
    found = []
    for step, ids in enumerate(tokens(steps * 2).split(2)):
        twin.load_state_dict(model.state_dict())
        twin.zero_grad()
        twin.loss(ids).backward()
        params = [twin.get_parameter(name) for name in names]
        scores = torch.cat([(p.grad.abs() / (p.detach().abs() + 0.01)).view(-1) for p in params])
        flat = torch.cat([masks[n].view(-1) for n in names])
        count = budget
        if grows:
            scores[flat] = -1.0
            count = grows(step) - int(flat.sum())
        else:
            flat = torch.zeros_like(flat)
        flat[scores.detach().argsort(descending=True, stable=True)[:count]] = True
        sizes = [masks[n].numel() for n in names]
        masks = {n: part.view(masks[n].shape) for n, part in zip(names, flat.split(sizes), strict=True)}
        model.loss(ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, index in zip(names, selection.choice.indices, strict=True):
            assert index.tolist() == masks[name].flatten().nonzero().flatten().tolist(), (step, name)
        found.append(masks)
    return found


def test_id3_grows_by_the_best_of_what_does_not_train_yet() -> None:
    masks = dense_id3(5, lambda step: (step + 1) * 37 // 5, 37)
    assert [int(sum(m.sum() for m in mask.values())) for mask in masks] == [7, 14, 22, 29, 37]


def test_id3_can_choose_all_anew_at_every_step() -> None:
    masks = dense_id3(4, None, 37)
    assert [int(sum(m.sum() for m in mask.values())) for mask in masks] == [37] * 4
    assert any(bool((one & ~two).any()) for one, two in zip(masks[0].values(), masks[1].values(), strict=True))


def test_id3_static_is_the_choice_of_the_first_step_for_good() -> None:
    options: dict[str, Any] = {"budget": 37, "exp": 2.0}
    static = follow(ID3(schedule="static", **options), Task(), 4).chosen
    assert static == [follow(ID3(schedule="repeat", **options), Task(), 1).chosen[0]] * 4


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({"form": "front"}, [3, 6, 8, 10, 10, 10]),
        ({"form": "even"}, [2, 5, 7, 10, 10, 10]),
        ({"every": 3}, [7, 7, 7, 10, 10, 10]),
        ({"max_steps": None}, [1, 3, 5, 6, 8, 10]),  # the Trainer's six steps
    ],
)
def test_id3_spreads_its_budget_over_the_steps(options: dict[str, Any], counts: list[int]) -> None:
    seen = follow(ID3(**{"budget": 10, "max_steps": 4, **options}), Task(), 6)
    assert [sum(map(len, chosen.values())) for chosen in seen.chosen] == counts


def test_id3_fills_the_slots_of_its_paper() -> None:
    slots = ID3(320_000, exp=2.0, eps=0.1, every=10, form="front", max_steps=500).slots
    assert (slots.score, slots.budget) == (D3(2.0, 0.1), Increment(320_000, "front", 500))
    assert (slots.rule, slots.select_when, slots.effect) == (TopK(grow=True), When(every=10), Compact())
    static, repeat = ID3(schedule="static").slots, ID3(schedule="repeat", every=5).slots
    assert (static.budget, static.rule, static.select_when) == (Constant(0.002), TopK(), When(end=1))
    assert (repeat.budget, repeat.rule, repeat.select_when) == (Constant(0.002), TopK(), When(every=5))
    with pytest.raises(ValueError, match=r"`ID3\(schedule='grow'\)`"):
        ID3(schedule="grow")


def test_a_charged_head_is_paid_for_once_and_the_rest_of_the_budget_grows() -> None:
    seen = follow(ID3(budget=104 + 60, charge=True), Task(), 6)
    assert [sum(map(len, chosen.values())) for chosen in seen.chosen] == [10, 20, 30, 40, 50, 60]
    with pytest.raises(ValueError, match="does not pay for the 104 that train whole"):
        follow(ID3(budget=104, charge=True), Task(), 1)


@pytest.mark.parametrize(("age", "ratio"), [("entry", 1.0), ("tensor", 0.484)])
def test_a_newcomers_first_step_is_the_learning_rate_if_entries_have_ages(age: str, ratio: float) -> None:
    def adam(params: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=1e-3, eps=1e-12)

    module = Given({"a": [[1.0, 1.0, 1.0]]}, {"a": [[3.0, 2.0, 1.0]]}, adam)
    seen = follow(ID3(budget=3, exp=0.0, age=age, every=9, max_steps=27), module, 10)
    assert [chosen["w.a"] for chosen in seen.chosen] == [[0]] * 9 + [[0, 1]]
    step = (seen.before[9]["w.a"] - seen.after[9]["w.a"])[0]
    assert float(step[0]) == pytest.approx(1e-3, rel=1e-3)
    assert float(step[1]) == pytest.approx(ratio * 1e-3, rel=2e-3)  # 0.1 / (1 - 0.9^10) / sqrt(0.001 / (1 - 0.999^10))


# Chosen from weights
# --------------------------------------------------------------------------------------------------------------------


def test_pafi_takes_the_smallest_weights_of_the_whole_model_lower_ones_first_among_equals() -> None:
    values: Matrices = {"a": [[0.5, -0.1], [0.0, 2.0]], "b": [[-0.1, 3.0], [0.1, -0.2]]}
    assert first(PaFI(1), values, {"a": [[1.0] * 2] * 2, "b": [[1.0] * 2] * 2}) == {"a": [2]}
    assert first(PaFI(3), values, {"a": [[1.0] * 2] * 2, "b": [[1.0] * 2] * 2}) == {"a": [1, 2], "b": [0]}
    assert first(PaFI(0.625), values, {"a": [[1.0] * 2] * 2, "b": [[1.0] * 2] * 2}) == {"a": [1, 2], "b": [0, 2, 3]}


BLOCK: Matrices = {"a": [[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 3.0]]}


@pytest.mark.parametrize("options", [{"exact": True}, {}, {"warm": True}])
def test_lift_takes_the_principal_weights_and_not_the_largest(options: dict[str, Any]) -> None:
    ones: Matrices = {"a": [[1.0] * 3] * 3}
    assert first(LIFT(amount=4, lra_rank=1, **options), BLOCK, ones) == {"a": [0, 1, 3, 4]}
    assert 8 in first(LIFT(amount=1, lra_rank=3, **options), BLOCK, ones)["a"]  # with its full rank, a matrix is itself


def test_lift_trains_as_many_entries_as_an_adapter_of_llama_2_7b_has() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(intermediate_size=11008, hidden_size=4096, num_hidden_layers=32))
    method = LIFT(rank=128)
    bound: Any = method.slots.units.bind(model)
    assert len(bound.names) == 224
    assert not bound.always
    quotas = RankEquivalent(128).quotas([p.shape for p in bound.tensors])
    assert method.slots.budget == RankEquivalent(128)
    assert sum(quotas) == 319_815_680
    assert quotas[0] == 1_048_576


def test_lift_fills_the_slots_of_its_paper() -> None:
    slots = LIFT(rank=32, lra_rank=16, interval=50).slots
    assert slots.score == Principal(16, warm=False)
    assert (slots.rule, slots.select_when, slots.effect) == (TopK(per="tensor"), When(every=50), Compact())
    assert LIFT(rank=32).slots.score == Principal(32, warm=False)
    assert LIFT(amount=0.05).slots.budget == Constant(0.05)
    bound = LIFT(train_head=True, train_embeddings=True).slots.units.bind(Net())
    assert set(bound.always) == {"embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("leaving", ["keep", "revert"])
def test_lift_refreshes_and_entries_that_leave_keep_their_value_or_go_back(leaving: str) -> None:
    module = Task(optimizer=lambda module: adamw(module.parameters(), lr=0.3))  # far enough to change what is principal
    seen = follow(LIFT(rank=1, lra_rank=1, interval=2, leaving=leaving), module, 3)
    left = 0
    for name, old in seen.chosen[1].items():
        gone = sorted(set(old) - set(seen.chosen[2][name]))
        left += len(gone)
        values = seen.after[2][name].flatten()[gone]
        origin, trained = seen.before[0][name].flatten()[gone], seen.after[1][name].flatten()[gone]
        assert torch.equal(values, origin if leaving == "revert" else trained)
        assert bool((origin != trained).all())
    assert left > 0


SMALL: Matrices = {"a": [[1e-3, -5e-4], [1e-2, -3e-3]]}


def test_a_threshold_that_no_entry_passes_is_refused_at_first_and_told_later() -> None:
    grads: Matrices = {"a": [[-1e-2, 1e-2], [0.0, 0.0]]}  # both small ones grow past the threshold in two steps
    with pytest.raises(ValueError, match=r"`Threshold\(.*selected none of 4 units at its first choice"):
        follow(SaRA(threshold=1e-6, nuclear=0.0), Given(SMALL, grads), 1)
    with pytest.warns(UserWarning, match="none of 4 units at step 2: from here on nothing of them trains"):
        seen = follow(SaRA(threshold=2e-3, progressive_step=2, nuclear=0.0), Given(SMALL, grads), 3)
    assert [chosen["w.a"] for chosen in seen.chosen] == [[0, 1], [0, 1], []]


def test_sara_takes_what_is_below_its_threshold_and_later_what_stayed_there() -> None:
    module = Given(SMALL, {"a": [[-1e-2, 0.0], [0.0, 0.0]]})  # 1e-3 a step: 1, 2, 3e-3
    method = SaRA(threshold=2e-3, progressive_step=2, nuclear=0.0)
    seen = follow(method, module, 6)
    assert [chosen["w.a"] for chosen in seen.chosen] == [[0, 1]] * 2 + [[1]] * 4
    assert method.history.steps == [0, 2]
    assert module.values()["a"].flatten().tolist() == pytest.approx([3e-3, -5e-4, 1e-2, -3e-3])  # 3e-3 stays trained
    again = Given(SMALL, {"a": [[-1e-2, 0.0], [0.0, 0.0]]})
    late = follow(SaRA(threshold=2e-3, progressive_step=None, nuclear=0.0), again, 4)
    assert [chosen["w.a"] for chosen in late.chosen] == [[0, 1]] * 4
    assert SaRA(threshold=1e-3).slots.rule == Threshold(-1e-3, within=True)


def test_saras_penalty_acts_on_what_trains_and_on_nothing_else() -> None:
    module = Given(SMALL, {"a": [[0.0] * 2] * 2})
    follow(SaRA(threshold=2e-3, nuclear=1e-3, min_side=2), module, 1)
    length = (1e-3**2 + 5e-4**2) ** 0.5  # P * M is its first row: rank 1, U V^T is the row over its length
    expected = [1e-3 - 0.1 * 1e-3 * 1e-3 / length, -5e-4 + 0.1 * 1e-3 * 5e-4 / length, 1e-2, -3e-3]
    assert module.values()["a"].flatten().tolist() == pytest.approx(expected, rel=1e-5)
    assert module.values()["a"][0, 0] < 1e-3
    still = Given(SMALL, {"a": [[0.0] * 2] * 2})
    follow(SaRA(threshold=2e-3, nuclear=1e-3), still, 1)  # its sides are below 65
    assert torch.equal(still.values()["a"], torch.tensor(SMALL["a"]))


@pytest.mark.parametrize(("kept", "steps"), [("reset", 2.0), ("keep", 4.0)])
def test_sara_resets_moments_at_its_second_choice_or_keeps_them(kept: str, steps: float) -> None:
    module = Given(SMALL, {"a": [[-1.0, 0.1], [0.0, 0.0]]}, lambda params: torch.optim.AdamW(params, lr=1e-6))
    ages = []

    class Count(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            ages.append(float(next(iter(trainer.optimizers[0].state.values()))["step"]))

    method = SaRA(threshold=2e-3, progressive_step=2, kept=kept)
    fit(module, [method, Count()], 4, DataLoader(torch.ones(4, 1)))
    assert ages[-1] == steps


def test_sara_has_all_tensors_for_candidates_and_refuses_numbers_that_select_nothing() -> None:
    bound = SaRA().slots.units.bind(Net())
    assert set(bound.names) == {name for name, _ in Net().named_parameters()}
    assert set(SaRA(train_head=True).slots.units.bind(Net()).always) == {"lm_head.weight"}
    assert learning_rate(2e-3) == pytest.approx(4.9659e-4, rel=1e-4)
    with pytest.raises(ValueError, match=r"`SaRA\(threshold=0.0\)`"):
        SaRA(threshold=0.0)
    with pytest.raises(ValueError, match=r"`SaRA\(progressive_step=0\)`"):
        SaRA(progressive_step=0)


def test_random_entries_are_drawn_once_by_the_seed_and_evenly() -> None:
    drawn, again, other = (follow(Random(400, seed=seed), Task(), 2).chosen for seed in (3, 3, 4))
    assert drawn == again
    assert drawn[0] == drawn[1]
    assert drawn != other
    counts = torch.tensor([len(index) for index in drawn[0].values()], dtype=torch.float64)
    expected = torch.tensor([64.0, 64, 64, 64, 128, 128] * 4) * 400 / 2048
    assert float(((counts - expected) ** 2 / expected).sum()) < 50  # chi-squared with 23 degrees of freedom: 1 in 1000
    even = follow(Random(0.25, per="tensor"), Task(), 1).chosen[0]
    assert [len(index) for index in even.values()] == [16, 16, 16, 16, 32, 32] * 4


def test_bitfit_trains_biases_as_if_the_rest_were_frozen() -> None:
    module, plain = Task(), Task()
    for name, p in plain.net.named_parameters():
        p.requires_grad_(name.endswith("bias") or name == "lm_head.weight")
    follow(BitFit(), module, 6)
    fit(plain, [], 6)
    assert all(torch.equal(p, weights(plain)[name]) for name, p in weights(module).items())


def test_bitfit_goes_by_the_names_of_vectors() -> None:
    class Vectors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(4, 2)
            self.norm = nn.LayerNorm(4)
            self.gamma = nn.Parameter(torch.ones(4))
            self.bias_table = nn.Parameter(torch.ones(4, 4))

    def names(**options: Any) -> set[str]:
        return set(BitFit(**options).slots.units.bind(Vectors()).names)

    inner = {"attn.in_proj_bias", "attn.out_proj.bias"}
    assert names() == {*inner, "norm.bias"}
    assert names(norm="freeze") == inner
    assert set(BitFit(norm="train").slots.units.bind(Vectors()).always) == {"norm.weight", "norm.bias"}
    assert names(pattern=r"out_proj\.bias") == {"attn.out_proj.bias"}
    assert names(exclude="norm") == inner
    with pytest.raises(ValueError, match="matches no trainable parameter"):
        BitFit().slots.units.bind(nn.Linear(4, 4, bias=False))
    with pytest.raises(ValueError, match=r"`BitFit\(norm='all'\)`"):
        BitFit(norm="all")


# Chosen from gradients
# --------------------------------------------------------------------------------------------------------------------


def test_sift_takes_the_largest_gradients_of_every_tensor() -> None:
    values: Matrices = {"a": [[1.0, 99.0], [1.0, 1.0]], "b": [[1e-3, 1.0], [1.0, 1.0]]}  # sizes play no part
    grads: Matrices = {"a": [[10.0, -40.0], [20.0, 30.0]], "b": [[0.1, 0.05], [0.0, -0.2]]}
    assert first(SIFT(0.5), values, grads) == {"a": [1, 3], "b": [0, 3]}
    assert first(SIFT(2), values, grads) == {"a": [1], "b": [3]}
    module = Given(values, grads)
    seen = follow(SIFT(2), module, 3, DataLoader(torch.tensor([[1.0], [-5.0], [7.0]])))
    assert seen.chosen == [{"w.a": [1], "w.b": [3]}] * 3
    assert float(module.values()["a"][0, 1]) == pytest.approx(99 + 0.1 * 40 * (1 - 5 + 7))  # the first batch trains too


class Means(pl.LightningModule):
    """A linear map whose loss is its mean output: the gradient of a sample is the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(2, 1, bias=False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.map(batch).mean()

    def configure_optimizers(self) -> Any:
        return sgd(self.parameters())


@pytest.mark.parametrize(("per", "best"), [("sample", [0]), ("batch", [1])])
def test_fish_squares_the_gradient_of_every_sample_by_itself(per: str, best: list[int]) -> None:
    batch = torch.tensor([[3.0, 1.0], [-3.0, 1.0]])  # mean squares 9 and 1; squares of the mean 0 and 1
    method = FISH(1, batches=1, per=per, probe_data=[batch])
    assert follow(method, Means(), 1, DataLoader(torch.ones(2, 2), batch_size=2)).chosen[0] == {"map.weight": best}
    other = FISH(1, batches=1, per=per)  # from the start of the training data
    assert follow(other, Means(), 1, DataLoader(batch, batch_size=2)).chosen[0] == {"map.weight": best}


def test_fish_takes_all_but_the_head_for_candidates_and_pays_for_the_head() -> None:
    bound: Any = FISH().slots.units.bind(Net())
    assert set(bound.always) == {"lm_head.weight"}
    assert set(bound.names) == {name for name, _ in Net().named_parameters()} - {"lm_head.weight"}
    assert bound.charged == 104
    assert FISH(charge=False).slots.units.bind(Net()).charged == 0
    with pytest.raises(ValueError, match="does not pay for the 104"):
        follow(FISH(103, batches=1), Task(), 1)


def test_trpts_gives_matrices_with_more_of_the_best_fisher_more_entries_in_every_row() -> None:
    roots: Matrices = {"a": [[0.0, 1.0], [2.0, 2.0]], "b": [[4.0, 3.0], [9.0, 9.0]]}
    one: Matrices = {"a": [[1.0, 1.0], [1.0, 1.0]], "b": [[1.0, 1.0], [1.0, 1.0]]}
    # The best four: 9, 9, 4, 3, all in b. The best five have one of a: b has four times its share, and a row has two.
    assert first(TRPTS(share=0.5, batches=1), one, roots) == {"a": [1, 2], "b": [0, 2]}
    assert first(TRPTS(share=0.625, batches=1), one, roots) == {"a": [1, 2], "b": [0, 1, 2, 3]}


def test_ttc_ranks_the_channels_of_the_example() -> None:
    class Channels(pl.LightningModule):
        """Outputs a = x W^T with W = 1, and a loss whose gradient towards them is given."""

        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(2, 2, bias=False)
            nn.init.eye_(self.map.weight)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return (self.map(batch) * torch.tensor([[1.0, -1.0], [1.0, 1.0]])).sum()

        def configure_optimizers(self) -> Any:
            return sgd(self.parameters())

    data = DataLoader(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), batch_size=2)
    seen = follow(TTC(1, align_steps=0, batches=1), Channels(), 1, data)  # |1 + 3| against |-2 + 4|
    assert seen.chosen[0] == {"map.weight": [0, 1]}
    with pytest.raises(ValueError, match=r"`TTC\(align_steps=-1\)`"):
        TTC(align_steps=-1)


def test_ttc_aligns_the_norms_first_and_measures_the_aligned_model() -> None:
    data = loader()
    method, module = TTC(align_steps=2, batches=3, probe_data=loader(shuffle=False)), Task()
    seen = follow(method, module, 4, data)
    aligned = {name for name, index in seen.moved(0).items() if index}
    assert aligned == {n for n in seen.before[0] if "norm" in n} | {"net.lm_head.weight"}
    assert {name for name, index in seen.moved(1).items() if index} == aligned
    twin = Task()
    twin.load_state_dict(seen.before[2])
    twin.eval()
    effects: dict[str, Tensor] = {}
    for ids in tokens()[:6].split(2):
        twin.zero_grad()
        twin.loss(ids).backward()
        for name in seen.chosen[2]:
            p = twin.get_parameter(name)
            assert p.grad is not None
            effects[name] = effects.get(name, 0) + (p.grad * p.detach()).sum(1).abs()
    for name, index in seen.chosen[2].items():
        rows, width = twin.get_parameter(name).shape
        best = sorted(effects[name].topk(rows // 8).indices.tolist())
        assert sorted({i // width for i in index}) == best
        assert len(index) == width * len(best)
    assert seen.chosen[3] == seen.chosen[2]


def plain(**options: Any) -> DataLoader[Any]:
    return DataLoader(tokens(12), batch_size=2, shuffle=True, **options)


@pytest.mark.parametrize(
    "make",
    [
        plain,
        lambda: plain(generator=torch.Generator().manual_seed(4)),
        lambda: plain(num_workers=1, persistent_workers=True),
        lambda: loader(12),
    ],
    ids=["plain", "generator", "persistent workers", "stateful"],
)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_calibration_on_the_training_data_leaves_the_batches_of_the_training_alone(make: Any) -> None:
    without = follow(BitFit(), Task(), 9, make()).batches
    for method in (TTC(align_steps=2, batches=2), FISH(200, batches=2)):
        assert torch.equal(torch.cat(follow(method, Task(), 9, make()).batches), torch.cat(without))


def test_a_loader_that_knows_its_place_keeps_it_through_a_calibration() -> None:
    data = loader(12)
    follow(TTC(align_steps=2, batches=2), Task(), 5, data)
    assert data.state_dict()["drawn"] == 10


# SPIDER
# --------------------------------------------------------------------------------------------------------------------

PRETRAINED, ASKED = {"a": [[1.0, -2.0], [3.0, -4.0]]}, {"a": [[4.0, -3.0], [2.0, -1.0]]}


def test_spider_blends_every_step_with_the_pretrained_weights() -> None:
    module = Given(PRETRAINED, ASKED)
    follow(SPIDER(), module, 1)
    mask = torch.tensor([[1.0, 0.8777], [0.0, 0.0]])
    start, grad = torch.tensor(PRETRAINED["a"]), torch.tensor(ASKED["a"])
    assert torch.allclose(module.values()["a"], start - mask * 0.1 * grad, atol=1e-4)
    assert torch.equal(module.values()["a"][1], start[1])


def test_spider_sums_gradients_and_follows_them_from_step_to_step() -> None:
    signs = torch.tensor([[1.0], [-3.0], [-2.0], [0.5]])
    module = Given(PRETRAINED, ASKED, lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))
    follow(SPIDER(), module, 4, DataLoader(signs))
    start, grad = torch.tensor(PRETRAINED["a"]), torch.tensor(ASKED["a"])
    w, moment, total = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for sign in signs.flatten():
        total, moment = total + sign * grad, 0.9 * moment + sign * grad
        share = blend_mask(start, total)
        w = (1 - share) * start + share * (w - 0.1 * moment)
    assert torch.allclose(module.values()["a"], w, atol=1e-6)
    assert not torch.equal(module.values()["a"], start)


def test_spider_trains_what_its_pattern_names_and_a_fresh_head_whole() -> None:
    slots = SPIDER(pattern=r"layers\.3", train_head=True).slots
    assert slots.effect == Blend()
    seen = follow(SPIDER(pattern=r"layers\.3", train_head=True), Task(), 2)
    moved = {name for name, index in seen.moved(1).items() if index}
    assert {name for name in moved if not name.startswith("net.layers.3.")} == {"net.lm_head.weight"}
    assert len(seen.moved(1)["net.lm_head.weight"]) == 104
    part = seen.moved(1)["net.layers.3.mlp.up_proj.weight"]
    assert 0 < len(part) < 128
    names = SPIDER(norm=False, bias=False).slots.units.bind(Net()).names
    assert all("norm" not in name and "bias" not in name for name in names)


def test_spider_hard_takes_the_largest_discrepancies_of_every_tensor() -> None:
    more: Matrices = {**PRETRAINED, "b": [[5.0, 1.0], [5.0, 5.0]]}
    asked: Matrices = {**ASKED, "b": [[0.01, 0.03], [0.01, 0.01]]}
    assert first(SPIDERHard(2, batches=1), more, asked) == {"a": [0], "b": [1]}
    assert first(SPIDERHard(4, batches=1), more, asked) == {"a": [0, 1], "b": [0, 1]}  # two of each, by index among 0s
    assert first(SPIDERHard(2, batches=1), PRETRAINED, ASKED) == {"a": [0, 1]}
