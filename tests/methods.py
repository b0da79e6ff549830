"""The table of methods: every preset with tiny arguments, and what it must select on the toy network at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from toys import BLOCKS, Net, lora_net

from apportion.callbacks import HFT, IST, LISA, RST, BAdam, OwLore
from apportion.driver import SelectiveTuning


@dataclass(frozen=True)
class Method:
    """A preset as the tests train it.

    Attributes:
        preset: The class.
        options: Arguments that make something happen within six optimizer steps.
        units: Number of units that it finds in the model.
        selected: Number of units selected at every step.
        switches: Optimizer steps, of the first six, before which a new selection is made.
        net: Makes the model that it trains.
        full: Arguments under which everything is selected.
        adapters: Whether it trains adapters.
    """

    preset: type[SelectiveTuning]
    options: Mapping[str, Any]
    units: int
    selected: int
    switches: tuple[int, ...]
    net: Callable[..., nn.Module] = Net
    full: Mapping[str, Any] = field(default_factory=dict)
    adapters: bool = False

    def make(self, **options: Any) -> SelectiveTuning:
        """The callback; ``options`` go before the table's."""
        return self.preset(**{**self.options, **options})


MATRICES = 8  # per toy layer: q, k, v, o; up, down; two norms

METHODS: dict[str, Method] = {
    "lisa": Method(
        LISA,
        {"active_layers": 2, "interval": 2},
        units=BLOCKS,
        selected=2,
        switches=(0, 2, 4),
        full={"active_layers": 1.0},
    ),
    "ist": Method(
        IST,
        {"active": 0.5, "probe_interval": 2},
        units=BLOCKS,
        selected=2,
        switches=(0, 1, 2, 3, 4, 5),
        net=lora_net,
        full={"active": 1.0},
        adapters=True,
    ),
    "rst": Method(
        RST,
        {"active": 0.5},
        units=BLOCKS,
        selected=2,
        switches=(0, 1, 2, 3, 4, 5),
        net=lora_net,
        full={"active": 1.0},
        adapters=True,
    ),
    "hft": Method(
        HFT,
        {},
        units=BLOCKS * MATRICES,
        selected=BLOCKS * MATRICES // 2,
        switches=(0,),
        full={"amount": 1.0},
    ),
    "badam": Method(
        BAdam,
        {"interval": 2},
        units=BLOCKS,
        selected=1,
        switches=(0, 2, 4),
    ),
    "owlore": Method(
        OwLore,
        {"active_layers": 2, "interval": 2, "threshold": 2.0},
        units=BLOCKS,
        selected=2,
        switches=(0, 2, 4),
        full={"active_layers": 1.0},
    ),
}
