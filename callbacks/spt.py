"""SPT: sensitivity-aware parameter-efficient tuning.

Before training, a few batches say where the loss wants the weights to change. The best entries over the whole model are
chosen; where a matrix collects many of them it gets an adapter instead:

    s = mean over batches of g^2;   c_W = chosen entries in W
    c_W >= cost(adapter of W) / alpha:   an adapter beside W trains;   else the c_W entries of W train
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from apportion.budgets import Constant
from apportion.calibrated import Fisher
from apportion.driver import SelectiveTuning
from apportion.effects import Compact
from apportion.entry_rules import Threshold
from apportion.entry_units import Entries
from apportion.planned import InPlan, Planned
from apportion.routing import Router
from apportion.types import When


class SPT(SelectiveTuning):
    """Trains the entries with the largest squared gradients, and adapters where a matrix holds many of them.

    The plan is made in ``setup``, before the optimizer is built, which must hold all parameters that require a gradient
    then. A resumed run makes it again, or reads it from ``plan``; one that comes out otherwise is refused.

    Args:
        target: Parameters that are to train after routing, the head not counted. Or:
        tau: Best entries before routing; an int counts them, a float is a fraction of the candidates.
        kind: Adapters: ``lora``, or ``adapter`` for a bottleneck on the matrix's output.
        rank: Rank of the LoRA pair, or features of the bottleneck.
        alpha: How readily a matrix gets an adapter; 1 when that costs no more than its entries, 10 as released.
        beta: How readily a vector trains whole, if ``vectors``.
        vectors: Whether vectors are candidates, and may train whole.
        structured: Whether there are adapters at all.
        dropout: Of the adapters' inputs.
        batches: Batches of the calibration.
        mode: ``train`` leaves dropout on in it, ``eval`` turns it off.
        train_head: Whether the output head trains whole.
        embeddings: Token embeddings: ``freeze``, ``train`` (whole) or ``unit`` (their entries are candidates).
        pattern: Regex that the names of candidates must match; None for all.
        exclude: Regex of names that are no candidates; None for none.
        dense: Regex of names that train whole; None for none.
        plan: File of the plan: read if it is there, else written; None for none.
        seed: Seed of the adapters' first values.
        name: Tells two of these callbacks on one Trainer apart.
        probe_data: Batches to calibrate on; None for the training data.
        probe_loss: ``probe_loss(module, batch)``; None for the loss of ``training_step``.

    Raises:
        ValueError: If not exactly one of ``target`` and ``tau`` is given, or an argument is out of its range.

    Example:
        >>> SPT(target=None, tau=0.01, structured=False).slots.units.score
        Fisher(batches=16, per='batch', mode='train')

    Differences:
        The paper's threshold for an adapter is preset; the released code takes its cost over alpha with alpha 10, and
        tries many tau for a target: ``target`` does the same, in 79 steps up to 1.6 times the target. The released
        scripts have alpha 10, ``vectors`` and a dropout of 0.1; the defaults here are the paper's alpha and neither.
        Entries train in place instead of as increments of a frozen weight, and decay with it; the scale of LoRA is 1,
        as released. There is no drop path beside the adapters, and class tokens are candidates of the role they have
        here. Released results are the best of several budgets; one budget is one run here.
        Not shown: the paper's scores with this implementation.

    References:
        He et al., *Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning*, ICCV 2023,
        https://arxiv.org/abs/2303.08566. Code: https://github.com/ziplab/SPT
    """

    def __init__(
        self,
        target: int | None = 400_000,
        tau: int | float | None = None,
        kind: str = "lora",
        rank: int = 8,
        alpha: float = 1.0,
        beta: float = 5.0,
        vectors: bool = False,
        structured: bool = True,
        dropout: float = 0.0,
        batches: int = 16,
        mode: str = "train",
        train_head: bool = True,
        embeddings: str | bool = "freeze",
        pattern: str | None = None,
        exclude: str | None = None,
        dense: str | None = None,
        plan: str | None = None,
        seed: int | None = 0,
        name: str | None = None,
        probe_data: Iterable[Any] | None = None,
        probe_loss: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        vector = "unit" if vectors else "freeze"
        entries = Entries(embeddings, train_head, vector, vector, pattern=pattern, exclude=exclude, dense=dense)
        router = Router(rank, alpha, beta, kind, vectors) if structured else None
        units = Planned(entries, Fisher(batches, "batch", mode), router, tau, target, dropout, plan, seed=seed or 0)
        super().__init__(
            units=units,
            score=InPlan(units),
            budget=Constant(1.0),
            rule=Threshold(above=0.0),
            effect=Compact(),
            select_when=When(end=1),
            seed=seed,
            name=name,
            probe_data=probe_data,
            probe_loss=probe_loss,
        )
