"""The command line: `apportion-train` as a user types it, and what other Hydra apps of the environment see of us."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.errors import MissingConfigException
from omegaconf import DictConfig

import apportion.conf

CONF = Path(apportion.conf.__file__).parent
TINY = [
    "trainer=cpu",
    "trainer.max_epochs=1",
    "+trainer.limit_train_batches=6",
    "+trainer.limit_val_batches=1",
    "+trainer.limit_test_batches=1",
    "trainer.enable_progress_bar=false",
    "model.config.hidden_size=16",
    "model.config.intermediate_size=16",
    "model.config.num_attention_heads=2",
]


def composed(*overrides: str) -> DictConfig:
    with initialize_config_module("apportion.conf", version_base="1.3"):
        return compose("train", overrides=list(overrides), return_hydra_config=False)


def run(*overrides: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`apportion-train` in a process of its own."""
    command = [sys.executable, "-m", "apportion.recipes.train", *overrides]
    environment = os.environ | {"HYDRA_FULL_ERROR": "0", "COLUMNS": "200"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def options(group: str) -> list[str]:
    folder = CONF / group
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


CASES = [
    (group, option)
    for group in ("model", "data", "trainer", "logger", "optimizer", "peft")
    for option in options(group)
]


@pytest.mark.parametrize(("group", "option"), CASES, ids=map("=".join, CASES))
def test_every_option_of_every_group_composes(group: str, option: str) -> None:
    assert composed(f"{group}={option}")[group] is not None


@pytest.mark.parametrize("option", options("experiment"))
def test_every_experiment_composes(option: str) -> None:
    assert composed(f"experiment={option}").model._target_


@pytest.mark.parametrize("path", sorted((CONF / "slots" / "callbacks").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_has_one_top_key_with_a_target_and_plain_containers(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    entries = content.get("callbacks", content) if "defaults" in content else content
    nodes = {key: node for key, node in entries.items() if key != "defaults"}
    assert len(nodes) == 1
    (node,) = nodes.values()
    assert node["_target_"].startswith("apportion.")
    assert node["_convert_"] == "all"  # else lists arrive as ListConfig and break the checkpoint


def test_nothing_is_selected_by_default() -> None:
    assert composed().get("callbacks") is None


def test_several_callbacks_are_merged_by_name() -> None:
    assert list(composed("callbacks=[lisa,hft]").callbacks) == ["lisa", "hft"]


def test_the_slots_are_groups_of_the_command_line() -> None:
    cfg = composed("callbacks=compose", "units=layers", "score=uniform", "rule=sample", "effect=freeze")
    assert {"units", "score", "budget", "rule", "effect"} <= set(cfg)


def test_a_wrong_option_lists_the_right_ones() -> None:
    with pytest.raises(MissingConfigException, match="lisa"):
        composed("callbacks=liza")


def test_a_sweep_of_presets_and_seeds_trains_each_of_them_once(tmp_path: Path) -> None:
    sweep = ["-m", "callbacks=lisa,ist", "peft=lora", *TINY, "hydra.sweep.dir=sweep"]
    done = run(*sweep, "seed=1,2", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    files = list((tmp_path / "sweep").glob("*/metrics.json"))
    results = [json.loads(file.read_text()) for file in files]
    assert [result["steps"] for result in results] == [6] * 4
    assert len({result["metrics"]["train/loss"] for result in results}) == 4
    histories = [path.name for path in (tmp_path / "sweep").glob("*/history/*.json")]
    assert sorted(histories) == ["ist.json"] * 2 + ["lisa.json"] * 2
    written = [file.stat().st_mtime_ns for file in files]
    again = run(*sweep, "seed=oops,1,2,3", cwd=tmp_path)
    assert again.returncode != 0  # a seed that is no number fails, and the others do not
    assert [file.stat().st_mtime_ns for file in files] == written
    assert len(list((tmp_path / "sweep").glob("*/metrics.json"))) == 6
    assert len(list((tmp_path / "sweep").glob("*/failure.json"))) == 2


def test_the_slots_train_from_the_command_line_without_a_preset(tmp_path: Path) -> None:
    slots = ["callbacks=compose", "units=layers", "score=uniform", "rule=sample", "effect=freeze", "budget.amount=2"]
    done = run(*slots, *TINY, "hydra.run.dir=out", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "out" / "history").glob("*.json")
    masks = json.loads(path.read_text())["masks"]
    assert masks
    assert all(sum(mask) == 2 for mask in masks)


def test_a_missing_data_file_is_named_with_its_absolute_path(tmp_path: Path) -> None:
    files = ["data.train=missing.tsv", "data.val=missing.tsv"]
    done = run("model=bert_tiny", "data=text_classification", *files, *TINY, cwd=tmp_path)
    assert done.returncode != 0
    assert f"there is no file {tmp_path / 'missing.tsv'}" in done.stderr
    assert "data.train" in done.stderr or "train='missing.tsv'" in done.stderr


def test_a_callback_without_a_target_says_what_its_file_must_hold(tmp_path: Path) -> None:
    done = run("+callbacks.mine.amount=3", *TINY, cwd=tmp_path)
    assert done.returncode != 0
    assert "`callbacks.mine` has no `_target_`" in done.stderr
