"""SuppressionReward: units are important when the loss suffers from damping their adapters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from apportion.probe import find_adapters, suppressed
from apportion.race import mask_of, race
from apportion.types import Bound, Probe, State, View


def updated(score: Tensor, sets: Tensor, losses: Sequence[float], rate: float, form: str = "released") -> Tensor:
    """Importance after one comparison of suppressed sets.

        r_k = exp(-L_k);   A_k = r_k - mean r;   p_i = sigmoid(I_i), from the importance before
        released:        I_i <- I_i - rate * sum over k with i in S_k of A_k p_i (1 - p_i)
        score_function:  I_i <- I_i - rate * sum over k with i in S_k of A_k

    A set that left the loss low has a positive advantage A_k: its units were not missed and lose importance. The second
    form is the gradient of the expected reward when unit i is suppressed with probability 1 - p_i, independently; its
    remaining term, (1 - p_i) sum A_k, is 0 since advantages sum to 0.

    Args:
        score: Importance I, float64, shape (n,).
        sets: The suppressed units S_k, bool, shape (c, n).
        losses: Loss L_k under each, c of them; a set whose loss is NaN is left out.
        rate: Step size.
        form: ``released`` or ``score_function``.

    Returns:
        The new importance, float64, shape (n,).

    Example:
        >>> sets = torch.tensor([[True, False], [False, True]])
        >>> updated(torch.zeros(2, dtype=torch.float64), sets, [2.0, 1.0], rate=10.0)
        tensor([ 0.2907, -0.2907], dtype=torch.float64)
    """
    loss = torch.tensor(losses, dtype=torch.float64)
    sets, loss = sets[~loss.isnan()], loss[~loss.isnan()]
    if len(loss) < 2:  # one set has nothing to be compared with
        return score.clone()
    reward = torch.exp(-loss)
    advantage = reward - reward.mean()
    missed = advantage @ sets.double()
    if form == "score_function":
        return score - rate * missed
    p = torch.sigmoid(score)
    return score - rate * missed * p * (1.0 - p)


def candidate_sets(score: Tensor, size: int, count: int, generator: torch.Generator, tries: int = 100) -> Tensor:
    """Draws distinct sets of units to suppress, the unimportant ones more often.

    Each set is drawn without replacement in proportion to sigmoid(-I); a set that was drawn before is drawn again.
    After ``tries`` draws, which saturated scores can use up, sets not drawn yet are taken in a random enumeration.

    Args:
        score: Importance I, float64, shape (n,).
        size: Units in a set, in [1, n].
        count: Sets wanted; there are fewer if n units have fewer sets of that size.
        generator: CPU generator.
        tries: Draws before the enumeration.

    Returns:
        The sets, bool, shape (c, n), c = min(count, binomial(n, size)).
    """
    n = len(score)
    wanted = min(count, math.comb(n, size))
    log_weights = torch.nn.functional.logsigmoid(-score)
    found: dict[tuple[int, ...], None] = {}
    for _ in range(tries):
        if len(found) == wanted:
            break
        found[tuple(sorted(race(log_weights, size, generator).tolist()))] = None
    if len(found) < wanted:
        relabel: list[int] = torch.randperm(n, generator=generator).tolist()
        for combination in itertools.combinations(relabel, size):
            found[tuple(sorted(combination))] = None
            if len(found) == wanted:
                break
    return torch.stack([mask_of(torch.tensor(chosen), n) for chosen in found])


@dataclass(frozen=True)
class SuppressionReward:
    """Importance learned during training from how the loss takes the damping of some units' adapters.

    Every ``every`` steps a few distinct sets of units are drawn, unimportant ones more often. For each, what their
    adapters add is scaled by ``factor`` and the loss on one probe batch is taken; `updated` then moves the
    importance of the units.

    Args:
        every: Period of the updates in optimizer steps; the first is before step ``every``.
        candidates: Sets compared at an update, at least 2.
        suppressed: Share of the units in a set, truncated, at least one unit and never all of them.
        factor: What is left of the adapters' part, in [0, 1).
        rate: Step size of the importance; 0 leaves all units equal.
        form: ``released`` or ``score_function``, see `updated`.
        adapters: Regex over module names for adapters that are not PEFT layers.
        adapter_form: Of those: ``residual`` if they return their input plus something, ``delta`` if they return what
            is added.

    Raises:
        ValueError: If an argument is out of its range, or at an update if a unit has no adapter that runs.

    Example:
        >>> [step for step in range(31) if SuppressionReward(every=10).due(step)]
        [10, 20, 30]

    References:
        Yao et al., *Layer-wise Importance Matters: Less Memory for Better Performance in Parameter-efficient
        Fine-tuning of Large Language Models*, Findings of EMNLP 2024, https://arxiv.org/abs/2410.11772
    """

    every: int = 10
    candidates: int = 3
    suppressed: float = 0.5
    factor: float = 0.25
    rate: float = 10.0
    form: str = "released"
    adapters: str | None = None
    adapter_form: str = "residual"

    needs: ClassVar[frozenset[str]] = frozenset({"loss"})

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(
                f"`SuppressionReward(every={self.every})` must be at least 1: it is a period in optimizer steps."
            )
        if self.candidates < 2:
            raise ValueError(
                f"`SuppressionReward(candidates={self.candidates})` must be at least 2: sets are compared with each "
                "other."
            )
        if not 0.0 < self.suppressed < 1.0:
            raise ValueError(
                f"`SuppressionReward(suppressed={self.suppressed!r})` must lie in (0, 1): it is a share of the units."
            )
        if not 0.0 <= self.factor < 1.0:
            raise ValueError(f"`SuppressionReward(factor={self.factor!r})` must lie in [0, 1): 1 would damp nothing.")
        if not 0.0 <= self.rate < math.inf:
            raise ValueError(
                f"`SuppressionReward(rate={self.rate!r})` must be at least 0 and finite: it is a step size."
            )
        if self.form not in ("released", "score_function"):
            raise ValueError(f"`SuppressionReward(form={self.form!r})` must be 'released' or 'score_function'.")
        if self.adapter_form not in ("residual", "delta"):
            raise ValueError(f"`SuppressionReward(adapter_form={self.adapter_form!r})` must be 'residual' or 'delta'.")

    def size(self, n: int) -> int:
        """Units in a suppressed set, of ``n``."""
        return max(1, min(n - 1, int(self.suppressed * n + 1e-9)))

    def init(self, n: int) -> State:
        """Zeros, shape (n,): all units equal."""
        return {"score": torch.zeros(n, dtype=torch.float64)}

    def due(self, step: int) -> bool:
        """At ``every``, twice ``every`` and so on, never at step 0."""
        return step > 0 and step % self.every == 0

    def check(self, bound: Bound) -> None:
        """Looks for the adapters of all units, so that what would fail at the first update fails at the start.

        Raises:
            ValueError: If a unit has no adapter.
        """
        for unit in bound.units:
            find_adapters(unit, self.adapters)

    def update(self, state: State, view: View) -> State:
        """Compares fresh sets on a fresh probe batch."""
        score = state["score"]
        if view.probe is None:
            raise ValueError(f"`{self!r}` needs a probe: pass probe batches and a probe loss.")
        self.check(view.bound)
        if len(score) < 2:  # one unit has nothing to be compared with
            return {"score": score.clone()}
        sets = candidate_sets(score, self.size(len(score)), self.candidates, view.generator)
        view.probe.refresh()
        losses = [self._loss(view.probe, view.bound, mask) for mask in sets]
        return {"score": updated(score, sets, losses, self.rate, self.form)}

    def _loss(self, probe: Probe, bound: Bound, mask: Tensor) -> float:
        with suppressed(bound, mask, self.factor, self.adapters, self.adapter_form) as calls:
            loss = probe.loss()
        idle = [name for name, count in calls.items() if count == 0]
        if idle:
            raise ValueError(
                f"`SuppressionReward` damped the adapters of {idle[0]}, but the probe loss never ran through them: "
                "its reward would say nothing. Probe with a loss that uses the whole model, or leave such units out "
                "by `exclude=`."
            )
        return loss

    def read(self, state: State) -> Tensor:
        """Importance, float64, shape (n,)."""
        return state["score"]
