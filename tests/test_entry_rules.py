"""Rules of entries: the best by tensor, layer and model, thresholds that shrink, and counts per row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Size, Tensor, nn

import apportion.entry_rules
from apportion.candidates import Ask
from apportion.entry_rules import PerRow, Threshold, best_of_rows, connections
from apportion.rules import TopK
from apportion.topk import best
from apportion.types import Bound, Draw, Unit

SCORES = st.one_of(st.sampled_from([0.0, 1.0, 2.0, math.nan, math.inf, -math.inf]), st.floats(width=32))


def ask(tensors: Sequence[Tensor], k: int = 0, **more: Any) -> Ask:
    return Ask(tuple(x.numel() for x in tensors), tuple(x.shape for x in tensors), k, **more)


def choose(rule: Any, tensors: Sequence[Tensor], k: int = 0, **more: Any) -> dict[int, list[int]]:
    """What a rule chooses where gradients arrive last tensor first; the payload names each unit."""
    chooser = rule.open(ask(tensors, k, **more))
    for i in reversed(range(len(tensors))):
        chooser.push(i, tensors[i].flatten(), torch.arange(tensors[i].numel()))
    chosen, payloads = chooser.chosen()
    assert all(index.dtype == torch.int64 and len(index) for index in chosen.values())
    assert {i: rows.tolist() for i, rows in payloads.items()} == {i: index.tolist() for i, index in chosen.items()}
    return {i: index.tolist() for i, index in chosen.items()}


MODEL = [torch.tensor([[9.0, 8.0], [7.0, 6.0]]), torch.tensor([5.0, 4.0]), torch.tensor([[3.0, 2.0, 1.0, 0.0]])]


# TopK
# ------------------------------------------------------------------------------------------------------------------


def test_entries_are_compared_over_the_model_within_layers_or_within_tensors() -> None:
    assert choose(TopK(), MODEL, 5) == {0: [0, 1, 2, 3], 1: [0]}
    assert choose(TopK("tensor"), MODEL, 5) == {0: [0, 1], 1: [0], 2: [0, 1]}  # 5 of 10 units: half of each
    assert choose(TopK("block"), MODEL, 5, blocks=(3, 7, 3)) == {0: [0, 1, 2, 3], 1: [0]}  # 4 of 8, and 1 of 2
    assert choose(TopK("block"), MODEL, 5, blocks=(7, 3, 3)) == {0: [0, 1], 1: [0, 1], 2: [0]}  # 2 of 4, and 3 of 6


def test_quotas_fix_the_count_of_each_tensor() -> None:
    assert choose(TopK("tensor"), MODEL, 4, quotas=(0, 1, 3)) == {1: [0], 2: [0, 1, 2]}


def test_without_growth_what_is_selected_now_plays_no_part() -> None:
    taken = {0: torch.tensor([0, 3])}
    assert choose(TopK(), MODEL, 2, taken=taken) == {0: [0, 1]}
    assert choose(TopK("tensor"), MODEL, 5, taken=taken) == {0: [0, 1], 1: [0], 2: [0, 1]}


def test_growth_adds_the_best_of_those_that_are_not_selected() -> None:
    taken = {0: torch.tensor([0, 1]), 1: torch.tensor([0, 1])}
    assert choose(TopK(grow=True), MODEL, 3, taken=taken) == {0: [2, 3], 2: [0]}
    # 2, 0 and 4 units are left: 3 more are split over those, and no tensor is asked for what it does not have.
    assert choose(TopK("tensor", grow=True), MODEL, 3, taken=taken) == {0: [2], 2: [0, 1]}
    assert choose(TopK("block", grow=True), MODEL, 3, taken=taken, blocks=(0, 0, 1)) == {0: [2], 2: [0, 1]}
    assert choose(TopK("tensor", grow=True), MODEL, 3, taken=taken, quotas=(1, 0, 2)) == {0: [2], 2: [0, 1]}


@given(data=st.data(), sizes=st.lists(st.integers(0, 7), min_size=1, max_size=5))
@settings(max_examples=150)
def test_every_comparison_selects_exactly_k_and_never_what_is_taken(data: st.DataObject, sizes: list[int]) -> None:
    tensors = [torch.tensor(data.draw(st.lists(SCORES, min_size=n, max_size=n)), dtype=torch.float32) for n in sizes]
    taken = {
        i: torch.tensor(sorted(data.draw(st.sets(st.integers(0, n - 1)))), dtype=torch.int64)
        for i, n in enumerate(sizes)
        if n
    }
    free = sum(sizes) - sum(map(len, taken.values()))
    k = data.draw(st.integers(0, free))
    blocks = tuple(data.draw(st.lists(st.integers(0, 2), min_size=len(sizes), max_size=len(sizes))))
    for per in ("model", "block", "tensor"):
        chosen = choose(TopK(per, grow=True), tensors, k, taken=taken, blocks=blocks)
        assert sum(map(len, chosen.values())) == k
        assert not any(set(units) & set(taken.get(i, torch.empty(0)).tolist()) for i, units in chosen.items())


def test_what_cannot_be_chosen_is_refused_with_the_numbers() -> None:
    taken = {0: torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=r"`TopK\(per='model', grow=False\)` is asked for 11 units, but only 10 can"):
        TopK().open(ask(MODEL, 11))
    with pytest.raises(ValueError, match="asked for 9 units, but only 8 can be chosen"):
        TopK(grow=True).open(ask(MODEL, 9, taken=taken))
    with pytest.raises(ValueError, match=r"asked for 3 units of tensor 1, of shape \(2,\), but only 2 can"):
        TopK("tensor").open(ask(MODEL, 4, quotas=(1, 3, 0)))
    with pytest.raises(ValueError, match="use per='tensor'"):
        TopK().open(ask(MODEL, 4, quotas=(1, 2, 1)))
    with pytest.raises(ValueError, match=r"`TopK\(per='group'.*groups of layers.*use 'block' or 'tensor'"):
        TopK("group").open(ask(MODEL, 4))
    with pytest.raises(ValueError, match="layer of each tensor, but 0 of 3 are known"):
        TopK("block").open(ask(MODEL, 4))


def layers(n: int, per_block: int = 1) -> Bound:
    return Bound(tuple(Unit(f"u{i}", {}, nn.Identity(), i // per_block) for i in range(n)))


def draw(rule: TopK, scores: list[float], k: int, mask: list[int] | None = None, per_block: int = 1) -> list[int]:
    n = len(scores)
    present = None if mask is None else torch.zeros(n, dtype=torch.bool).index_fill_(0, torch.tensor(mask), True)
    drawn = Draw(torch.tensor(scores).double(), k, layers(n, per_block), torch.Generator(), mask=present)
    return [int(i) for i in rule.select(drawn)[0].nonzero()]


def test_layers_grow_as_well_and_keep_what_is_selected() -> None:
    scores = [5.0, 1.0, 4.0, 2.0, 3.0, 0.0]
    assert draw(TopK(grow=True), scores, 2) == [0, 2]
    assert draw(TopK(grow=True), scores, 4, mask=[1, 5]) == [0, 1, 2, 5]
    assert draw(TopK(), scores, 4, mask=[1, 5]) == [0, 2, 3, 4]
    assert draw(TopK(grow=True), scores, 1, mask=[1, 3, 5]) == [3]  # a smaller budget: the best of the selected
    # One of each layer's two units that are left, though both of the last layer score higher.
    assert draw(TopK("block", grow=True), [9.0, 0.0, 1.0, 9.0, 7.0, 8.0], 4, mask=[0, 3], per_block=3) == [0, 2, 3, 5]


@given(data=st.data(), scores=st.lists(SCORES, min_size=1, max_size=9))
def test_growing_layers_number_exactly_k_and_are_nested(data: st.DataObject, scores: list[float]) -> None:
    mask = data.draw(st.sets(st.integers(0, len(scores) - 1), min_size=1))
    k = data.draw(st.integers(0, len(scores)))
    for per in ("model", "block", "group"):
        chosen = set(draw(TopK(per, grow=True), scores, k, sorted(mask), per_block=2))
        assert len(chosen) == k
        assert mask <= chosen if k >= len(mask) else chosen <= mask


def test_whole_units_are_not_compared_within_a_tensor() -> None:
    with pytest.raises(ValueError, match=r"`TopK\(per='tensor', grow=False\)`.*units are whole here: use 'block'"):
        draw(TopK("tensor"), [1.0, 2.0], 1)


# Threshold
# ------------------------------------------------------------------------------------------------------------------


def test_the_smallest_weights_are_below_a_threshold_as_worked_by_hand() -> None:
    weight = torch.tensor([[1e-3, -5e-4], [1e-2, -3e-3]])
    assert choose(Threshold(-2e-3), [-weight.abs()]) == {0: [0, 1]}
    assert not Threshold(-2e-3).budgeted


def test_a_score_at_the_threshold_nan_and_infinities_are_not_above_it() -> None:
    scores = torch.tensor([1.0, 1.5, math.nan, math.inf, -math.inf, 1.0000001])
    assert choose(Threshold(1.0), [scores, torch.zeros(3)], k=99) == {0: [1, 5]}
    assert choose(Threshold(-1e30), [scores]) == {0: [0, 1, 5]}
    assert choose(Threshold(-2e-3), [-torch.tensor([2e-3])]) == {}  # equal in fp32


def test_chunks_do_not_change_what_is_above(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(100, generator=torch.Generator().manual_seed(0))
    expected = (scores > 0.5).nonzero().flatten().tolist()
    monkeypatch.setattr(apportion.entry_rules, "CHUNK", 7)
    assert choose(Threshold(0.5), [scores]) == {0: expected}


def test_a_second_choice_within_the_first_can_only_shrink_it() -> None:
    tensors = [torch.tensor([3.0, 1.0, 3.0, 0.0]), torch.tensor([3.0, 3.0])]
    taken = {0: torch.tensor([0, 1])}
    assert choose(Threshold(2.0, within=True), tensors, taken=taken) == {0: [0]}
    assert choose(Threshold(2.0), tensors, taken=taken) == {0: [0, 2], 1: [0, 1]}
    for nothing in ({}, {0: torch.tensor([], dtype=torch.int64)}):
        assert choose(Threshold(2.0, within=True), tensors, taken=nothing) == {0: [0, 2], 1: [0, 1]}


@pytest.mark.parametrize("above", [math.nan, math.inf, -math.inf])
def test_a_threshold_has_to_be_finite(above: float) -> None:
    with pytest.raises(ValueError, match=r"`Threshold\(above=.*\)` must be finite"):
        Threshold(above)


# PerRow
# ------------------------------------------------------------------------------------------------------------------


def test_connections_have_the_values_worked_by_hand() -> None:
    assert connections([0.5, 0.3, 0.2], 1) == [2, 1, 1]  # 2.5, 1.5, 1
    assert connections([0.5, 0.3, 0.2], 2) == [5, 3, 2]
    assert connections([0.6, 0.2], 1) == [3, 1]  # whole though 0.6 / 0.2 is not quite 3
    assert connections([0.0, 0.4, 0.1, 0.0], 3) == [1, 12, 3, 1]
    assert connections([0.0, 0.0], 3) == [1, 1]


@given(shares=st.lists(st.integers(0, 1000), min_size=1, max_size=6), least=st.integers(1, 5))
def test_more_connections_never_take_one_away_and_scale_plays_no_part(shares: list[int], least: int) -> None:
    counts = connections(shares, least)
    assert all(a <= b for a, b in zip(counts, connections(shares, least + 1), strict=True))
    assert counts == connections([share / 1024 for share in shares], least)
    assert min(counts) >= 1


@given(data=st.data(), rows=st.integers(1, 5), width=st.integers(1, 6))
@settings(max_examples=150)
def test_the_best_of_every_row_are_those_of_a_sort(data: st.DataObject, rows: int, width: int) -> None:
    scores = torch.tensor(data.draw(st.lists(SCORES, min_size=rows * width, max_size=rows * width)))
    scores = scores.float().reshape(rows, width)
    count = data.draw(st.integers(1, 7))
    kept = apportion.entry_rules.CHUNK
    apportion.entry_rules.CHUNK = data.draw(st.integers(1, 12))
    try:
        found = best_of_rows(scores, count).tolist()
    finally:
        apportion.entry_rules.CHUNK = kept
    assert found == [r * width + int(j) for r in range(rows) for j in best(scores[r], count)]


def test_tensors_with_more_of_the_best_entries_train_more_of_every_row() -> None:
    # The best 8 of 40 entries: 5 in the first tensor, 2 in the second, 1 in the third; 5, 2 and 1 per row.
    first = torch.zeros(2, 8)
    first[0, 1:6] = 10.0
    second = torch.zeros(4, 3)
    second[3, 1:] = 9.0
    third = torch.arange(12.0).reshape(2, 2, 3) / 12 + 0.5
    third[0, 0, 0] = 8.0
    chosen = choose(PerRow(share=0.2), [first, second, third])
    assert chosen[0] == [1, 2, 3, 4, 5, 8, 9, 10, 11, 12]
    assert chosen[1] == [0, 1, 3, 4, 6, 7, 10, 11]
    assert chosen[2] == [0, 11]  # rows of a tensor of three dimensions run over the last two


def test_every_row_trains_its_count_capped_at_its_length_even_if_nothing_tells_entries_apart() -> None:
    for value in (0.0, 1.0, math.nan):
        tensors = [torch.full((3, 4), value), torch.full((5,), value), torch.full((2, 2), value), torch.tensor(value)]
        chosen = choose(PerRow(share=1.0, least=2), tensors)
        # 12, 5, 4 and 1 of the 22 best: 24, 10, 8 and 2 per row, more than any row has
        assert {i: len(units) for i, units in chosen.items()} == {0: 12, 1: 5, 2: 4, 3: 1}
        one = choose(PerRow(share=1e-9), tensors)  # one entry of all is best: one per row everywhere
        assert one == {0: [0, 4, 8], 1: [0, 1, 2, 3, 4], 2: [0, 2], 3: [0]}


def test_the_scale_of_the_scores_plays_no_part_in_counts_per_row() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.rand(6, 8, generator=generator) * scale for scale in (1.0, 3.0, 0.5)]
    assert choose(PerRow(0.1), tensors) == choose(PerRow(0.1), [x * 4.0 for x in tensors])


def test_nonsense_counts_per_row_are_refused() -> None:
    for share in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"`PerRow\(share=.*\)` must lie in \(0, 1\]"):
            PerRow(share)
    with pytest.raises(ValueError, match=r"`PerRow\(least=0\)` must be at least 1"):
        PerRow(least=0)
    with pytest.raises(ValueError, match=r"shape \(2, 3\) has 2 units: use entries"):
        PerRow().open(Ask((2,), (Size([2, 3]),), 1))


def test_rules_of_entries_print_compare_and_say_their_grain() -> None:
    assert repr(Threshold(0.5, within=True)) == "Threshold(above=0.5, within=True)"
    assert PerRow() == PerRow(0.05, 1)
    assert {Threshold.grain, PerRow.grain} == {"entry"}
    assert not PerRow.budgeted
