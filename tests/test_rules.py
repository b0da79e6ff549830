"""Rules: exactly k units whatever the scores are, and the distributions that they promise."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from apportion.race import race
from apportion.rules import Balanced, Cycle, Sample, TopK
from apportion.types import Bound, Draw, Rule, State, Unit, resolve

SCORES = st.one_of(st.floats(0.0, 1e300), st.sampled_from([0.0, 1.0, math.inf, math.nan]))
SIGNED = st.one_of(st.floats(-1e300, 1e300), st.sampled_from([0.0, 1.0, -1.0, math.inf, -math.inf, math.nan]))
RULES: list[Rule] = [
    Sample(),
    Sample(floor=0.3),
    Cycle(),
    Cycle("ascending"),
    Cycle("descending"),
    Cycle("fixed"),
    Balanced(),
    Balanced(by="size"),
    TopK(),
    TopK(per="group"),
    TopK(per="block"),
]
SIGNED_RULES: list[Rule] = [
    Sample("sigmoid"),
    Sample("softmax"),
    Sample("sigmoid", 0.5),
    Sample("softmax", 0.5),
    TopK(),
]


def plain(n: int) -> Bound:
    """n layers of one entry each."""
    return Bound(tuple(Unit(f"layer{i}", {"w": nn.Parameter(torch.zeros(1))}, nn.Identity(), i) for i in range(n)))


def matrices(layers: int, cells: dict[str, Sequence[int]]) -> Bound:
    """Layers that hold groups of units; each group is given by the sizes of its units."""
    units = []
    for block in range(layers):
        for group, sizes in cells.items():
            for i, size in enumerate(sizes):
                weight = nn.Parameter(torch.empty(size, device="meta"))
                units.append(
                    Unit(f"{block}.{group}.{i}", {"weight": weight}, nn.Identity(), block, f"{group}{i}", group)
                )
    return Bound(tuple(units))


def select(rule: Rule, scores: Tensor | Sequence[float], k: int, seed: int = 0, bound: Bound | None = None) -> Tensor:
    scores = torch.as_tensor(scores, dtype=torch.float64)
    return rule.select(Draw(scores, k, bound or plain(len(scores)), torch.Generator().manual_seed(seed)))[0]


def by_cell(bound: Bound, mask: Tensor) -> dict[tuple[str, int], int]:
    counts: Counter[tuple[str, int]] = Counter()
    for unit, selected in zip(bound.units, mask.tolist(), strict=True):
        counts[unit.group, unit.block] += selected
    return dict(counts)


# Exactly k
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=repr)
@given(scores=st.lists(SCORES, min_size=1, max_size=12), data=st.data())
@settings(max_examples=60)
def test_exactly_k_units_are_selected_whatever_the_scores_are(
    rule: Rule, scores: list[float], data: st.DataObject
) -> None:
    k = data.draw(st.integers(0, len(scores)))
    mask = select(rule, scores, k, seed=data.draw(st.integers(0, 5)))
    assert mask.dtype == torch.bool
    assert mask.shape == (len(scores),)
    assert int(mask.sum()) == k


@pytest.mark.parametrize("rule", SIGNED_RULES, ids=repr)
@given(scores=st.lists(SIGNED, min_size=1, max_size=12), data=st.data())
@settings(max_examples=60)
def test_exactly_k_units_are_selected_by_scores_of_both_signs(
    rule: Rule, scores: list[float], data: st.DataObject
) -> None:
    k = data.draw(st.integers(0, len(scores)))
    assert int(select(rule, scores, k).sum()) == k


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("value", [0.0, 1.0, math.nan, math.inf])
def test_equal_zero_and_nan_scores_still_give_exactly_k(rule: Rule, value: float) -> None:
    for k in range(7):
        assert int(select(rule, [value] * 6, k).sum()) == k


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_rules_leave_the_global_random_numbers_alone_and_do_not_depend_on_them(rule: Rule) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = select(rule, [1.0] * 9, 4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(select(rule, [1.0] * 9, 4), first)


@pytest.mark.parametrize("rule", [Sample(), Cycle(), Cycle("fixed"), Balanced(), Balanced(by="size")], ids=repr)
def test_other_seeds_give_other_draws(rule: Rule) -> None:
    assert len({tuple(select(rule, [1.0] * 12, 5, seed).tolist()) for seed in range(20)}) > 5


# Sample
# ------------------------------------------------------------------------------------------------------------------


def inclusion(weights: Sequence[float], k: int) -> list[float]:
    """Inclusion probabilities of successive sampling without replacement, by enumerating the ordered draws."""
    chance = [0.0] * len(weights)
    for order in itertools.permutations(range(len(weights)), k):
        p, left = 1.0, sum(weights)
        for i in order:
            p *= weights[i] / left
            left -= weights[i]
        for i in order:
            chance[i] += p
    return chance


IMPORTANCE = [-0.02332918, 0.12005472, 0.02332918, -0.12005472]


def test_the_enumeration_gives_the_inclusion_probabilities_worked_out_by_hand() -> None:
    weights = [1.0 / (1.0 + math.exp(-i)) for i in IMPORTANCE]
    assert weights == pytest.approx([0.494168, 0.529978, 0.505832, 0.470022], abs=1e-6)
    assert inclusion(weights, 2) == pytest.approx([0.495717, 0.523066, 0.504795, 0.476422], abs=1e-6)


@pytest.mark.parametrize(
    ("rule", "scores", "weights"),
    [
        (Sample("sigmoid"), IMPORTANCE, [1.0 / (1.0 + math.exp(-i)) for i in IMPORTANCE]),
        (Sample("score"), [1.0, 2.0, 5.0, 0.5], [1.0, 2.0, 5.0, 0.5]),
        (Sample("softmax"), [0.0, 1.0, -2.0, 0.3], [math.exp(s) for s in (0.0, 1.0, -2.0, 0.3)]),
        (Sample("score", floor=0.4), [1.0, 2.0, 5.0, 0.0], [0.6 * s / 8.0 + 0.1 for s in (1.0, 2.0, 5.0, 0.0)]),
    ],
    ids=repr,
)
def test_units_are_included_as_often_as_successive_sampling_says(
    rule: Sample, scores: list[float], weights: list[float]
) -> None:
    draws, bound, generator = 8_000, plain(4), torch.Generator().manual_seed(0)
    draw = Draw(torch.tensor(scores, dtype=torch.float64), 2, bound, generator)
    counts = torch.stack([rule.select(draw)[0] for _ in range(draws)]).double().mean(0)
    expected = torch.tensor(inclusion(weights, 2), dtype=torch.float64)
    error = (expected * (1 - expected) / draws).sqrt()
    assert bool(((counts - expected).abs() < 4.0 * error).all())


def test_zero_weights_come_after_all_positive_ones_and_nan_after_those() -> None:
    scores = [0.0, 1e-300, math.nan, 3.0, 0.0, math.inf]
    for seed in range(30):
        assert select(Sample(), scores, 1, seed).nonzero().flatten().tolist() == [5]
        assert select(Sample(), scores, 3, seed).nonzero().flatten().tolist() == [1, 3, 5]
        assert select(Sample(), scores, 5, seed).nonzero().flatten().tolist() == [0, 1, 3, 4, 5]


def test_units_of_weight_zero_are_drawn_uniformly_among_themselves() -> None:
    seen = {int(select(Sample(), [0.0] * 4, 1, seed).nonzero()) for seed in range(60)}
    assert seen == {0, 1, 2, 3}


def test_a_floor_gives_every_unit_a_chance_but_leaves_nan_last() -> None:
    scores = [0.0, 5.0, math.nan]
    seen = {int(select(Sample(floor=0.9), scores, 1, seed).nonzero()) for seed in range(60)}
    assert seen == {0, 1}


def test_equal_weights_give_the_same_draw_whatever_they_are() -> None:
    for seed in range(50):
        uniform = select(Sample(), [1.0] * 16, 4, seed)
        assert torch.equal(uniform, select(Sample("sigmoid"), [0.0] * 16, 4, seed))
        assert torch.equal(uniform, select(Sample("score"), [0.3] * 16, 4, seed))


def test_equal_weights_are_drawn_uniformly_even_where_they_are_huge() -> None:
    seen = {int(select(Sample("softmax"), [1e20] * 4, 1, seed).nonzero()) for seed in range(60)}
    assert seen == {0, 1, 2, 3}


def test_the_race_uses_as_many_random_numbers_whatever_the_weights_are() -> None:
    states = []
    for weights in ([0.0] * 5, [-math.inf, 0.0, math.nan, 1.0, 700.0]):
        generator = torch.Generator().manual_seed(3)
        race(torch.tensor(weights, dtype=torch.float64), 2, generator)
        states.append(generator.get_state())
    assert torch.equal(states[0], states[1])


def test_the_race_lists_its_winners_in_order_of_importance_when_weights_are_far_apart() -> None:
    order = race(
        torch.tensor([-400.0, 0.0, -800.0, math.inf], dtype=torch.float64), 4, torch.Generator().manual_seed(0)
    )
    assert order.tolist() == [3, 1, 0, 2]


def test_negative_scores_are_no_weights() -> None:
    with pytest.raises(ValueError, match="met a score of -2, which is no weight: use weights='sigmoid'"):
        select(Sample(), [1.0, -2.0], 1)


def test_nonsense_rules_are_refused_at_construction() -> None:
    with pytest.raises(ValueError, match=r"`Sample\(weights='rank'\)`"):
        Sample(weights="rank")
    for floor in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
            Sample(floor=floor)
    with pytest.raises(ValueError, match=r"`Cycle\(order='random'\)`"):
        Cycle(order="random")
    with pytest.raises(ValueError, match=r"`Balanced\(by='params'\)`"):
        Balanced(by="params")
    with pytest.raises(ValueError, match=r"`TopK\(per='layer'\)`"):
        TopK(per="layer")


# Cycle
# -------------------------------------------------------------------------------------------------------------------


def passes(rule: Cycle, n: int, ks: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Selections of consecutive draws."""
    generator, state, mask, chosen = torch.Generator().manual_seed(seed), State(), None, []
    for k in ks:
        mask, state = rule.select(Draw(torch.ones(n, dtype=torch.float64), k, plain(n), generator, state, mask))
        chosen.append(mask.nonzero().flatten().tolist())
    return chosen


@pytest.mark.parametrize("order", ["shuffled", "ascending", "descending", "fixed"])
@given(n=st.integers(1, 12), data=st.data())
@settings(max_examples=60)
def test_every_unit_has_its_turn_once_per_pass(order: str, n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    chosen = passes(Cycle(order), n, [k] * (3 * n), seed=data.draw(st.integers(0, 5)))
    assert all(len(set(units)) == k for units in chosen)
    turns = Counter(itertools.chain.from_iterable(chosen))
    assert set(turns.values()) == {3 * k}  # 3 k passes of n turns each
    for draws in range(3 * n):  # and nobody is ever more than one turn ahead
        so_far = Counter(itertools.chain.from_iterable(chosen[: draws + 1]))
        counts = [so_far[i] for i in range(n)]
        assert max(counts) - min(counts) <= 1


@given(n=st.integers(1, 8), ks=st.lists(st.integers(0, 8), min_size=1, max_size=12))
def test_a_budget_that_changes_keeps_the_turns_fair(n: int, ks: list[int]) -> None:
    ks = [min(k, n) for k in ks]
    chosen = passes(Cycle(), n, ks)
    assert [len(units) for units in chosen] == ks
    turns = Counter(itertools.chain.from_iterable(chosen))
    counts = [turns[i] for i in range(n)]
    assert max(counts) - min(counts) <= 1


def test_orders_are_what_they_say() -> None:
    assert passes(Cycle("ascending"), 3, [1] * 6) == [[0], [1], [2], [0], [1], [2]]
    assert passes(Cycle("descending"), 3, [1] * 6) == [[2], [1], [0], [2], [1], [0]]
    fixed = passes(Cycle("fixed"), 6, [1] * 18)
    assert fixed[:6] == fixed[6:12] == fixed[12:]
    assert len({tuple(map(tuple, passes(Cycle("fixed"), 6, [1] * 6, seed))) for seed in range(9)}) > 4
    shuffled = passes(Cycle("shuffled"), 6, [1] * 18)
    assert not shuffled[:6] == shuffled[6:12] == shuffled[12:]


def test_a_cycle_goes_on_where_its_state_was_saved() -> None:
    whole = passes(Cycle(), 5, [2] * 10)
    generator, state, scores = torch.Generator().manual_seed(0), State(), torch.ones(5, dtype=torch.float64)
    chosen = []
    for _ in range(10):
        mask, state = Cycle().select(Draw(scores, 2, plain(5), generator, state))
        state = {key: value.clone() for key, value in state.items()}
        saved = generator.get_state()
        generator = torch.Generator()
        generator.set_state(saved)
        chosen.append(mask.nonzero().flatten().tolist())
    assert chosen == whole


# TopK
# --------------------------------------------------------------------------------------------------------------------


def test_the_highest_scores_win_ties_go_to_the_lower_index_and_nan_is_last() -> None:
    scores = [1.0, math.nan, 3.0, 3.0, -math.inf, 3.0, math.inf]
    expected = [6, 2, 3, 5, 0, 4, 1]
    for k in range(8):
        assert set(select(TopK(), scores, k).nonzero().flatten().tolist()) == set(expected[:k])


def test_groups_and_layers_get_their_share_by_the_largest_remainder() -> None:
    bound = matrices(2, {"attention": [1] * 4, "ffn": [1] * 3})
    scores = torch.arange(14, dtype=torch.float64)  # the second layer has all the high scores
    mask = select(TopK(per="block"), scores, 5, bound=bound)
    assert mask.nonzero().flatten().tolist() == [4, 5, 6, 12, 13]
    mask = select(TopK(per="group"), scores, 5, bound=bound)  # 8 and 6 of 14: 2.86 and 2.14 of 5
    assert mask.nonzero().flatten().tolist() == [8, 9, 10, 12, 13]


# Balanced
# ----------------------------------------------------------------------------------------------------------------

LLAMA = {"attention": [16] * 4, "ffn": [43] * 3, "norm": [1] * 2}
GROUPED = {"attention": [16, 4, 4, 16], "ffn": [56] * 3, "norm": [1] * 2}
FUSED = {"attention": [48, 16], "ffn": [64, 64], "norm": [1] * 2}


@pytest.mark.parametrize("by", ["count", "size"])
@pytest.mark.parametrize("layers", [2, 4, 32])
@pytest.mark.parametrize("seed", range(5))
def test_one_half_is_two_attention_matrices_one_norm_and_one_or_two_ffn_matrices(
    by: str, layers: int, seed: int
) -> None:
    bound = matrices(layers, LLAMA)
    k = resolve(0.5, bound.n)
    counts = by_cell(bound, select(Balanced(by=by), torch.ones(bound.n), k, seed, bound))
    assert [counts["attention", b] for b in range(layers)] == [2] * layers
    assert [counts["norm", b] for b in range(layers)] == [1] * layers
    assert Counter(counts["ffn", b] for b in range(layers)) == {1: layers // 2, 2: layers // 2}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("layers", [1, 3, 7])
def test_an_odd_number_of_layers_keeps_the_shares_and_truncates_the_total(layers: int, seed: int) -> None:
    bound = matrices(layers, LLAMA)
    k = resolve(0.5, bound.n)
    assert k == (9 * layers - 1) // 2
    counts = by_cell(bound, select(Balanced(), torch.ones(bound.n), k, seed, bound))
    assert [counts["attention", b] for b in range(layers)] == [2] * layers
    assert [counts["norm", b] for b in range(layers)] == [1] * layers
    assert Counter(counts["ffn", b] for b in range(layers))[2] == (layers - 1) // 2


def test_the_half_of_the_layers_that_trains_more_is_random_and_so_are_the_matrices() -> None:
    bound = matrices(4, LLAMA)
    seen, trained = set(), torch.zeros(bound.n)
    for seed in range(2000):
        mask = select(Balanced(), torch.ones(bound.n), 18, seed, bound)
        counts = by_cell(bound, mask)
        seen.add(tuple(counts["ffn", b] for b in range(4)))
        trained += mask
    assert len(seen) == 6  # all choices of 2 of 4 layers
    assert bool((trained / 2000 - 0.5).abs().max() < 4.5 * 0.5 / 2000**0.5)


@given(
    layers=st.integers(1, 6),
    attention=st.integers(0, 5),
    ffn=st.integers(1, 9),
    norm=st.integers(0, 4),
    by=st.sampled_from(["count", "size"]),
    data=st.data(),
)
@settings(max_examples=150)
def test_every_cell_and_every_group_gets_its_share_rounded_down_or_up(
    layers: int, attention: int, ffn: int, norm: int, by: str, data: st.DataObject
) -> None:
    sizes = {"attention": [3, 1, 1, 3, 2][:attention], "ffn": [5] * ffn, "norm": [1] * norm}
    bound = matrices(layers, sizes)
    k = data.draw(st.integers(0, bound.n))
    mask = select(Balanced(by=by), torch.ones(bound.n), k, data.draw(st.integers(0, 9)), bound)
    assert int(mask.sum()) == k
    low, high = k / bound.n, (k + 1) / bound.n  # the fraction meant lies between: it truncates to k
    counts = by_cell(bound, mask)
    for (group, _), count in counts.items():
        assert math.floor(low * len(sizes[group]) + 1e-9) <= count <= math.ceil(high * len(sizes[group]) - 1e-9)
    for group in sizes:
        total = sum(count for (g, _), count in counts.items() if g == group)
        assert math.floor(low * layers * len(sizes[group]) + 1e-9) <= total
        assert total <= math.ceil(high * layers * len(sizes[group]) - 1e-9)


def test_fused_projections_and_two_matrix_ffns_are_halved_too() -> None:
    bound = matrices(4, FUSED)
    counts = by_cell(bound, select(Balanced(), torch.ones(bound.n), resolve(0.5, bound.n), 0, bound))
    assert set(counts.values()) == {1}


def entries(bound: Bound, mask: Tensor, group: str) -> tuple[int, int]:
    """Selected and all entries of a group."""
    sizes = bound.sizes.tolist()
    inside = [(size, bool(m)) for unit, size, m in zip(bound.units, sizes, mask, strict=True) if unit.group == group]
    return sum(size for size, m in inside if m), sum(size for size, _ in inside)


def test_by_size_grouped_attention_trains_half_of_its_entries_in_every_layer() -> None:
    bound = matrices(8, GROUPED)
    shares = set()
    for seed in range(20):
        mask = select(Balanced(by="size"), torch.ones(bound.n), 36, seed, bound)
        for block in range(8):
            picked = [
                u
                for u, m in zip(bound.units, mask.tolist(), strict=True)
                if m and (u.group, u.block) == ("attention", block)
            ]
            shares.add(sum(u.params["weight"].numel() for u in picked) / 40)
    assert shares == {0.5}
    by_count = [entries(bound, select(Balanced(), torch.ones(bound.n), 36, s, bound), "attention") for s in range(20)]
    assert len({selected for selected, _ in by_count}) > 1  # drawn by count, shares of .2, .5 and .8 mix


def test_by_size_every_matrix_is_still_drawn_as_often() -> None:
    bound = matrices(2, GROUPED)
    trained = sum(select(Balanced(by="size"), torch.ones(bound.n), 9, seed, bound).double() for seed in range(2000))
    assert isinstance(trained, Tensor)
    assert bool((trained / 2000 - 0.5).abs().max() < 4.5 * 0.5 / 2000**0.5)


def test_by_size_errors_that_no_layer_can_avoid_cancel_between_layers() -> None:
    bound = matrices(8, FUSED)  # one of 48 and 16 entries: 75% or 25% of a layer, half of the model
    for seed in range(10):
        mask = select(Balanced(by="size"), torch.ones(bound.n), 24, seed, bound)
        assert entries(bound, mask, "attention") == (8 * 32, 8 * 64)


def test_layers_with_many_experts_are_searched_at_random_but_spent_exactly() -> None:
    bound = matrices(2, {"ffn": [3] * 60})
    mask = select(Balanced(by="size"), torch.ones(120), 60, 0, bound)
    assert by_cell(bound, mask) == {("ffn", 0): 30, ("ffn", 1): 30}
