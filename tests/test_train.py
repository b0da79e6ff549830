"""The training script and its modules in this process: tasks, adapters, exact resume, plain checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from running import trained

from apportion.recipes.sweeps.clock import Clock
from apportion.recipes.tasks.digits import DigitsData
from apportion.recipes.tasks.module import CausalLM, ImageClassification, SequenceClassification
from apportion.recipes.tasks.text import CausalTextData, TextClassificationData
from apportion.recipes.train import pieces, score, show, write

MakeTrainer = Callable[..., pl.Trainer]
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT = {"model_type": "vit", "image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10} | SIZES
BERT = {"model_type": "bert", "vocab_size": 384, "num_labels": 2} | SIZES
LLAMA = {"model_type": "llama", "vocab_size": 384, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1} | SIZES


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., float]:
    """Runs `train` on the tiny default model as the command line would, in this process."""

    def go(*overrides: str, folder: str = "run") -> float:
        sizes = [f"model.config.{key}={value}" for key, value in SIZES.items()]
        quiet = ["trainer=cpu", "trainer.enable_progress_bar=false", "logger=none"]
        return trained(tmp_path / folder, *sizes, *quiet, *overrides)

    return go


def test_full_tuning_learns_the_digits_and_returns_its_accuracy(run: Callable[..., float], tmp_path: Path) -> None:
    accuracy = run("trainer.max_epochs=6", "optimizer.lr=5e-3", "model.config.hidden_size=32")
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert accuracy == written["objective"] == written["metrics"]["val/accuracy"]
    assert accuracy > 0.6
    assert written["metrics"]["test/accuracy"] > 0.6
    assert written["steps"] == 6 * 34
    assert written["trainable"] == written["parameters"]


def test_the_objective_can_be_another_metric(run: Callable[..., float], tmp_path: Path) -> None:
    loss = run("objective=test/loss", "trainer.max_steps=2")
    assert loss == json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"]["test/loss"]


def test_an_objective_that_was_not_logged_lists_those_that_were() -> None:
    with pytest.raises(ValueError, match=r"val/acc` was not logged; choose one of \['val/accuracy'\]"):
        score({"val/accuracy": 1.0}, "val/acc")


def test_a_wrong_objective_ends_the_run_at_its_first_validation(run: Callable[..., float], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`objective=val/acc` was not logged; choose one of .*val/accuracy"):
        run("objective=val/acc", "trainer.max_steps=2")
    assert not list((tmp_path / "run").rglob("*.ckpt"))  # the check before the first step has found it


def test_results_are_kept_if_the_objective_was_not_logged(run: Callable[..., float], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`objective=test/acc` was not logged"):
        run("objective=test/acc", "trainer.max_steps=2")
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert "test/accuracy" in written["metrics"]
    assert "objective" not in written  # a sweep does not take it for done


def test_seconds_are_those_of_all_attempts() -> None:
    clock = Clock()
    clock.load_state_dict({"seconds": 100.0})
    clock.start()
    assert 100.0 < clock.state_dict()["seconds"] < 101.0
    clock.load_state_dict({"seconds": 200.0})  # Lightning restores it after the fit has begun
    assert 200.0 < clock.seconds < 201.0
    clock.stop()
    assert clock.seconds == clock.seconds > 200.0


def test_the_most_frequent_class_stands_beside_the_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show({"val/accuracy": 0.91, "val/majority": 0.655, "val/loss": 0.2}, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert any("0.91 (always the most frequent class: 0.655)" in line for line in lines)
    assert not any("val/majority" in line for line in lines)


# Without a callback nobody saves the random numbers of dropout.
LISA = [
    "callbacks=lisa",
    "callbacks.lisa.active_layers=1",
    "callbacks.lisa.interval=3",
    "+model.config.hidden_dropout_prob=0.2",
]


@pytest.mark.parametrize("selection", [[], LISA], ids=["full", "lisa"])
def test_a_run_resumed_in_mid_epoch_ends_where_the_whole_run_ends(
    run: Callable[..., float], tmp_path: Path, selection: list[str]
) -> None:
    every = ["checkpoint.every_n_train_steps=10", "checkpoint.save_top_k=-1", "+checkpoint.filename='{step}'"]
    common = ["trainer.max_epochs=2", *every, *selection]
    run(*common, folder="whole")
    checkpoint = tmp_path / "whole" / "checkpoints" / "step=40.ckpt"  # 34 steps make an epoch
    run(*common, f'ckpt_path="{checkpoint}"', folder="resumed")
    ends = [
        torch.load(tmp_path / folder / "checkpoints" / "step=60.ckpt", weights_only=True)["state_dict"]
        for folder in ("whole", "resumed")
    ]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    histories = [tmp_path / folder / "history" / "lisa.json" for folder in ("whole", "resumed")]
    assert [path.exists() for path in histories] == [bool(selection)] * 2
    if selection:
        assert histories[0].read_text() == histories[1].read_text()


def test_the_selection_is_written_beside_the_metrics(run: Callable[..., float], tmp_path: Path) -> None:
    run("callbacks=lisa", "callbacks.lisa.active_layers=1", "callbacks.lisa.interval=2", "trainer.max_steps=6")
    history = json.loads((tmp_path / "run" / "history" / "lisa.json").read_text())
    assert history["steps"] == [0, 2, 4]
    assert [sum(mask) for mask in history["masks"]] == [1, 1, 1]
    assert len(history["names"]) == 2


@pytest.mark.parametrize(("peft", "part"), [("lora", "lora_A"), ("dora", "lora_magnitude_vector"), ("ia3", "ia3_l")])
def test_adapters_train_the_head_and_themselves_only(
    run: Callable[..., float], tmp_path: Path, peft: str, part: str
) -> None:
    run(f"peft={peft}", "trainer.max_steps=2")
    content = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert any(part in key for key in content["state_dict"])
    facts = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 0 < facts["trainable"] < 0.6 * facts["parameters"]
    head = [key for key in content["state_dict"] if "classifier" in key and "modules_to_save" in key]
    assert head
    assert not any(part in key and "classifier" in key for key in content["state_dict"])


def test_an_entry_set_to_null_is_left_out_and_one_without_target_is_refused() -> None:
    made = pieces({"a": None, "b": {"_target_": "pytorch_lightning.callbacks.Timer"}}, "callbacks")
    assert list(made) == ["b"]
    with pytest.raises(ValueError, match="has no `_target_`"):
        pieces({"lisa": {"interval": 3}}, "callbacks")


def test_numbers_that_json_has_no_word_for_become_null(tmp_path: Path) -> None:
    write(tmp_path / "m.json", {"a": float("nan"), "b": [1.0, float("inf")]})
    assert json.loads((tmp_path / "m.json").read_text(), parse_constant=pytest.fail) == {"a": None, "b": [1.0, None]}


def test_a_model_without_weights_or_configuration_says_how_to_name_one() -> None:
    with pytest.raises(ValueError, match=r"model\.path=/data"):
        CausalLM()


def test_a_schedule_without_warmup_refuses_one() -> None:
    with pytest.raises(ValueError, match="no warm-up"):
        ImageClassification(config=VIT, warmup=0.1)


def test_a_saved_model_is_loaded_with_its_weights(tmp_path: Path) -> None:
    saved = ImageClassification(config=VIT)
    saved.model.save_pretrained(tmp_path)
    loaded = ImageClassification(path=str(tmp_path))
    assert all(part.training for part in loaded.modules())
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), loaded.parameters(), strict=True))


def tsv(path: Path, rows: int = 24) -> str:
    """Texts whose class is their first letter."""
    lines = ["text\tlabel", *(f'{"ab"[i % 2]} {"x" * (i % 5)} "quoted\t{i % 2}' for i in range(rows))]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_texts_are_read_padded_and_learned(tmp_path: Path, quiet_trainer: MakeTrainer) -> None:
    data = TextClassificationData(tsv(tmp_path / "a.tsv", 64), tsv(tmp_path / "b.tsv"), batch_size=8, length=24)
    module = SequenceClassification(config=BERT, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    trainer = quiet_trainer(max_epochs=12)
    trainer.fit(module, data)
    batch = next(iter(data.val_dataloader()))
    lengths = [len(sample["input_ids"]) for sample in data.val[:8]]
    assert len(set(lengths)) > 1
    assert batch["input_ids"].shape == (8, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()
    assert trainer.callback_metrics["val/accuracy"] == 1.0


def test_lines_of_json_and_a_table_give_the_same_samples(tmp_path: Path) -> None:
    table = tsv(tmp_path / "a.tsv")
    rows = [
        dict(zip(("text", "label"), line.split("\t"), strict=True)) for line in Path(table).read_text().splitlines()[1:]
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    read = []
    for path in (table, str(tmp_path / "a.jsonl")):
        data = TextClassificationData(path, path)
        data.setup("fit")
        read.append([(s["input_ids"].tolist(), s["labels"].item()) for s in data.train])
    assert read[0] == read[1]
    assert len(read[0]) == 24


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    data = TextClassificationData(tsv(tmp_path / "a.tsv"), tsv(tmp_path / "b.tsv"), text="sentence")
    with pytest.raises(ValueError, match=r"no column 'sentence'; it has \['label', 'text'\]"):
        data.setup("fit")


def test_running_text_is_cut_into_blocks_and_its_perplexity_is_that_of_the_whole(
    tmp_path: Path, quiet_trainer: MakeTrainer
) -> None:
    text = tmp_path / "a.txt"
    text.write_text("abcdefgh" * 40)
    data = CausalTextData(str(text), str(text), length=16, batch_size=3)
    module = CausalLM(config=LLAMA, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), checkpointing=True)
    trainer = quiet_trainer(max_epochs=8)
    trainer.fit(module, data)
    assert all(sample["input_ids"].shape == (16,) for sample in data.train)
    assert len(data.train) == 320 // 16  # the end-of-text token does not fill a block
    metrics = trainer.callback_metrics
    assert metrics["val/loss"] < 1.0  # log 8 = 2.08 without context
    assert torch.allclose(metrics["val/perplexity"], metrics["val/loss"].exp())


def test_a_text_shorter_than_a_block_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    data = CausalTextData(str(tmp_path / "a.txt"), str(tmp_path / "a.txt"), length=16)
    with pytest.raises(ValueError, match="4 tokens, too few for a block of 16"):
        data.setup("fit")


@pytest.mark.parametrize("make", [TextClassificationData, CausalTextData])
def test_a_missing_file_is_named_with_its_absolute_path(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "none.jsonl")):
        make("none.jsonl", "none.jsonl").setup("fit")


def test_digits_are_enlarged_shifted_chosen_and_split_without_overlap() -> None:
    data = DigitsData(size=16, channels=3, shift=torch.neg, classes=[3, 8])
    plain = DigitsData(classes=[3, 8])
    for module in (data, plain):
        module.setup("fit")
    assert data.train[0]["pixel_values"].shape == (3, 16, 16)
    assert torch.equal(data.train[0]["pixel_values"][0, ::2, 1::2], -plain.train[0]["pixel_values"][0])
    assert {sample["labels"].item() for sample in data.train} == {0, 1}
    splits = [plain.train, plain.val, plain.test]
    images = [sample["pixel_values"].numpy().tobytes() for split in splits for sample in split]
    assert len(images) == 183 + 174
    assert len(set(images)) == len(images)


@pytest.mark.parametrize("wrong", [{"channels": 2}, {"size": 12}, {"holdout": 0.5}, {"batch_size": 0}])
def test_digits_refuse_what_they_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DigitsData(**wrong)


def test_evaluation_reads_no_global_random_numbers() -> None:
    data = DigitsData()
    data.setup("fit")
    before = torch.get_rng_state()
    next(iter(data.val_dataloader()))
    next(iter(data.train_dataloader()))
    assert torch.equal(torch.get_rng_state(), before)


def test_warmup_rises_from_zero_and_the_schedule_falls_to_it(quiet_trainer: MakeTrainer) -> None:
    rates: list[float] = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = ImageClassification(config=VIT, schedule="linear", warmup=0.5)
    quiet_trainer(max_steps=8, limit_val_batches=0, callbacks=[Rates()]).fit(module, DigitsData())
    assert rates == pytest.approx([1e-3 * r for r in (0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25)])
