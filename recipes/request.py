"""One estimate as the command line asks for it: a model by its shape, a method by its name, a moment of the run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from apportion.estimate import Estimate, estimate
from apportion.estimate_ranks import schedule
from apportion.ledger import Parts
from apportion.rank_selection import NOMINAL
from apportion.recipes.shapes import Shape

PRESETS = {
    "lisa": "LISA",
    "ist": "IST",
    "rst": "RST",
    "hft": "HFT",
    "badam": "BAdam",
    "owlore": "OwLore",
    "id3": "ID3",
    "lift": "LIFT",
    "sara": "SaRA",
    "sift": "SIFT",
    "fish": "FISH",
    "pafi": "PaFI",
    "random": "Random",
    "bitfit": "BitFit",
    "ttc": "TTC",
    "spider_hard": "SPIDERHard",
    "adalora": "AdaLoRA",
    "increlora": "IncreLoRA",
    "triadapt": "TriAdaptLoRA",
}
"""Method to the class of its preset."""

REFUSED = {"spider": "SPIDER", "spt": "SPT", "trpts": "TRPTS"}
"""Methods whose cost depends on values, see `apportion.estimate_entries.idle`."""

METHODS = ("full", "lora", *PRESETS)
RANKS = ("adalora", "increlora", "triadapt")
"""Methods that come with AdaLoRA's adapters, and whose budget follows the run."""

ON_ADAPTERS = ("lora", "ist", "rst", *RANKS)
MOMENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the run at which a budget of ranks is looked at."""

_SCANS = ("mamba", "mamba2", "falcon_mamba")  # without its CUDA kernels transformers loops over positions
_DEPTHS = (4, 8)


@dataclass(frozen=True)
class Request:
    """One estimate to make, as the command line asks for it."""

    config: Any
    method: str = "full"
    settings: tuple[tuple[str, Any], ...] = ()
    batch: int = 1
    length: int = 1024
    precision: str = "bf16-true"
    optimizer: str = "adamw"
    checkpointing: bool = False
    lora_rank: int = 32
    lora_targets: tuple[str, ...] = ()
    done: int = 0
    total_steps: int = NOMINAL

    def run(self) -> Estimate:
        """The estimate; of a state-space model, from two small depths."""
        if getattr(self.config, "model_type", "") in _SCANS:
            return self._extrapolated()
        return self._at(self.config)

    def over_time(self) -> dict[str, Estimate]:
        """Estimates of a budget of ranks at `MOMENTS` of the run; where it holds equally many, it is estimated once."""
        method = preset(self.method, dict(self.settings))
        moments = schedule(self._shape(self.config).build, method, self.total_steps, MOMENTS)
        held: dict[int, Estimate] = {}
        for moment in moments:
            if moment.held not in held:
                held[moment.held] = replace(self, done=moment.step).run()
        return {
            f"at {share:.0%}": replace(held[moment.held], moment=moment)
            for share, moment in zip(MOMENTS, moments, strict=True)
        }

    def _shape(self, config: Any) -> Shape:
        rank = self.lora_rank if self.method in ON_ADAPTERS else 0
        return Shape(config, rank, self.lora_targets, svd=self.method in RANKS)

    def _at(self, config: Any) -> Estimate:
        shape = self._shape(config)
        method = preset(self.method, dict(self.settings)) if {**PRESETS, **REFUSED}.get(self.method) else "full"
        result = estimate(
            shape.build,
            shape.batch(self.batch, self.length),
            method=method,
            optimizer=self.optimizer,
            precision=self.precision,
            checkpointing=self.checkpointing,
            done=self.done,
            total=self.total_steps,
        )
        said = result.assumptions
        if shape.experts:
            said += (f"experts multiplied by {shape.experts}: every token goes to its experts, none is dropped",)
        if shape.lora_rank:
            said += (
                f"{'AdaLoRA' if shape.svd else 'LoRA'} of rank {shape.lora_rank} on "
                f"{', '.join(self.lora_targets) or 'all linear maps but the head'}",
            )
        return replace(result, assumptions=said)

    def _extrapolated(self) -> Estimate:
        depth = self.config.num_hidden_layers
        low, high = (self._at(type(self.config)(**{**self.config.to_dict(), "num_hidden_layers": n})) for n in _DEPTHS)

        def line(name: str) -> int:
            a, b = getattr(low, name), getattr(high, name)
            return int(a + (b - a) * (depth - _DEPTHS[0]) / (_DEPTHS[1] - _DEPTHS[0]))

        numbers: dict[str, Any] = {
            name: line(name) for name in (*Parts.__dataclass_fields__, "parameters", "trainable")
        }
        said = (
            f"EXTRAPOLATED: linear in depth from {_DEPTHS[0]} and {_DEPTHS[1]} layers to {depth}, and with the scan as "
            "a loop over positions; the fused CUDA scan keeps less",
        )
        return replace(
            high, **numbers, selected=(), assumptions=said + high.assumptions, seconds=low.seconds + high.seconds
        )


def preset(name: str, settings: dict[str, Any]) -> Any:
    """The preset of a method by its name on the command line, with ``--set`` applied.

    Raises:
        ValueError: If the preset has no such setting.
    """
    from apportion import callbacks

    cls: Callable[..., Any] = getattr(callbacks, {**PRESETS, **REFUSED}[name])
    known = [key for key in inspect.signature(cls).parameters if key not in ("name", "probe_data", "probe_loss")]
    wrong = [key for key in settings if key not in known]
    if wrong:
        raise ValueError(f"`--set {wrong[0]}=...`: {cls.__name__} has no such setting; it has {', '.join(known)}.")
    return cls(**settings)
