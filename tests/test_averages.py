"""Averages of weights beside ranks that come and go are refused; what is left of them can be averaged afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
from peft import PeftModel
from pytorch_lightning.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from rank_methods import CASES, svd_net
from toys import OtherTask, Task, fit, moved, weights

from apportion.callbacks import LIFT, LISA, AdaLoRA
from apportion.lora_export import to_lora

AVERAGES: dict[str, Callable[[Any], Any]] = {
    "WeightAveraging": lambda package: package.callbacks.WeightAveraging(),
    "EMAWeightAveraging": lambda package: package.callbacks.EMAWeightAveraging(decay=0.5),
    "StochasticWeightAveraging": lambda package: package.callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=1),
}


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("name", CASES)
def test_an_average_beside_ranks_is_refused(name: str, average: str, ours_first: bool) -> None:
    case = CASES[name]
    task = Task(case.net(dropout=0.0))
    start = weights(task)
    both = [case.make(), AVERAGES[average](pytorch_lightning)]
    label = case.preset.__name__
    with pytest.raises(ValueError, match=rf"`{label}` changes which ranks.*`{average}` averages.*without `{label}`"):
        fit(task, both if ours_first else both[::-1])
    assert not moved(start, weights(task))


@pytest.mark.parametrize("average", AVERAGES)
def test_it_is_refused_without_shrinking_in_both_packages_and_beside_others(average: str) -> None:
    for package, kind in ((pytorch_lightning, Task), (lightning.pytorch, OtherTask)):
        found = [LISA(active_layers=1), AVERAGES[average](package), AdaLoRA(every=1, shrink=False)]
        with pytest.raises(ValueError, match=rf"`AdaLoRA` changes which ranks.*`{average}`"):
            fit(kind(svd_net(dropout=0.0)), found, package=package)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("make", [lambda: LISA(1, 2), lambda: LIFT(rank=1, lra_rank=2, interval=2)])
def test_an_average_beside_layers_and_entries_is_not_refused(make: Callable[[], Any], average: str) -> None:
    fit(Task(), [make(), AVERAGES[average](pytorch_lightning)], steps=-1, max_epochs=2, limit_train_batches=3)


@pytest.mark.parametrize(
    "average", [WeightAveraging(), EMAWeightAveraging(decay=0.5), StochasticWeightAveraging(1e-2, swa_epoch_start=1)]
)
def test_the_way_out_averages_a_plain_lora_of_what_is_left(average: Any, tmp_path: Path) -> None:
    case = CASES["adalora"]
    model = svd_net(dropout=0.0)
    fit(Task(model), case.make(), steps=8)
    left = to_lora(model, tmp_path)
    assert sum(left.values()) == 20
    again = PeftModel.from_pretrained(model.unload(), tmp_path, is_trainable=True)
    start = {n: p.detach().clone() for n, p in again.named_parameters() if p.requires_grad}
    fit(Task(again), average, steps=-1, max_epochs=2, limit_train_batches=3)
    trained = dict(again.named_parameters())
    assert sum(p.shape[0] for n, p in trained.items() if "lora_A" in n) == 20
    assert moved(start, {n: trained[n].detach() for n in start}) == set(start)
