"""The methods of the evidence grids: each at a budget, and beside it random choice of the same unit at that budget.

The budget is that of LoRA of rank `RANK` on all matrices of the layers: as many entries train where entries are
chosen, and as many ranks per matrix where ranks are. Layers are 2 of all at a time, or 1; matrices are half of them.
The head trains in all, embeddings in none but full tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from apportion.budgets import Constant
from apportion.callbacks import (
    HFT,
    ID3,
    IST,
    LIFT,
    LISA,
    RST,
    SIFT,
    SPT,
    AdaLoRA,
    BAdam,
    BitFit,
    IncreLoRA,
    OwLore,
    PaFI,
    Random,
)
from apportion.driver import SelectiveTuning
from apportion.effects import Freeze
from apportion.recipes.evidence.adapters import RANK
from apportion.recipes.evidence.bars import RandomMatrices, RandomRanks
from apportion.rules import Sample
from apportion.scores import Uniform
from apportion.types import When
from apportion.units import Layers, Modules

ACTIVE = 2
"""Layers that train at a time."""

Rates = Mapping[str, tuple[float, ...]]
"""Learning rates by grid: the decoder is small, and takes higher ones."""

FULL: Rates = {"encoder": (3e-5, 1e-4, 3e-4), "decoder": (3e-4, 1e-3, 3e-3)}
WEIGHTS: Rates = {"encoder": (1e-4, 3e-4, 1e-3), "decoder": (1e-3, 3e-3, 1e-2)}
ENTRIES: Rates = {"encoder": (1e-3, 3e-3, 1e-2), "decoder": (3e-3, 1e-2, 3e-2)}
ADAPTERS: Rates = {"encoder": (1e-3, 3e-3, 1e-2), "decoder": (3e-3, 1e-2, 3e-2)}
NONE: Rates = {"encoder": (0.0,), "decoder": (0.0,)}


@dataclass(frozen=True)
class Setting:
    """What a method is made for.

    Args:
        k: Entries that a method of entries trains: those of LoRA of rank ``RANK`` on the same matrices.
        seed: Of the run, and of the method's draws.
        steps: Of the run.
        head: Whether the model has a fresh head, which then trains whole.
    """

    k: int
    seed: int
    steps: int
    head: bool

    @property
    def turn(self) -> int:
        """Steps between choices of layers: twelve choices a run, so that each of six layers has about two turns."""
        return max(1, self.steps // 12)


@dataclass(frozen=True)
class Method:
    """One row of the tables.

    Args:
        key: Its name in files and on the command line.
        title: Its name in tables.
        group: The unit that it chooses, or ``reference``.
        rates: Learning rates that it is searched at, by grid.
        make: From a setting to the callback; None for none.
        adapter: ``lora``, ``adalora`` or ``growing``, see `adapters`; None to train the model's own weights.
        bar: The method that chooses the same unit at random, at the same budget; None if there is nothing to beat.
        frozen: Whether all but a fresh head is frozen.
        grids: Grids that it makes sense in.
    """

    key: str
    title: str
    group: str
    rates: Rates
    make: Callable[[Setting], Any] | None = None
    adapter: str | None = None
    bar: str | None = None
    frozen: bool = False
    grids: tuple[str, ...] = ("encoder", "decoder")


def _layers(s: Setting, active: int = ACTIVE) -> dict[str, Any]:
    around: dict[str, Any] = {"train_embeddings": False, "train_head": s.head, "train_norm": False}
    return {"active_layers": active, "interval": s.turn, "seed": s.seed, **around}


def _once(s: Setting) -> SelectiveTuning:
    units = Layers(embeddings="freeze", head=s.head, norm="freeze")
    return SelectiveTuning(units, Uniform(), Constant(ACTIVE), Sample(), Freeze(), select_when=When(end=1), seed=s.seed)


def _matrices(s: Setting) -> SelectiveTuning:
    units = Modules(embeddings="freeze", head=s.head, norm="freeze")
    return SelectiveTuning(units, Uniform(), Constant(0.5), Sample(), Freeze(), select_when=When(end=1), seed=s.seed)


def _growing(s: Setting) -> SelectiveTuning:
    every = max(1, s.steps // 30)
    return IncreLoRA(RANK, matrices=9, warmup=0.1, every=every, seed=s.seed)


def _scored(method: SelectiveTuning, score: Any, seed: int) -> SelectiveTuning:
    """The same method in all but its score."""
    slots = method.slots
    return SelectiveTuning(
        slots.units, score, slots.budget, slots.rule, slots.effect, select_when=slots.select_when, seed=seed
    )


METHODS: tuple[Method, ...] = (
    Method("base", "no fine-tuning", "reference", NONE, frozen=True, grids=("decoder",)),
    Method("full", "full tuning", "reference", FULL),
    Method("head", "head only", "reference", NONE, frozen=True, grids=("encoder",)),
    Method("bitfit", "BitFit", "reference", ENTRIES, lambda s: BitFit(seed=s.seed), grids=("encoder",)),
    Method("lora", "LoRA", "reference", ADAPTERS, adapter="lora"),
    Method(
        "random_entries",
        "random entries",
        "entries",
        ENTRIES,
        lambda s: Random(s.k, per="tensor", train_head=s.head, seed=s.seed),
    ),
    Method("id3", "ID3", "entries", ENTRIES, lambda s: ID3(s.k, train_head=s.head, seed=s.seed), bar="random_entries"),
    Method(
        "lift",
        "LIFT",
        "entries",
        ENTRIES,
        lambda s: LIFT(RANK, interval=max(1, s.steps // 3), train_head=s.head, seed=s.seed),
        bar="random_entries",
    ),
    Method(
        "sift", "SIFT", "entries", ENTRIES, lambda s: SIFT(s.k, train_head=s.head, seed=s.seed), bar="random_entries"
    ),
    Method(
        "pafi", "PaFI", "entries", ENTRIES, lambda s: PaFI(s.k, train_head=s.head, seed=s.seed), bar="random_entries"
    ),
    Method(
        "spt",
        "SPT (entries)",
        "entries",
        ENTRIES,
        lambda s: SPT(None, s.k, structured=False, batches=8, train_head=s.head, seed=s.seed),
        bar="random_entries",
    ),
    Method(
        "rst",
        "random layers (LoRA)",
        "adapter layers",
        ADAPTERS,
        lambda s: RST(ACTIVE, seed=s.seed),
        adapter="lora",
    ),
    Method(
        "ist",
        "IST (LoRA)",
        "adapter layers",
        ADAPTERS,
        lambda s: IST(ACTIVE, seed=s.seed),
        adapter="lora",
        bar="rst",
    ),
    Method("layers_once", "random layers, drawn once", "layers", WEIGHTS, _once),
    Method("lisa", "LISA", "layers", WEIGHTS, lambda s: LISA(**_layers(s)), bar="layers_once"),
    Method("owlore", "OwLore (layers)", "layers", WEIGHTS, lambda s: OwLore(**_layers(s)), bar="lisa"),
    Method("one_layer", "one random layer", "one layer", WEIGHTS, lambda s: LISA(**_layers(s, 1))),
    Method(
        "badam",
        "BAdam",
        "one layer",
        WEIGHTS,
        lambda s: BAdam(s.turn, train_head=s.head, master=None, seed=s.seed),
        bar="one_layer",
    ),
    Method("matrices", "random half of the matrices", "matrices", WEIGHTS, _matrices),
    Method(
        "hft",
        "HFT",
        "matrices",
        WEIGHTS,
        lambda s: HFT(train_embeddings=False, train_head=s.head, train_norm=False, seed=s.seed),
        bar="matrices",
    ),
    Method(
        "random_ranks",
        "random ranks",
        "ranks",
        ADAPTERS,
        lambda s: _scored(AdaLoRA(RANK), RandomRanks(s.seed), s.seed),
        adapter="adalora",
    ),
    Method(
        "adalora",
        "AdaLoRA",
        "ranks",
        ADAPTERS,
        lambda s: AdaLoRA(RANK, seed=s.seed),
        adapter="adalora",
        bar="random_ranks",
    ),
    Method(
        "random_growth",
        "ranks for random matrices",
        "growing ranks",
        ADAPTERS,
        lambda s: _scored(_growing(s), RandomMatrices(s.seed), s.seed),
        adapter="growing",
    ),
    Method("increlora", "IncreLoRA", "growing ranks", ADAPTERS, _growing, adapter="growing", bar="random_growth"),
)

BY_KEY = {method.key: method for method in METHODS}
