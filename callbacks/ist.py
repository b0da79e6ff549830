"""IST: importance-aware sparse tuning.

Adapters sit in all layers; only some train at a step. Which, is drawn by an importance I that is learned on the way:

    train:   the adapters of floor(active N) layers, drawn without replacement with weights sigmoid(I)
    probe:   every ``probe_interval`` steps damp the adapters of ``candidates`` sets of floor(suppressed N) layers to
             ``factor``, drawn with weights sigmoid(-I); reward r_k = exp(-loss_k), advantage A_k = r_k - mean r
    learn:   I_i <- I_i - rate * sum over sets k with layer i of A_k p_i (1 - p_i),   p_i = sigmoid(I_i)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from apportion.bandit import SuppressionReward
from apportion.budgets import Constant
from apportion.driver import SelectiveTuning
from apportion.effects import Freeze
from apportion.rules import Sample
from apportion.types import When
from apportion.units import Layers


class IST(SelectiveTuning):
    """Trains the adapters of a few layers at a time, the important ones more often; what lies outside layers stays
    as is.

    Args:
        active: Layers that train at a step; a float is a fraction, an int counts them.
        every: Optimizer steps between draws.
        probe_interval: Optimizer steps between updates of the importance.
        suppressed: Share of the layers that a probe damps.
        candidates: Damped sets that an update compares.
        factor: What is left of a damped adapter's part.
        rate: Step size of the importance; 0 is random sparse tuning, draw by draw.
        form: ``released`` or ``score_function``, the update of the importance.
        floor: Share of the uniform draw that is mixed in, in [0, 1).
        state: Optimizer state of adapters that are put back: ``offload``, ``keep`` or ``drop``.
        adapters: Regex over module names for adapters that are not PEFT layers.
        adapter_form: Of those: ``residual`` if they return their input plus something, ``delta`` if what is added.
        probe_data: Batches to probe with; None for the batch of the coming step.
        probe_loss: ``probe_loss(module, batch)``; None for the loss of ``training_step``.
        pattern: Regex that the names of the layers must match; None for all.
        exclude: Regex of names that are left out; None for none.
        seed: Seed of draws and probes, which have streams of their own.
        name: Tells two of these callbacks on one Trainer apart.

    Example:
        >>> IST(active=0.25).slots.score
        SuppressionReward(every=10, candidates=3, suppressed=0.5, factor=0.25, rate=10.0, form='released', \
adapters=None, adapter_form='residual')

    Differences:
        The release scores *un*importance, -I here. It damps by writing LoRA's scale, which under DoRA leaves the
        magnitude as it is; here the adapter's whole part of the output is damped. It probes on its own shuffle of the
        training set, 16 examples: give ``probe_data`` for that. It never evicts moments: ``state="keep"``; dropping
        them at every step would turn Adam into sign descent. ``form="score_function"`` and ``floor`` are ours.
        Not shown: the paper's accuracies with this implementation.

    References:
        Yao et al., *Layer-wise Importance Matters: Less Memory for Better Performance in Parameter-efficient
        Fine-tuning of Large Language Models*, Findings of EMNLP 2024, https://arxiv.org/abs/2410.11772.
        Code: https://github.com/antgroup/importance-aware-sparse-tuning-IST-paper
    """

    def __init__(
        self,
        active: int | float = 0.25,
        every: int = 1,
        probe_interval: int = 10,
        suppressed: float = 0.5,
        candidates: int = 3,
        factor: float = 0.25,
        rate: float = 10.0,
        form: str = "released",
        floor: float = 0.0,
        state: str = "offload",
        adapters: str | None = None,
        adapter_form: str = "residual",
        probe_data: Iterable[Any] | None = None,
        probe_loss: Callable[[Any, Any], Any] | None = None,
        pattern: str | None = None,
        exclude: str | None = None,
        seed: int | None = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(
            units=Layers(pattern=pattern, exclude=exclude),
            score=SuppressionReward(probe_interval, candidates, suppressed, factor, rate, form, adapters, adapter_form),
            budget=Constant(active),
            rule=Sample(weights="sigmoid", floor=floor),
            effect=Freeze(state=state),
            select_when=When(every=every),
            seed=seed,
            name=name,
            probe_data=probe_data,
            probe_loss=probe_loss,
        )
