"""The estimate: it says what the tracker then measures, for models that do not fit here as well."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, MambaConfig, MixtralConfig

from apportion.callbacks import HFT, IST, LISA, BAdam, OwLore
from apportion.estimate import estimate
from apportion.fake import FakeRun
from apportion.memory import Tracker
from apportion.optim import Selective
from apportion.recipes import shapes
from apportion.recipes.estimate import main
from apportion.recipes.request import Request

TOKENS = torch.zeros(2, 96, dtype=torch.int64)
BATCH = {"input_ids": TOKENS, "labels": TOKENS}
GIB = 2**30


def llama() -> nn.Module:
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1000,
        max_position_embeddings=256,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def adapted() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(llama(), LoraConfig(r=16, target_modules="all-linear"))


def tracked(build: Any, method: Any, precision: str, checkpointing: bool) -> Any:
    """The peak of two real steps."""
    model = build().to(torch.bfloat16 if precision == "bf16-true" else torch.float32)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    with Tracker(model) as tracker:
        optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
        if method is not None:
            optimizer = Selective(optimizer, model, method)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = model(**BATCH).loss
            loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad()
    return tracker.peak


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("precision", "checkpointing"), [("32-true", False), ("bf16-true", True), ("bf16-mixed", True)]
)
@pytest.mark.parametrize(("build", "method"), [(llama, None), (adapted, None), (llama, LISA(active_layers=1))])
def test_the_estimate_is_what_the_tracker_measures(
    build: Any, method: Any, precision: str, checkpointing: bool
) -> None:
    measured = tracked(build, method, precision, checkpointing)
    told = estimate(build, BATCH, method=method or "full", precision=precision, checkpointing=checkpointing)
    assert told.peak == pytest.approx(measured.total, rel=0.02)
    for part in ("weights", "gradients", "optimizer", "activations", "temporaries"):
        assert getattr(told, part) == pytest.approx(getattr(measured, part), abs=0.02 * measured.total)


PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "tinyllama-1.1b": 1_100_048_384,
    "gpt-2": 124_439_808,
    "deberta-v3-base": 184_423_682,
    "vit-b-16": 86_567_656,
    "bert-base": 109_483_778,
    "bert-large": 333_581_314,
    "roberta-base": 124_647_170,
    "roberta-large": 355_361_794,
    "deberta-v3-large": 435_063_810,
    "bart-large": 406_291_456,
    "t5-base": 222_903_552,
}


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_a_shape_has_the_parameters_of_its_model(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = shapes.Shape(shapes.config_of(name)).build()
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_every_shape_is_in_the_table_above() -> None:
    assert set(shapes.names()) == set(PARAMETERS)


def test_the_command_tells_llama_7b_in_half_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "llama-2-7b", "--precision", "bf16-true", "--batch", "1", "--length", "1024"]
    options += ["--checkpointing", "--json"]
    told = {}
    for method in ("full", "lisa"):
        assert main([*options, "--method", method]) == 0
        told[method] = json.loads(capsys.readouterr().out)
        assert told[method]["seconds"] < 30
    # 2 bytes for each of weights, gradients and two moments, and what the loop form needs for the largest tensor
    assert told["full"]["peak"] == pytest.approx(4 * 2 * 6_738_415_616 + 4 * 32000 * 4096, rel=0.01)
    assert told["full"]["peak"] / GIB == pytest.approx(50.7, abs=0.1)
    assert told["lisa"]["peak"] / GIB < 17.1
    lisa = told["lisa"]
    parts = ("weights", "gradients", "optimizer", "activations", "temporaries")
    assert lisa["peak"] == sum(lisa[part] for part in parts)
    assert lisa["offloaded"] == 0
    assert lisa["trainable"] == 2 * 202_383_360 + 2 * 32000 * 4096 + 4096
    assert lisa["gradients"] == 2 * lisa["trainable"]
    assert len(lisa["selected"]) == 2


def test_settings_reach_the_method(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "tinyllama-1.1b", "--length", "64", "--json", "--method", "lisa"]
    main([*options, "--set", "active_layers=3", "--set", "train_embeddings=False"])
    told = json.loads(capsys.readouterr().out)
    assert len(told["selected"]) == 3
    assert told["settings"] == {"active_layers": 3, "train_embeddings": False}


def test_the_table_has_all_methods_side_by_side(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, vocab_size=100
    )
    config.save_pretrained(tmp_path)
    assert main(["--model", str(tmp_path), "--table", "--length", "32"]) == 0
    printed = capsys.readouterr().out
    for word in ("full", "lora", "lisa", "ist", "badam", "hft", "activations", "offloaded", "peak"):
        assert word in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "gpt-9"], r"`--model gpt-9` is neither a shape \(bart-large, bert-base, .*config"),
        (["--model", "gpt-2", "--method", "luck"], r"`--method luck` must be one of full, lora, lisa, ist"),
        (
            ["--model", "gpt-2", "--method", "lisa", "--set", "layers=2"],
            r"LISA has no such setting; it has active_layers",
        ),
        (["--model", "gpt-2", "--set", "layers=2"], "`--set` needs one `--method` that has settings"),
        (["--model", "gpt-2", "--length", "4096"], r"`--length 4096` must lie in \[1, 1024\]"),
        (["--model", "gpt-2", "--batch", "0"], "0 must be at least 1"),
        (
            ["--model", "gpt-2", "--method", "lisa", "--set", "active_layers=abc"],
            r"`--set active_layers=abc`: LISA cannot be made with it \(.*\); active_layers is int \| float",
        ),
        (
            ["--model", "gpt-2", "--method", "hft", "--set", "amount=0.5", "--set", "round=1.5"],
            r"error: `--set round=1.5`: HFT cannot be made with it \(.*\); round is int, 0 by default",
        ),
    ],
)
def test_a_wrong_option_lists_the_right_ones(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(options)
    assert left.value.code == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert re.search(message, printed), printed


def test_offloaded_state_is_told_apart_and_every_layer_has_had_its_turn() -> None:
    lora, ist = estimate(adapted, BATCH), estimate(adapted, BATCH, method=IST(active=1))
    assert ist.optimizer == lora.optimizer // 4
    assert ist.offloaded == lora.optimizer - lora.optimizer // 4
    assert ist.peak < lora.peak


def test_methods_cost_what_they_train() -> None:
    full = estimate(llama, BATCH, precision="bf16-true")
    half = estimate(llama, BATCH, precision="bf16-true", method=HFT())
    block = estimate(llama, BATCH, precision="bf16-true", method=BAdam())
    always = 2 * 1000 * 128 + 128  # embedding, head, final norm
    assert half.trainable == pytest.approx(always + (full.trainable - always) / 2, rel=0.02)
    assert half.optimizer == pytest.approx(2 * 2 * half.trainable, rel=0.001)  # and step counts
    assert block.optimizer >= 3 * 4 * block.trainable  # with fp32 masters
    assert block.trainable < full.trainable / 4


def test_a_score_that_reads_weights_is_replaced_and_said_to_be() -> None:
    told = estimate(llama, BATCH, method=OwLore(active_layers=2))
    assert len(told.selected) == 2
    assert any(line.startswith("equal scores in place of") for line in told.assumptions)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_form_of_the_optimizer_shows_in_the_temporaries() -> None:
    forms = ("adamw-fused", "adamw", "adamw-foreach")
    fused, loop, foreach = (estimate(llama, BATCH, optimizer=form, checkpointing=True) for form in forms)
    assert fused.peak <= loop.peak < foreach.peak
    assert foreach.temporaries >= fused.parameters * 4  # a copy of everything that trains


def test_tied_weights_are_one_tensor_on_fake_tensors() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 8)
            self.head = nn.Linear(8, 50, bias=False)
            self.head.weight = self.embed.weight
            self.table = torch.ones(7)  # neither parameter nor buffer

    run = FakeRun(Tied, None, lambda model, batch: model.head(model.embed(batch)).sum(), precision="bf16-true")
    assert run.model.head.weight is run.model.embed.weight
    assert run.model.head.weight.dtype is run.model.table.dtype is torch.bfloat16


def test_attention_with_dropout_keeps_no_matrix_of_pairs() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            heads = self.project(x).view(1, -1, 4, 16).transpose(1, 2)
            return F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.1)

    told = estimate(Attention, torch.ones(1, 2048, 64), loss_fn=lambda model, batch: model(batch).sum())
    assert told.activations + told.temporaries < 4 * 2048 * 2048


def test_a_causal_model_needs_no_matrix_of_a_mask() -> None:
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    tokens = torch.zeros(1, 4096, dtype=torch.int64)
    told = estimate(lambda: LlamaForCausalLM(config), {"input_ids": tokens, "labels": tokens}, precision="bf16-true")
    assert told.activations + told.temporaries < 4096 * 4096


def test_a_lightning_module_is_estimated_by_its_training_step() -> None:
    import pytorch_lightning as pl

    class Module(pl.LightningModule):
        reads = False

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(100, 100)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            loss = self.net(batch).square().mean()
            self.log("loss", loss)
            if self.reads and loss.item() > 1:
                return 2 * loss
            return loss

    told = estimate(Module, torch.ones(8, 100))
    assert told.weights == told.gradients == 4 * 10_100
    Module.reads = True
    with pytest.raises(ValueError, match=r"py:\d+ \(`if self.reads and loss.item\(\) > 1:`\). Pass `loss_fn="):
        estimate(Module, torch.ones(8, 100))
    assert estimate(Module, torch.ones(8, 100), loss_fn=lambda m, b: m.net(b).square().mean()).peak == told.peak


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"precision": "8-bit"}, ValueError, r"`precision='8-bit'` must be one of 32-true, bf16-true, bf16-mixed"),
        ({"optimizer": "adam"}, ValueError, r"`estimate\(optimizer='adam'\)` must be one of adamw, "),
        ({"method": "lisa"}, ValueError, r"`estimate\(method='lisa'\)` must be 'full' or a method"),
        ({"steps": 1}, ValueError, r"`estimate\(steps=1\)` must be at least 2"),
        ({"build": nn.Linear(1, 1)}, TypeError, r"`build=Linear` must be a function that makes the model"),
        ({"build": lambda: 1}, TypeError, r"`build\(\)` gave a int, not a module"),
        ({"build": lambda: nn.Linear(9, 1), "batch": torch.ones(1, 9)}, TypeError, "`Linear` gives no `.loss`"),
        ({"build": lambda: nn.Linear(9, 1), "checkpointing": True}, ValueError, "Linear holds no module with"),
    ],
)
def test_what_cannot_be_estimated_is_refused_with_advice(wrong: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        estimate(**{"build": llama, "batch": BATCH, **wrong})


def test_experts_are_multiplied_in_groups_and_it_is_said() -> None:
    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        num_local_experts=4,
    )
    told = Request(config, length=32).run()
    assert told.weights == pytest.approx(2 * told.parameters, rel=0.001)  # and the rotary frequencies
    assert any("grouped_mm" in line for line in told.assumptions)


def test_a_state_space_model_is_extrapolated_and_it_is_said() -> None:
    config = MambaConfig(hidden_size=32, num_hidden_layers=12, vocab_size=50, state_size=4)
    request = Request(config, length=8)
    told, direct = request.run(), request._at(config)
    assert told.assumptions[0].startswith("EXTRAPOLATED")
    assert told.parameters == direct.parameters
    assert told.peak == pytest.approx(direct.peak, rel=0.02)


def small(folder: Path, architecture: str | None, family: str = "bert") -> str:
    """A folder with the config of a small model; None names no class."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    named = None if architecture is None else [architecture]
    AutoConfig.for_model(family, vocab_size=100, architectures=named, **sizes).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "head", ["SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM", "CausalLM"]
)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_head_is_built_as_the_config_names_it(
    head: str, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family, name = ("llama", f"LlamaFor{head}") if head == "CausalLM" else ("bert", f"BertFor{head}")
    folder = small(tmp_path, name, family)
    assert main(["--model", folder, "--length", "8", "--method", method, "--lora-rank", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["assumptions"][0] == f"the model is {name}"
    with torch.device("meta"):
        model = shapes.Shape(shapes.config_of(folder)).build()
    assert type(model).__name__ == name
    if method == "full":
        assert told["parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("BertForQuestionAnswering", "qa_outputs"),
        ("BertForTokenClassification", "classifier"),
        ("LlamaForTokenClassification", "score"),
    ],
)
def test_a_head_beside_adapters_is_trained_whole(name: str, head: str, tmp_path: Path) -> None:
    family = "llama" if name.startswith("Llama") else "bert"
    with torch.device("meta"):
        model = shapes.Shape(shapes.config_of(small(tmp_path, name, family)), lora_rank=2).build()
    trained = [name for name, p in model.named_parameters() if p.requires_grad and head in name]
    assert trained
    assert not any("lora" in name for name in trained)


@pytest.mark.parametrize("name", ["BertModel", "BertForPreTraining", "Mine"])
def test_a_model_without_a_loss_is_refused_with_the_heads_that_have_one(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--model", small(tmp_path, name)])
    printed = " ".join(capsys.readouterr().err.split())
    assert f"`architectures: [{name}]` in the config of the model: a step needs a class with a loss" in printed
    assert "ForTokenClassification, ForQuestionAnswering" in printed


def test_a_config_that_names_no_class_is_told_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", small(tmp_path / "llama", None, "llama"), "--length", "8"]) == 0
    assert "the model is LlamaForCausalLM, as its config names no class" in " ".join(capsys.readouterr().out.split())
    for name, said in (
        (None, "No `architectures`"),
        ("DebertaV2ForCausalLM", "`architectures: [DebertaV2ForCausalLM]`"),
    ):
        with pytest.raises(SystemExit):
            main(["--model", small(tmp_path / "deberta", name, "deberta-v2")])
        printed = " ".join(capsys.readouterr().err.split())
        assert f"{said} in the config of the model: AutoModelForCausalLM builds no model of DebertaV2Config" in printed


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("x.safetensors", b"\x10\0\0\0\0\0\0\0\xff\xfe"),
        ("config.json", b"{"),
        ("other.json", b"[1]"),
        ("odd.json", b'{"model_type": "bert", "hidden_size": "x"}'),
    ],
)
def test_a_file_that_is_no_config_is_refused(
    file: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(SystemExit) as left:
        main(["--model", str(tmp_path / file)])
    assert left.value.code == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert f"{file}` holds no config that transformers can read" in printed
    assert "config.json, not the weights" in printed


def test_a_local_config_is_read(tmp_path: Path) -> None:
    AutoConfig.for_model("bert", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                         architectures=["BertForSequenceClassification"]).save_pretrained(tmp_path)  # fmt: skip
    shape = shapes.Shape(shapes.config_of(str(tmp_path)))
    assert shape.task == "AutoModelForSequenceClassification"
    assert set(shape.batch(3, 16)) == {"input_ids", "labels"}
    assert shapes.config_of(str(tmp_path / "config.json")).hidden_size == 32
