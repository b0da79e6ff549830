"""BAdam: block coordinate descent with Adam.

One block trains for ``interval`` steps on a full-precision copy with fresh moments, then the next; a pass visits
every block once, in an order that is shuffled for each pass.
"""

from __future__ import annotations

from apportion.budgets import Constant
from apportion.driver import SelectiveTuning
from apportion.effects import Freeze
from apportion.rules import Cycle
from apportion.scores import Uniform
from apportion.types import When
from apportion.units import Layers


def block_interval(examples: int, batch: int, blocks: int) -> int:
    """The authors' rule for the steps per block: about one pass over all blocks per epoch, kept within bounds.

        K = min(max(n / (B D), 50), 100)

    Args:
        examples: Training examples n.
        batch: Examples per optimizer step B, over ranks and accumulation.
        blocks: Blocks D.

    Example:
        >>> block_interval(52_000, 16, 32), block_interval(10_000, 16, 32), block_interval(10**6, 16, 32)
        (100, 50, 100)
    """
    return min(max(examples // (batch * blocks), 50), 100)


class BAdam(SelectiveTuning):
    """Trains one layer at a time, each in turn; embedding, head and final norm stay as they are.

    Args:
        interval: Optimizer steps per block; `block_interval` is the authors' rule.
        order: ``shuffled`` anew for every pass, ``ascending``, ``descending``, or ``fixed``: shuffled once.
        include_embeddings: Whether the token embedding is a block of the pass.
        include_head: Whether the output head and the norm before it are blocks of the pass.
        train_head: Whether the head always trains, as a fresh classification head must.
        state: Optimizer state of blocks that are put back: ``drop``, ``keep`` or ``offload``.
        master: ``fp32`` for full-precision copies of the block's half-precision weights; None for none.
        pattern: Regex that the names of the layers must match; None for all.
        exclude: Regex of names that are left out; None for none.
        seed: Seed of the orders.
        name: Tells two of these callbacks on one Trainer apart.

    Raises:
        ValueError: If the head is to be a block and to train always.

    Example:
        >>> BAdam(order="descending").slots.rule
        Cycle(order='descending')

    Differences:
        In the release the first block gets one step less, weight decay falls back to the inner optimizer's default, and
        block, order and copies are not in its checkpoint; here all blocks get ``interval`` steps, groups keep their
        decay, and resuming is exact. Its class defaults are 50 steps and descending order. Head and final norm are two
        blocks here. Its ``fixed`` mode, one block for the whole run, is ``pattern=`` here.
        Not shown: the paper's scores with this implementation.

    References:
        Luo, Yu, Li, *BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language Models*, NeurIPS
        2024, https://arxiv.org/abs/2404.02827. Code: https://github.com/Ledzy/BAdam
    """

    def __init__(
        self,
        interval: int = 100,
        order: str = "shuffled",
        include_embeddings: bool = False,
        include_head: bool = False,
        train_head: bool = False,
        state: str = "drop",
        master: str | None = "fp32",
        pattern: str | None = None,
        exclude: str | None = None,
        seed: int | None = 0,
        name: str | None = None,
    ) -> None:
        if include_head and train_head:
            raise ValueError(
                "`BAdam(include_head=True, train_head=True)`: a head that always trains has no turn; choose."
            )
        super().__init__(
            units=Layers(
                embeddings="unit" if include_embeddings else "freeze",
                head="unit" if include_head else "train" if train_head else "freeze",
                norm="unit" if include_head else "freeze",
                pattern=pattern,
                exclude=exclude,
            ),
            score=Uniform(),
            budget=Constant(1),
            rule=Cycle(order),
            effect=Freeze(state=state, master=master),
            select_when=When(every=interval),
            seed=seed,
            name=name,
        )
