"""Encodings of index sets: they give back what they were given, in the bytes that they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apportion.encoding import KINDS, check, decode, encode, index_dtype, sizes


def drawn(n: int, density: float, seed: int = 0) -> Tensor:
    """A set of indices at random."""
    return (torch.rand(n, generator=torch.Generator().manual_seed(seed)) < density).nonzero().squeeze(1)


@st.composite
def sets(draw: Any) -> tuple[Tensor, int]:
    """Sorted sets in [0, n), of small and of huge tensors, with gaps at the escape and beside it."""
    gaps = st.one_of(st.integers(0, 40), st.sampled_from([65533, 65534, 65535, 65536, 131069, 131070, 131071, 400_000]))
    steps = draw(st.lists(gaps, max_size=30))
    indices = torch.cumsum(torch.tensor(steps, dtype=torch.int64) + 1, 0) - 1
    n = int(indices[-1]) + 1 if steps else 0
    return indices, n + draw(st.integers(0, 20))


@given(sets())
def test_what_is_encoded_comes_back(given_set: tuple[Tensor, int]) -> None:
    indices, n = given_set
    kind, tensors = encode(indices, n)
    back = decode(kind, tensors, n, len(indices))
    assert back.dtype == torch.int32
    assert torch.equal(back.long(), indices)


@given(sets())
def test_the_smallest_is_chosen_and_has_the_bytes_it_says(given_set: tuple[Tensor, int]) -> None:
    indices, n = given_set
    told = sizes(indices, n)
    kind, tensors = encode(indices, n)
    assert sum(t.nbytes for t in tensors.values()) == told[kind] == min(told.values())


@given(st.lists(st.booleans(), max_size=70))
def test_a_mask_is_its_bits(mask: list[bool]) -> None:
    indices = torch.tensor(mask, dtype=torch.bool).nonzero().squeeze(1)
    packed = sum(1 << i for i, bit in enumerate(mask) if bit).to_bytes((len(mask) + 7) // 8, "little")
    stored = torch.tensor(list(packed), dtype=torch.uint8)
    assert torch.equal(decode("bitmask", {"bits": stored}, len(mask), len(indices)).long(), indices)


@pytest.mark.parametrize(
    ("density", "kind", "each"),
    [
        (9.5e-06, "int32", 4.0),
        (2e-05, "gaps", None),
        (0.001, "gaps", 2.0),
        (0.05, "gaps", 2.0),
        (0.0605, "gaps", 2.0),
        (0.0645, "bitmask", None),
        (0.5, "bitmask", None),
    ],
)
def test_each_encoding_wins_at_its_densities(density: float, kind: str, each: float | None) -> None:
    n = 20_000_000 if density < 0.0001 else 1_000_000
    indices = drawn(n, density)
    chosen, tensors = encode(indices, n)
    assert chosen == kind
    (stored,) = tensors.values()
    assert stored.nbytes == (n // 8 if kind == "bitmask" else pytest.approx((each or 3.0) * len(indices), rel=0.2))
    if each is not None:
        assert stored.nbytes == each * len(indices)
    assert torch.equal(decode(chosen, tensors, n, len(indices)).long(), indices)


def test_the_sizes_are_the_formulas() -> None:
    indices = torch.tensor([0, 65535, 65536, 196_607, 262_143])  # skipped: 0, 65534, 0, 131070, 65535
    assert sizes(indices, 300_000) == {"int32": 20, "gaps": 2 * (5 + 0 + 0 + 0 + 2 + 1), "bitmask": 37_500}


def test_an_empty_set_costs_nothing() -> None:
    for n in (0, 5):
        kind, tensors = encode(torch.empty(0, dtype=torch.int64), n)
        assert (kind, [t.numel() for t in tensors.values()]) == ("int32", [0])
        assert len(decode(kind, tensors, n, 0)) == 0


def test_tensors_beyond_int32_have_int64_indices_and_the_same_gaps() -> None:
    n = 2**33
    indices = torch.tensor([5, 2**31, 2**33 - 1])
    assert encode(indices, n)[0] == "int64"
    assert sizes(indices, n)["int64"] == 24
    close = torch.arange(1000) + 2**32
    kind, tensors = encode(close, n)
    assert kind == "int64"  # 65,537 escapes come first
    assert torch.equal(decode(kind, tensors, n, 1000), close)
    many = torch.arange(30_000) + 2**32
    kind, tensors = encode(many, n)
    assert (kind, index_dtype(n)) == ("gaps", torch.int64)
    assert torch.equal(decode(kind, tensors, n, 30_000), many)


def test_every_kind_is_decoded_whichever_is_smaller() -> None:
    codes = torch.tensor([1, 65535, 0], dtype=torch.int32).to(torch.uint16)
    assert decode("gaps", {"gaps": codes}, 70_000, 2).tolist() == [1, 65537]
    assert decode("int32", {"indices": torch.tensor([1, 65537], dtype=torch.int32)}, 70_000, 2).tolist() == [1, 65537]


@pytest.mark.parametrize(
    ("indices", "n", "message"),
    [
        (torch.tensor([1, 0]), 4, "must rise .*sort them"),
        (torch.tensor([1, 1]), 4, "must rise .*none twice"),
        (torch.tensor([1, 4]), 4, r"from 1 to 4 must lie in \[0, 4\)"),
        (torch.tensor([-1, 2]), 4, r"from -1 to 2 must lie in \[0, 4\)"),
        (torch.tensor([0.0]), 4, "int32 or int64 in one dimension, not torch.float32"),
        (torch.tensor([[0]]), 4, r"of shape \(1, 1\)"),
        (torch.tensor([0]), 0, r"must lie in \[0, 0\)"),
        (torch.empty(0, dtype=torch.int64), -1, "`n` must be at least 0"),
    ],
)
def test_what_is_no_sorted_set_is_refused(indices: Tensor, n: int, message: str) -> None:
    for call in (check, encode, sizes):
        with pytest.raises(ValueError, match=message):
            call(indices, n)


def bits(*values: int) -> dict[str, Tensor]:
    return {"bits": torch.tensor(values, dtype=torch.uint8)}


def gaps(*values: int) -> dict[str, Tensor]:
    return {"gaps": torch.tensor(values, dtype=torch.int32).to(torch.uint16)}


def absolute(*values: int, dtype: torch.dtype = torch.int32) -> dict[str, Tensor]:
    return {"indices": torch.tensor(values, dtype=dtype)}


@pytest.mark.parametrize(
    ("kind", "tensors", "n", "count", "message"),
    [
        ("runs", bits(1), 8, 1, f"must be one of {', '.join(KINDS)}"),
        ("gaps", bits(1), 8, 1, r"needs one tensor, 'gaps', and got \['bits'\]"),
        ("gaps", {**gaps(1), **bits(1)}, 8, 1, "needs one tensor"),
        ("gaps", {}, 8, 1, r"got \[\]"),
        ("gaps", {"gaps": torch.tensor([1])}, 8, 1, "needs torch.uint16"),
        ("gaps", {"gaps": gaps(1)["gaps"][None]}, 8, 1, r"shape \(1, 1\)"),
        ("gaps", gaps(1, 65535), 70_000, 1, "end with an escape"),
        ("gaps", gaps(1, 6), 8, 2, r"from 1 to 8 must lie in \[0, 8\)"),
        ("gaps", gaps(1, 2), 8, 3, r"count=3\)` found 2"),
        ("bitmask", bits(1), 9, 1, "has 2 bytes, not 1"),
        ("bitmask", bits(1, 2), 9, 1, "behind the last entry"),
        ("bitmask", bits(3), 8, 1, r"count=1\)` found 2"),
        ("int32", absolute(2, 1), 8, 2, "must rise"),
        ("int32", absolute(8), 8, 1, "must lie in"),
        ("int32", absolute(0), 8, 2, "found 1"),
        ("int32", absolute(0), 2**31, 1, "stored as torch.int64"),
        ("int64", absolute(0, dtype=torch.int64), 8, 1, "stored as torch.int32"),
        ("int64", absolute(0), 2**31, 1, "needs torch.int64"),
    ],
)
def test_what_encodes_no_set_is_refused(
    kind: str, tensors: dict[str, Tensor], n: int, count: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        decode(kind, tensors, n, count)
