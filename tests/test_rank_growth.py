"""Budgets, rules and scores of ranks that come in: figures by hand, and those of the released codes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_adalora_parity import adapted, bound_of
from torch import Tensor, nn
from toys import Net

from apportion.callbacks import IncreLoRA, TriAdaptLoRA
from apportion.matrix_scores import MatrixSensitivity, NormGrowth, strengths
from apportion.rank_budgets import Fixed
from apportion.rank_growth import Gap, Growth, Rounds
from apportion.rank_piecewise import Piecewise
from apportion.rank_rules import Above, BestMatrices, evenly, grants
from apportion.rank_scores import RankGradient, RankMagnitude, magnitudes
from apportion.rank_units import Ranks
from apportion.rules import TopK
from apportion.types import Draw
from apportion.units import Layers

NAN = float("nan")

# Budgets
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("matrices", "add", "mean", "rounds", "last"),
    [(2, 1, 2, 36, 2), (5, 1, 2, 15, 2), (3, 4, 8, 42, 12), (18, 1, 8, 28, 18), (22, 4, 8, 6, 64), (10, 4, 8, 13, 24)],
)
def test_rounds_end_at_the_target_and_not_above(matrices: int, add: int, mean: int, rounds: int, last: int) -> None:
    budget = Rounds(mean_rank=mean, matrices=matrices, add=add, warmup=100, every=100)
    size = (10_000, 72 * 16, 72)
    counts = [int(budget.at(t, *size)) for t in range(0, 10_001, 100)]
    grown = [b - a for a, b in pairwise(counts)]
    assert counts[0] == 72
    assert counts[-1] == 72 * mean  # the released code ends at 600 and 592 in the last two cases
    assert [g for g in grown if g] == [matrices * add] * (rounds - 1) + [last]
    # A warm-up of one period: the first choice is at the end of the second, the last one `rounds` periods after it.
    assert budget.ends(*size) == (100, 100 * (rounds + 1))
    assert (budget.at(199, *size), budget.at(200, *size)) == (72, 72 + matrices * add)


@pytest.mark.parametrize(
    ("form", "grown", "done"),
    [("linear", [1, 3, 5, 6, 7, 7], 1900), ("exponential", [1, 1, 1, 1, 1, 1, 2], 2700)],
)
def test_the_number_of_growing_matrices_follows_the_gap(form: str, grown: list[int], done: int) -> None:
    budget = Gap(target=144, form=form, warmup=100, every=100)
    size = (3900, 288, 72)
    counts = [int(budget.at(t, *size)) for t in range(100, 3901, 100)]
    assert [b - a for a, b in pairwise(counts)][: len(grown)] == grown
    assert budget.ends(*size) == (100, done)
    assert (budget.at(done - 1, *size) < 144, budget.at(done, *size)) == (True, 144)


@pytest.mark.parametrize("form", ["linear", "exponential"])
@pytest.mark.parametrize("add", [1, 3])
def test_a_gap_is_closed_by_all_matrices_at_most(form: str, add: int) -> None:
    size = (50, 400, 4)
    budget = Gap(target=97, add=add, form=form)
    counts = [int(budget.at(t, *size)) for t in range(51)]
    grown = [b - a for a, b in pairwise(counts)]
    assert counts[0] == 4
    assert counts[-1] == 97
    end = budget.ends(*size)[1]
    assert all(add <= g <= 4 * add for g in grown[: end - 1])
    assert counts[end:] == [97] * (51 - end)


@pytest.mark.parametrize(
    "budget",
    [Growth(0.7, power=0.5), Growth(mean_rank=3, warmup=7, final=0), Rounds(30, matrices=3, add=4), Gap(0.8, add=3)],
)
def test_what_grows_never_falls_and_never_overshoots(budget: Any) -> None:
    size = (60, 48, 12)
    counts = [int(budget.at(t, *size)) for t in range(61)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (12, budget.last(48, 12))
    begin, end = budget.ends(*size)
    assert set(counts[: begin + 1]) == {12}
    assert set(counts[end:]) == {budget.last(48, 12)}
    assert counts[end - 1] < counts[end]


def test_growth_is_linear_between_its_ends() -> None:
    budget = Growth(target=40, warmup=10, final=20)
    expected = {0: 10, 10: 10, 11: 10, 12: 11, 35: 25, 59: 39, 60: 40, 80: 40}  # 10 + 30 (t - 10) / 50
    assert {t: budget.at(t, 80, 80, 10) for t in expected} == expected
    assert Growth(target=0.5, warmup=0.125, final=0.25).at(35, 80, 80, 10) == 25


def test_a_fixed_budget_is_one() -> None:
    budget = Fixed(mean_rank=2, warmup=10, final=20)
    assert {budget.at(t, 80, 48, 12) for t in range(81)} == {24} == {budget.first(48, 12)}
    assert budget.ends(80, 48, 12) == (10, 60)


def test_pieces_follow_their_points() -> None:
    steps = Piecewise([(0, 48), (0.25, 0.5), (60, 12)])
    assert [steps.at(t, 80, 48) for t in (0, 19, 20, 59, 60, 80)] == [48, 48, 24, 24, 12, 12]
    assert (steps.ends(80), steps.first(48, 12), steps.last(48, 12)) == ((19, 60), 48, 12)
    lines = Piecewise([(0, 12), (20, 48), (0.75, 12)], form="linear")
    assert [lines.at(t, 80, 48) for t in (0, 1, 10, 20, 30, 59, 60, 80)] == [12, 13, 30, 48, 39, 12, 12, 12]
    assert (lines.ends(80), lines.first(48, 12)) == ((0, 60), 12)
    assert hash(lines) == hash(Piecewise([[0, 12], [20, 48], [0.75, 12]], form="linear"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Growth(start=0), r"`Growth\(start=0\)` must be a whole number of at least 1"),
        (lambda: Growth(power=0), r"`Growth\(power=0\)` must be above 0"),
        (lambda: Growth(target=1.5), r"`Growth\(target=1.5\)` must be a count"),
        (lambda: Fixed(final=1.0), r"`Fixed\(final=1.0\)` must be a number of steps"),
        (lambda: Fixed(every=0), r"`Fixed\(every=0\)` must be at least 1"),
        (lambda: Rounds(matrices=0), r"`Rounds\(matrices=0\)` must be a whole number"),
        (lambda: Rounds(add=True), r"`Rounds\(add=True\)`"),
        (lambda: Rounds(warmup=1.0), r"`Rounds\(warmup=1.0\)`"),
        (lambda: Gap(form="cubic"), r"`Gap\(form='cubic'\)` must be 'linear' or 'exponential'"),
        (lambda: Piecewise([(0, 1.0)]), r"must be at least two pairs"),
        (lambda: Piecewise([(1, 1.0), (2, 0.5)]), r"the first of them at 0"),
        (lambda: Piecewise([(0, 1.0), (1.0, 0.5)]), r"1.0 must be a step \(int\) of at least 0 or a fraction"),
        (lambda: Piecewise([(0, 1.5), (5, 1)]), r"1.5 must be a count"),
        (lambda: Piecewise([(0, 1.0), (5, 1)], form="cubic"), r"`Piecewise\(form='cubic'\)`"),
        (lambda: Piecewise([(0, 1.0), (9, 8), (5, 1)]).ends(20), r"points at the steps \[0, 9, 5\] of a run of 20"),
        (lambda: Piecewise([(0, 1.0), (30, 8)]).ends(20), r"end with the run at the latest"),
        (lambda: Piecewise([(0, 1.0), (5, 49)]).last(48, 12), r"asks for 49 ranks, but the adapters have 48"),
        (lambda: Rounds(100).ends(20, 200, 12), r"reaches its target after 88 steps, but the run has 20"),
        (lambda: Gap(100, every=9).ends(20, 200, 12), r"reaches its target after 21 steps, but the run has 20"),
        (lambda: Rounds(11).first(48, 12), r"begins with 12 ranks in 12 matrices, but ends with 11"),
        (lambda: Growth(49).last(48, 12), r"asks for 49 ranks in the end, but the 12 adapters have 48"),
        (lambda: BestMatrices(add=0), r"`BestMatrices\(add=0\)`"),
        (lambda: Above(NAN), r"`Above\(above=nan\)` must be finite"),
        (lambda: RankGradient(beta=1.0), r"`RankGradient\(beta=1.0\)`"),
        (lambda: MatrixSensitivity(beta2=0.0), r"`MatrixSensitivity\(beta2=0.0\)`"),
        (lambda: MatrixSensitivity(size="sum"), r"`MatrixSensitivity\(size='sum'\)` must be 'mean' or 'root'"),
        (lambda: NormGrowth("blocks"), r"`NormGrowth\(form='blocks'\)`"),
        (lambda: IncreLoRA(ramp=-1), r"`Grow\(ramp=-1\)` must be at least 0"),
        (lambda: TriAdaptLoRA(growth="log"), r"`Gap\(form='log'\)`"),
    ],
)
def test_what_is_out_of_range_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Rules
# --------------------------------------------------------------------------------------------------------------------


def drawn(rule: Any, scores: list[float], k: int, mask: list[int] | None = None, ranks: int = 2) -> list[int]:
    bound = bound_of(*[(2, 2, ranks)] * (len(scores) // ranks))
    present = None if mask is None else torch.tensor(mask, dtype=torch.bool)
    draw = Draw(torch.tensor(scores, dtype=torch.float64), k, bound, torch.Generator(), {}, present)
    return rule.select(draw)[0].int().tolist()


def test_portions_are_handed_out_by_score() -> None:
    assert grants([0.1, 0.9, 0.5], [3, 3, 3], 2, 5) == [1, 2, 2]
    assert grants([0.1, 0.9, 0.5], [3, 1, 3], 2, 4) == [1, 1, 2]  # a full one is passed over
    assert grants([0.1, 0.9, 0.5], [3, 3, 3], 1, 8) == [2, 3, 3]  # more than one round
    assert grants([NAN, -1.0, 0.0], [1, 1, 1], 1, 2) == [0, 1, 1]
    assert evenly([2, 1, 5], 7) == [2, 1, 4]
    with pytest.raises(ValueError, match=r"1 left over"):
        grants([1.0], [1], 1, 2)


def test_at_ties_as_many_matrices_grow_as_the_budget_says() -> None:
    tied = [0.5] * 8
    mask = [1, 0] * 4
    assert drawn(BestMatrices(), tied, 6, mask) == [1, 1, 1, 1, 1, 0, 1, 0]
    assert sum(s >= sorted(tied)[-2] for s in tied[::2]) == 4  # a threshold lets all of them grow


def test_matrices_are_judged_by_the_ranks_that_are_in() -> None:
    assert drawn(BestMatrices(), [0.2, 9.0, 0.3, 0.0], 3, [1, 0, 1, 0]) == [1, 0, 1, 1]
    assert drawn(BestMatrices(2), [0.2] * 3 + [0.3] * 3, 5, [1, 0, 0, 1, 0, 0], ranks=3) == [1, 1, 0, 1, 1, 1]
    with pytest.raises(ValueError, match=r"only adds ranks, but the budget takes 1 away"):
        drawn(BestMatrices(), [0.2] * 4, 1, [1, 0, 1, 0])


def test_every_matrix_gets_its_share_where_ranks_of_one_are_compared() -> None:
    scores = [0.9, 0.8, 0.7, 0.1, 0.3, 0.2]
    assert drawn(TopK(), scores, 3, ranks=3) == [1, 1, 1, 0, 0, 0]
    assert drawn(TopK(per="tensor"), scores, 2, ranks=3) == [1, 0, 0, 0, 1, 0]
    assert drawn(TopK(per="tensor"), scores, 3, ranks=3) == [1, 1, 0, 0, 1, 0]
    assert drawn(TopK(per="tensor", grow=True), scores, 4, [0, 0, 1, 0, 0, 1], 3) == [1, 0, 1, 0, 1, 1]


def test_a_threshold_asks_no_budget() -> None:
    scores = [0.5, 0.4, NAN, 0.6]
    assert drawn(Above(0.4), scores, 1) == [1, 0, 0, 1]
    assert drawn(Above(0.3, within=True), scores, 4, [0, 1, 1, 1]) == [0, 1, 0, 1]


@pytest.mark.parametrize("rule", [BestMatrices(), Above(0.0)])
def test_rules_of_ranks_refuse_layers(rule: Any) -> None:
    bound = Layers().bind(Net())
    with pytest.raises(TypeError, match=r"is for ranks of adapters, `units=Ranks\(\)`; use `TopK\(\)`"):
        rule.select(Draw(torch.ones(4, dtype=torch.float64), 2, bound, torch.Generator()))
    with pytest.raises(ValueError, match=r"compares entries, rows or ranks of one tensor"):
        TopK(per="tensor").select(Draw(torch.ones(4, dtype=torch.float64), 2, bound, torch.Generator()))


# Scores
# --------------------------------------------------------------------------------------------------------------------


def lora_bound(*shapes: tuple[int, int], rank: int = 2, **options: Any) -> Any:
    model = nn.ModuleDict({f"m{i}": nn.Linear(a, b, bias=False) for i, (a, b) in enumerate(shapes)})
    config = LoraConfig(r=rank, target_modules=list(model), init_lora_weights=False, **options)
    return Ranks().bind(get_peft_model(model, config))


def test_the_change_that_an_update_makes_is_read_off_its_factors() -> None:
    bound = lora_bound((2, 2), rank=1)
    gate = bound.adapters[0].b
    gate.data = torch.tensor([[1.0], [1.0]])
    gate.grad = torch.tensor([[0.5], [0.2]])  # |dW dL/dW| = [.1 .4; .2 0], summed over columns
    for size, first in (("mean", 0.175), ("root", 0.35)):
        score = MatrixSensitivity(size=size)
        state = score.update(score.init(bound), bound)
        mean, doubt = 0.15 * first, 0.15 * (first - 0.15 * first)
        assert state["mean"].item() == pytest.approx(mean, rel=1e-6)
        assert score.scores(state, bound).item() == pytest.approx(mean * doubt, rel=1e-5)
        state = score.update(state, bound)
        second = 0.85 * mean + 0.15 * first
        assert state["mean"].item() == pytest.approx(second, rel=1e-6)
        assert state["doubt"].item() == pytest.approx(0.85 * doubt + 0.15 * (first - second), rel=1e-5)


@pytest.mark.parametrize("kind", ["svd", "lora"])
def test_it_is_the_product_of_the_dense_update_and_its_gradient(kind: str) -> None:
    torch.manual_seed(0)
    shapes = ((3, 5), (4, 2), (3, 5))
    bound = lora_bound(*shapes, rank=3) if kind == "lora" else bound_of(*[(a, b, 3) for a, b in shapes])
    expected = []
    for part, (inputs, outputs) in zip(bound.adapters, shapes, strict=True):
        for p, _ in part.tensors():
            nn.init.normal_(p)
        dense = torch.randn(outputs, inputs)  # dL/dW
        core = torch.ones(3, 1) if part.e is None else part.e
        (dense * (part.b @ (core * part.a))).sum().backward()
        parts = torch.stack([torch.outer(part.b[:, i], core[i] * part.a[i]) for i in range(3)])
        expected += [float((parts * dense).sum((1, 2)).abs().sum()) / (inputs * outputs)] * 3
    score = MatrixSensitivity()
    state = score.update(score.init(bound), bound)
    assert (state["mean"] / 0.15).repeat_interleave(3).tolist() == pytest.approx(expected, rel=1e-4)


def test_the_size_of_a_matrix_plays_no_part_unless_asked() -> None:
    bound = lora_bound((4, 4), (400, 400), rank=1)
    for part in bound.adapters:
        outputs = part.b.shape[0]
        part.b.data.fill_(0.5)
        part.b.grad = torch.full_like(part.b, 0.1 * outputs)  # every entry of |dW dL/dW| is 0.05
    for size, ratio in (("mean", 1.0), ("root", 100.0)):
        score = MatrixSensitivity(size=size)
        mean = score.update(score.init(bound), bound)["mean"]
        assert float(mean[1] / mean[0]) == pytest.approx(ratio, rel=1e-5)


def test_adapters_without_a_gradient_keep_their_averages() -> None:
    bound = lora_bound((2, 2), (2, 2), (2, 2))
    matrices, ranks = MatrixSensitivity(), RankGradient(0.5)
    states = [matrices.init(bound), ranks.init(bound)]
    for part in bound.adapters:
        for p, _ in part.tensors():
            p.grad = torch.ones_like(p)
    whole = [s["mean"].clone() for s in (matrices.update(states[0], bound), ranks.update(states[1], bound))]
    bound.adapters[1].a.grad = bound.adapters[1].b.grad = None
    others = {p for part in bound.adapters[:2] for p, _ in part.tensors()}
    matrices.update(states[0], bound, others)  # the third is in another optimizer
    ranks.update(states[1], bound, others)
    assert torch.equal(states[0]["mean"][1:], whole[0][1:])
    assert states[0]["mean"][0] != whole[0][0]
    assert torch.equal(states[1]["mean"][2:], whole[1][2:])
    assert bool((states[1]["mean"][:2] > whole[1][:2]).all())
    for p in [p for part in bound.adapters for p, _ in part.tensors()]:
        p.grad = None
    assert torch.equal(matrices.update(states[0], bound)["mean"], states[0]["mean"])
    assert torch.equal(ranks.update(states[1], bound)["mean"], states[1]["mean"])


def test_magnitudes_are_norms_of_parts_of_the_update() -> None:
    torch.manual_seed(0)
    bound = lora_bound((3, 5), (7, 2), rank=3, use_dora=True)
    parts = [torch.outer(p.b[:, i], p.a[i]) for p in bound.adapters for i in range(3)]
    expected = torch.stack([torch.linalg.matrix_norm(part) for part in parts]).double()
    torch.testing.assert_close(RankMagnitude().scores({}, bound), expected)
    bound = bound_of((2, 2, 3), (4, 1, 3))
    values = [torch.tensor([[-2.0], [1.0], [0.0]]), torch.tensor([[0.5], [-3.0], [4.0]])]
    for part, value in zip(bound.adapters, values, strict=True):
        part.e.data.copy_(value)
    assert RankMagnitude().scores({}, bound).tolist() == [2.0, 1.0, 0.0, 0.5, 3.0, 4.0]


def test_values_of_the_ranks_in_memory_go_to_their_places() -> None:
    bound = bound_of((2, 2, 3), (4, 1, 3), (2, 2, 3))
    for part, held in zip(bound.adapters, (2, 1, 3), strict=True):
        part.a.data, part.b.data = part.a.data[:held], part.b.data[:, :held]
        part.e.data = torch.arange(1.0, 1.0 + held)[:, None]
    assert RankMagnitude().scores({}, bound).tolist() == [1, 2, 0, 1, 0, 0, 1, 2, 3]
    assert strengths(bound).tolist() == pytest.approx([5**0.5 / 2, 1.0, 14**0.5 / 3])


def test_gradients_of_a_rank_are_taken_together() -> None:
    bound = bound_of((2, 2, 2), (2, 2, 2))
    for i, part in enumerate(bound.adapters):
        part.a.grad = (i + 1) * torch.tensor([[2.0, 4.0], [0.0, 0.0]])
        part.e.grad = (i + 1) * torch.tensor([[2.0], [3.0]])
        part.b.grad = (i + 1) * torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    score = RankGradient(beta=0.75)
    state = score.update(score.init(bound), bound)
    assert score.scores(state, bound).tolist() == [1.25, 1.25, 2.5, 2.5]  # sqrt(4 + 16 + 4 + 1), sqrt(9 + 16)
    assert score.scores(score.update(state, bound), bound).tolist() == [2.1875, 2.1875, 4.375, 4.375]


def test_plain_adapters_have_gradients_of_two_parts() -> None:
    bound = lora_bound((2, 3), rank=2)
    part = bound.adapters[0]
    part.a.grad, part.b.grad = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[4.0, 0.0], [0, 0], [0, 0]])
    score = RankGradient(beta=0.0)
    assert score.scores(score.update(score.init(bound), bound), bound).tolist() == [5.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_halves_do_not_vanish(dtype: torch.dtype) -> None:
    bound = bound_of((16, 16, 4))
    for p, _ in bound.adapters[0].tensors():
        p.data, p.grad = torch.full_like(p, 2e-4).to(dtype), torch.full_like(p, 1e-4).to(dtype)
    for score in (MatrixSensitivity(), RankGradient()):
        state: Any = score.update(score.init(bound), bound)
        assert all(v.dtype == torch.float32 and bool((v > 0).all()) for v in state.values())
    assert magnitudes(bound).dtype == torch.float32


def _core(rank: int, rows: list[list[float]], columns: list[list[float]]) -> Tensor:
    """The square core of two triangles: rows of the lower one, columns of the upper one, both with a diagonal."""
    core = torch.zeros(rank, rank)
    for i, (row, column) in enumerate(zip(rows, columns, strict=True)):
        core[i, : i + 1] += torch.tensor(row)
        core[: i + 1, i] += torch.tensor(column)
    return core


def test_a_core_that_grows_by_a_row_and_a_column() -> None:
    rows, columns = [[1.0], [2.0, 3.0]], [[4.0], [5.0, 6.0]]
    small, large = _core(1, rows[:1], columns[:1]), _core(2, rows, columns)
    assert large.tolist() == [[5.0, 5.0], [2.0, 9.0]]  # the diagonal counts twice, as both triangles have one
    model = adapted(nn.Sequential(nn.Linear(3, 3, bias=False)), 2)
    bound = Ranks().bind(model)
    part = bound.adapters[0]
    score = NormGrowth()
    state = score.init(bound)
    for rank, core, q, grown in ((1, small, 5.0, 5.0), (2, large, 5.8095, 0.8095)):
        part.a.data, part.b.data = torch.ones(rank, 3), torch.ones(3, rank)
        part.e.data = torch.linalg.svdvals(core)[:, None]  # a core and its singular values have one norm
        assert strengths(bound).item() == pytest.approx(q, abs=1e-4)
        assert score.scores(state, bound).tolist() == pytest.approx([grown] * 2, abs=1e-4)
        state = score.chosen(state, bound)
    assert strengths(bound, "square").item() == pytest.approx(135.0, abs=1e-3)  # 25 + 25 + 4 + 81
    assert part.a.numel() + part.b.numel() + 2 * 3 == 2 * (3 + 3) + 2**2 + 2  # r (in + out) + r^2 + r


def test_plain_adapters_have_the_norm_of_their_update_as_a_core() -> None:
    bound = lora_bound((4, 6), rank=2)
    part = bound.adapters[0]
    part.a.data = torch.tensor([[3.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]])
    part.b.data = torch.eye(6)[:, :2] * torch.tensor([1.0, 4.0])
    update = part.b @ part.a
    assert strengths(bound).item() == pytest.approx(float(torch.linalg.matrix_norm(update)) / 2, rel=1e-6)
