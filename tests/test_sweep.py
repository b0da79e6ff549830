"""Jobs of a sweep: named after their config, done once, taken up where they stopped, agreed on by all ranks."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from workers import RanksFailed, ranks

from apportion.recipes.sweeps import sweep
from apportion.recipes.sweeps.identity import identity
from apportion.recipes.sweeps.inputs import changed, inputs
from apportion.recipes.sweeps.objective import better, directed, direction, objective_of, settled
from apportion.recipes.sweeps.processes import SameConfig, guard
from apportion.recipes.train import train

Launch = Callable[..., tuple[DictConfig, Path]]


def composed(*overrides: str) -> DictConfig:
    with initialize_config_module("apportion.conf", version_base="1.3"):
        return compose("train", overrides=list(overrides), return_hydra_config=True)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Makes this process the job of a Hydra app, a sweep unless told otherwise; gives its config and folder."""

    def go(*overrides: str, mode: RunMode = RunMode.MULTIRUN, folder: str | None = None) -> tuple[DictConfig, Path]:
        cfg = composed(*overrides)
        place = tmp_path / (folder or identity(cfg))
        with open_dict(cfg):
            cfg.hydra.runtime.output_dir = str(place)
            cfg.hydra.mode = mode
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            cfg.pop("hydra")
        return cfg, place

    yield go
    HydraConfig.instance().cfg = None
    GlobalHydra.instance().clear()


def finishing(folder: Path, objective: float | None, calls: list[DictConfig]) -> Callable[[DictConfig], float]:
    """A training that writes what `train` writes."""

    def go(cfg: DictConfig) -> float:
        calls.append(cfg.copy())
        (folder / "metrics.json").write_text(json.dumps({"metrics": {}, "objective": objective}))
        return math.nan if objective is None else objective

    return go


def failing(cfg: DictConfig) -> float:
    raise ValueError("the third layer is missing\nand so is the fourth")


# Identity -------------------------------------------------------------------------------------------------------------


def test_the_identity_knows_what_a_job_computes_and_not_how_it_is_run() -> None:
    one = identity(composed("callbacks=lisa"))
    same = ["seed=0", "logger=none", "on_failure=continue", "hydra.sweep.dir=elsewhere"]
    assert all(identity(composed("callbacks=lisa", other)) == one for other in same)
    others = ["seed=1", "optimizer.lr=0.1", "callbacks.lisa.interval=3", "model.config.hidden_size=8", "callbacks=ist"]
    others += [
        "ckpt_path=/a/b.ckpt",
        "ckpt_path=/a/c.ckpt",
    ]  # of another run: one's own is taken up without being named
    assert len({one, *(identity(composed("callbacks=lisa", other)) for other in others)}) == 8


def test_the_identity_is_the_same_tomorrow_and_in_another_folder() -> None:
    text = (
        "{name: '${now:%H-%M-%S-%f}', log: '${hydra:runtime.output_dir}/log', again: '${name}', n: '${hydra.job.num}'}"
    )
    assert identity(OmegaConf.create(text)) == identity(OmegaConf.create(text))
    assert identity(OmegaConf.create({"name": "a"})) != identity(OmegaConf.create({"name": "b"}))


def test_an_interpolation_counts_by_its_value() -> None:
    first, second = (OmegaConf.create({"lr": lr, "optimizer": {"lr": "${lr}"}}) for lr in (0.1, 0.2))
    assert identity(first) != identity(second)
    assert identity(first) == identity(OmegaConf.create({"optimizer": {"lr": 0.1}, "lr": 0.1}))


def test_the_folder_of_a_job_is_its_identity() -> None:
    cfg = composed("callbacks=lisa", "seed=3")
    assert OmegaConf.select(cfg, "hydra.sweep.subdir") == identity(cfg)
    assert len(identity(cfg)) == 12


# How far a job has come -----------------------------------------------------------------------------------------------


def begun(folder: Path, **files: Any) -> Path:
    sweep.begin(folder, "mine", {"/a/train.tsv": "12"})
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_a_folder_without_a_job_is_new(tmp_path: Path) -> None:
    assert sweep.standing(tmp_path / "none", "mine") == sweep.Standing()
    (tmp_path / "metrics.json").write_text('{"objective": 0.5}')  # of a run that was no job of a sweep
    assert not sweep.standing(tmp_path, "mine").done


def test_a_job_with_results_is_done(tmp_path: Path) -> None:
    assert sweep.standing(begun(tmp_path, metrics={"objective": 0.75}), "mine") == sweep.Standing(True, 0.75)


def test_a_job_whose_objective_was_no_number_is_done_all_the_same(tmp_path: Path) -> None:
    found = sweep.standing(begun(tmp_path, metrics={"objective": None}), "mine")
    assert found.done
    assert math.isnan(found.objective)


@pytest.mark.parametrize("results", ["", '{"metrics": {"val/lo', "[]", '{"metrics": {}}'])
def test_results_that_are_cut_short_are_none(tmp_path: Path, results: str) -> None:
    assert not sweep.standing(begun(tmp_path, metrics=results), "mine").done


def test_a_job_goes_on_from_a_checkpoint_that_is_whole(tmp_path: Path) -> None:
    folder, last = begun(tmp_path), tmp_path / "last.ckpt"
    assert sweep.standing(folder, "mine", tmp_path).checkpoint is None
    torch.save({"state_dict": {"w": torch.ones(1000)}}, last)
    assert sweep.standing(folder, "mine", tmp_path).checkpoint == last
    last.write_bytes(last.read_bytes()[:2000])
    assert sweep.standing(folder, "mine", tmp_path).checkpoint is None


def test_a_folder_of_another_config_is_refused_and_left_alone(tmp_path: Path) -> None:
    folder = begun(tmp_path, metrics={"objective": 0.75})
    with pytest.raises(ValueError, match=r"another config.*Leave `hydra\.sweep\.subdir` alone"):
        sweep.standing(folder, "yours")
    assert sweep.standing(folder, "mine").done


def test_a_job_is_not_done_with_other_data(tmp_path: Path) -> None:
    folder = begun(tmp_path, metrics={"objective": 0.75})
    assert sweep.standing(folder, "mine", data={"/elsewhere/train.tsv": "12"}).done
    with pytest.raises(ValueError, match=r"begun with other data: /a/train\.tsv is not what it was"):
        sweep.standing(folder, "mine", data={"/a/train.tsv": "34"})
    (folder / "job.json").write_text('{"job": "mine"}')  # of a version that did not look
    assert sweep.standing(folder, "mine", data={"/a/train.tsv": "34"}).done


@pytest.mark.parametrize(
    ("data", "names"),
    [
        ({"train": "{}/a.tsv", "val": "{}/b.tsv", "test": None}, ["a.tsv", "b.tsv"]),
        ({"path": "{}", "train": "train", "val": "dev.tsv", "test": "test"}, ["train.tsv", "dev.tsv"]),
        (
            {"path": "{}", "name": "cola", "train": "train"},
            ["cola/train-00-of-02.jsonl", "cola/train-01-of-02.jsonl", "train.tsv"],
        ),
        ({"path": "{}/a.tsv", "train": "train", "val": "b.tsv"}, ["a.tsv", "b.tsv", "train.tsv"]),
        ({"path": "someone/something", "train": "train[:10]", "val": None}, []),
        ({"train": [{"text": "a"}], "val": None}, []),
    ],
)
def test_data_files_are_known_by_their_content(data: dict[str, Any], names: list[str], tmp_path: Path) -> None:
    (tmp_path / "cola").mkdir()
    for name in ("a.tsv", "b.tsv", "train.tsv", "dev.tsv", "cola/train-00-of-02.jsonl", "cola/train-01-of-02.jsonl"):
        (tmp_path / name).write_text(name)
    cfg = OmegaConf.create({"data": {k: v.format(tmp_path) if isinstance(v, str) else v for k, v in data.items()}})
    before = inputs(cfg)
    assert sorted(before) == sorted(str(tmp_path / name) for name in names)
    assert changed(before, inputs(cfg)) == []
    for name in names[:1]:
        (tmp_path / name).write_text("something else")
        assert changed(before, inputs(cfg)) == [str(tmp_path / name)]


def test_a_sweep_does_not_pass_over_a_job_whose_data_were_edited(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("text\tlabel\na\t0\n")
    calls: list[DictConfig] = []
    cfg, folder = launch("data=text_classification", f"data.train={tmp_path}/a.tsv", f"data.val={tmp_path}/a.tsv")
    for _ in range(2):
        sweep.run(finishing(folder, 0.5, calls), cfg)
    assert len(calls) == 1
    (tmp_path / "a.tsv").write_text("text\tlabel\nb\t1\n")
    with pytest.raises(ValueError, match="other data"):
        sweep.run(finishing(folder, 0.5, calls), cfg)


# One job --------------------------------------------------------------------------------------------------------------


def test_a_job_that_is_done_is_not_trained_again(launch: Launch) -> None:
    cfg, folder = launch("seed=1")
    calls: list[DictConfig] = []
    assert [sweep.run(finishing(folder, 0.5, calls), cfg) for _ in range(3)] == [0.5] * 3
    assert len(calls) == 1


def test_an_edited_config_is_another_job(launch: Launch) -> None:
    calls: list[DictConfig] = []
    for overrides in ("seed=1", "seed=1", "seed=2", "optimizer.lr=0.5"):
        cfg, folder = launch(overrides)
        sweep.run(finishing(folder, 0.5, calls), cfg)
    assert [(call.seed, call.optimizer.lr == 0.5) for call in calls] == [(1, False), (2, False), (0, True)]
    cfg, folder = launch("seed=3", folder="fixed")
    sweep.run(finishing(folder, 0.5, calls), cfg)
    cfg, folder = launch("seed=4", folder="fixed")
    with pytest.raises(ValueError, match="another config"):
        sweep.run(finishing(folder, 0.5, calls), cfg)


def test_a_run_that_is_no_sweep_trains_every_time(launch: Launch) -> None:
    cfg, folder = launch(mode=RunMode.RUN)
    folder.mkdir()
    calls: list[DictConfig] = []
    for _ in range(2):
        sweep.run(finishing(folder, 0.5, calls), cfg)
    assert len(calls) == 2
    assert not (folder / "job.json").exists()


@pytest.mark.parametrize("mode", [RunMode.RUN, RunMode.MULTIRUN])
def test_an_error_is_written_down_and_forgotten_when_the_job_succeeds(launch: Launch, mode: RunMode) -> None:
    cfg, folder = launch(mode=mode)
    with pytest.raises(ValueError, match="third layer"):
        sweep.run(failing, cfg)
    said = json.loads((folder / "failure.json").read_text())
    assert said["error"].startswith("ValueError: the third layer")
    assert "Traceback" in said["traceback"]
    assert sweep.run(finishing(folder, 0.5, []), cfg) == 0.5
    assert not (folder / "failure.json").exists()


def test_a_failed_job_may_leave_the_sweep_running(launch: Launch, caplog: pytest.LogCaptureFixture) -> None:
    cfg, folder = launch("on_failure=continue")
    with caplog.at_level(logging.ERROR):
        assert math.isnan(sweep.run(failing, cfg))
    assert "the third layer" in caplog.text
    assert (folder / "failure.json").exists()
    calls: list[DictConfig] = []
    sweep.run(finishing(folder, 0.5, calls), cfg)
    assert calls, "a job that failed is tried again when the sweep is launched again"


def test_on_failure_is_one_of_two_words(launch: Launch) -> None:
    cfg, _ = launch("on_failure=ignore")
    with pytest.raises(ValueError, match=r"`on_failure=ignore` must be `raise` or `continue`"):
        sweep.run(failing, cfg)


def test_an_unfinished_job_goes_on_from_its_own_checkpoint_and_keeps_its_log(launch: Launch) -> None:
    cfg, folder = launch("on_failure=continue")
    sweep.run(failing, cfg)
    (folder / "checkpoints").mkdir()
    (folder / "log").mkdir()
    torch.save({}, folder / "checkpoints" / "last.ckpt")
    (folder / "log" / "metrics.csv").write_text("step,train/loss\n0,1.0\n")
    calls: list[DictConfig] = []
    sweep.run(finishing(folder, 0.5, calls), cfg)
    assert calls[0].ckpt_path == str(folder / "checkpoints" / "last.ckpt")
    assert [file.relative_to(folder).as_posix() for file in folder.rglob("metrics.csv")] == ["log.0/metrics.csv"]


class Stop(pl.Callback):
    """Raises once, at the given step of the first attempt."""

    def __init__(self, flag: str, step: int) -> None:
        self.flag, self.step = Path(flag), step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and not self.flag.exists():
            self.flag.touch()
            raise RuntimeError("pulled the plug")


def test_a_job_that_was_stopped_ends_where_it_would_have_ended(launch: Launch, tmp_path: Path) -> None:
    small = [f"model.config.{size}=16" for size in ("hidden_size", "intermediate_size")]
    small += ["model.config.num_hidden_layers=2", "model.config.num_attention_heads=2", "trainer.max_epochs=1"]
    common = [*small, "trainer=cpu", "trainer.enable_progress_bar=false", "checkpoint.every_n_train_steps=10"]
    common += ["callbacks=lisa", "callbacks.lisa.active_layers=1", "callbacks.lisa.interval=3"]
    stop = [f"+callbacks.stop._target_={__name__}.Stop", f"+callbacks.stop.flag={tmp_path}/flag"]
    ends = []
    for step, attempts in ((17, 2), (999, 1)):
        for attempt in range(attempts):
            cfg, folder = launch(*common, *stop, f"+callbacks.stop.step={step}")
            if attempts - attempt == 2:
                with pytest.raises(RuntimeError, match="pulled the plug"):
                    sweep.run(train, cfg)
                assert not (folder / "metrics.json").exists()
            else:
                sweep.run(train, cfg)
        last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        ends.append((last["global_step"], last["state_dict"], (folder / "history" / "lisa.json").read_text()))
    assert ends[0][0] == ends[1][0] > 17
    assert all(torch.equal(value, ends[1][1][name]) for name, value in ends[0][1].items())
    assert ends[0][2] == ends[1][2]


def test_one_job_is_run_by_one_process_at_a_time(tmp_path: Path) -> None:
    order: list[str] = []
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with sweep.claimed(tmp_path):
            inside.set()
            leave.wait(10)
            order.append("first")

    def second() -> None:
        with sweep.claimed(tmp_path):
            order.append("second")

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    threads[1].join(0.2)
    assert order == []
    leave.set()
    for thread in threads:
        thread.join(10)
    assert order == ["first", "second"]


# The objective --------------------------------------------------------------------------------------------------------


def sweeper(launch: Launch, way: str, *overrides: str) -> tuple[DictConfig, Path]:
    """As `launch`, under a sweeper with a direction."""
    cfg, folder = launch(*overrides)
    known = HydraConfig.instance().cfg
    assert known is not None
    with read_write(known.hydra), open_dict(known.hydra):
        known.hydra.sweeper = {"direction": way}
    return cfg, folder


@pytest.mark.parametrize(
    ("way", "objective", "worst"), [("maximize", "val/accuracy", -math.inf), ("minimize", "val/loss", math.inf)]
)
def test_a_sweeper_with_a_direction_gets_its_worst_value_and_never_nan(
    launch: Launch, way: str, objective: str, worst: float
) -> None:
    chosen = [f"objective={objective}", "on_failure=continue"]
    assert sweep.run(failing, sweeper(launch, way, *chosen)[0]) == worst
    cfg, folder = sweeper(launch, way, *chosen, "seed=1")
    assert [sweep.run(finishing(folder, None, []), cfg) for _ in range(2)] == [worst] * 2


def test_a_sweeper_that_looks_for_the_worst_is_refused(launch: Launch) -> None:
    calls: list[DictConfig] = []
    cfg, folder = sweeper(launch, "minimize", "objective=test/accuracy")
    with pytest.raises(ValueError, match=r"direction=minimize` looks for the worst test/accuracy: set it to maximize"):
        sweep.run(finishing(folder, 0.5, calls), cfg)
    assert not calls
    cfg, _ = sweeper(launch, "minimize", "trainer=cpu", "trainer.enable_progress_bar=false")
    with pytest.raises(ValueError, match="looks for the worst val/accuracy"):  # of the model
        sweep.run(train, cfg)


def test_the_direction_follows_from_the_objective() -> None:
    assert direction(composed()) == "maximize"  # accuracy of the image classifier
    assert direction(composed("objective=val/loss")) == "minimize"
    assert direction(composed("model=causal_lm")) == "minimize"
    with pytest.raises(ValueError, match=r"`objective=val/wer`: whether more of it is better is not known"):
        direction(composed("objective=val/wer"))


SIZES = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 384}


@pytest.mark.parametrize(
    ("target", "settings"),
    [("CausalLM", {}), ("CausalLM", {"answer": "number"}), ("Seq2SeqLM", {}), ("Seq2SeqLM", {"generate": False})],
    ids=["next tokens", "answers", "texts", "sequences"],
)
def test_what_a_config_says_of_its_objective_is_what_the_model_says(target: str, settings: dict[str, Any]) -> None:
    sizes = {"model_type": "t5"} | SIZES if target == "Seq2SeqLM" else composed("model=llama_tiny").model.config
    node = {"_target_": f"apportion.recipes.tasks.module.{target}", "config": sizes} | settings
    cfg = OmegaConf.create({"objective": None, "model": node})
    assert objective_of(cfg) == instantiate(cfg.model, _convert_="all").objective


def test_several_directions_are_not_ours_to_judge() -> None:
    both = OmegaConf.create({"direction": ["minimize", "maximize"]})
    assert directed(both, "val/accuracy") is None
    assert directed(OmegaConf.create({}), "val/accuracy") is None
    assert directed(OmegaConf.create({"direction": "minimize"}), "val/wer") == "minimize"


def test_only_nan_is_replaced() -> None:
    assert settled(0.25, "maximize") == 0.25
    assert settled(math.inf, "minimize") == math.inf
    assert better("test/perplexity") == "minimize"


@pytest.mark.parametrize("option", ["lr", "lisa", "ist", "compose"])
def test_the_searches_compose_where_optuna_is_installed(option: str) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    method = {"ist": "ist", "compose": "compose"}.get(option, "lisa")
    cfg = composed(f"hparams_search={option}", f"callbacks={method}")
    assert cfg.hydra.sweeper.direction == "maximize"
    assert not cfg.test
    for name in cfg.hydra.sweeper.params:
        assert OmegaConf.select(cfg, str(name)) is not None, f"{name} is no setting of callbacks={method}"


# Processes ------------------------------------------------------------------------------------------------------------


def two(**kwargs: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", devices=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, **kwargs
    )


def test_lightning_must_not_repeat_the_command_line_of_a_sweep(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)  # which Lightning leaves behind where a test has trained on ranks
    cfg, _ = launch()
    with pytest.raises(ValueError, match=r"`trainer\.devices=2` under `-m`.*torchrun"):
        guard(two(strategy="ddp"), "val/accuracy", cfg)
    cfg, _ = launch(mode=RunMode.RUN)
    guard(two(strategy="ddp"), "val/accuracy", cfg)


def test_processes_that_something_else_started_may_sweep_together(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400", "TORCHELASTIC_RUN_ID": "x"}
    for name, value in (started | address).items():  # as torchrun does
        monkeypatch.setenv(name, value)
    cfg, _ = launch()
    trainer = two(strategy="ddp")
    guard(trainer, "val/accuracy", cfg)
    assert any(isinstance(callback, SameConfig) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def compare(jobs: list[str]) -> str:
    rank = dist.get_rank()
    SameConfig(jobs[rank], [f"optimizer.lr={rank}"]).setup(None, None, "fit")  # type: ignore[arg-type]
    return jobs[rank]


@pytest.mark.xdist_group("ranks")
def test_ranks_with_different_configs_do_not_begin() -> None:
    assert ranks(2).run(compare, ["same", "same"]) == ["same", "same"]
    with pytest.raises(RanksFailed) as caught:
        ranks(2).run(compare, ["same", "other"])
    for rank, error in enumerate(caught.value.errors):
        assert error is not None
        assert f"Ranks disagree on the config (here the overrides are optimizer.lr={rank})" in error


@pytest.mark.parametrize(
    ("option", "launcher"), [("joblib", "JoblibLauncher"), ("submitit", "LocalLauncher"), ("slurm", "SlurmLauncher")]
)
def test_the_launchers_compose_where_they_are_installed(option: str, launcher: str) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{'joblib' if option == 'joblib' else 'submitit'}_launcher")
    cfg = composed(f"launch={option}", "trainer=ddp")
    assert cfg.hydra.launcher._target_.endswith(f".{launcher}")
    if option == "slurm":
        assert cfg.hydra.launcher.tasks_per_node == cfg.trainer.devices == 2
