"""The table of methods that select ranks: every preset with tiny arguments, and the adapters that it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from toys import Net, lora_net

from apportion.callbacks import AdaLoRA
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


@dataclass(frozen=True)
class RankMethod:
    """A preset as the tests train it.

    Attributes:
        preset: The class.
        options: Arguments that make something happen within eight optimizer steps.
        units: Number of ranks that it finds in the model.
        selected: Ranks that are in after each of the first eight optimizer steps.
        net: Makes the model that it trains.
    """

    preset: type[SelectiveTuning]
    options: Mapping[str, Any]
    units: int
    selected: tuple[int, ...]
    net: Callable[..., nn.Module] = svd_net

    def make(self, **options: Any) -> SelectiveTuning:
        """The callback; ``options`` go before the table's."""
        return self.preset(**{**self.options, **options})


SCHEDULE: dict[str, Any] = {"warmup": 1, "final": 3, "every": 2}

RANK_METHODS: dict[str, RankMethod] = {
    # b(2) = 20 + 28 (3/4)^3 = 31.8, b(4) = 20 + 28 (1/4)^3 = 20.4, b(5) = 20 of 12 matrices of rank 4
    "adalora": RankMethod(
        AdaLoRA,
        {"target": 20, **SCHEDULE},
        units=48,
        selected=(48, 31, 31, 20, 20, 20, 20, 20),
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
