"""The estimate of a budget of ranks over the run: what the tracker measures at its start and at its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_estimate import BATCH
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from apportion.callbacks import SPIDER, SPT, TRPTS, TTC, AdaLoRA, IncreLoRA, SPIDERHard, TriAdaptLoRA
from apportion.estimate import estimate
from apportion.estimate_ranks import schedule
from apportion.ledger import Parts
from apportion.memory import Tracker
from apportion.optim import Selective
from apportion.rank_units import Ranks
from apportion.recipes.estimate import main
from apportion.recipes.request import MOMENTS

RANK, MATRICES = 16, 14  # 7 linear maps in each of 2 layers
TOTAL = 6


def llama() -> nn.Module:
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "vocab_size": 300}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=128, use_cache=False))


def svd() -> nn.Module:
    from peft import AdaLoraConfig, get_peft_model

    config = AdaLoraConfig(init_r=RANK, target_r=1, total_step=1, target_modules="all-linear")
    return get_peft_model(llama(), config)


def tracked(build: Any, method: Any, first: int, last: int, total: int = TOTAL) -> Parts:
    """The peak of the steps from ``first`` to ``last`` of a real run."""
    torch.manual_seed(0)
    model: Any = build().train()
    with Tracker(model) as tracker:
        base = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
        optimizer: Any = Selective(base, model, method, probe=lambda: model(**BATCH).loss, total_steps=total)
        for step in range(total):
            if step == first:
                tracker.mark("before")
            loss = model(**BATCH).loss
            loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad()
            if step == last:
                return tracker.mark("after")
    raise AssertionError("the run ended before that step")


METHODS: dict[str, Any] = {
    "adalora": AdaLoRA(warmup=2, final=3, every=1),
    "increlora": IncreLoRA(target_rank=3, start=1, matrices=14, add=1, warmup=0, every=1, ramp=0),
    "triadapt": TriAdaptLoRA(target_rank=3, warmup=0, every=1),
}


@pytest.mark.filterwarnings("ignore:.*the run ended.*")
@pytest.mark.parametrize("name", METHODS)
def test_the_estimate_is_what_the_tracker_measures_at_the_start_and_at_the_end(name: str) -> None:
    for done, steps in ((0, (0, 1)), (TOTAL, (4, 5))):
        told = estimate(svd, BATCH, method=METHODS[name], done=done, total=TOTAL)
        measured = tracked(svd, METHODS[name], *steps)
        assert told.peak == pytest.approx(measured.total, rel=0.02)
        for part in ("weights", "gradients", "optimizer"):
            assert getattr(told, part) == pytest.approx(getattr(measured, part), abs=0.01 * measured.total)


def entries(ranks: int) -> int:
    """Of adapters with as many ranks in every matrix: q and o 128 x 128, k and v 64 x 128, three of 128 and 352."""
    return 2 * ranks * (2 * 257 + 2 * 193 + 3 * 481)


def test_state_and_weights_fall_with_the_ranks() -> None:
    base = sum(p.numel() for p in llama().parameters())
    start, end = (estimate(svd, BATCH, method=AdaLoRA(target_rank=4), done=done) for done in (0, 10_000))
    assert (start.trainable, end.trainable) == (entries(RANK), entries(4))
    base += MATRICES  # PEFT keeps the number of ranks as a parameter
    assert (start.parameters, end.parameters) == (base + entries(RANK), base + entries(4))
    # two moments and two averages of the score at the start, two moments in the end; 4 bytes for a step count
    assert start.optimizer == 16 * entries(RANK) + 4 * 3 * MATRICES
    assert end.optimizer == 8 * entries(4) + 4 * 3 * MATRICES
    assert start.weights - end.weights == 4 * (entries(RANK) - entries(4))
    assert (start.moment, start.selected) == (schedule(svd, AdaLoRA(target_rank=4), 10_000, [0.0])[0], ())


def test_ranks_stay_in_memory_until_the_choice_is_final() -> None:
    at = [0.0, 0.12, 0.32, 0.52, 1.0]
    told = schedule(svd, AdaLoRA(target_rank=4), 1000, at)
    n, last = RANK * MATRICES, 4 * MATRICES
    half = int(last + (n - last) * 0.5**3)
    assert [m.ranks for m in told] == [n, n, half, last, last]
    assert [m.held for m in told] == [n, n, n, last, last]
    assert [m.held for m in schedule(svd, AdaLoRA(target_rank=4, shrink=False), 1000, at)] == [n] * 5
    grown = schedule(svd, TriAdaptLoRA(target_rank=4), 1000, at)
    assert [m.ranks for m in grown] == [m.held for m in grown] == sorted(m.held for m in grown)
    assert (grown[0].held, grown[-1].held) == (MATRICES, last)


def test_scores_are_told_apart_from_activations_in_a_real_run_too() -> None:
    model: Any = svd()
    base = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    optimizer: Any = Selective(base, model, AdaLoRA(warmup=2, final=3), total_steps=TOTAL)
    kept = Ranks().bind(model)
    assert sum(t.numel() for t in optimizer.owner.beside()) == 2 * sum(p.numel() for _, p in kept.covered())
    optimizer.close()
    assert not list(optimizer.owner.beside())


# The command
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> str:
    options: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    LlamaConfig(hidden_size=64, intermediate_size=96, **options).save_pretrained(tmp_path)
    return str(tmp_path)


def test_the_command_tells_a_budget_of_ranks_over_the_run(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", config, "--precision", "32-true", "--length", "32", "--lora-rank", "8"]
    options += ["--method", "adalora", "--total-steps", "400", "--set", "target_rank=2", "--set", "warmup=40"]
    assert main([*options, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in rows] == [int(400 * share) for share in MOMENTS]
    assert [row["ranks"] for row in rows] == [112, int(28 + 84 * (1 - 60 / 168) ** 3), 28, 28, 28]
    assert [row["held"] for row in rows] == [112, 112, 112, 28, 28]
    peaks = [row["peak"] for row in rows]
    assert peaks[0] == peaks[1] == peaks[2] > peaks[3] == peaks[4]
    assert {row["method"] for row in rows} == {"adalora"}
    assert [row["moment"] for row in rows] == ["at 0%", "at 25%", "at 50%", "at 75%", "at 100%"]
    assert main(options) == 0
    shown = capsys.readouterr().out
    assert "adalora over 400 steps" in shown
    assert "a matrix, mean" in shown
    assert "AdaLoRA of rank 8 on all linear maps but the head" in shown
    assert max(map(len, shown.split("Taken for")[0].splitlines())) <= 80


def test_a_schedule_that_does_not_fit_is_refused(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", config, "--length", "32", "--method", "adalora", "--total-steps", "5"]
    for more, message in ((["--set", "warmup=5"], "leaves no step in between"), (["--set", "target=999"], "asks for")):
        with pytest.raises(SystemExit):
            main([*options, *more])
        assert message in capsys.readouterr().err


def test_moments_outside_the_run_are_refused() -> None:
    for done in (-1, 9):
        with pytest.raises(ValueError, match=rf"`estimate\(done={done}, total=8\)`: `done` must lie in \[0, 8\]"):
            estimate(svd, BATCH, method=AdaLoRA(), done=done, total=8)


@pytest.mark.parametrize("method", [SPIDERHard(batches=2), TTC(align_steps=1, batches=2)], ids=["spider_hard", "ttc"])
def test_entries_spread_evenly_cost_about_what_the_chosen_ones_cost(method: Any) -> None:
    told, measured = estimate(llama, BATCH, method=method), tracked(llama, method, 4, 5)
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(told, part) == pytest.approx(getattr(measured, part), rel=0.001)
    assert told.peak == pytest.approx(measured.total, rel=0.08)  # where the chosen rows crowd, their gradients do


@pytest.mark.parametrize(
    ("method", "reason"),
    [(SPIDER(), "how far the weights have moved"), (TRPTS(), "every row as many"), (SPT(), "makes a plan")],
    ids=["spider", "trpts", "spt"],
)
def test_what_depends_on_values_is_refused_with_the_reason(
    method: Any, reason: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=rf"`{type(method).__name__}` .*{reason}.*`apportion.memory.Tracker`"):
        estimate(llama, BATCH, method=method)
    with pytest.raises(SystemExit):
        main(["--model", config, "--length", "32", "--method", type(method).__name__.lower()])
    assert reason in " ".join(capsys.readouterr().err.split())
