"""The number that a run returns to a sweeper, and which way it should go."""

from __future__ import annotations

import math
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from apportion.recipes.sweeps.identity import register

LARGER = ("accuracy", "f1", "mcc", "matthews", "pearson", "spearman", "exact_match", "rouge1", "rouge2", "rougeL")
"""Last components of metrics that are better when they are larger."""

SMALLER = ("loss", "perplexity", "error")
"""Last components of metrics that are better when they are smaller."""


def better(objective: str) -> str | None:
    """``maximize`` or ``minimize``, by the last component of a metric; None for a metric that we do not know.

    Example:
        >>> better("val/accuracy"), better("test/loss"), better("val/wer")
        ('maximize', 'minimize', None)
    """
    last = objective.rpartition("/")[2]
    return "maximize" if last in LARGER else "minimize" if last in SMALLER else None


def objective_of(cfg: DictConfig) -> str:
    """The metric that a run returns, as far as its config says: ``objective``, or that of the model's class.

    A model that writes answers or texts is measured by them.
    """
    if cfg.get("objective"):
        return str(cfg.objective)
    made = get_class(cfg.model._target_)
    if cfg.model.get("answer"):
        return "val/exact_match"
    if made.__name__ == "Seq2SeqLM" and cfg.model.get("generate", True):
        return "val/rougeL"
    return str(getattr(made, "objective", ""))


def directed(sweeper: Any, objective: str) -> str | None:
    """The direction of a sweeper; None if it has none or several.

    Raises:
        ValueError: If it would look for the worst value of the objective.
    """
    declared = OmegaConf.select(sweeper, "direction")
    if declared is None or OmegaConf.is_list(declared):
        return None
    direction, wanted = str(getattr(declared, "name", declared)), better(objective)
    if wanted is not None and direction != wanted:
        raise ValueError(
            f"`hydra.sweeper.direction={direction}` looks for the worst {objective}: set it to {wanted}, or name "
            "another metric with `objective=`."
        )
    return direction


def settled(value: float, direction: str | None) -> float:
    """The objective as a sweeper can take it.

    Example:
        >>> settled(math.nan, "maximize"), settled(math.nan, None), settled(0.5, "minimize")
        (-inf, nan, 0.5)
    """
    if direction is None or not math.isnan(value):
        return value
    return -math.inf if direction == "maximize" else math.inf


def direction(cfg: DictConfig) -> str:
    """The direction that a sweeper of this config needs: ``hydra.sweeper.direction: ${apportion.direction:}``.

    Raises:
        ValueError: If it does not follow from the name of the metric.
    """
    objective = objective_of(cfg)
    wanted = better(objective)
    if wanted is None:
        raise ValueError(
            f"`objective={objective}`: whether more of it is better is not known, only of {', '.join(LARGER)} and of "
            f"{', '.join(SMALLER)}. Set `hydra.sweeper.direction` to maximize or minimize."
        )
    return wanted


register("apportion.direction", direction)
