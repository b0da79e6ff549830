"""The identity of a job: one short name for everything in its config that bears on its results."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

APART = ("hydra", "on_failure", "logger")
"""Top-level keys that say how a job is run or watched, and not what it computes."""

_OF_THE_RUN = re.compile(r"\$\{(hydra[:.]|now:|apportion\.job:)")


def identity(cfg: DictConfig) -> str:
    """The same 12 hexadecimal digits for the same config, wherever and whenever it runs.

        the first 12 digits of sha256(JSON of the resolved config)

    Values that Hydra fills in for each run (its folder, the time, its number) count as they are written, unresolved.

    Args:
        cfg: A composed config, with or without ``hydra``.

    Example:
        >>> first = OmegaConf.create({"seed": 1, "data": {"seed": "${seed}"}, "log": "${hydra:runtime.output_dir}/log"})
        >>> again = OmegaConf.create({"log": "${hydra:runtime.output_dir}/log", "data": {"seed": 1}, "seed": 1})
        >>> identity(first) == identity(again), len(identity(first))
        (True, 12)
    """
    content = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(content, dict)
    kept = _masked({key: value for key, value in content.items() if key not in APART})
    resolved = OmegaConf.to_container(OmegaConf.create(kept), resolve=True)
    text = json.dumps(resolved, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _masked(value: Any) -> Any:
    """``value`` with ``${hydra:...}`` and ``${now:...}`` as plain text."""
    if isinstance(value, dict):
        return {key: _masked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_masked(item) for item in value]
    return value.replace("${", "$(") if isinstance(value, str) and _OF_THE_RUN.search(value) else value


def register(name: str, of: Callable[[DictConfig], str]) -> None:
    """Makes ``${name:}`` the value of ``of`` at the whole config."""
    known: Any = OmegaConf.register_new_resolver
    if "replace" in inspect.signature(OmegaConf.register_resolver).parameters:  # its name since OmegaConf 2.4
        known = OmegaConf.register_resolver
    known(name, lambda *, _root_: of(_root_), replace=True)


# ``hydra.sweep.subdir: ${apportion.job:}`` names the folder of a job after its config.
register("apportion.job", identity)
