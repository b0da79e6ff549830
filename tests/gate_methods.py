"""The table of methods that put gates before adapters: every preset with tiny arguments, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from toys import BLOCKS, lora_net

from apportion.callbacks import DiffoRA
from apportion.driver import SelectiveTuning


@dataclass(frozen=True)
class GateMethod:
    """A preset as the tests train it.

    Attributes:
        preset: The class.
        options: Arguments that make something happen within six optimizer steps.
        units: Number of adapters that it finds in the model.
        selected: Adapters that train at each of the first six optimizer steps.
        switches: Optimizer steps, of the first six, before which a selection is made.
        net: Makes the model that it trains.
    """

    preset: type[SelectiveTuning]
    options: Mapping[str, Any]
    units: int
    selected: tuple[int, ...]
    switches: tuple[int, ...]
    net: Callable[..., nn.Module] = lora_net

    def make(self, **options: Any) -> SelectiveTuning:
        """The callback; ``options`` go before the table's."""
        return self.preset(**{**self.options, **options})


ADAPTERS = BLOCKS * 3  # q, v, up

GATE_METHODS: dict[str, GateMethod] = {
    "diffora": GateMethod(
        DiffoRA,
        {"share": 0.4, "warmup": 2, "every": 1, "batches": 2},
        units=ADAPTERS,
        selected=(ADAPTERS, ADAPTERS, *(4,) * 4),  # 0.4 of 12 is 4.8
        switches=(0, 2),
    ),
}
