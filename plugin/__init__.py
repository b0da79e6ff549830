"""apportion: while a model is being fine-tuned, decide what is worth training, and make the cost follow."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apportion.driver import SelectiveTuning
    from apportion.optim import Selective

__all__ = ["Selective", "SelectiveTuning"]

_homes = {"Selective": "apportion.optim", "SelectiveTuning": "apportion.driver"}
_modules = ("budgets", "callbacks", "effects", "rules", "scores", "units")


def __getattr__(name: str) -> Any:
    """Imports on first use, so that ``import apportion`` alone costs nothing."""
    if name in _homes:
        return getattr(import_module(_homes[name]), name)
    if name in _modules:
        return import_module(f"apportion.{name}")
    raise AttributeError(f"module 'apportion' has no attribute {name!r}")
