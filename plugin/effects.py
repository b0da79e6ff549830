"""Effects: what selection does to the training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from apportion import ages
from apportion.blend import Blended
from apportion.candidates import Candidates
from apportion.compact import Fate, Gathered
from apportion.eligible import check_entries
from apportion.entry_selection import Choice
from apportion.hold import Held
from apportion.owner import Owner
from apportion.penalties import Penalty
from apportion.stores import Narrow
from apportion.tiled import CAPTURES, layer_of
from apportion.types import Bound


@dataclass(frozen=True)
class Freeze:
    """Trains the selected units and freezes the others: no gradient, no optimizer state, no step, no decay.

        selected:     w <- step(w, g, state)
        unselected:   w <- w, bit for bit; g = None

    Args:
        state: What happens to the optimizer state of a unit that is no longer selected. ``drop`` forgets it: the
            next time, the unit takes the optimizer's first step again (about lr per entry under Adam, whatever the
            gradient's size). ``offload`` moves it to (pinned) CPU memory and brings it back; ``keep`` leaves it on the
            device.
        master: ``fp32`` trains half-precision units through full-precision copies, which exist for what is selected;
            None leaves the precision to the optimizer and the Trainer. What others write into a weight, such as loaded
            or averaged weights, is taken up at the next step; writes through ``.data`` are not seen, so use
            `torch.no_grad()`.

    Raises:
        ValueError: If ``state`` or ``master`` is unknown.

    Example:
        >>> Freeze(state="offload")
        Freeze(state='offload', master=None)
    """

    state: str = "drop"
    master: str | None = None

    hides: ClassVar[frozenset[str]] = frozenset({"grad"})

    def __post_init__(self) -> None:
        if self.state not in ("drop", "keep", "offload"):
            raise ValueError(f"`Freeze(state={self.state!r})` must be 'drop', 'keep' or 'offload'.")
        if self.master not in ("fp32", None):
            raise ValueError(f"`Freeze(master={self.master!r})` must be 'fp32' or None.")

    def open(self, owner: Owner, key: str, bound: Bound) -> None:
        """Announces the parameters that the selection called ``key`` decides about."""
        covered = dict(bound.covered())
        if self.master is not None:  # what always trains is of the same precision as what trains in turn
            covered.update(bound.always)
        owner.claim(key, covered, self.state, self.master)

    def apply(self, owner: Owner, key: str, bound: Bound, mask: Tensor) -> None:
        """Makes ``mask`` (bool, shape (n,)) the set that trains."""
        owner.select(key, [*bound.spread(mask).values(), *bound.always.values()])

    def close(self, owner: Owner, key: str, final: bool = True) -> None:
        """Leaves the model and the optimizers as they were found."""
        owner.release(key, final)


@dataclass(frozen=True)
class Compact:
    """Trains single entries at the cost of single entries: the optimizer sees only what is selected.

        selected:     w[index] <- step(w[index], g[index], state)      in fp32, then rounded to the weight's precision
        unselected:   w <- w, bit for bit; no gradient after the backward pass, no state, no decay

    Of each tensor the selected entries stand in its place in the param group, as one vector, with the same learning
    rate, decay, schedule and clipping. That costs 20 bytes an entry with AdamW: 4 for its index, 4 for its value in
    fp32, 4 for its gradient, 8 for two moments. Dense gradients live one tensor at a time, if at all; at steps whose
    gradients decide about the selection and are summed over several micro-batches, all of them live until the last.

    Gradients are clipped over what is selected, by Lightning's ``gradient_clip_val`` or over the optimizer's
    parameters. `clip_grad_norm_(model.parameters())` would find no gradient.

    What others write into a weight, such as loaded or averaged weights, is taken up at the next step. Writes through
    ``.data`` are not seen, as all values would have to be compared at every step: use `torch.no_grad()`.

    Args:
        kept: Entries that stay selected ``keep`` value, moments and age, or ``reset`` the moments and the step count of
            their tensor. Entering entries start with moments of zero.
        leaving: Entries that leave ``keep`` their trained value, or ``revert`` to the one they entered with, which
            costs another copy of what is selected.
        age: Steps that Adam's bias correction counts: those of the ``tensor``, or of each ``entry`` (4 bytes more).
        penalty: What is added to the gradients of the selected entries before the step, or None.
        capture: How the gradients of selected entries are got. ``hook`` takes them out of the dense gradient of each
            tensor, so that they are those of dense training bit for bit. Of plain linear layers ``tiled`` makes it tile
            by tile and ``sampled`` (on the CPU) entry by entry, in another order of summation, without
            `torch.autograd.grad` towards the weight and without a gradient of the gradient. ``auto`` takes what costs
            least, see `apportion.tiled.layout`: the hook for small matrices.

    Raises:
        ValueError: If an argument is unknown.

    Example:
        >>> Compact(leaving="revert")
        Compact(kept='keep', leaving='revert', age='tensor', penalty=None, capture='auto')
    """

    kept: str = "keep"
    leaving: str = "keep"
    age: str = "tensor"
    penalty: Penalty | None = None
    capture: str = "auto"

    hides: ClassVar[frozenset[str]] = frozenset()
    grain: ClassVar[str] = "entry"

    def __post_init__(self) -> None:
        self._fate()
        if self.capture not in CAPTURES:
            raise ValueError(f"`Compact(capture={self.capture!r})` must be {', '.join(map(repr, CAPTURES))}.")

    def _fate(self) -> Fate:
        return Fate(self.kept, self.leaving, self.age)

    def open(self, owner: Owner, key: str, bound: Bound) -> None:
        """Announces the parameters that the selection called ``key`` decides about; none of their entries trains."""
        check_entries(owner.optimizers)
        if self.age == "entry":
            ages.check(owner.optimizers)
        fate, how = self._fate(), self.capture
        layers = {p: layer_of(how, unit.module, p) for unit in bound.units for p in unit.params.values()}
        _open(owner, key, bound, lambda p: Gathered(p, fate, owner.slots[p].optimizer, layers[p], how))

    def apply(self, owner: Owner, key: str, bound: Bound, mask: Choice) -> None:
        """Makes the entries of the choice ``mask`` the ones that train."""
        _apply(owner, key, bound, mask)

    def close(self, owner: Owner, key: str, final: bool = True) -> None:
        """Leaves the model and the optimizers as they were found."""
        owner.release(key, final)


@dataclass(frozen=True)
class Hold:
    """Trains whole tensors and puts unselected entries back after every step: what `Compact` is checked against.

        w' = step(w, g masked, state);   w <- w' where selected, w elsewhere

    Gradients, optimizer state and a copy of the weights are as large as the model.

    Args:
        kept: As for `Compact`.
        leaving: As for `Compact`.

    Raises:
        ValueError: If an argument is unknown.

    Example:
        >>> Hold()
        Hold(kept='keep', leaving='keep')
    """

    kept: str = "keep"
    leaving: str = "keep"

    hides: ClassVar[frozenset[str]] = frozenset()
    grain: ClassVar[str] = "entry"

    def __post_init__(self) -> None:
        Fate(self.kept, self.leaving)

    def open(self, owner: Owner, key: str, bound: Bound) -> None:
        """Announces the parameters that the selection called ``key`` decides about; none of their entries trains."""
        _open(owner, key, bound, partial(Held, fate=Fate(self.kept, self.leaving)))

    def apply(self, owner: Owner, key: str, bound: Bound, mask: Choice) -> None:
        """Makes the entries of the choice ``mask`` the ones that train."""
        _apply(owner, key, bound, mask)

    def close(self, owner: Owner, key: str, final: bool = True) -> None:
        """Leaves the model and the optimizers as they were found."""
        owner.release(key, final)


@dataclass(frozen=True)
class Blend:
    """Trains all candidates and draws every entry back to its first value, as far as the task does not want it moved.

        w <- (1 - M) w_0 + M step(w, g, state)      M in [0, 1] entry by entry, see `apportion.blend.Blended`

    What is selected plays no part: M is soft, and made anew after every step. It costs what full training costs, and
    4 bytes an entry for the sum of gradients and a copy of the weights more.

    Example:
        >>> Blend()
        Blend()
    """

    hides: ClassVar[frozenset[str]] = frozenset()
    grain: ClassVar[str] = "entry"

    def open(self, owner: Owner, key: str, bound: Bound) -> None:
        """Announces the candidates."""
        _open(owner, key, bound, Blended, None)

    def apply(self, owner: Owner, key: str, bound: Bound, mask: Choice) -> None:
        """Nothing changes with the selection."""

    def close(self, owner: Owner, key: str, final: bool = True) -> None:
        """Leaves the model and the optimizers as they were found."""
        owner.release(key, final)


def _open(
    owner: Owner, key: str, bound: Bound, make: Callable[[nn.Parameter], Narrow], master: str | None = "fp32"
) -> None:
    """Claims candidates entry by entry, and what always trains as a whole, with full-precision copies for both."""
    covered = {**dict(bound.covered()), **bound.always}
    stores = {name: make for unit in bound.units for name in unit.params}
    owner.claim(key, covered, "drop", master, stores)
    owner.select(key, [*(p for unit in bound.units for p in unit.params.values()), *bound.always.values()])


def _apply(owner: Owner, key: str, bound: Bound, choice: Choice) -> None:
    assert isinstance(bound, Candidates)
    indices = dict(zip(bound.tensors, choice.indices, strict=True))
    owner.move(key, indices, {bound.tensors[i]: picks for i, picks in choice.picks.items()})
    owner.select(key, owner.claims[key].selected)
