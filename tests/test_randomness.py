"""Random number states: captured, saved and put back without a trace."""

from __future__ import annotations

import io
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import randomness

DRAWS: dict[str, Callable[[], object]] = {
    "random": random.random,
    "gauss": lambda: random.gauss(0.0, 1.0),  # draws pairs and keeps the second number
    "numpy": lambda: float(np.random.rand()),
    "numpy-normal": lambda: float(np.random.randn()),  # as well
    "torch": lambda: torch.rand(3).tolist(),
    "torch-normal": lambda: torch.randn(3).tolist(),
}


def draw(names: list[str]) -> list[object]:
    return [DRAWS[name]() for name in names]


def saved(states: object) -> object:
    """Through a file, as a checkpoint goes."""
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@settings(max_examples=60, deadline=None)
@given(
    before=st.lists(st.sampled_from(sorted(DRAWS)), max_size=5),
    between=st.lists(st.sampled_from(sorted(DRAWS)), max_size=5),
    after=st.lists(st.sampled_from(sorted(DRAWS)), min_size=1, max_size=8),
    seed=st.integers(0, 2**31),
)
def test_what_is_drawn_after_a_restore_is_what_was_drawn_after_the_capture(
    before: list[str], between: list[str], after: list[str], seed: int
) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    draw(before)
    states = saved(randomness.capture())
    expected = draw(after)
    draw(between)
    randomness.restore(states)  # type: ignore[arg-type]
    assert draw(after) == expected


@pytest.mark.parametrize("name", sorted(DRAWS))
def test_a_capture_draws_nothing(name: str) -> None:
    def sequence(capturing: bool) -> list[object]:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        numbers = []
        for _ in range(4):
            if capturing:
                randomness.capture()
            numbers.append(DRAWS[name]())
        return numbers

    assert sequence(True) == sequence(False)


def test_a_state_is_a_copy_that_later_draws_leave_alone() -> None:
    states = randomness.capture()
    first = saved(states)
    draw(sorted(DRAWS))
    assert str(first) == str(saved(states))


def test_states_of_devices_that_are_not_there_are_left_out() -> None:
    states = {**randomness.capture(), "cuda": [torch.zeros(16, dtype=torch.uint8)] * 99}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all() + [torch.zeros(16, dtype=torch.uint8)] * 99
    expected = draw(["torch"])
    randomness.restore(states)
    assert draw(["torch"]) == expected


@pytest.mark.parametrize("name", sorted(DRAWS))
def test_a_seeded_block_repeats_itself_and_leaves_the_states_alone(name: str) -> None:
    states = randomness.capture()
    expected = draw([name] * 3)
    randomness.restore(states)
    with randomness.seeded(5):
        first = draw([name] * 3)
    assert draw([name]) == expected[:1]
    with pytest.raises(KeyError):
        _fail_while_seeded(name, first)
    assert draw([name] * 2) == expected[1:]
    assert first != expected


def _fail_while_seeded(name: str, first: list[object]) -> None:
    with randomness.seeded(5):
        assert draw([name] * 3) == first
        raise KeyError(name)
