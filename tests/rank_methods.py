"""The table of methods that select ranks: every preset with tiny arguments, and the adapters that it trains."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from toys import Net, lora_net

from apportion.callbacks import AdaLoRA, IncreLoRA, TriAdaptLoRA
from apportion.driver import SelectiveTuning


def svd_net(rank: int = 4, target_modules: Any = ("q_proj", "v_proj", "up_proj"), **options: Any) -> nn.Module:
    """The net with AdaLoRA adapters whose singular values are at work from the start."""
    from peft import AdaLoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = AdaLoraConfig(init_r=rank, target_r=1, total_step=1000, target_modules=list(target_modules))
        model = get_peft_model(Net(**options), config)
        for name, p in model.named_parameters():
            if "lora_" in name and p.requires_grad:
                nn.init.normal_(p, std=0.3)
    return model


def fresh_net(kind: str = "svd", rank: int = 4, target_modules: Any = None, **options: Any) -> nn.Module:
    """The net with adapters as PEFT makes them, at work from the second step on: ``svd``, ``lora`` or ``dora``."""
    from peft import AdaLoraConfig, LoraConfig, get_peft_model

    names = list(target_modules or ("q_proj", "v_proj", "up_proj"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if kind == "svd":
            config: Any = AdaLoraConfig(init_r=rank, target_r=1, total_step=1000, target_modules=names)
        else:
            config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, use_dora=kind == "dora")
        model = get_peft_model(Net(**options), config)
        for name, p in model.named_parameters():
            if "lora_A" in name or ("lora_B" in name and kind == "svd"):
                nn.init.normal_(p, std=0.3)
    return model


@dataclass(frozen=True)
class RankMethod:
    """A preset as the tests train it.

    Attributes:
        preset: The class.
        options: Arguments that make something happen within eight optimizer steps.
        units: Number of ranks that it finds in the model.
        selected: Ranks that are in after each of the first eight optimizer steps.
        net: Makes the model that it trains.
        grows: Whether ranks come in, and do not go.
    """

    preset: type[SelectiveTuning]
    options: Mapping[str, Any]
    units: int
    selected: tuple[int, ...]
    net: Callable[..., nn.Module] = svd_net
    grows: bool = False

    def make(self, **options: Any) -> SelectiveTuning:
        """The callback; ``options`` that it has go before the table's."""
        known = inspect.signature(self.preset).parameters
        return self.preset(**{**self.options, **{k: v for k, v in options.items() if k in known}})


SCHEDULE: dict[str, Any] = {"warmup": 1, "final": 3, "every": 2}

RANK_METHODS: dict[str, RankMethod] = {
    # b(2) = 20 + 28 (3/4)^3 = 31.8, b(4) = 20 + 28 (1/4)^3 = 20.4, b(5) = 20 of 12 matrices of rank 4
    "adalora": RankMethod(
        AdaLoRA,
        {"target": 20, **SCHEDULE},
        units=48,
        selected=(48, 31, 31, 20, 20, 20, 20, 20),
    ),
    # 12 + 2 matrices of 2 ranks each at steps 2 and 4
    "increlora": RankMethod(
        IncreLoRA,
        {"target": 20, "matrices": 2, "add": 2, "warmup": 1, "every": 2},
        units=48,
        selected=(12, 16, 16, 20, 20, 20, 20, 20),
        net=fresh_net,
        grows=True,
    ),
    # 8 ranks are missing at first: floor(8 / 7), floor(6 * 3 / 7), floor(2 * 5 / 7) matrices of 2 ranks each
    "triadapt": RankMethod(
        TriAdaptLoRA,
        {"target": 20, "add": 2, "warmup": 1, "every": 2},
        units=48,
        selected=(12, 14, 14, 18, 18, 20, 20, 20),
        net=fresh_net,
        grows=True,
    ),
}

LORA_CASES: dict[str, RankMethod] = {
    kind: RankMethod(
        AdaLoRA,
        {"target": 10, **SCHEDULE},
        units=24,
        selected=(24, 15, 15, 10, 10, 10, 10, 10),
        net=lambda kind=kind, **options: lora_net(kind, **options),
    )
    for kind in ("lora", "dora")
}

GROWING_LORA: dict[str, RankMethod] = {
    f"{name} over {kind}": replace(RANK_METHODS[name], net=partial(fresh_net, kind))
    for name in ("increlora", "triadapt")
    for kind in ("lora", "dora")
}

CASES: dict[str, RankMethod] = RANK_METHODS | LORA_CASES | GROWING_LORA
