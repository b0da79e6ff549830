"""The demo from its command to its page, in a few steps; and the pre-trained weights that it starts from."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from transformers import ViTForImageClassification

from apportion.recipes import demo, measure, pretrain

pytest.importorskip("sklearn")
pytestmark = pytest.mark.xdist_group("demo")  # its runs are made once
SHORT = ["--", "trainer.max_steps=6", "++callbacks.measure.track=3"]


def only_folder(out: Path) -> Path:
    (folder,) = out.iterdir()
    return folder


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    out, chosen = tmp_path_factory.mktemp("demo"), ("full", "random", "lisa")
    assert demo.main(["--out", str(out), "--methods", *chosen, "--seeds", "2", "5", *SHORT]) == 0
    folder = only_folder(out)
    return folder, json.loads((folder / "results.json").read_text("utf-8"))


def test_the_demo_ends_with_a_page_and_pictures_of_every_method(shown: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, results = shown
    names = ("full tuning", "random layers", "LISA")
    assert [(result["method"], result["seed"]) for result in results] == [(n, s) for n in names for s in (2, 5)]
    page = (folder / "index.html").read_text("utf-8")
    assert page.count("data:image/png;base64,") == 2
    for name in ("majority class", "no fine-tuning", "full tuning", "random layers", "LISA"):
        assert f'<th scope="row">{name}</th>' in page
    assert all((folder / name).stat().st_size > 10_000 for name in ("layers.png", "memory.png"))


def test_the_table_holds_the_test_accuracy_of_each_run(shown: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, results = shown
    page = (folder / "index.html").read_text("utf-8")
    for job, result in enumerate(results):
        metrics = json.loads((folder / "runs" / str(job) / "metrics.json").read_text("utf-8"))
        assert result["accuracy"] == metrics["metrics"]["test/accuracy"]
    for first, second in zip(results[::2], results[1::2], strict=True):
        mean = (first["accuracy"] + second["accuracy"]) / 2
        assert f'{first["method"]}</th><td data-value="{mean}">{100 * mean:.1f} ± ' in page


def test_the_demo_shows_the_selections_that_were_made(shown: tuple[Path, list[dict[str, Any]]]) -> None:
    full, random, lisa = (result["history"] for result in shown[1][::2])
    assert full is None
    assert random["steps"] == [0, 1, 2, 3, 4, 5]
    assert [sum(mask) for mask in random["masks"]] == [2] * 6
    assert len({tuple(mask) for mask in random["masks"]}) > 1
    assert random["masks"] != shown[1][3]["history"]["masks"]
    assert lisa["steps"] == [0]
    assert len(lisa["masks"][0]) == 8


def test_memory_is_followed_first_and_time_taken_after(shown: tuple[Path, list[dict[str, Any]]]) -> None:
    for result in shown[1]:
        assert [point["step"] for point in result["timeline"]] == [0, 1, 2]
        assert 0 < result["seconds_per_step"] < 10
        for point in result["timeline"]:
            parts = ("weights", "gradients", "optimizer", "activations", "temporaries")
            assert point["peak"] == sum(point[part] for part in parts)
    full, random, lisa = (result["memory"] for result in shown[1][::2])
    assert full["optimizer"] > 1.9 * full["weights"]
    assert random["optimizer"] < 0.2 * full["optimizer"]
    assert lisa["optimizer"] < 0.4 * full["optimizer"]


def test_a_run_that_fails_is_named_and_the_others_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = [*SHORT, "++model.config.num_hidden_layers=1"]  # one layer is enough for full tuning, but LISA wants two
    assert demo.main(["--out", str(tmp_path), "--methods", "lisa", "full", "--seeds", "1", *broken]) == 1
    said = capsys.readouterr().out
    assert "1 of 2 runs failed" in said
    assert "lisa, seed 1: ValueError: `Constant(amount=2)` of `LISA`: a budget of 2 over 1 units" in said
    assert "full tuning" in said
    assert '<th scope="row">full tuning</th>' in (only_folder(tmp_path) / "index.html").read_text("utf-8")


def test_a_command_that_cannot_start_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--out", str(tmp_path), "--methods", "full", "--seeds", "1", "--", "optimiser=adamw"]) == 1
    said = capsys.readouterr().out
    assert "full, seed 1: it was not started" in said
    assert "optimiser" in said.split("not started")[1]


@pytest.mark.parametrize("method", demo.METHODS)
def test_every_method_takes_the_seed_of_the_run(method: str) -> None:
    with initialize_config_module("apportion.conf", version_base="1.3"):
        config = compose("train", overrides=[f"experiment=demo/{method}", "seed=7"])
    assert config.data.seed == 7
    assert config.data.split_seed == 0
    chosen = [entry for name, entry in config.callbacks.items() if name != "measure"]
    assert [entry.seed for entry in chosen] == [7] * len(chosen)
    assert bool(chosen) == (method not in ("full", "lora"))


def test_measure_refuses_a_negative_number_of_steps() -> None:
    with pytest.raises(ValueError, match=r"`Measure\(track=-1\)` must be at least 0"):
        measure.Measure("measured.json", track=-1)


def test_the_weights_know_printed_digits_and_not_yet_handwritten_ones() -> None:
    from sklearn.datasets import load_digits

    model = ViTForImageClassification.from_pretrained(pretrain.weights(), dtype=torch.float32)
    ink, digits = pretrain.masters(pretrain.UNSEEN_FONTS)
    printed = pretrain.distort(ink.repeat(20, 1, 1, 1), torch.Generator().manual_seed(3))
    assert pretrain.accuracy(model, printed, digits.repeat(20)) > 0.98
    written = load_digits()
    images = torch.tensor(written.images, dtype=torch.float32)[:, None] / 8 - 1
    assert 0.5 < pretrain.accuracy(model, images, torch.tensor(written.target)) < 0.7


def test_distorted_digits_look_like_the_handwritten_data() -> None:
    ink, _ = pretrain.masters(("cmr10",))
    images = pretrain.distort(ink, torch.Generator().manual_seed(0))
    assert images.shape == (10, 1, 8, 8)
    assert images.min() == -1
    assert images.max() <= 1
    assert torch.equal(images * 8, (images * 8).round())
    assert not torch.equal(images, pretrain.distort(ink, torch.Generator().manual_seed(1)))


def test_pretraining_writes_weights_that_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain", "--steps", "2", "--out", str(tmp_path)])
    pretrain.main()
    one = ViTForImageClassification.from_pretrained(tmp_path)
    assert one.dtype == torch.float16
    assert one.config.num_hidden_layers == 8
    again = pretrain.train(2).half().state_dict()
    assert all(torch.equal(value, again[name]) for name, value in one.state_dict().items())
