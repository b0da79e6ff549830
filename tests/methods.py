"""The tables of methods: every preset with tiny arguments, and what it must select on the toy network at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from toys import BLOCKS, Net, lora_net

from apportion.callbacks import (
    FISH,
    HFT,
    ID3,
    IST,
    LIFT,
    LISA,
    RST,
    SIFT,
    SPIDER,
    SPT,
    TRPTS,
    TTC,
    BAdam,
    BitFit,
    OwLore,
    PaFI,
    Random,
    SaRA,
    SPIDERHard,
)
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


@dataclass(frozen=True)
class EntryMethod:
    """A preset that selects entries, as the tests train it on the toy network.

    Attributes:
        preset: The class.
        options: Arguments that make something happen within six optimizer steps.
        tensors: Number of candidate tensors.
        units: Number of candidate entries, or rows.
        selected: Number of entries selected at each of the first six optimizer steps.
        switches: Optimizer steps, of the first six, at which a selection is made.
        always: Number of entries that train whole.
        moves: Whether the selected entries move and no others.
    """

    preset: type[SelectiveTuning]
    options: Mapping[str, Any]
    tensors: int
    units: int
    selected: tuple[int, int, int, int, int, int]
    switches: tuple[int, ...]
    always: int
    moves: bool = True

    def make(self, **options: Any) -> SelectiveTuning:
        """The callback; ``options`` go before the table's."""
        return self.preset(**{**self.options, **options})


def _still(count: int) -> tuple[int, int, int, int, int, int]:
    return (count,) * 6


LINEAR = BLOCKS * 6  # q, k, v, o: 8 x 8; up: 16 x 8; down: 8 x 16
ENTRIES = BLOCKS * (4 * 64 + 2 * 128)
ROWS = BLOCKS * (4 * 8 + 16 + 8)
HEAD = EMBEDDING = 13 * 8
NORMS, NORM_ENTRIES = 2 * (2 * BLOCKS + 1), 16 * (2 * BLOCKS + 1)
BIASES, BIAS_ENTRIES = BLOCKS * 5, BLOCKS * (3 * 8 + 16 + 8)  # k has none

ENTRY_METHODS: dict[str, EntryMethod] = {
    "id3": EntryMethod(
        ID3,
        {"budget": 60, "max_steps": 4},
        tensors=LINEAR,
        units=ENTRIES,
        selected=(15, 30, 45, 60, 60, 60),
        switches=(0, 1, 2, 3),
        always=HEAD,
    ),
    "pafi": EntryMethod(
        PaFI, {"budget": 60}, tensors=LINEAR, units=ENTRIES, selected=_still(60), switches=(0,), always=HEAD
    ),
    "fish": EntryMethod(
        FISH,
        {"budget": 200, "batches": 2},
        tensors=LINEAR + 1 + NORMS + BIASES,
        units=ENTRIES + EMBEDDING + NORM_ENTRIES + BIAS_ENTRIES,
        selected=_still(200 - HEAD),
        switches=(0,),
        always=HEAD,
    ),
    "lift": EntryMethod(
        LIFT,
        {"rank": 1, "lra_rank": 2, "interval": 3},
        tensors=LINEAR,
        units=ENTRIES,
        selected=_still(BLOCKS * (4 * (8 + 8) + 2 * (16 + 8))),
        switches=(0, 3),
        always=0,
    ),
    "sara": EntryMethod(
        SaRA,
        # Linear layers start within 8^-1/2 = 0.35 and three steps of 1e-2 do not bring them to 0.5; norms scale by 1.
        {"threshold": 0.5, "progressive_step": 3, "min_side": 8, "exclude": "embed_tokens"},
        tensors=LINEAR + 1 + NORMS + BIASES,
        units=ENTRIES + HEAD + NORM_ENTRIES + BIAS_ENTRIES,
        selected=_still(ENTRIES + HEAD + NORM_ENTRIES // 2 + BIAS_ENTRIES),
        switches=(0, 3),
        always=0,
    ),
    "sift": EntryMethod(
        SIFT, {"amount": 60}, tensors=LINEAR, units=ENTRIES, selected=_still(60), switches=(0,), always=HEAD
    ),
    "random": EntryMethod(
        Random, {"budget": 60}, tensors=LINEAR, units=ENTRIES, selected=_still(60), switches=(0,), always=HEAD
    ),
    "bitfit": EntryMethod(
        BitFit,
        {},
        tensors=BIASES + NORMS // 2,
        units=BIAS_ENTRIES + NORM_ENTRIES // 2,
        selected=_still(BIAS_ENTRIES + NORM_ENTRIES // 2),
        switches=(0,),
        always=HEAD,
    ),
    "trpts": EntryMethod(
        TRPTS,
        {"share": 1.0, "batches": 2},  # all entries count as the best, so that shares are sizes: 1 to 2
        tensors=LINEAR,
        units=ENTRIES,
        selected=_still(BLOCKS * (4 * 8 + 2 * (16 + 8))),
        switches=(0,),
        always=HEAD,
    ),
    "ttc": EntryMethod(
        TTC,
        {"align_steps": 2, "batches": 2},
        tensors=LINEAR,
        units=ROWS,
        selected=(0, 0, *(BLOCKS * (4 * 8 + 2 * 8 + 16),) * 4),  # an eighth of the rows: 1, 2 of up
        switches=(2,),
        always=HEAD + NORM_ENTRIES,
    ),
    "spider": EntryMethod(
        SPIDER,
        {},
        tensors=LINEAR + NORMS + BIASES,
        units=ROWS + NORM_ENTRIES + BIAS_ENTRIES,
        selected=_still(ENTRIES + NORM_ENTRIES + BIAS_ENTRIES),
        switches=(0,),
        always=0,
        moves=False,
    ),
    "spider_hard": EntryMethod(
        SPIDERHard,
        {"batches": 2},
        tensors=LINEAR,
        units=ENTRIES,
        selected=_still(ENTRIES // 5),
        switches=(0,),
        always=0,
    ),
}

PLANNED_METHODS: dict[str, EntryMethod] = {
    # The plan decides how many of the candidate tensors are left: these counts are its own, see tests/test_planned.py.
    "spt": EntryMethod(
        SPT,
        {"target": None, "tau": 60, "structured": False, "batches": 2},
        tensors=LINEAR,
        units=ENTRIES,
        selected=_still(60),
        switches=(0,),
        always=HEAD,
    ),
}
