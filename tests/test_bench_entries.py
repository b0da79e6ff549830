"""The benchmark of single entries, at a size that takes seconds: its figures, its verdicts, and how it misses a bar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from apportion.budgets import Increment
from apportion.compact import Gathered
from apportion.recipes.bench import entries as bench_entries
from apportion.recipes.bench import entry_bars, entry_rivals, entry_times
from apportion.recipes.bench.entries import BARS, Plan, main, measure, section
from apportion.recipes.bench.entry_bars import Size, memory
from apportion.recipes.bench.entry_rivals import refresh, selection_step
from apportion.recipes.bench.entry_times import step_time, take_turns

TINY = Size("tiny", hidden=64, inner=96, layers=2, tokens=16, vocabulary=80)
PLAN = Plan(
    memory=(TINY,),
    timed=TINY,
    shares=(0.05,),
    turns=3,
    layers=(((256, 96), 0.05, False), ((256, 96), 0.05, True)),
    layer_tokens=8,
    layer_turns=1,
    threads=(1,),
    refreshes=1,
    matrices=(((24, 16), 4),),
)


class Chooser(torch.optim.AdamW):
    """A rival that chooses as ID3 does, by sorting all scores."""

    def __init__(self, params: Any, budget: int, max_steps: int, eps: float, exp: float, verify: bool, **rest: Any):
        super().__init__(params, **rest)
        self.growth, self.eps, self.exp, self.taken = Increment(budget, "front", max_steps), eps, exp, 0
        for group in self.param_groups:
            group["chosen_masks"] = [torch.zeros_like(p, dtype=torch.bool) for p in group["params"]]

    def update_chosen(self) -> None:
        (group,) = self.param_groups
        grads = [p.grad.abs() / (p.detach().abs() + self.eps) ** self.exp for p in group["params"]]
        scores = torch.cat(
            [g.masked_fill(m, -1.0).flatten() for g, m in zip(grads, group["chosen_masks"], strict=True)]
        )
        count = self.growth.at(self.taken, None) - (self.growth.at(self.taken - 1, None) if self.taken else 0)
        chosen = torch.zeros(len(scores), dtype=torch.bool)
        chosen[scores.topk(count).indices] = True
        for part, mask in zip(
            chosen.split([m.numel() for m in group["chosen_masks"]]), group["chosen_masks"], strict=True
        ):
            mask |= part.view_as(mask)
        self.taken += 1

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.update_chosen()
        for p, mask in zip(self.param_groups[0]["params"], self.param_groups[0]["chosen_masks"], strict=True):
            p.grad.mul_(mask)
        super().step()


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return measure(PLAN, lambda doing: None, lambda: lambda base, method: Chooser)


def test_all_figures_are_there_and_the_memory_bar_is_kept(figures: dict[str, Any]) -> None:
    (m,) = figures["memory"]
    entries = 2 * (4 * 64 * 64 + 3 * 64 * 96) + 64 * 80
    assert m["selected"] == int(0.05 * entries)
    # Two moments and the counts of steps of 15 tensors.
    assert m["state"] == 8 * m["selected"] + 4 * 15
    assert m["masters"] == m["indices"] == 4 * m["selected"]
    assert m["allowed"] == 20 * m["selected"] + 4 * 64 * 96
    assert 1.0 <= m["entries_ratio"] <= BARS["memory"]
    assert m["ratio"] <= 1.0
    assert figures["passed"]["memory"]
    assert [t["optimizer"] for t in figures["step"]] == ["AdamW", "AdamW, fused"]
    assert all(t["same_weights"] for t in figures["step"])
    assert [c["auto"] for c in figures["capture"]] == ["hook", "tiled"]
    for c in figures["capture"]:
        assert c["hook"]["to_hook"] == 1.0
        assert c["hook"]["temporaries"] >= 4 * 256 * 96
        assert c["sampled"]["temporaries"] < 4 * 256 * 96
        assert (c["tiled"]["temporaries"] < 4 * 256 * 96) is c["rows"]
    assert figures["rival"]["same_masks"]
    assert all(0.0 <= f[key] <= 1.0 for f in figures["refresh"] for key in ("cold_overlap", "warm_overlap"))
    assert {f["values"] for f in figures["refresh"]} == {"noise", "j^-0.35"}


def test_indices_that_two_hold_count_once() -> None:
    index = torch.arange(10, dtype=torch.int32)
    assert entry_bars._bytes([index, index.view(2, 5), index[:3], None]) == 40
    assert entry_bars._bytes([index, index.clone()]) == 80


def test_a_second_copy_of_the_indices_misses_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    move = Gathered.move
    monkeypatch.setattr(Gathered, "move", lambda self, p, index, *rest: move(self, p, index.clone(), *rest))
    assert memory(TINY, 0.05)["entries_ratio"] > BARS["memory"]


def test_turns_rotate_and_the_first_is_not_counted() -> None:
    order: list[str] = []
    runs = [lambda tokens, name=name: order.append(name) for name in "abc"]
    seconds = take_turns(runs, TINY.batches(), 3)
    assert len(seconds) == 3
    assert all(len(turn) == 3 for turn in seconds)
    assert order == list("abcbcacababc")


def test_rivals_that_train_otherwise_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert step_time(TINY, 0.05, 1, fused=False)["same_weights"]
    monkeypatch.setattr(
        entry_times, "_masks", lambda c: [torch.ones_like(p).bool() for p in entry_bars.candidates(c).tensors]
    )
    assert not step_time(TINY, 0.05, 1, fused=False)["same_weights"]


def test_rivals_that_choose_otherwise_are_told() -> None:
    class Backwards(Chooser):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "exp": -1.0})

    assert selection_step(TINY, 0.05, 1, lambda base, method: Chooser)["same_masks"]
    assert not selection_step(TINY, 0.05, 1, lambda base, method: Backwards)["same_masks"]


def test_a_refresh_of_few_iterations_overlaps_less(monkeypatch: pytest.MonkeyPatch) -> None:
    good = refresh((64, 48), 8, 0.05, 2, decaying=False)
    real = entry_rivals.Principal
    monkeypatch.setattr(entry_rivals, "Principal", lambda rank, exact=False: real(rank, exact=exact, iterations=1))
    poor = refresh((64, 48), 8, 0.05, 2, decaying=False)
    assert good["cold_overlap"] > poor["cold_overlap"]


def test_without_the_rival_the_rest_runs() -> None:
    def missing() -> Any:
        raise RuntimeError("no index")

    found = measure(PLAN, lambda doing: None, missing)
    assert found["rival"] == {"run": False, "reason": "no index"}
    assert found["passed"]["rival"] is None
    said = {"command": "c", "seconds": 1, "device": "CPU", "torch": "2", "transformers": "5"}
    assert "Not run: no index" in section({**said, **found})


@pytest.mark.parametrize("missed", [None, "to_masked", "rival"])
def test_a_missed_bar_is_printed_and_fails(
    figures: dict[str, Any], missed: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    passed = {bar: bar != missed for bar in figures["passed"]}
    monkeypatch.setattr(bench_entries, "measure", lambda *_: {**figures, "passed": passed})
    assert main(["--out", str(tmp_path)], PLAN) == (1 if missed else 0)
    assert ("MISSED" in capsys.readouterr().out) is (missed is not None)
    written = json.loads((tmp_path / "entries.json").read_text())
    assert written["bars"] == BARS
    assert {"torch", "transformers", "python", "command", "device", "seconds"} <= set(written)
