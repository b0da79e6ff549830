"""Run folders on disk: found, read, and told what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apportion.recipes.sweeps import runs, sweep
from apportion.recipes.sweeps.runs import Run, collect


def folder(place: Path, **files: Any) -> Path:
    """A run folder; ``config`` goes to ``.hydra``, other files are JSON."""
    (place / ".hydra").mkdir(parents=True)
    (place / ".hydra" / "config.yaml").write_text(files.pop("config", "seed: 1\n"))
    for name, content in files.items():
        (place / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return place


def only(place: Path) -> Run:
    (run,) = collect(place)
    return run


RESULTS = {"metrics": {"val/loss": 0.5, "val/accuracy": None}, "objective": 0.5, "steps": 7, "seconds": 1.5}


def test_a_tree_is_searched_and_a_run_is_not(tmp_path: Path) -> None:
    for place in ("sweep/10", "sweep/2", "outputs/a/b", "outputs/a/b/inside", "sweep/.submitit/x"):
        folder(tmp_path / place)
    (tmp_path / "sweep" / "no-run").mkdir()
    assert [run.name for run in collect(tmp_path)] == ["outputs/a/b", "sweep/2", "sweep/10"]
    assert only(tmp_path / "sweep" / "2").name == "2"


def test_a_folder_without_runs_says_what_a_run_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no run: a run folder is one with `\.hydra/config\.yaml`"):
        collect(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        collect(tmp_path / "none")


def test_results_are_read_without_what_is_no_number(tmp_path: Path) -> None:
    run = only(folder(tmp_path / "a", metrics=RESULTS, config="seed: 3\ndata: {lr: 1.0e-05}\n"))
    assert run.done
    assert run.reason == ""
    assert run.metrics == {"val/loss": 0.5}
    assert run.number("seconds") == 1.5
    assert run.number("none") is None
    assert run.config == {"seed": 3, "data": {"lr": 1e-05}}


@pytest.mark.parametrize(
    ("files", "state", "reason"),
    [
        ({}, "unfinished", "it stopped without an error before it wrote metrics.json"),
        ({"failure": {"error": "ValueError: no\nmore"}}, "failed", "ValueError: no"),
        ({"failure": {"error": "OOM"}, "metrics": RESULTS}, "failed", "OOM"),
        ({"failure": {"other": 1}}, "failed", "failure.json names no error"),
        ({"metrics": '{"metrics": {"val/l'}, "unfinished", "metrics.json cannot be read: Unterminated string"),
        ({"metrics": "[1]"}, "unfinished", "metrics.json holds a list and no mapping"),
        ({"metrics": {"metrics": 3}}, "unfinished", "metrics.json holds no metrics"),
    ],
)
def test_a_run_that_is_not_done_says_why(tmp_path: Path, files: dict[str, Any], state: str, reason: str) -> None:
    run = only(folder(tmp_path / "a", **files))
    assert (run.state, run.done) == (state, False)
    assert run.reason.startswith(reason)


def test_without_a_file_of_the_error_the_log_has_it(tmp_path: Path) -> None:
    place = folder(tmp_path / "a")
    (place / "train.log").write_text(
        "[INFO] KeyError: no\nTraceback\nKeyError: first\n  x\ntorch.OutOfMemoryError: all\nend"
    )
    assert (only(place).state, only(place).reason) == ("failed", "torch.OutOfMemoryError: all")


def test_a_job_that_is_at_work_is_running(tmp_path: Path) -> None:
    place = folder(tmp_path / "a")
    with sweep.claimed(place):
        assert only(place).state == "running"
    assert only(place).state == "unfinished"


def test_curves_of_a_run_that_was_resumed_are_joined(tmp_path: Path) -> None:
    place = folder(tmp_path / "a")
    logs = {
        "log.0": "epoch,step,train/loss,val/loss\n0,1,3.0,\n0,2,2.5,\n0,2,,9.0\n",
        "log.1": "epoch,step,train/loss\n0,2,2.25\n0,3,2.0\n",
        "log": "epoch,step,train/loss\n0,3,1.75\n0,4,nan\n0,,7\n0,5,x\n0,6,1.0,5,5\n0,7\n",
    }
    for name, text in logs.items():
        (place / name).mkdir()
        (place / name / "metrics.csv").write_text(text)
    run = only(place)
    assert run.curves == {"train/loss": [(1, 3.0), (2, 2.25), (3, 1.75), (6, 1.0)], "val/loss": [(2, 9.0)]}


GOOD = {"names": ["a", "b"], "steps": [0, 4], "masks": [[1, 0], [0, 1]]}
BAD: dict[str, Any] = {
    "a row is short": GOOD | {"masks": [[1, 0], [0]]},
    "a step is missing": GOOD | {"steps": [0]},
    "no steps": GOOD | {"steps": [], "masks": []},
    "text": GOOD | {"masks": [[1, 0], "ab"]},
    "no masks": {"names": ["a"], "steps": [0]},
    "no sizes": {"names": ["a"], "steps": [0], "counts": [[3]]},
    "names are a number": GOOD | {"names": 2},
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_a_history_that_cannot_be_drawn_is_told_and_left_out(tmp_path: Path, content: Any) -> None:
    place = folder(tmp_path / "a", metrics=RESULTS)
    (place / "history").mkdir()
    (place / "history" / "lisa.json").write_text(json.dumps(GOOD))
    (place / "history" / "odd.json").write_text(json.dumps(content))
    run = only(place)
    assert run.done
    assert run.histories == {"lisa": GOOD}
    assert run.damaged == ("history/odd.json holds no selections of one length",)


MEASURED = {"timeline": [{"step": 0, "peak": 3}], "memory": {"peak": 3}, "seconds_per_step": None}


@pytest.mark.parametrize(
    "content", [{"memory": {"peak": "3"}}, {"memory": [1]}, {"seconds_per_step": "fast"}, {"timeline": [{}, 1]}]
)
def test_measurements_are_numbers_or_nothing(tmp_path: Path, content: Any) -> None:
    assert only(folder(tmp_path / "a", metrics=RESULTS, measured=MEASURED)).measured == MEASURED
    run = only(folder(tmp_path / "b", metrics=RESULTS, measured=MEASURED | content))
    assert run.measured == {}
    assert run.damaged == ("measured.json holds something else than bytes by part and seconds",)


def test_a_config_that_is_no_yaml_leaves_the_rest(tmp_path: Path) -> None:
    run = only(folder(tmp_path / "a", metrics=RESULTS, config="a: [1\n"))
    assert run.done
    assert run.config == {}
    assert run.damaged[0].startswith("config.yaml cannot be read")


def test_the_last_error_of_a_log_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert runs.last_error(tmp_path / "train.log") is None
