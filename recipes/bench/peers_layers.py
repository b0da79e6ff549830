"""Who trains a few layers at a time, and who trains a few ranks: ours and others, on the same layers in turn."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

from apportion.budgets import Polynomial
from apportion.callbacks import IST, LISA, AdaLoRA, BAdam
from apportion.driver import SelectiveTuning
from apportion.effects import Freeze
from apportion.recipes.bench import packages
from apportion.recipes.bench.entry_bars import DECAY, LR, Size
from apportion.recipes.bench.field import (
    Contender,
    Loop,
    Ours,
    Rival,
    Trained,
    layers_of,
    loss_of,
    plain,
    training,
    whole,
)
from apportion.recipes.bench.peers_lightning import InLightning
from apportion.recipes.bench.twins import IstTwin, LisaTwin
from apportion.rules import TopK
from apportion.still import Still
from apportion.types import State, When
from apportion.units import Layers

ACTIVE, INTERVAL, RANK = 2, 3, 8
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Depth(Still):
    """The deeper, the more important: what others call thawing from the top.

    Example:
        >>> score = Depth()
        >>> score.read(score.init(3)).tolist()
        [0.0, 1.0, 2.0]
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def init(self, n: int) -> State:
        """Numbers of the layers, shape (n,)."""
        return {"score": torch.arange(n, dtype=torch.float64)}

    def read(self, state: State) -> Tensor:
        """Numbers of the layers, float64, shape (n,)."""
        return state["score"]


def drawn(method: Any, model: nn.Module, steps: int) -> list[tuple[int, ...]]:
    """The layers that ``method`` trains at each step."""
    selection = method.new_selection()
    selection.bind(model)
    found = []
    for step in range(steps):
        selection.step = step
        selection.advance(0, step == 0, steps, None)
        found.append(tuple(selection.mask.nonzero().flatten().tolist()))
    return found


def _rounds(model: nn.Module, steps: int) -> list[tuple[int, ...]]:
    return drawn(LISA(ACTIVE, INTERVAL), model, steps)[::INTERVAL]


def lisa_twin(model: Any, steps: int) -> Rival:
    """LMFlow's LISA: AdamW over everything, layers switched by ``requires_grad`` alone."""
    rounds = _rounds(model, steps)
    loop = plain(model)
    twin = LisaTwin(layers_of(model), rounds, INTERVAL)
    loop.before = lambda step, tokens: twin.before_step(step)
    return loop


def badam(model: Any, steps: int) -> Rival:
    """BAdam's own optimizer, from the last layer down."""
    del steps
    make = packages.module(packages.BADAM).BlockOptimizer
    base = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # it wants half precision
        optimizer = make(base, list(model.named_parameters()), switch_block_every=INTERVAL, verbose=0)

    def step() -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints every switch
            optimizer.step()
        optimizer.zero_grad()

    return Loop(model, step, lambda: training(model), lambda: [optimizer.base_optimizer])


def base_finetuning(model: Any, steps: int) -> Rival:
    """Lightning's BaseFinetuning, which freezes and thaws layers at the beginning of each epoch."""
    rounds = _rounds(model, steps)
    layers = layers_of(model)

    class Switch(pl.callbacks.BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze([layer for i, layer in enumerate(layers) if i not in rounds[0]])

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 0 or epoch >= len(rounds):
                return
            self.freeze([layer for i, layer in enumerate(layers) if i not in rounds[epoch]])
            now = [layers[i] for i in rounds[epoch]]
            self.unfreeze_and_add_param_group(now, optimizer, lr=LR)

    return InLightning(model, pl, lambda: [Switch()], INTERVAL)


def finetuning_scheduler(model: Any, steps: int) -> Rival:
    """finetuning-scheduler, which thaws layers from the top, two more every epoch."""
    theirs = packages.module(packages.FINETUNING_SCHEDULER)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    layers = layers_of(model)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    name_of = {id(p): f"model.{name}" for name, p in model.named_parameters()}
    phases: dict[int, dict[str, Any]] = {}
    for phase in range(min(-(-steps // INTERVAL), len(layers) // ACTIVE)):
        top = len(layers) - phase * ACTIVE
        names = [name_of[id(p)] for layer in layers[top - ACTIVE : top] for p in layer.parameters()]
        names += [name for key, name in name_of.items() if phase == 0 and key not in inside]
        phases[phase] = {"params": names, "max_transition_epoch": phase + 1}

    def callbacks() -> list[Any]:
        return [
            theirs.FinetuningScheduler(
                phases, base_max_lr=LR, restore_best=False, epoch_transitions_only=True, logging_level=logging.ERROR
            )
        ]

    return InLightning(model, importlib.import_module("lightning.pytorch"), callbacks, INTERVAL)


def growing(model: Any, steps: int) -> Rival:
    """Two more layers from the top every interval, as a choice of our slots."""
    depth = len(layers_of(model))
    budget = Polynomial(ACTIVE, depth, finish=INTERVAL * (depth // ACTIVE - 1))
    method = SelectiveTuning(
        Layers(True, True, True), Depth(), budget, TopK(), Freeze(), select_when=When(every=INTERVAL)
    )
    return Ours(model, method, steps)


def adapted(size: Size) -> nn.Module:
    """The model with LoRA on all linear maps of the layers."""
    model: nn.Module = get_peft_model(size.build(), LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LINEAR))
    return model


def ist_twin(model: Any, steps: int) -> Rival:
    """The official IST on LoRA."""
    del steps
    loop = plain(model)
    adapters = [[m for m in layer.modules() if hasattr(m, "lora_A")] for layer in layers_of(model)]
    twin = IstTwin(adapters)
    loop.before = lambda step, tokens: twin.before_step(step, lambda: loss_of(model, tokens))
    return loop


def ranked(size: Size, task: str | None = None) -> Any:
    """The model with adapters in AdaLoRA's form."""
    config = AdaLoraConfig(
        init_r=RANK, target_r=RANK // 2, total_step=1000, target_modules=LINEAR, orth_reg_weight=0.1, task_type=task
    )
    return get_peft_model(size.build(), config)


def adalora(model: Any, steps: int) -> Rival:
    """PEFT's AdaLoRA, which has to be told of every step."""
    config = model.peft_config["default"]
    config.total_step, config.tinit, config.tfinal, config.deltaT = steps, 1, max(1, steps // 2), 1
    loop = plain(model)
    (optimizer,) = loop.optimizers()

    def step() -> None:
        optimizer.step()
        model.base_model.update_and_allocate(loop.done)
        optimizer.zero_grad()

    def alive() -> Trained:
        found: dict[str, Tensor | None] = {}
        for name, layer in model.named_modules():
            if not hasattr(layer, "lora_E"):
                continue
            for adapter, values in layer.lora_E.items():
                mask = values.detach() != 0.0
                a, b = layer.lora_A[adapter], layer.lora_B[adapter]
                found[f"{name}.lora_E.{adapter}"] = mask
                found[f"{name}.lora_A.{adapter}"] = mask.expand_as(a)
                found[f"{name}.lora_B.{adapter}"] = mask.T.expand_as(b)
        return found

    loop.step, loop.trained, loop.late = step, alive, True
    return loop


def contenders() -> list[Contender]:
    """All of them."""
    package = [p.requirement for p in (packages.BADAM, packages.FINETUNING_SCHEDULER)]
    return [
        Contender("apportion LISA", "layers drawn", "ours", lambda m, s: Ours(m, LISA(ACTIVE, INTERVAL), s), whole),
        Contender("LISA as in LMFlow", "layers drawn", "twin", lisa_twin, whole),
        Contender(
            f"BaseFinetuning, Lightning {version('pytorch-lightning')}",
            "layers drawn",
            "package",
            base_finetuning,
            whole,
        ),
        Contender(
            "apportion BAdam",
            "layers in turn",
            "ours",
            lambda m, s: Ours(m, BAdam(INTERVAL, order="descending"), s),
            whole,
        ),
        Contender(package[0], "layers in turn", "package", badam, whole, note="its first layer gets one step less"),
        Contender("apportion, layers from the top", "layers thawed", "ours", growing, whole),
        Contender(package[1], "layers thawed", "package", finetuning_scheduler, whole),
        Contender("apportion IST", "layers of LoRA", "ours", lambda m, s: Ours(m, IST(), s, probe=True), adapted),
        Contender("the official IST", "layers of LoRA", "twin", ist_twin, adapted, note="draws of its own"),
        Contender(
            "apportion AdaLoRA",
            "ranks",
            "ours",
            lambda m, s: Ours(m, AdaLoRA(RANK // 2, warmup=1, final=max(1, s // 2), every=1, orthogonality=0.1), s),
            ranked,
            kept=False,  # a rank that is out goes on learning until the end, so that it can come back
        ),
        Contender("AdaLoRA, PEFT", "ranks", "package", adalora, lambda size: ranked(size, "CAUSAL_LM"), kept=False),
    ]
