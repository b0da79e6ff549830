"""What two runs that must be the same are compared by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def assert_equal(found: Any, expected: Any, what: str = "") -> None:
    """The same, bit for bit, with the same types all the way down."""
    assert type(found) is type(expected), f"{what}: {type(found)} and {type(expected)}"
    if isinstance(expected, dict):
        assert set(found) == set(expected), f"{what}: {set(found) ^ set(expected)}"
        for key in expected:
            assert_equal(found[key], expected[key], f"{what}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), what
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_equal(a, b, f"{what}/{i}")
    elif isinstance(expected, Tensor):
        assert found.dtype == expected.dtype, what
        assert found.shape == expected.shape, what
        assert torch.equal(found, expected), f"{what} differs by {(found.double() - expected.double()).abs().max()}"
    else:
        assert found == expected, f"{what}: {found} and {expected}"
