"""Who trains single entries: ours and others, on the same entries, and AdamW on everything as the measure of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import peft
import torch
from peft import ShiraConfig, get_peft_model
from torch import Tensor, nn

from apportion.budgets import RankEquivalent
from apportion.callbacks import ID3, LIFT, SaRA
from apportion.driver import SelectiveTuning
from apportion.effects import Compact
from apportion.entry_units import Entries
from apportion.entrywise import RandomEntries
from apportion.recipes.bench import packages
from apportion.recipes.bench.entry_bars import DECAY, LR, Size, adamw, trainable
from apportion.recipes.bench.field import Contender, Loop, Ours, Rival, matrices, plain, whole
from apportion.recipes.bench.peers_layers import INTERVAL
from apportion.recipes.bench.twins import LiftTwin, SaraTwin
from apportion.rules import TopK
from apportion.types import When

RANK = 4
GROWTH, SHARE, EPS = 8, 0.01, 1e-3
THRESHOLD = 2.5e-4  # one weight in a hundred of a normal distribution of deviation 0.02


def drawn() -> SelectiveTuning:
    """Random entries, as many in each matrix as an adapter of rank `RANK` has."""
    return SelectiveTuning(
        Entries(), RandomEntries(), RankEquivalent(RANK), TopK(per="tensor"), Compact(), select_when=When(end=1)
    )


def masks_of(model: Any) -> dict[str, Tensor]:
    """The entries that `drawn` selects in ``model``, by the names of the matrices."""
    rival = Ours(model, drawn(), 1)
    owner, bound = rival.optimizer.owner, rival.optimizer.selection.bound
    named = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for p in bound.tensors:  # type: ignore[attr-defined]
        mask = torch.zeros(p.numel(), dtype=torch.bool)
        mask[owner.narrow(p).index.long()] = True
        found[named[id(p)]] = mask.view(p.shape)
    rival.optimizer.close()
    return found


def masked(model: Any, steps: int, put_back: bool = True) -> Rival:
    """Gradients times a mask, AdamW on everything, and what it has moved beside the mask put back, or not."""
    del steps
    masks = masks_of(model)
    optimizer = adamw(model)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def step() -> None:
        before = {name: p.detach().clone() for name, p in params.items()} if put_back else {}
        for name, p in params.items():
            p.grad.mul_(masks[name])
        optimizer.step()
        for name, old in before.items():
            params[name].copy_(torch.where(masks[name], params[name], old))
        optimizer.zero_grad()

    seen: Mapping[str, Tensor | None] = masks
    return Loop(model, step, lambda: seen, lambda: [optimizer])


def sparse_adapters(size: Size) -> nn.Module:
    """The model with PEFT's SHiRA adapters on the entries that `drawn` selects."""
    model = matrices(size)
    masks = masks_of(model)
    at = {id(p): masks[name] for name, p in model.named_parameters() if name in masks}
    names = sorted({name.split(".")[-2] for name in masks})
    config = ShiraConfig(r=RANK, target_modules=names, mask_type="random")
    config.mask_fn = lambda layer, r, **rest: at[id(layer.weight)].to(layer.weight.dtype)
    adapted: nn.Module = get_peft_model(model, config)
    return adapted


def _budget(n: int) -> int:
    return max(1, int(SHARE * n) // GROWTH) * GROWTH


def id3(model: Any, steps: int) -> Rival:
    """Our ID3, all linear maps and the head as candidates."""
    budget = _budget(sum(p.numel() for p in trainable(model)))
    method = ID3(budget, exp=1.0, eps=EPS, form="front", max_steps=GROWTH, train_head="unit")  # type: ignore[arg-type]
    return Ours(model, method, steps)


def selective_optimizers(model: Any, steps: int) -> Rival:
    """The ID3 of selective-optimizers on the same candidates."""
    del steps
    make = packages.module(packages.SELECTIVE_OPTIMIZERS, "selective_optimizers.wrap").get_selective_optimizer
    params = trainable(model)
    budget = _budget(sum(p.numel() for p in params))
    kind = make(torch.optim.AdamW, "id3")
    optimizer = kind(params, lr=LR, weight_decay=0.0, budget=budget, max_steps=GROWTH, eps=EPS, exp=1.0, verify=False)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def trained() -> Mapping[str, Tensor | None]:
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        return dict(zip(names, (mask.clone() for mask in optimizer.param_groups[0]["chosen_masks"]), strict=True))

    return Loop(model, step, trained, lambda: [optimizer], late=True)


class _Of:
    """A twin's state, as an optimizer would show it."""

    def __init__(self, state: Mapping[Any, dict[str, Tensor]]) -> None:
        self.state = state


def lift_twin(model: Any, steps: int) -> Rival:
    """The official LIFT."""
    del steps
    twin = LiftTwin(trainable(model), RANK, 2 * INTERVAL, LR)
    names = [name for name, p in model.named_parameters() if p.requires_grad]

    def step() -> None:
        twin.step()
        twin.zero_grad()

    def trained() -> Mapping[str, Tensor | None]:
        return dict(zip(names, twin.masks, strict=True))

    return Loop(model, step, trained, lambda: [_Of(twin.state)], late=True)


def sara_twin(model: Any, steps: int) -> Rival:
    """The official SaRA in its compact form."""
    del steps
    params = trainable(model)
    twin = SaraTwin(params, THRESHOLD, LR, DECAY)
    names = [name for name, p in model.named_parameters() if p.requires_grad]

    def step() -> None:
        twin.step()
        twin.zero_grad()

    return Loop(model, step, lambda: dict(zip(names, twin.masks, strict=True)), lambda: [twin.base])


def contenders() -> list[Contender]:
    """All of them."""
    return [
        Contender("AdamW on everything", "everything", "torch", plain, whole),
        Contender("apportion, random entries", "entries, fixed", "ours", lambda m, s: Ours(m, drawn(), s), matrices),
        Contender("AdamW, masked, the rest put back", "entries, fixed", "torch", masked, matrices),
        Contender(
            "AdamW, gradients masked", "entries, fixed", "torch", lambda m, s: masked(m, s, put_back=False), matrices
        ),
        Contender(f"SHiRA, PEFT {peft.__version__}", "entries, fixed", "package", plain, sparse_adapters),
        Contender("apportion ID3", "entries, growing", "ours", id3, lambda size: size.build()),
        Contender(
            packages.SELECTIVE_OPTIMIZERS.requirement,
            "entries, growing",
            "package",
            selective_optimizers,
            lambda size: size.build(),
            note="in a plain loop: a Trainer's closure makes it fail",
        ),
        Contender(
            "apportion LIFT",
            "entries, refreshed",
            "ours",
            lambda m, s: Ours(m, LIFT(RANK, RANK, 2 * INTERVAL), s),
            matrices,
        ),
        Contender("the official LIFT", "entries, refreshed", "twin", lift_twin, matrices),
        Contender(
            "apportion SaRA",
            "entries by size",
            "ours",
            lambda m, s: Ours(m, SaRA(THRESHOLD, progressive_step=None), s),
            whole,
        ),
        Contender("the official SaRA", "entries by size", "twin", sara_twin, whole),
    ]
