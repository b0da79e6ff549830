"""The benchmark on a GPU, run on a CPU at toy size: the same code, cell by cell, and what it says without a device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from apportion.recipes.bench import gpu as bench_gpu
from apportion.recipes.bench import gpu_cells as bench_gpu_cells
from apportion.recipes.bench import gpu_run as bench_gpu_run
from apportion.recipes.bench import gpu_step as bench_gpu_step
from apportion.recipes.bench import gpu_table as bench_gpu_table
from apportion.recipes.bench.field import hushed
from apportion.recipes.bench.gpu_cells import METHODS, Cell


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_nothing_is_run_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a cell was run")

    assert bench_gpu.main(["--out", str(tmp_path)], never) == 0
    assert "Not run: no CUDA device." in capsys.readouterr().out
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert not found["run"]
    assert bench_gpu_table.figures(found) == [("", "not run", "no CUDA device")]
    with pytest.raises(SystemExit):
        bench_gpu.main(["--device", "cpu", "--out", str(tmp_path)], never)


def test_the_cells_are_those_that_were_asked_for() -> None:
    found = bench_gpu.cells("full")
    large = [cell for cell in found if cell.shape == "llama-2-7b"]
    assert {(cell.batch, cell.checkpointing) for cell in large} == {(1, True), (1, False), (8, True), (8, False)}
    assert {cell.method for cell in large} == set(METHODS)
    assert {cell.share for cell in large if cell.method == "lift"} == {0.001, 0.01, 0.05}
    assert {cell.method for cell in found if cell.shape == "llama-2-13b"} == {"id3", "lift"}
    assert all(cell.only_estimate for cell in found if cell.shape == "llama-2-70b")
    assert len({cell.name for cell in found}) == len(found)
    config = bench_gpu_cells.shape_of(Cell("llama-2-13b", "full")).config
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (5120, 40, 13824)


@pytest.mark.parametrize(("method", "share"), [("full", 0.0), ("lisa-layers", 0.0), ("id3", 0.05)])
def test_a_cell_is_measured_and_its_estimate_is_near(method: str, share: float) -> None:
    cell = Cell("tiny", method, share, length=32, checkpointing=method == "lisa-layers")
    with hushed():
        row = bench_gpu_run.row(cell, "cpu")
    assert row["outcome"] == "measured"
    assert row["peak"] == pytest.approx(row["estimate"]["peak"], rel=bench_gpu_table.TARGETS["estimate"])
    assert row["moments"] == 2 * row["estimate"]["trains"]
    assert row["tokens_per_second"] == pytest.approx(32 / row["step"])
    assert (row["selection"] is None) == (method == "full")
    if method == "id3":
        assert row["peak_selecting"] > row["peak"]


def test_a_run_goes_on_where_it_was_and_survives_a_cell_that_dies(tmp_path: Path) -> None:
    ran: list[str] = []

    def run(cell: Cell, device: str, out: Path) -> None:
        ran.append(cell.name)
        outcome = {"full": "out of memory", "lora": "failed"}.get(cell.method, "measured")
        row = {**bench_gpu._settings(cell), "device": device, "outcome": outcome, "reason": "told"}
        measures = ("peak", "peak_selecting", "reserved", "mfu", "selection", "waits")
        row |= {"estimate": None, "tokens_per_second": 1.0, **dict.fromkeys(measures)}
        row["peak"] = row["peak_selecting"] = 1
        bench_gpu._write(out, cell, row)

    asked = ["--device", "cpu", "--size", "tiny", "--out", str(tmp_path), "--only", "1x32-all"]
    assert bench_gpu.main(asked, run) == 1  # a cell failed
    first = len(ran)
    assert first == len([cell for cell in bench_gpu.cells("tiny") if "1x32-all" in cell.name])
    bench_gpu.main(asked, run)
    assert ran[first:] == ["tiny-lora-1x32-all"]  # what failed is tried again
    bench_gpu.main([*asked, "--again"], run)
    assert len(ran) == 2 * first + 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    lines = bench_gpu_table.section(found)
    assert any("| full | 1 x 32 | off | out of memory |" in line for line in lines)
    assert [line for line in lines if "eager" in line]
    assert len({line.count("|") for line in lines if "1 x 32" in line}) == 1
    there = next(cell for cell in bench_gpu.cells("tiny") if cell.name == "tiny-full-1x32-all")
    assert bench_gpu.known(tmp_path, there, "cpu")
    assert bench_gpu.known(tmp_path, there, "cuda") is None  # what another device did says nothing


def test_a_cell_whose_process_dies_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead:
        returncode, stdout = -9, "loading\nKilled\n"

    monkeypatch.setattr(bench_gpu.subprocess, "run", lambda *a, **k: Dead)
    cell = bench_gpu.cells("tiny")[0]
    bench_gpu.in_process(cell, "cpu", tmp_path)
    assert json.loads((tmp_path / "gpu" / f"{cell.name}.json").read_text())["reason"] == "ended with -9: Killed"


def test_out_of_memory_is_an_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(cell: Cell, device: str) -> dict[str, Any]:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")

    monkeypatch.setattr(bench_gpu_run, "measured", full)
    monkeypatch.setattr(bench_gpu_run, "estimated", lambda cell: {"peak": 1})
    row = bench_gpu_run.row(Cell("tiny", "full"), "cuda")
    assert (row["outcome"], row["reason"]) == ("out of memory", "CUDA out of memory. Tried")


def test_targets_are_judged_by_the_cells() -> None:
    def cell(method: str, peak: float, speed: float, share: float = 0.0, estimate: float = 0.0) -> dict[str, Any]:
        told = {"peak": estimate} if estimate else None
        return {"shape": "s", "method": method, "share": share, "batch": 1, "checkpointing": True, "estimate": told,
                "outcome": "measured", "peak": peak, "tokens_per_second": speed}  # fmt: skip

    gib = 2**30
    step = {"rows": [{"run": True, "share": 0.01, "of_bandwidth_by_sectors": 0.71}, {"run": False, "share": 0.01}]}
    lora = cell("lora", 20 * gib, 100.0, estimate=20.5 * gib)
    good = [cell("lisa-layers", 19 * gib, 100.0), cell("id3", 23 * gib, 85.0, 0.01), cell("lift", 25 * gib, 84.0, 0.01)]
    met = bench_gpu_table.targets({"cells": [lora, *good], "step": step})
    assert list(met.values()) == [True, True, True, True, False, False, True, True]
    bad = bench_gpu_table.targets({"cells": [cell("lora", 20 * gib, 100.0, estimate=19 * gib)], "step": {}})
    assert list(bad.values()) == [None, None, None, None, None, None, False, None]


def test_bytes_of_the_compact_step() -> None:
    assert bench_gpu_step.moved(10, 1.0) == (480.0, 480.0)
    # Single entries of a sparse choice: three sectors of 32 bytes instead of three times 2.
    assert bench_gpu_step.moved(1, 1e-9)[1] == pytest.approx(42 + 96, rel=1e-6)
    found = bench_gpu_step.compared("cpu", (16, 24), (0.1,), 1, ("eager", "fused", "foreach", "nothing"), 4096)
    assert [row["run"] for row in found["rows"]] == [True, True, True, False]
    assert found["rows"][0]["of_bandwidth"] < found["rows"][0]["of_bandwidth_by_sectors"]


def test_every_way_of_the_compact_step_trains_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda body: body)  # its arithmetic, without the compiler
    weights = []
    for way in bench_gpu_step.WAYS:
        run, entries, p = bench_gpu_step.stepper(way, (16, 24), 0.2, "cpu")
        before = p.clone()
        for _ in range(30):
            run()
        assert 0 < int((p != before).sum()) <= entries
        weights.append(p)
    assert all(torch.equal(weights[0], other) for other in weights[1:])
