"""The small variant of a run: every task, offline, with a selection that changes."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from running import composed, trained

from apportion.recipes.shapes import Shape, config_of, fields, names
from apportion.recipes.tasks.smoke import smoke, tiny
from apportion.recipes.tasks.smoke_rows import rows

HUB = ["model.path=nobody/model", "data.path=nobody/data", "data.train=train", "trainer=gpu"]
TEXTS = ["model=sequence_classifier", "shape=deberta-v3-base", "data=text_classification", "data.val=validation"]
GROWN = ["peft=adalora", "callbacks=adalora", "callbacks.adalora.warmup=5000", "callbacks.adalora.target_rank=8"]
TASKS: dict[str, list[str]] = {
    "instructions": [
        "model=causal_lm", "shape=llama-2-7b", "data=instructions", "data.holdout=2000", "data.packing=true",
        "model.answer=number", "callbacks=lisa", "trainer.accumulate_grad_batches=16",
    ],
    "running text": ["model=causal_lm", "shape=gpt-2", "data=causal_text", "data.val=validation", "callbacks=badam"],
    "adapters": [
        "model=causal_lm", "shape=mistral-7b", "data=instructions", "data.holdout=0.1", "peft=lora", "peft.r=64",
        "callbacks=ist",
    ],
    "classes": [
        *TEXTS, "model.config.num_labels=3", "data.labels=[a,b,c]", "callbacks=id3", "callbacks.id3.budget=320000",
    ],
    "numbers": [*TEXTS, "model.config.num_labels=1", "model.regression=true", "data.pair=other", *GROWN],
    "questions": [
        "model=question_answering", "shape=bert-base", "data=question_answering", "data.val=dev", "callbacks=hft",
    ],
    "translation": ["model=seq2seq_lm", "shape=t5-base", "data=seq2seq", "data.val=validation", "callbacks=lift"],
    "summaries": ["model=seq2seq_lm", "shape=bart-large", "data=seq2seq", "data.val=validation", *GROWN],
    "images": [
        "model=image_classifier", "shape=vit-b-16", "data=images", "data.holdout=200", "model.config.num_labels=100",
        "callbacks=ttc",
    ],
}  # fmt: skip
CHANGES = {"instructions", "running text", "adapters", "classes", "numbers", "translation", "summaries"}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_small_variant_without_a_network(task: str, tmp_path: Path) -> None:
    trained(tmp_path, *HUB, *TASKS[task], "smoke=true", "recipe=a/b", "checkpoint=null")
    told = json.loads((tmp_path / "metrics.json").read_text())
    assert (told["recipe"], told["smoke"], told["steps"]) == ("a/b", True, 6)
    assert math.isfinite(told["metrics"]["train/loss"])
    assert math.isfinite(told["metrics"]["val/loss"])
    assert told["parameters"] < 200_000
    (path,) = (tmp_path / "history").glob("*.json")
    history = json.loads(path.read_text())
    chosen = history.get("masks") or history.get("counts")
    assert any(any(row) for row in chosen)
    assert len(history["steps"]) == len(chosen)
    assert (len(chosen) > 1) == (task in CHANGES)
    assert list((tmp_path / "log").glob("metrics.csv"))


def test_the_config_is_left_as_it_is() -> None:
    cfg = composed(*HUB, *TASKS["classes"], "smoke=true")
    before = copy.deepcopy(cfg)
    made = smoke(cfg)
    assert cfg == before
    assert made.model.path is None
    assert made.callbacks.id3.budget == 0.05
    assert made.data.train[0] == {"text": "plain 0", "label": 0}
    assert len(made.data.train) == 12
    assert len(made.data.val) == 4
    assert made.data.batch_size == 4


@pytest.mark.parametrize(
    ("key", "value", "small"),
    [
        ("peft.r", 64, 4),
        ("peft.r", 2, 2),
        ("callbacks.lisa.interval", 20, 2),
        ("callbacks.lisa.active_layers", 8, 2),
        ("callbacks.lisa.active_layers", 0.25, 0.25),
        ("callbacks.lisa.interval", 1, 1),
        ("callbacks.lisa.train_head", False, False),
    ],
)
def test_what_cannot_fit_is_cut_and_nothing_else(key: str, value: Any, small: Any) -> None:
    cfg = composed(*HUB, *TASKS["instructions"], "peft=lora", f"{key}={value}")
    assert OmegaConf.select(smoke(cfg), key) == small
    assert OmegaConf.select(smoke(cfg), "callbacks.lisa._target_") == "apportion.callbacks.LISA"


def test_slots_of_ones_own_are_cut_as_well() -> None:
    slots = ["callbacks=compose", "units=ranks", "score=sensitivity", "budget=decay", "rule=topk", "effect=prune"]
    made = smoke(composed(*HUB, *TEXTS, *slots, "budget.warmup=5000", "budget.final=9000", "budget.target=576"))
    assert (made.budget.warmup, made.budget.final, made.budget.target) == (1, 2, 0.05)
    assert made.callbacks.compose.budget.warmup == 1


def test_the_trainer_is_one_process_on_the_cpu() -> None:
    overrides = ["trainer=ddp", "trainer.devices=8", "trainer.precision=16-mixed", "trainer.accumulate_grad_batches=8"]
    made = smoke(composed(*HUB, *TASKS["instructions"], *overrides))
    assert (made.trainer.devices, made.trainer.strategy, made.trainer.accelerator) == (1, "auto", "cpu")
    assert (made.trainer.precision, made.trainer.accumulate_grad_batches) == ("bf16-mixed", 2)
    assert smoke(composed(*HUB, *TASKS["instructions"], "trainer.precision=bf16-true")).trainer.precision == "bf16-true"


def test_what_is_offline_already_stays() -> None:
    made = smoke(composed("experiment=demo/lisa"))
    assert made.model.path._target_ == "apportion.recipes.pretrain.weights"
    assert made.data == composed("experiment=demo/lisa").data
    digits = smoke(composed("experiment=digits"))
    assert digits.model.config.hidden_size == 32
    assert digits.model.config.image_size == 8


def test_the_family_must_be_known() -> None:
    with pytest.raises(ValueError, match=r"`smoke=true` with `model\.path=nobody/model` must know the family"):
        smoke(composed(*HUB, *TASKS["classes"], "shape=null"))
    with pytest.raises(ValueError, match=r"`shape=llama-1` is none of .*llama-2-7b"):
        smoke(composed(*HUB, *TASKS["classes"], "shape=llama-1"))
    with pytest.raises(ValueError, match="has no rows for `MyData`"):
        rows("MyData", {})


@pytest.mark.parametrize("name", names())
def test_every_shape_has_a_tiny_model_of_its_family(name: str) -> None:
    large = fields(name)
    small = tiny(large)
    assert small["model_type"] == large["model_type"]
    config = type(config_of(name))(**{key: value for key, value in small.items() if key != "model_type"})
    with torch.device("meta"):
        model = Shape(config).build()
    assert sum(p.numel() for p in model.parameters()) < 200_000
