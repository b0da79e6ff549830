"""``apportion-export``: from checkpoints on disk to a delta, or to a merged model that transformers loads."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from apportion.delta import apply, fingerprint, load
from apportion.recipes import export
from apportion.recipes.checkpoints import Shards, weights
from apportion.recipes.export import main, rows


def llama(dtype: torch.dtype = torch.bfloat16) -> Any:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=40,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype)


def opened(folder: Path, dtype: Any = "auto") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits


def moved(model: nn.Module, share: float = 0.05) -> nn.Module:
    """A copy in which a share of all entries has moved."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(torch.where(torch.rand(p.shape) < share, torch.randn(p.shape).to(p.dtype), p))
    return other


class Module(pl.LightningModule):
    """The usual LightningModule around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Tensor) -> Tensor:
        return self.model(batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    llama().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "extra").mkdir()
    (folder / "extra" / "chat.jinja").write_text("hi")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "trainer_state.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"weights")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    return folder


@pytest.fixture
def tuned(base: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "tuned"
    moved(opened(base)).save_pretrained(folder)
    return folder


def run(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """What the command says when it stops; rich's and argparse's line breaks undone."""
    with pytest.raises(SystemExit) as left:
        run(*arguments)
    assert left.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_two_folders_make_a_delta_that_makes_the_tuned_model(
    base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "d.safetensors"
    assert run("--base", base, "--tuned", tuned, "--out", out) == 0
    delta = load(out)
    assert delta.config == {"base": "base", "tuned": "tuned"}
    assert delta.base_hash == fingerprint(opened(base)) == fingerprint(weights(base))
    printed = " ".join(capsys.readouterr().out.split())
    entries = sum(change.count for change in delta.changes.values())
    assert f"{entries:,} entries in" in printed
    assert "old values kept" in printed
    model = opened(base)
    apply(delta, model)
    assert torch.equal(logits(model), logits(opened(tuned)))
    merged = tmp_path / "merged"
    assert run("--base", base, "--apply", out, "--merge", merged) == 0
    again = opened(merged)
    assert again.dtype == torch.bfloat16
    assert fingerprint(again) == fingerprint(opened(tuned)) != fingerprint(opened(base))


def test_a_merge_keeps_what_is_no_weights(base: Path, tuned: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    merged.mkdir()
    assert run("--base", base, "--tuned", tuned, "--merge", merged) == 0
    files = {str(path.relative_to(merged)) for path in merged.rglob("*") if path.is_file()}
    assert files == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "extra/chat.jinja",
    }
    assert torch.equal(logits(opened(merged)), logits(opened(tuned)))
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_merge_that_fails_leaves_nothing(
    base: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(export, "copy_others", full)
    assert "disk full" in refused(capsys, "--base", base, "--tuned", tuned, "--merge", tmp_path / "m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_alpha_lies_between(base: Path, tuned: Path, tmp_path: Path) -> None:
    for alpha in (0.0, 0.5):
        assert run("--base", base, "--tuned", tuned, "--merge", tmp_path / str(alpha), "--alpha", alpha) == 0
    assert fingerprint(opened(tmp_path / "0.0")) == fingerprint(opened(base))
    old, new, half = (opened(folder).lm_head.weight.float() for folder in (base, tuned, tmp_path / "0.5"))
    assert torch.equal(half, (old + 0.5 * (new - old)).bfloat16().float())


def test_shards_are_read_as_one(base: Path, tuned: Path, tmp_path: Path) -> None:
    opened(base).save_pretrained(tmp_path / "split", max_shard_size="2KB")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 1
    for folder, name in ((base, "a"), (tmp_path / "split", "b")):
        assert run("--base", folder, "--tuned", tuned, "--out", tmp_path / f"{name}.safetensors") == 0
    one, other = (load(tmp_path / f"{name}.safetensors") for name in "ab")
    assert one.base_hash == other.base_hash
    assert [(n, c.new.tolist()) for n, c in one.changes.items()] == [
        (n, c.new.tolist()) for n, c in other.changes.items()
    ]


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_a_lightning_checkpoint_and_a_file_are_models_too(
    suffix: str, base: Path, tmp_path: Path, quiet_trainer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    module = Module(opened(base, torch.float32))
    trainer = quiet_trainer(max_steps=2)
    trainer.fit(module, torch.utils.data.DataLoader(torch.arange(24).reshape(2, 12), batch_size=1))
    path = tmp_path / f"last.{suffix}"
    if suffix == "ckpt":
        trainer.save_checkpoint(path)
        assert "model.lm_head.weight" in torch.load(path, weights_only=True)["state_dict"]
    else:
        state = {
            f"net.{name}": t.contiguous() for name, t in module.model.state_dict().items() if "lm_head" not in name
        }
        save_file(state, path)
    out = tmp_path / "d.safetensors"
    assert run("--base", base, "--tuned", path, "--out", out, "--no-old-values") == 0
    printed = " ".join(capsys.readouterr().err.split())
    assert "Note: The tuned values were rounded to the base's dtype: torch.float32 to torch.bfloat16." in printed
    delta = load(out)
    assert not delta.revertible
    assert not delta.fresh
    model = opened(base)
    apply(delta, model)
    goal = {name: t.bfloat16() for name, t in module.model.state_dict().items()}
    assert all(torch.equal(t, goal[name]) for name, t in model.state_dict().items())


def test_a_classifier_on_a_pretrained_body_is_merged_by_its_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(**sizes, vocab_size=40, num_labels=3)
    BertForMaskedLM(config).save_pretrained(tmp_path / "body")
    goal = moved(BertForSequenceClassification.from_pretrained(tmp_path / "body", config=config))
    torch.save({"state_dict": Module(goal).state_dict()}, tmp_path / "last.ckpt")
    goal.config.architectures = ["BertForSequenceClassification"]
    goal.config.save_pretrained(tmp_path / "config")
    options = ("--base", tmp_path / "body", "--tuned", tmp_path / "last.ckpt", "--merge", tmp_path / "merged")
    said = refused(capsys, *options)
    assert "The model lacks `bert.pooler.dense.bias`" in said
    assert not (tmp_path / "merged").exists()
    assert run(*options, "--config", tmp_path / "config") == 0
    merged = BertForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert fingerprint(merged) == fingerprint(goal)


def test_a_pattern_of_fresh_tensors_that_does_nothing_is_told(
    base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {name: tensor.clone() for name, tensor in opened(tuned).state_dict().items() if name != "lm_head.weight"}
    save_file({**state, "classifier.weight": torch.zeros(2, 16)}, tmp_path / "t.safetensors")
    options = ("--base", base, "--tuned", tmp_path / "t.safetensors", "--out", tmp_path / "d.safetensors", "--fresh")
    for pattern, way in (("classifier", r"`classifier\..*`"), ("classif", "`.*(?:classif).*`")):
        said = refused(capsys, *options, pattern)
        assert f"`--fresh {pattern}` matches no tensor of TUNED, which has `classifier.weight`: it must match" in said
        assert f"as a whole, as {way} does." in said
    said = refused(capsys, *options, "head")
    assert (
        "`--fresh head` matches no tensor of TUNED, which has `classifier.weight`, `model.embed_tokens.weight`" in said
    )
    for pattern in ("[", "(?i", "x(?i)y"):
        assert f"argument --fresh: `--fresh {pattern}` is no regular expression: " in refused(capsys, *options, pattern)
    assert not (tmp_path / "d.safetensors").exists()
    assert run(*options, r"classifier\..*") == 0
    assert load(tmp_path / "d.safetensors").fresh == ("classifier.weight",)


def test_show_adds_up(base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "d.safetensors"
    run("--base", base, "--tuned", tuned, "--out", out, "--no-old-values")
    delta = load(out)
    capsys.readouterr()
    assert run("--show", out, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    header = 8 + int.from_bytes(out.read_bytes()[:8], "little")
    assert told["total"]["bytes"] == sum(row["bytes"] for row in told["tensors"]) == out.stat().st_size - header
    assert told["tensors"] == rows(delta)
    row = next(row for row in rows(delta) if row["tensor"] == "model.layers.0.mlp.up_proj.weight")
    change = delta.changes[row["tensor"]]
    assert row["entries"] == change.count == len(change.indices)
    assert row["density"] == change.count / (24 * 16)
    assert row["dense"] == 2 * 24 * 16
    assert (row["encoding"], row["bytes"]) in (("gaps", 4 * change.count), ("bitmask", 2 * change.count + 48))
    assert run("--show", out) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"total\s.*{told['total']['entries']:,}\s.*{told['total']['bytes']:,}", printed)
    assert f"{told['total']['bytes'] / told['total']['entries']:.2f} bytes an entry" in " ".join(printed.split())


def test_a_delta_of_another_base_is_not_merged(
    base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "d.safetensors"
    run("--base", base, "--tuned", tuned, "--out", out)
    said = refused(capsys, "--base", tuned, "--apply", out, "--merge", tmp_path / "m")
    assert "the model has this delta already" in said
    llama().save_pretrained(tmp_path / "other")
    said = refused(capsys, "--base", tmp_path / "other", "--apply", out, "--merge", tmp_path / "m")
    assert "is not the base of this delta" in said
    out.write_bytes(out.read_bytes()[:-1])
    said = refused(capsys, "--base", base, "--apply", out, "--merge", tmp_path / "m")
    assert "the file is cut short" in said
    assert not (tmp_path / "m").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "d.safetensors", "other", "tuned"]


class Evil:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("side", ["--base", "--tuned"])
def test_a_checkpoint_that_would_run_something_is_refused(
    side: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = {"state_dict": opened(base).state_dict(), "hyper_parameters": Evil(tmp_path / "ran")}
    torch.save(held, tmp_path / "evil.ckpt")
    sides = {"--base": base, "--tuned": base, side: tmp_path / "evil.ckpt"}
    said = refused(capsys, *(x for pair in sides.items() for x in pair), "--out", tmp_path / "d.safetensors")
    assert "holds more than tensors and plain data, and is not opened" in said
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "evil.ckpt", weights_only=False)
    assert (tmp_path / "ran").exists()  # it does run where it is let


def test_torch_is_always_asked_for_weights_only(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"state_dict": Module(moved(opened(base))).state_dict()}, tmp_path / "t.ckpt")
    asked: list[Any] = []
    real = torch.load

    def watched(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs.get("weights_only"))
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "load", watched)
    assert run("--base", base, "--tuned", tmp_path / "t.ckpt", "--merge", tmp_path / "m") == 0
    assert asked
    assert set(asked) == {True}


def test_wrong_sources_say_what_is_right(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(path: Path) -> str:
        return refused(capsys, "--base", path, "--tuned", base, "--out", tmp_path / "o.safetensors")

    assert "nowhere does not exist; it must be a Hugging Face folder" in said(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has neither model.safetensors nor model.safetensors.index.json" in said(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("x")
    assert "notes.txt must be a Hugging Face folder" in said(tmp_path / "notes.txt")
    (tmp_path / "short.ckpt").write_bytes(b"PK")
    assert re.search("short.ckpt (is cut short|holds more)", said(tmp_path / "short.ckpt"))
    torch.save([1], tmp_path / "list.ckpt")
    assert "list.ckpt has no `state_dict`" in said(tmp_path / "list.ckpt")
    (tmp_path / "short.safetensors").write_bytes(b"xx")
    assert "short.safetensors is cut short" in said(tmp_path / "short.safetensors")
    index = tmp_path / "empty" / "model.safetensors.index.json"
    index.write_text("[]")
    assert "index.json is damaged" in said(tmp_path / "empty")
    for name in ("gone.safetensors", "../base/model.safetensors"):
        index.write_text(json.dumps({"weight_map": {"w": name}}))
        assert f"names {name}, which is not in" in said(tmp_path / "empty")
    assert not (tmp_path / "o.safetensors").exists()


def test_wrong_options_say_what_is_right(
    base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "d.safetensors"
    both = ("--base", base, "--tuned", tuned)
    for options in ((), both, (*both, "--out", out, "--merge", out), ("--show", out, *both), ("--apply", out)):
        assert "Give `--base`, `--tuned` and `--out` for a delta" in refused(capsys, *options)
    assert "must end with .safetensors" in refused(capsys, *both, "--out", tmp_path / "d.bin")
    (tmp_path / "e.safetensors").mkdir()
    taken = (("--out", tuned / "model.safetensors"), ("--merge", tuned), ("--out", tmp_path / "e.safetensors"))
    for target in taken:
        assert "is there already and is not overwritten" in refused(capsys, *both, *target)
    file = base / "model.safetensors"
    assert "`--base` to be a Hugging Face folder" in refused(
        capsys, "--base", file, "--tuned", tuned, "--merge", tmp_path / "m"
    )
    assert "No such file" in refused(capsys, "--show", tmp_path / "none.safetensors")
    config = json.loads((base / "config.json").read_text())
    for change, said in (
        ({"architectures": ["Mine"]}, "The config names Mine, which transformers has not itself"),
        ({"architectures": None}, "The config names no architecture"),
        ({"hidden_size": 32}, "does not fit its config"),
    ):
        (base / "config.json").write_text(json.dumps({**config, **change}))
        assert said in refused(capsys, *both, "--merge", tmp_path / "m")
    (base / "config.json").unlink()
    assert "has no config.json" in refused(capsys, *both, "--merge", tmp_path / "m")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "e.safetensors") == ["base", "tuned"]


def test_a_file_is_read_tensor_by_tensor_and_the_bar_moves(base: Path) -> None:
    ticks: list[int] = []
    shards = Shards([base / "model.safetensors"], lambda: ticks.append(1))
    assert "model.norm.weight" in shards
    assert len(shards) == len(list(shards)) > 10
    assert not ticks
    assert torch.equal(shards["model.norm.weight"], torch.ones(16, dtype=torch.bfloat16))
    assert ticks == [1]
    fingerprint(shards)
    assert len(ticks) == 1 + len(shards)
