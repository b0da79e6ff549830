"""The suite of benchmarks: every part by itself, one page from their files, and the parts on a toy scale."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from workers import ranks

from apportion.recipes.bench import ddp as bench_ddp
from apportion.recipes.bench import memory as bench_memory
from apportion.recipes.bench import overhead as bench_overhead
from apportion.recipes.bench import ranks as bench_ranks
from apportion.recipes.bench import resume as bench_resume
from apportion.recipes.bench import scale as bench_scale
from apportion.recipes.bench import suite as bench
from apportion.recipes.bench import table as bench_table
from apportion.recipes.bench.entry_bars import Size

TINY = Size("tiny", hidden=64, inner=72, layers=4, tokens=8, vocabulary=40)
DDP: dict[str, Any] = {"run": False, "passed": None, "reason": "0 CUDA devices of 2"}


def scale(passed: bool) -> dict[str, Any]:
    entry = dict.fromkeys(("weights", "gradients", "optimizer", "activations", "temporaries", "peak", "floor"), 2**20)
    row = {"model": "30 M", "selected": 10, "share": 0.01, "ratio": 1.0, "optimizer_floor": 2**20, **entry}
    step = {"model": "30 M", "tokens": 8, "share": 0.01, "step": 0.1, "ratio": 1.02, "lowest": 1.0, "highest": 1.1}
    made = {"model": "30 M", "entries": 100, "share": 0.01, "seconds": 0.01, "per_million": 0.1, "to_passes": 0.2}
    return {"passed": passed, "entries": [row], "layers": [], "step": [step], "selection": [made]}


class Parts:
    """Stands for the programs of the parts."""

    def __init__(self, **outcomes: Any) -> None:
        self.outcomes, self.ran = outcomes, []  # type: ignore[var-annotated]

    def __call__(self, part: str, arguments: list[str]) -> tuple[int, str]:
        self.ran.append((part, arguments))
        found = self.outcomes.get(part)
        if isinstance(found, dict):
            Path(arguments[1], f"{part}.json").write_text(json.dumps(found))
            return int(found["passed"] is False), "fine\n"
        return 137, f"began\n{found or 'no such thing'}\n"


def page(out: Path) -> str:
    return (out / "bench.md").read_text()


def test_one_page_is_made_from_the_files_of_the_parts(tmp_path: Path) -> None:
    parts = Parts(scale=scale(True), ddp=DDP)
    assert bench.main(["--out", str(tmp_path), "--only", "scale, ddp"], parts) == 0
    assert parts.ran == [("scale", ["--out", str(tmp_path)]), ("ddp", ["--out", str(tmp_path), "--device", "cpu"])]
    lines = page(tmp_path).splitlines()
    assert any(line.startswith("| scale | passed |") for line in lines)
    assert "|  | |  | 30 M, 1.0%: step, to forward + backward | 1.020 (1.000 to 1.100) | 1 |" in lines
    assert "## Growth with the size of the model and with what is selected" in lines
    assert "Not run: 0 CUDA devices of 2." in lines
    suite = json.loads((tmp_path / "bench.json").read_text())
    assert suite["command"] == f"python -m apportion.recipes.bench --out {tmp_path} --only scale, ddp"
    assert bench_table.page(tmp_path) == page(tmp_path)


def test_a_part_that_fails_is_reported_and_loses_no_other(tmp_path: Path) -> None:
    (tmp_path / "peers.json").write_text("{}")  # of another run
    parts = Parts(peers="MemoryError: too much", scale=scale(True))
    assert bench.main(["--out", str(tmp_path), "--only", "peers,scale"], parts) == 1
    assert [part for part, _ in parts.ran] == ["peers", "scale"]
    assert "| peers | failed: MemoryError: too much |" in page(tmp_path)
    assert "| scale | passed |" in page(tmp_path)


def test_a_missed_bar_fails_and_other_parts_keep_their_figures(tmp_path: Path) -> None:
    assert bench.main(["--out", str(tmp_path), "--only", "ddp"], Parts(ddp=DDP)) == 0
    assert bench.main(["--out", str(tmp_path), "--only", "scale"], Parts(scale=scale(False))) == 1
    assert "| scale | MISSED |" in page(tmp_path)
    assert "| ddp | passed |" in page(tmp_path)


def test_every_part_is_run_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts()
    assert bench.main(["--out", str(tmp_path)], parts) == 1
    assert [part for part, _ in parts.ran] == list(bench.ON_CPU)
    assert "| gpu | not run: asked for with --device cuda |" in page(tmp_path)
    assert set(bench_table.SECTIONS) == set(bench_table._FIGURES) == set(bench.PARTS)
    folder = Path(bench.__file__).parent
    assert all((folder / f"{part}.py").is_file() for part in bench.PARTS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_its_parts_say_so(tmp_path: Path) -> None:
    parts = Parts()
    assert bench.main(["--out", str(tmp_path), "--device", "cuda"], parts) == 0
    assert not parts.ran
    assert page(tmp_path).count("not run: no CUDA device") == len(bench.ON_CUDA)


def test_an_unknown_part_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--only", "speed"], Parts())
    assert "--only speed: there is no such part; there are memory" in capsys.readouterr().err


def test_a_part_is_a_program_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    class Done:
        returncode, stdout = 1, "said\n"

    monkeypatch.setattr(bench.subprocess, "run", lambda command, **_: asked.append(command) or Done)
    assert bench.in_process("ddp", ["--out", "x"]) == (1, "said\n")
    assert asked == [[sys.executable, "-m", "apportion.recipes.bench.ddp", "--out", "x"]]


def test_growth_is_measured_and_counted(tmp_path: Path) -> None:
    plan = bench_scale.Plan((TINY,), (0.01, 0.2), ((8, 1, (0.01,)),))
    assert bench_scale.main(["--out", str(tmp_path)], plan) == 0
    found = json.loads((tmp_path / "scale.json").read_text())
    n = sum(p.numel() for p in bench_scale.trainable(TINY.build()))
    assert [row["selected"] for row in found["entries"]] == [int(0.01 * n), int(0.2 * n)]
    for row in found["entries"]:
        assert 0 <= row["optimizer"] - 16 * row["selected"] <= 4096
        assert row["ratio"] <= 1.05
    full, layers = found["layers"]
    assert full["trains"] == full["parameters"] > layers["trains"]
    assert full["gradients"] == 4 * full["trains"]
    assert layers["peak"] - layers["activations"] >= layers["floor"]
    assert found["selection"][0]["entries"] == n
    assert found["step"][0]["ratio"] > 0


def _party() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    return bench_ddp.take_part(bench_ddp.Plan(TINY, share=0.05, turns=1))


def test_processes_send_what_trains_and_no_more(tmp_path: Path) -> None:
    rows = ranks(2).run(_party)[0]
    everything, lisa, entries = rows
    assert everything["bytes"] == everything["floor"] == 4 * sum(p.numel() for p in TINY.build().parameters())
    assert lisa["floor"] < everything["floor"]
    for row in (lisa, entries):
        assert 0 < row["bytes"] - row["floor"] <= 4 * 64  # a flag for each tensor
    assert entries["trains"] == int(0.05 * sum(p.numel() for p in bench_scale.trainable(TINY.build())))
    assert bench_ddp.main(["--out", str(tmp_path)], bench_ddp.Plan(TINY), lambda plan: rows) == 0
    assert bench_ddp.main(["--out", str(tmp_path)], bench_ddp.Plan(TINY), lambda plan: [{**lisa, "bytes": 2**30}]) == 1


def test_going_on_and_files_are_measured(tmp_path: Path) -> None:
    assert bench_resume.main(["--out", str(tmp_path)], bench_resume.Plan(TINY, turns=1, steps=2)) == 0
    found = json.loads((tmp_path / "resume.json").read_text())
    assert [row["name"] for row in found["resume"]] == list(bench_resume.METHODS)
    plain, lisa, entries = found["resume"]
    assert plain["checkpoint"] > lisa["checkpoint"] > entries["checkpoint"] > 0
    files = found["files"]
    model = bench_resume.matrices(TINY)
    assert 0 < files["entries"] <= sum(4 * sum(p.shape) for p in bench_scale.trainable(model))
    assert files["delta_floor"] < files["delta"] < files["revertible"] < files["full"]
    assert files["revertible_floor"] - files["delta_floor"] == 4 * files["entries"]
    assert files["lora_entries"] == sum(4 * sum(p.shape) for p in bench_scale.trainable(model))


@pytest.mark.parametrize("name", ["memory", "overhead", "ranks"])
def test_recorded_figures_have_a_section(name: str) -> None:
    path = Path(__file__).parent.parent / "results" / f"{name}.json"
    if not path.is_file():
        pytest.skip("no figures are recorded")
    found = json.loads(path.read_text())
    module = {"memory": bench_memory, "overhead": bench_overhead, "ranks": bench_ranks}[name]
    lines = module.section(found)
    assert lines[0].startswith("## ")
    assert bench_table.figures(name, found)
