"""The recipes of the papers: their cards, the figures they repeat, and that every experiment runs."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

import apportion.conf
import apportion.recipes
from apportion.recipes.shapes import names as shapes
from apportion.recipes.train import job, pieces

EXPERIMENTS = Path(apportion.conf.__file__).parent / "experiment"
RECIPES = Path(apportion.recipes.__file__).parent
PAPERS = sorted(path.parent.name for path in RECIPES.glob("*/reported.json"))
GRADES = {"paper", "code", "secondary", "recalled"}
SHOWN = {"paper", "code"}


def files() -> list[Path]:
    """The files of the papers' experiments."""
    return [path for paper in PAPERS for path in sorted((EXPERIMENTS / paper).glob("*.yaml"))]


def experiments() -> list[str]:
    """Names of the experiments; ``base`` files hold what several of them share."""
    return [f"{path.parent.name}/{path.stem}" for path in files() if not path.stem.startswith("base")]


def composed(*overrides: str, hydra: bool = False) -> DictConfig:
    with initialize_config_module("apportion.conf", version_base="1.3"):
        return compose("train", overrides=list(overrides), return_hydra_config=hydra)


@cache
def row_of(name: str) -> DictConfig:
    """The config of an experiment."""
    return composed(f"experiment={name}")


def reported(paper: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RECIPES / paper / "reported.json").read_text(encoding="utf-8"))
    return content


def card(paper: str) -> str:
    return (RECIPES / paper / "README.md").read_text(encoding="utf-8")


def row(figure: dict[str, Any]) -> str:
    """A figure as the card shows it."""
    where = "; ".join(filter(None, [figure["table"], figure["note"]]))
    name = figure["experiment"].split("/")[1]
    return f"| `{name}` | {figure['metric']} | {figure['value']:g} {figure['unit']} | {where} |"


def test_every_paper_of_the_plan_has_a_card() -> None:
    planned = {"ist", "lisa", "hft", "badam", "id3", "lift", "sara", "spt", "trpts", "adalora", "increlora", "triadapt"}
    assert planned <= set(PAPERS)


def test_every_folder_of_experiments_with_a_recipe_has_a_card() -> None:
    folders = {path.parent.name for path in EXPERIMENTS.glob("*/*.yaml") if "\nrecipe:" in path.read_text()}
    assert folders <= set(PAPERS)


def test_the_index_lists_every_card_and_every_experiment() -> None:
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    listed = []
    for group in re.findall(r"`(\w+/[\w{},]+)`", text):
        paper, names = group.split("/")
        listed += [f"{paper}/{name}" for name in names.strip("{}").split(",")]
    assert sorted(listed) == sorted(experiments())
    assert sorted(re.findall(r"\((\w+)/README\.md\)", text)) == sorted([*PAPERS, "lora2"])  # a card without a method


@pytest.mark.parametrize("paper", PAPERS)
def test_reported_figures_follow_the_schema(paper: str) -> None:
    content = reported(paper)
    assert set(content) == {"paper", "figures"}
    assert set(content["paper"]) == {"title", "venue", "year", "link"}
    assert content["paper"]["link"].startswith("https://")
    assert 2000 < content["paper"]["year"] < 2100
    for figure in content["figures"]:
        assert set(figure) == {"experiment", "metric", "value", "unit", "table", "grade", "note"}
        assert isinstance(figure["value"], int | float)
        assert not isinstance(figure["value"], bool)
        assert figure["grade"] in GRADES
        assert figure["table"]
        assert figure["experiment"] in experiments()
        assert figure["experiment"].split("/")[0] == paper


@pytest.mark.parametrize("paper", PAPERS)
def test_no_figure_is_given_twice(paper: str) -> None:
    keys = [(f["experiment"], f["metric"], f["table"], f["grade"]) for f in reported(paper)["figures"]]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("paper", PAPERS)
def test_a_card_repeats_the_checked_figures_and_marks_the_others(paper: str) -> None:
    figures = reported(paper)["figures"]
    shown = [line for line in card(paper).splitlines() if re.match(r"\| `\w+` \|.*\|.*\|.*\|$", line)]
    assert shown == [row(figure) for figure in figures if figure["grade"] in SHOWN]
    if any(figure["grade"] not in SHOWN for figure in figures):
        assert "not checked" in card(paper)


@pytest.mark.parametrize("paper", PAPERS)
def test_a_card_names_its_paper_its_experiments_and_its_evidence(paper: str) -> None:
    text, about = card(paper), reported(paper)["paper"]
    flat = " ".join(text.split())
    assert about["link"] in text
    assert about["title"] in flat
    assert str(about["year"]) in text
    assert text.splitlines().count(f"<!-- evidence: {paper} -->") == 1
    for name in experiments():
        if name.startswith(f"{paper}/"):
            assert name in text or name.split("/")[1] in text, f"{name} is not in the card"


@pytest.mark.parametrize("paper", PAPERS)
def test_commands_of_a_card_compose(paper: str) -> None:
    lines = re.findall(r"^apportion-train (.*)$", card(paper).replace("\\\n", " "), re.MULTILINE)
    for line in lines:
        words = [word for word in line.split("#")[0].split() if word != "-m"]
        overrides = [re.sub(r"=([^\[]*?),.*$", r"=\1", word) for word in words]  # of a sweep, the first
        cfg = composed(*overrides)
        assert (cfg.recipe or "").startswith(f"{paper}/") == (f"experiment={paper}/" in line)


@pytest.mark.parametrize("name", experiments())
def test_an_experiment_names_itself_and_an_architecture(name: str) -> None:
    cfg = row_of(name)
    assert cfg.recipe == name
    assert cfg.shape in shapes()
    assert [key for key, node in cfg.callbacks.items() if node is not None]
    OmegaConf.to_container(cfg, throw_on_missing=True)


@pytest.mark.parametrize("name", experiments())
def test_the_paper_s_own_values_are_in_range(name: str) -> None:
    """Those of the large run, which a small one cuts."""
    cfg = row_of(name)
    assert pieces(cfg.callbacks, "callbacks")
    adapters = instantiate(cfg.peft, _convert_="all")
    assert adapters == {} or adapters.target_modules
    weight = torch.nn.Parameter(torch.zeros(2))
    assert instantiate(cfg.optimizer)([weight]).defaults["lr"] == cfg.optimizer.lr


@contextmanager
def launched(folder: Path, *overrides: str) -> Iterator[DictConfig]:
    """The config that `apportion-train` hands to its job, in this process."""
    cfg = composed(*overrides, "hydra.mode=RUN", hydra=True)
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir = str(folder)
        HydraConfig.instance().set_config(cfg)
        cfg.pop("hydra")
    try:
        yield cfg
    finally:
        HydraConfig.instance().cfg = None


def selections(folder: Path) -> dict[str, tuple[list[list[int]], list[Any]]]:
    """For each callback that selects, its choices over the units, and the sizes or names of the units."""
    contents = {path.stem: json.loads(path.read_text()) for path in (folder / "history").glob("*.json")}
    return {
        name: (content["counts"], content["sizes"]) if "counts" in content else (content["masks"], content["names"])
        for name, content in contents.items()
    }


def check(folder: Path, name: str) -> None:
    """Fails unless the run in ``folder`` learned, and unless its callback selected some of what there is."""
    results = json.loads((folder / "metrics.json").read_text())
    assert results["recipe"] == name
    assert results["steps"] >= 3
    for metric, value in results["metrics"].items():
        if metric.endswith("loss"):
            assert value is not None, f"{metric} is no number"  # written as null
            assert math.isfinite(value)
    assert {"train/loss", "val/loss"} <= set(results["metrics"])
    chosen = selections(folder)
    assert chosen
    for callback, (choices, units) in chosen.items():
        assert choices, f"{callback} chose nothing"
        assert all(any(choice) for choice in choices), f"{callback} chose nothing at a choice"
        whole = sum(units) if isinstance(units[0], int) else len(units)
        assert any(sum(choice) < whole for choice in choices), f"{callback} left nothing out"


@pytest.mark.parametrize("name", experiments())
def test_an_experiment_runs_in_small(name: str, tmp_path: Path) -> None:
    with launched(tmp_path, f"experiment={name}", "smoke=true") as cfg:
        objective = job(cfg)
    assert math.isfinite(objective)
    check(tmp_path, name)


@pytest.mark.parametrize("name", ["ist/commonsense_llama7b_dora", "adalora/xsum", "spt/vtab_cifar_lora"])
def test_a_recipe_runs_from_the_command_line(name: str, tmp_path: Path) -> None:
    script = Path(sysconfig.get_path("scripts")) / "apportion-train"
    words = [str(script), f"experiment={name}", "smoke=true", f"hydra.run.dir={tmp_path}/run"]
    done = subprocess.run(words, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    check(tmp_path / "run", name)


@pytest.mark.parametrize("path", files(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_value_of_an_experiment_says_where_it_comes_from(path: Path) -> None:
    """Numbers of the method, the optimizer and the training; the paths of models and data speak for themselves."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if re.match(r"\s+\w+: -?[\d.]+(e[-+]?\d+)?$", line):
            assert re.match(r"\s+num_labels:", line), f"`{line.strip()}` has no source"
