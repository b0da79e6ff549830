"""Freeze: what it claims, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from toys import Net, adamw

from apportion.effects import Freeze
from apportion.owner import Owner
from apportion.units import Layers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state": "forget"}, r"`Freeze\(state='forget'\)` must be"),
        ({"master": "fp64"}, r"`Freeze\(master='fp64'\)` must be"),
    ],
)
def test_unknown_options_are_refused_at_construction(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Freeze(**options)


def test_unselected_units_and_what_never_trains_are_frozen_and_the_rest_is_left_alone() -> None:
    net = Net()
    owner = Owner([adamw(net.parameters())])
    bound = Layers(embeddings="freeze").bind(net)
    effect = Freeze()
    effect.open(owner, "a", bound)
    effect.apply(owner, "a", bound, torch.tensor([False, True, False, True]))
    trains = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trains == {n for n, _ in net.named_parameters() if n.startswith(("layers.1", "layers.3", "norm", "lm_head"))}
    effect.close(owner, "a")
    assert all(p.requires_grad for p in net.parameters())


def test_masters_cover_what_always_trains_too() -> None:
    net = Net().bfloat16()
    optimizer = adamw(net.parameters())
    owner = Owner([optimizer])
    bound = Layers(embeddings="freeze").bind(net)
    effect = Freeze(master="fp32")
    effect.open(owner, "a", bound)
    effect.apply(owner, "a", bound, torch.tensor([False, True, False, False]))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {p.dtype for p in held} == {torch.float32}
    assert {id(p) for p in held} == {id(owner.leaf(p)) for p in net.parameters() if p.requires_grad}
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}


def test_a_gradient_is_what_freezing_hides() -> None:
    assert Freeze.hides == {"grad"}
