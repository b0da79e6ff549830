"""The measurement of rank budgets measures what it says, on a small scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from apportion.recipes.bench import ranks as bench_ranks


def test_after_the_final_choice_memory_is_that_of_lora_with_those_ranks() -> None:
    weighed = bench_ranks.memory(steps=10)
    assert abs(weighed["excess"]) <= bench_ranks.MEMORY_BAR
    assert weighed["peft"] > 2.5 * weighed["lora"]  # 12 ranks a matrix for 4


def test_both_ways_do_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = bench_ranks.adapted
    monkeypatch.setattr(bench_ranks, "adapted", lambda rank, every: adapted(rank, every, width=8, blocks=2))
    monkeypatch.setattr(bench_ranks, "TOTAL", 20)
    theirs, ours = bench_ranks.Peft(6, 2, "cpu"), bench_ranks.Ours(6, 2, "cpu")
    for way in (theirs, ours):  # values apart from zero, so that what is out can be told
        with torch.no_grad():
            torch.manual_seed(5)
            for name, p in way.model.named_parameters():
                if ".lora_E." in name:
                    p.copy_(torch.randn_like(p))
    grads: list[Any] = []
    for _ in range(8):
        theirs.step()
        ours.step()
        values = [[p for n, p in way.model.named_parameters() if ".lora_E." in n] for way in (theirs, ours)]
        assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))
    grads = [[p.grad for p in way.model.parameters() if p.requires_grad] for way in (theirs, ours)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert sum(int((v == 0).sum()) for v in values[0]) > 0


def test_the_report_holds_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = bench_ranks.adapted
    monkeypatch.setattr(bench_ranks, "adapted", lambda rank, every, *a: adapted(rank, every, *(a or (8, 2))))
    code = bench_ranks.main(["--pairs", "2", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "ranks.json").read_text())
    assert code == (0 if report["passed"] else 1)
    assert [(t["rank"], t["every"]) for t in report["time"]] == [(12, 1), (12, 10), (32, 1), (32, 10)]
    assert all(t["ratio"] > 0 and t["peft_ms"] > 0 for t in report["time"])
