"""The adapters of the evidence, and the rank that fixes the budget of all methods."""

from __future__ import annotations

from typing import Any

RANK = 4
"""Of LoRA, and in the mean of all that chooses ranks."""

FIRST_RANK = 6
"""Of adapters whose ranks are chosen, before the choice: 1.5 times as many, as in AdaLoRA's settings."""

MOST_RANKS = 8
"""Of adapters whose ranks grow from one each."""

_RANKS = {"lora": RANK, "adalora": FIRST_RANK, "growing": MOST_RANKS}


def adapter(kind: str, targets: list[str]) -> Any:
    """PEFT's configuration of the adapters that a method trains; their scale is 2.

    Args:
        kind: ``lora`` of rank `RANK`; ``adalora`` of rank `FIRST_RANK`, of which a mean of `RANK` is to be left; or
            ``growing``, in the same form, with room for `MOST_RANKS`.
        targets: Last parts of the names of the matrices that get one.

    Raises:
        ValueError: If there is no such kind.
    """
    from peft import AdaLoraConfig, LoraConfig

    if kind not in _RANKS:
        raise ValueError(f"`adapter({kind!r})` must be one of {', '.join(_RANKS)}.")
    rank = _RANKS[kind]
    if kind == "lora":
        return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    # The schedule is the callback's; PEFT only wants to see one.
    return AdaLoraConfig(init_r=rank, lora_alpha=2 * rank, total_step=10**6, target_modules=targets)
