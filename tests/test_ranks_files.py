"""Ranks in files: what is saved at any step computes what the live model computes, and resuming is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from alike import assert_equal
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from pytorch_lightning.callbacks import ModelCheckpoint
from rank_methods import CASES, LORA_CASES, RANK_METHODS, SCHEDULE, svd_net
from test_ranks import Sequences
from torch import Tensor, nn
from toys import LENGTH, Net, Task, adamw, fit, loader, tokens, trainable, two_groups

from apportion.callbacks import AdaLoRA
from apportion.lora_export import to_lora
from apportion.optim import Selective

IDS = tokens(6, seed=5)[:, :LENGTH]


def logits(model: nn.Module) -> Tensor:
    training = model.training
    model.eval()
    with torch.no_grad():
        found: Tensor = model(IDS)
    model.train(training)
    return found


# Save and load
# --------------------------------------------------------------------------------------------------------------------


class Saves(pl.Callback):
    """Saves the adapter after every optimizer step, together with what the live model computes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder, 0
        self.live: dict[int, Tensor] = {}
        self.checkpoints: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step > self.seen:
            self.seen = trainer.global_step
            pl_module.net.save_pretrained(str(self.folder / str(self.seen)))
            self.live[self.seen] = logits(pl_module.net)
            self.checkpoints[self.seen] = {k: v.clone() for k, v in pl_module.net.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "shrink"),
    [(name, shrink) for name in CASES for shrink in (True, False) if shrink or not CASES[name].grows],
)
def test_a_file_of_any_step_computes_what_the_live_model_did(name: str, shrink: bool, tmp_path: Path) -> None:
    case = CASES[name]
    saves = Saves(tmp_path)
    net: Any = case.net()
    # Choices after steps 3 and 6, so that steps 4, 5 and 7 lie between; final from step 8 on.
    fit(Task(net), [case.make(shrink=shrink, warmup=1, final=2, every=3), saves], steps=10)
    net.save_pretrained(str(tmp_path / "end"))
    saves.live[11] = logits(net)
    (tmp_path / "end").rename(tmp_path / "11")
    assert len(saves.live) == 11
    for step, live in saves.live.items():
        again = PeftModel.from_pretrained(Net(), str(tmp_path / str(step)))
        torch.testing.assert_close(logits(again), live, rtol=0, atol=1e-5)
        if step in saves.checkpoints:
            whole = case.net()
            whole.load_state_dict(saves.checkpoints[step])
            torch.testing.assert_close(logits(whole), live, rtol=0, atol=1e-5)
    torch.testing.assert_close(saves.live[11], saves.live[10], rtol=0, atol=1e-5)
    assert (saves.live[4] - saves.live[3]).abs().max() > 1e-3  # it was training


def test_weights_of_ranks_that_are_gone_are_not_loaded_silently() -> None:
    model = svd_net()
    whole = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = Selective(adamw(trainable(model)), model, AdaLoRA(target=20, **SCHEDULE), total_steps=8)
    for _ in range(6):
        model(IDS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"have ranks of .* that are out for good"):
        model.load_state_dict(whole)
    before = logits(model)
    model.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), before)
    optimizer.close()
    model.load_state_dict(whole)


# Resume
# --------------------------------------------------------------------------------------------------------------------


def train(name: str, folder: Path, resume: Path | None = None, save: bool = False, accumulate: int = 1) -> Any:
    case = CASES[name]
    driver = case.make(warmup=1, final=3, every=3)
    task = Task(
        case.net(dropout=0.2),
        lambda m: adamw(two_groups(m)),
        lambda o: {"scheduler": torch.optim.lr_scheduler.ExponentialLR(o, 0.95), "interval": "step"},
    )
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    options: dict[str, Any] = {"enable_checkpointing": True} if save else {}
    run = fit(
        task,
        [driver, saver] if save else [driver],
        steps=10,
        resume=None if resume is None else str(resume),
        data=loader(8 * accumulate - (2 if accumulate > 1 else 0)),  # the last window of an epoch may be a short one
        accumulate_grad_batches=accumulate,
        seed=11 if resume is None else 77,  # what resuming does not restore would show
        **options,
    )
    return task, driver, run


def state_of(found: Any) -> dict[str, Any]:
    task, driver, run = found
    return {
        "weights": task.state_dict(),
        "optimizer": run.optimizers[0].state_dict()["state"],
        "selection": driver.selection.state_dict(),
        "logged": {k: v for k, v in run.callback_metrics.items() if k.startswith(driver.label)},
    }


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_resumed_from_any_step_a_run_goes_on_bit_for_bit(name: str, accumulate: int, tmp_path: Path) -> None:
    whole = state_of(train(name, tmp_path, save=True, accumulate=accumulate))
    assert whole["selection"]["final"]
    files = sorted(tmp_path.glob("step=*.ckpt"), key=lambda f: int(f.stem.split("=")[1]))
    assert [int(f.stem.split("=")[1]) for f in files] == list(range(1, 11))
    for file in files[:9] if accumulate == 1 else files[1:9:3]:
        assert_equal(state_of(train(name, tmp_path, resume=file, accumulate=accumulate)), whole, file.stem)


@pytest.mark.parametrize("name", RANK_METHODS)
def test_checkpoints_have_the_shapes_of_the_untouched_run(name: str, tmp_path: Path) -> None:
    train(name, tmp_path, save=True)
    first, last = (torch.load(tmp_path / f"step={i}.ckpt", weights_only=True) for i in (1, 10))
    assert {k: v.shape for k, v in first["state_dict"].items()} == {k: v.shape for k, v in last["state_dict"].items()}
    plain = Task(RANK_METHODS[name].net())
    plain.load_state_dict(last["state_dict"])
    optimizer = adamw(two_groups(plain))
    optimizer.load_state_dict(last["optimizer_states"][0])  # a run without any selection goes on from here
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert optimizer.state[p]["exp_avg"].shape == p.shape


@pytest.mark.parametrize("at", [2, 4, 5, 6, 8])
@pytest.mark.parametrize("name", RANK_METHODS)
def test_the_wrapper_resumes_bit_for_bit(name: str, at: int) -> None:
    def make() -> tuple[Any, Selective]:
        model = RANK_METHODS[name].net(dropout=0.0)
        base = adamw(trainable(model))
        return model, Selective(base, model, CASES[name].make(warmup=1, final=4, every=3), total_steps=10)

    def go(model: Any, optimizer: Selective, steps: range) -> None:
        for t in steps:
            model.loss(tokens(4, seed=t)).backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = make()
    go(model, optimizer, range(at))
    saved = ({k: v.clone() for k, v in model.state_dict().items()}, optimizer.state_dict())
    saved = torch.load(_written(saved), weights_only=True)
    go(model, optimizer, range(at, 10))
    other, resumed = make()
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    go(other, resumed, range(at, 10))
    assert_equal(dict(other.state_dict()), dict(model.state_dict()))
    assert_equal(resumed.state_dict(), optimizer.state_dict())


def _written(value: Any) -> Any:
    import io

    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


# Export
# --------------------------------------------------------------------------------------------------------------------


def pruned(net: Any, steps: int = 8, **options: Any) -> Any:
    fit(Task(net), [AdaLoRA(**{"target": 9, **SCHEDULE, **options})], steps=steps)
    return net


def test_the_export_computes_the_same_with_the_ranks_that_are_left(tmp_path: Path) -> None:
    model = pruned(svd_net())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ranks = to_lora(model, tmp_path)
    assert_equal(dict(model.state_dict()), before)
    assert sum(ranks.values()) == 9
    again: Any = PeftModel.from_pretrained(Net(), str(tmp_path))
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)
    assert isinstance(again.peft_config["default"], LoraConfig)
    adapted = {n: m.lora_A["default"].weight.shape[0] for n, m in again.get_base_model().named_modules() if
               hasattr(m, "base_layer")}  # fmt: skip
    assert adapted == ranks
    assert len(ranks) < 12  # layers without a rank are not adapted
    assert 0 not in ranks.values()
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-5)


def test_the_export_of_a_run_in_progress_is_that_of_the_live_model(tmp_path: Path) -> None:
    found = []

    class Export(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            folder = str(tmp_path / str(trainer.global_step))
            ranks = to_lora(pl_module.net, folder)
            again = PeftModel.from_pretrained(Net(), folder)
            torch.testing.assert_close(logits(again), logits(pl_module.net), rtol=0, atol=1e-6)
            found.append(sum(ranks.values()))

    fit(Task(svd_net()), [AdaLoRA(target=20, **SCHEDULE), Export()], steps=8)
    assert found == [48, 31, 48, 20, 20, 20, 20, 20]


def test_the_export_keeps_what_else_was_saved(tmp_path: Path) -> None:
    module = Sequences("SEQ_CLS")
    fit(module, [AdaLoRA(target=3, **SCHEDULE)], steps=8)
    to_lora(module.model, tmp_path)
    again = PeftModel.from_pretrained(Sequences("SEQ_CLS").model.unload(), str(tmp_path))
    for model in (module.model, again):
        model.eval()
    assert again.peft_config["default"].task_type == "SEQ_CLS"
    theirs, ours = (m(input_ids=IDS).logits for m in (again, module.model))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)


def test_a_name_that_ends_like_another_is_told_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net = nn.Sequential(nn.Linear(4, 4), inner)
    config = AdaLoraConfig(init_r=3, target_r=1, total_step=9, target_modules=["0", "1.0", "1.1"])
    model = get_peft_model(net, config)
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p)
    with torch.no_grad():
        model.get_submodule("base_model.model.0").lora_E["default"][1:] = 0
        model.get_submodule("base_model.model.1.0").lora_E["default"][:1] = 0
    assert to_lora(model, tmp_path) == {"0": 1, "1.0": 2, "1.1": 3}
    x = torch.randn(3, 4)
    expected = model(x)
    again = PeftModel.from_pretrained(model.unload(), str(tmp_path))
    torch.testing.assert_close(again(x), expected, rtol=1e-5, atol=1e-5)


def test_convolutions_are_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1))
    config = AdaLoraConfig(init_r=3, target_r=1, total_step=9, target_modules=["0", "2"])
    model = get_peft_model(net, config)
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p)
    with torch.no_grad():
        model.get_submodule("base_model.model.0").lora_E["default"][1] = 0
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)
    assert to_lora(model, tmp_path) == {"0": 2, "2": 3}
    again = PeftModel.from_pretrained(model.unload(), str(tmp_path))
    torch.testing.assert_close(again(x), expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`to_lora\(Net, ...\)` needs a model from `peft.get_peft_model`"):
        to_lora(Net(), tmp_path)
    with pytest.raises(ValueError, match=r"found no AdaLoRA adapter 'other': the model has 'default'"):
        to_lora(svd_net(), tmp_path, adapter="other")
    with pytest.raises(ValueError, match=r"found no AdaLoRA adapter 'default'"):
        to_lora(LORA_CASES["lora"].net(), tmp_path)
    with pytest.raises(ValueError, match=r"All ranks .* are out"):
        to_lora(pruned(svd_net(), target=0), tmp_path)
