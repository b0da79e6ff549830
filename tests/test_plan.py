"""Plans: the same slots run once, the same choice as a dense reference, and files that are whole or refused."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from toys import Net

from apportion import sync
from apportion.budgets import Constant
from apportion.candidates import Ask, Calibration, Candidates, Chooser, Site
from apportion.plan import Plan, select
from apportion.rules import TopK
from apportion.types import Unit
from apportion.units import Layers

IDS = torch.arange(10).view(2, 5) % 13


@dataclass(frozen=True)
class Matrices:
    """The matrices of a model as candidates; its vectors train whole."""

    pool: str | None = None
    charge: bool = False

    def bind(self, model: nn.Module) -> Candidates:
        units, always = [], {}
        for name, p in model.named_parameters():
            if p.ndim == 2:
                units.append(Unit(name, {name: p}, model, block=len(units)))
            else:
                always[name] = p
        charged = sum(p.numel() for p in always.values()) if self.charge else 0
        return Candidates(tuple(units), always, charged=charged, pool=self.pool)


@dataclass(frozen=True)
class Size:
    """|w|."""

    needs: ClassVar[frozenset[str]] = frozenset({"weight"})

    def entries(self, site: Site) -> Tensor:
        return site.weight.abs()


@dataclass(frozen=True)
class Slope:
    """|g|."""

    needs: ClassVar[frozenset[str]] = frozenset({"grad"})

    def entries(self, site: Site) -> Tensor:
        assert site.grad is not None
        return site.grad.abs()


@dataclass(frozen=True)
class Squares:
    """The mean of g^2 w^2 over the data."""

    calibration: Calibration = field(default_factory=lambda: Calibration(2))
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    def term(self, grad: Tensor, weight: Tensor) -> Tensor:
        return (grad * weight).square()

    def entries(self, site: Site) -> Tensor:
        assert site.grad is not None
        return site.grad


class Small(nn.Module):
    """Two matrices with ties between them and inside, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.b = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor([[1.0, -3.0], [2.0, 2.0]]))
            self.b.weight.copy_(torch.tensor([[2.0, 5.0], [0.0, float("nan")]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def dense_choice(scores: dict[str, Tensor], k: int) -> dict[str, list[int]]:
    """The k best entries by a plain sort of all of them."""
    everything = [
        (-float(s) if s.isfinite() else float("inf"), t, j, name)
        for t, (name, tensor) in enumerate(scores.items())
        for j, s in enumerate(tensor.flatten())
    ]
    chosen: dict[str, list[int]] = {}
    for _, _, j, name in sorted(everything)[:k]:
        chosen.setdefault(name, []).append(j)
    return {name: sorted(index) for name, index in chosen.items()}


def lists(plan: Plan) -> dict[str, list[int]]:
    return {name: index.tolist() for name, index in plan.indices.items()}


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.ndim == 2}


# Selection ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", range(1, 9))
def test_exactly_k_entries_are_selected_ties_to_the_lower_index_and_nan_last(k: int) -> None:
    model = Small()
    plan = select(model, Matrices(), Size(), Constant(k), TopK())
    assert lists(plan) == dense_choice({name: p.detach().abs() for name, p in matrices(model).items()}, k)
    assert plan.count == k + 2
    assert plan.dense == ("a.bias",)
    assert plan.shapes == {"a.weight": (2, 2), "b.weight": (2, 2), "a.bias": (2,)}
    assert all(index.dtype == torch.int32 for index in plan.indices.values())


def test_a_fraction_is_of_the_candidates() -> None:
    plan = select(Small(), Matrices(), Size(), Constant(0.5), TopK())
    assert sum(map(len, plan.indices.values())) == 4


def test_the_budget_pays_for_what_trains_whole_if_it_is_charged() -> None:
    assert lists(select(Small(), Matrices(charge=True), Size(), Constant(5), TopK())) == {
        "a.weight": [1, 2],
        "b.weight": [1],
    }
    with pytest.raises(ValueError, match="has nothing left after the 2 entries"):
        select(Small(), Matrices(charge=True), Size(), Constant(2), TopK())
    with pytest.raises(ValueError, match="of rows cannot pay"):
        select(Small(), Matrices(pool="sum", charge=True), Size(), Constant(3), TopK())


def test_rows_are_selected_whole() -> None:
    plan = select(Small(), Matrices(pool="sum"), Size(), Constant(2), TopK(), keep_scores=True)
    assert lists(plan) == {"a.weight": [0, 1], "b.weight": [0, 1]}  # rows of 4, 4, 7 and NaN: the first 4 counts
    assert {name: scores.tolist() for name, scores in plan.scores.items()} == {
        "a.weight": [4.0, 4.0],
        "b.weight": [7.0, 7.0],
    }


def test_gradients_are_averaged_over_all_batches_in_eval_mode() -> None:
    model = Net(dropout=0.5).train()
    batches = [IDS, (IDS + 3) % 13, (IDS * 5) % 13]

    def loss_fn(x: Tensor) -> Tensor:
        return model(x).square().mean()

    model.eval()
    weights = matrices(model)
    total = dict.fromkeys(weights, 0.0)
    for batch in batches:
        for name, grad in zip(weights, torch.autograd.grad(loss_fn(batch), list(weights.values())), strict=True):
            total[name] = total[name] + grad  # type: ignore[assignment]
    model.train()
    plan = select(model, Matrices(), Slope(), Constant(0.1), TopK(), batches=iter(batches), loss_fn=loss_fn)
    sums = {name: (grad / 3).abs() for name, grad in total.items()}  # type: ignore[attr-defined]
    assert lists(plan) == dense_choice(sums, int(0.1 * sum(p.numel() for p in weights.values())))
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_calibration_gathers_the_scores_own_terms() -> None:
    model = Net().eval()
    batches = [IDS, (IDS + 3) % 13, IDS]  # the third is not asked for
    weights = matrices(model)
    expected = {name: torch.zeros_like(p) for name, p in weights.items()}
    for batch in batches[:2]:
        grads = torch.autograd.grad(model(batch).square().mean(), list(weights.values()))
        for (name, p), grad in zip(weights.items(), grads, strict=True):
            expected[name] += (grad * p.detach()).square() / 2
    plan = select(
        model, Matrices(), Squares(), Constant(40), TopK(), batches=batches, loss_fn=lambda x: model(x).square().mean()
    )
    assert lists(plan) == dense_choice(expected, 40)
    assert plan.config["calibration"] == repr(Calibration(2))


def test_the_plan_follows_the_seed_alone() -> None:
    model = Net(dropout=0.5)
    score = Squares(Calibration(2, mode="train"))

    def plan(seed: int) -> dict[str, list[int]]:
        def batches() -> Any:
            while True:
                yield torch.randint(13, (2, 5))

        found = select(
            model,
            Matrices(),
            score,
            Constant(30),
            TopK(),
            batches=batches(),
            loss_fn=lambda x: model(x).square().mean(),
            seed=seed,
        )
        return lists(found)

    first = plan(1)
    torch.rand(7)
    random.random()
    state = torch.get_rng_state()
    assert plan(1) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert plan(2) != first


@dataclass(frozen=True)
class Remembering:
    """Counts how often it was asked, and sees seed, place and step."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def entries(self, site: Site) -> Tensor:
        site.memory["asked"] = site.memory.get("asked", torch.zeros(())) + 1
        site.memory["seen"] = torch.tensor([site.seed, site.index, site.step])
        return torch.zeros(site.weight.shape)


def test_scores_remember_in_what_is_handed_over() -> None:
    memory: dict[str, dict[str, Tensor]] = {}
    for _ in range(2):
        select(Small(), Matrices(), Remembering(), Constant(1), TopK(), seed=7, memory=memory)
    assert list(memory) == ["a.weight", "b.weight"]
    assert [float(kept["asked"]) for kept in memory.values()] == [2.0, 2.0]
    assert [kept["seen"].tolist() for kept in memory.values()] == [[7, 0, 0], [7, 1, 0]]


@dataclass(frozen=True)
class Asked:
    """A rule that writes down what it is asked, and takes the first unit of each tensor."""

    seen: list[Ask]
    budgeted: bool = True

    def open(self, ask: Ask) -> Chooser:
        self.seen.append(ask)
        return _First()


class _First:
    def __init__(self) -> None:
        self.found: dict[int, Tensor] = {}

    def push(self, i: int, scores: Tensor, payload: Tensor | None = None) -> None:
        assert scores.dtype == torch.float32
        assert not scores.requires_grad
        self.found[i] = torch.tensor([0])

    def chosen(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        return self.found, {}


@dataclass(frozen=True)
class Fixed:
    """Counts per tensor by shape."""

    def quotas(self, shapes: tuple[torch.Size, ...]) -> tuple[int, ...]:
        return tuple(shape[0] for shape in shapes)


@dataclass(frozen=True)
class Shared:
    """A budget that has to know how many units there are."""

    def counted(self, n: int) -> Constant:
        return Constant(n // 4)


def test_budgets_say_what_the_rule_is_asked_for() -> None:
    for budget, k, quotas in ((Constant(3), 3, None), (Fixed(), 4, (2, 2)), (Shared(), 2, None)):
        seen: list[Ask] = []
        plan = select(Small(), Matrices(), Size(), budget, Asked(seen))
        ask = seen[0]
        assert (ask.k, ask.quotas) == (k, quotas)
        assert (ask.counts, ask.shapes, ask.blocks) == ((4, 4), (torch.Size([2, 2]),) * 2, (0, 1))
        assert plan.config["budget"] == repr(budget)
    assert lists(plan) == {"a.weight": [0], "b.weight": [0]}


def test_scores_reach_the_rule_in_fp32() -> None:
    seen: list[Ask] = []
    select(Small().to(torch.bfloat16), Matrices(), Size(), Constant(3), Asked(seen))  # the rule looks itself
    assert len(seen) == 1


def test_a_rule_without_budget_needs_none_and_others_do() -> None:
    seen: list[Ask] = []
    plan = select(Small(), Matrices(), Size(), None, Asked(seen, budgeted=False))
    assert plan.config["counts"] == {"units": 8, "selected": 2, "charged": 0}
    with pytest.raises(ValueError, match=r"select\(budget=None\)"):
        select(Small(), Matrices(), Size(), None, Asked(seen))


def test_what_does_not_fit_is_refused() -> None:
    @dataclass(frozen=True)
    class Flat:
        needs: ClassVar[frozenset[str]] = frozenset()

        def entries(self, site: Site) -> Tensor:
            return site.weight.flatten()

    with pytest.raises(TypeError, match="use `Entries` or `Rows`"):
        select(Net(), Layers(), Size(), Constant(1), TopK())
    for score in (Slope(), Squares()):
        with pytest.raises(ValueError, match=r"reads gradients: give `select\(\.\.\., batches"):
            select(Small(), Matrices(), score, Constant(1), TopK(), batches=[1])
    with pytest.raises(ValueError, match=r"`Constant\(amount=9\)`: a budget of 9 over 8 units"):
        select(Small(), Matrices(), Size(), Constant(9), TopK())
    with pytest.raises(ValueError, match=r"gave \(4,\) for a\.weight"):
        select(Small(), Matrices(), Flat(), Constant(1), TopK())


def test_the_config_is_plain_data_that_says_how_it_came_about() -> None:
    plan = select(Small(), Matrices(), Size(), Constant(3), TopK(), seed=5)
    assert plan.config == {
        "units": "Matrices(pool=None, charge=False)",
        "score": "Size()",
        "budget": "Constant(amount=3)",
        "rule": repr(TopK()),
        "seed": 5,
        "calibration": None,
        "counts": {"units": 8, "selected": 3, "charged": 0},
    }


def test_ranks_compare_their_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(sync, "world_size", lambda: 2)
    monkeypatch.setattr(sync, "agree", lambda what, value: told.append(value))
    one = Small()
    select(one, Matrices(), Size(), Constant(3), TopK())
    select(Small(), Matrices(), Size(), Constant(3), TopK())
    with torch.no_grad():
        one.a.weight[0, 0] = 9.0
    select(one, Matrices(), Size(), Constant(3), TopK())
    assert told[0] == told[1] != told[2]


# Files ----------------------------------------------------------------------------------------------------------------


def same(a: Plan, b: Plan) -> bool:
    fields = (a.shapes, a.structured, a.dense, a.config) == (b.shapes, b.structured, b.dense, b.config)
    tensors = all(
        list(x) == list(y) and all(x[n].dtype == y[n].dtype and torch.equal(x[n], y[n]) for n in x)
        for x, y in ((a.indices, b.indices), (a.scores, b.scores))
    )
    return fields and tensors


def example() -> Plan:
    return Plan(
        {"a.weight": torch.tensor([1, 2]), "b/c.weight": torch.tensor([0], dtype=torch.int32)},
        {"a.weight": (2, 2), "b/c.weight": (3,), "d.weight": (2, 3), "a.bias": (2,)},
        {"d": "lora"},
        ("a.bias",),
        {"seed": 3, "nested": {"tuple": (1, 2)}},
        {"a.weight": torch.tensor([0.5, 0.25])},
    )


@given(st.data())
def test_what_is_saved_is_what_is_loaded(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=0, max_size=4))
    indices = {
        f"layer.{i}": torch.tensor(sorted(data.draw(st.sets(st.integers(0, n - 1)))), dtype=torch.int64)
        for i, n in enumerate(sizes)
    }
    plan = Plan(indices, {f"layer.{i}": (n,) for i, n in enumerate(sizes)}, config={"name": data.draw(st.text())})
    path = tmp_path_factory.mktemp("plan") / "plan.safetensors"
    plan.save(path)
    assert same(Plan.load(path), plan)
    assert os.listdir(path.parent) == ["plan.safetensors"]


def test_all_parts_are_saved(tmp_path: Path) -> None:
    example().save(tmp_path / "p")
    loaded = Plan.load(str(tmp_path / "p"))
    assert same(loaded, example())
    assert loaded.config["nested"] == {"tuple": [1, 2]}
    assert loaded.shapes["d.weight"] == (2, 3)


def test_large_tensors_have_wide_indices(tmp_path: Path) -> None:
    plan = Plan({"w": torch.tensor([5, 2**31])}, {"w": (2**16, 2**16)})
    plan.save(tmp_path / "p")
    loaded = Plan.load(tmp_path / "p").indices["w"]
    assert loaded.dtype == torch.int64
    assert loaded.tolist() == [5, 2**31]


def test_saving_replaces_a_file_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p"
    example().save(path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space left"):
            Plan({}, {"w": (2,)}).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["p"]
    Plan({}, {"w": (2,)}).save(path)
    assert Plan.load(path).shapes == {"w": (2,)}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "p"
    example().save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"Plan\.load\('.*p'\)` found no plan"):
        Plan.load(path)


def edited(change: Callable[[dict[str, Any]], None]) -> dict[str, str]:
    plan = {"shapes": {"w": [4]}, "structured": {}, "dense": [], "config": {}}
    change(plan)
    return {"format": "apportion-plan-1", "plan": json.dumps(plan)}


W = {"indices/w": torch.tensor([1, 2])}
BAD: dict[str, tuple[dict[str, Tensor], dict[str, str] | None]] = {
    "no metadata": (W, None),
    "another format": (W, edited(lambda plan: None) | {"format": "apportion-plan-2"}),
    "no plan": (W, {"format": "apportion-plan-1"}),
    "no JSON": (W, {"format": "apportion-plan-1", "plan": "{"}),
    "no object": (W, {"format": "apportion-plan-1", "plan": "[1]"}),
    "no shapes": (W, edited(lambda plan: plan.pop("shapes"))),
    "shapes of another kind": (W, edited(lambda plan: plan.update(shapes=3))),
    "an unknown part": (W, edited(lambda plan: plan.update(code="print()"))),
    "a tensor without a shape": (W, edited(lambda plan: plan.update(shapes={"v": [4]}))),
    "a tensor of no part": ({"w": torch.tensor([1])}, edited(lambda plan: None)),
    "a tensor of another part": ({"masks/w": torch.tensor([1])}, edited(lambda plan: None)),
    "indices out of range": ({"indices/w": torch.tensor([1, 4])}, edited(lambda plan: None)),
    "negative indices": ({"indices/w": torch.tensor([-1, 2])}, edited(lambda plan: None)),
    "unsorted indices": ({"indices/w": torch.tensor([2, 1])}, edited(lambda plan: None)),
    "indices twice": ({"indices/w": torch.tensor([2, 2])}, edited(lambda plan: None)),
    "float indices": ({"indices/w": torch.tensor([1.0, 2.0])}, edited(lambda plan: None)),
    "square indices": ({"indices/w": torch.tensor([[1], [2]])}, edited(lambda plan: None)),
    "scores without indices": ({"scores/w": torch.tensor([1.0])}, edited(lambda plan: None)),
    "too few scores": (W | {"scores/w": torch.tensor([1.0])}, edited(lambda plan: None)),
    "an unknown kind": (W, edited(lambda plan: plan.update(structured={"v": "magic"}))),
    "dense and indexed": (W, edited(lambda plan: plan.update(dense=["w"]))),
    "dense without a shape": (W, edited(lambda plan: plan.update(dense=["v"]))),
    "structured and indexed": (
        {"indices/v.weight": torch.tensor([1])},
        edited(lambda plan: plan.update(shapes={"v.weight": [4]}, structured={"v": "lora"})),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_holds_no_sound_plan_is_refused(tmp_path: Path, case: str) -> None:
    tensors, metadata = BAD[case]
    save_file(tensors, tmp_path / "p", metadata)
    with pytest.raises(ValueError, match="found no plan that can be used"):
        Plan.load(tmp_path / "p")


def test_scores_of_what_is_not_selected_are_refused() -> None:
    for indices in ({}, {"w": torch.tensor([0])}):
        with pytest.raises(ValueError, match="of w must be one score for each"):
            Plan(indices, {"w": (2,)}, scores={"w": torch.tensor([1.0, 2.0])})


def test_the_file_that_the_bad_ones_are_made_from_is_sound(tmp_path: Path) -> None:
    save_file(W, tmp_path / "p", edited(lambda plan: None))
    assert Plan.load(tmp_path / "p").indices["w"].tolist() == [1, 2]


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "trapped"),))

    torch.save(Trap(), tmp_path / "p")
    with pytest.raises(ValueError, match="found no plan"):
        Plan.load(tmp_path / "p")
    assert not (tmp_path / "trapped").exists()
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "q")


# What a plan says -----------------------------------------------------------------------------------------------------


def test_the_description_counts_every_tensor() -> None:
    plan = example()
    assert plan.count == 5
    assert plan.density() == 5 / 15
    lines = plan.describe().splitlines()
    rows = {line.split()[0]: line.split()[-2:] for line in lines[:6]}
    assert rows["a.weight"] == ["2", "50.000%"]
    assert rows["b/c.weight"] == ["1", "33.333%"]
    assert rows["d.weight"] == ["0", "0.000%"]
    assert rows["a.bias"] == ["2", "100.000%"]
    assert rows["total"] == ["5", "33.333%"]
    assert "lora on d" in lines
    assert "seed: 3" in lines


def test_a_plan_fits_its_own_model_and_no_other() -> None:
    model = Small()
    plan = select(model, Matrices(), Size(), Constant(3), TopK())
    plan.check(model)
    with pytest.raises(ValueError, match=r"a\.weight is missing; b\.weight is missing; a\.bias is missing"):
        plan.check(nn.Sequential(model))
    other = Small()
    other.b = nn.Linear(2, 3, bias=False)
    with pytest.raises(ValueError, match=r"this `Small`: b\.weight is \(3, 2\) and was \(2, 2\)\. "):
        plan.check(other)
    with pytest.raises(ValueError, match="the module c is missing"):
        Plan({}, {}, {"c": "lora"}).check(model)
    with pytest.raises(ValueError, match="and 2 more"):
        Plan({}, {f"w{i}": (1,) for i in range(7)}).check(model)


def test_tensors_without_selected_entries_are_left_out() -> None:
    plan = Plan({"w": torch.tensor([], dtype=torch.int64)}, {"w": (2,)}, scores={"w": torch.tensor([])})
    assert (plan.indices, plan.scores, plan.count) == ({}, {}, 0)
