"""What stands between a parameter and its optimizer: comparing selections, reading and writing, sharing owners."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from narrow import ALL, Everything, backward, drawn, index_of, listed, snapshot, windows
from torch import Tensor, nn, optim
from toys import Net, lora_net, tokens, trainable, weights

from apportion.budgets import Constant
from apportion.callbacks import IST
from apportion.driver import SelectiveTuning
from apportion.effects import Compact, Freeze
from apportion.entry_units import Entries
from apportion.optim import Selective
from apportion.owner import Owner
from apportion.rules import Cycle
from apportion.scores import Uniform
from apportion.stores import Carry, index_type, merged, read, write
from apportion.types import When
from apportion.units import Layers

# Near each other and far apart: both are looked up in a way of their own.
near, far = st.integers(0, 40), st.integers(0, 10**5)
indices = (st.sets(near) | st.sets(near | far)).map(lambda chosen: torch.tensor(sorted(chosen), dtype=torch.int32))


@given(indices, indices)
def test_two_selections_are_compared_as_sets_are(old: Tensor, new: Tensor) -> None:
    carry = Carry.between(old, new)
    before, after = set(old.tolist()), set(new.tolist())
    assert {int(new[i]) for i in carry.kept} == before & after
    assert [int(old[i]) for i in carry.source] == [int(new[i]) for i in carry.kept]
    assert {int(old[i]) for i in carry.left} == before - after
    values = old.float() + 1.0
    assert carry.over(values).tolist() == [float(i) + 1.0 if int(i) in before else 0.0 for i in new]


@given(indices, indices)
def test_a_union_is_sorted_and_keeps_its_type(old: Tensor, new: Tensor) -> None:
    fresh = torch.tensor(sorted(set(new.tolist()) - set(old.tolist())), dtype=torch.int32)
    union = merged(old, fresh)
    assert union.dtype == torch.int32
    assert union.tolist() == sorted(set(old.tolist()) | set(new.tolist()))


def tensors() -> dict[str, Tensor]:
    """The same numbers in the memory layouts that parameters have."""
    block = torch.arange(24.0).view(2, 3, 2, 2)
    return {
        "matrix": torch.arange(12.0).view(3, 4),
        "transposed": torch.arange(12.0).view(4, 3).t(),
        "slice of rows": torch.arange(24.0).view(3, 8)[:, ::2],
        "channels last": block.contiguous(memory_format=torch.channels_last),
        "vector": torch.arange(5.0),
        "scalar": torch.tensor(3.0),
        "bf16": torch.arange(6.0).view(2, 3).bfloat16(),
    }


@pytest.mark.parametrize("name", tensors())
def test_entries_are_read_and_written_in_the_order_of_the_shape(name: str) -> None:
    p = nn.Parameter(tensors()[name])
    dense = p.detach().clone().contiguous().view(-1)
    index = torch.arange(0, p.numel(), 2, dtype=torch.int32)
    assert torch.equal(read(p, index), dense[index.long()])
    stride = p.stride()
    write(p, index, torch.full((len(index),), -7.3))
    dense[index.long()] = torch.tensor(-7.3, dtype=p.dtype)
    assert torch.equal(p.detach().reshape(-1), dense)
    assert p.stride() == stride
    write(p, index[:0], torch.empty(0))
    assert torch.equal(p.detach().reshape(-1), dense)


def test_reading_gives_a_copy() -> None:
    p = torch.zeros(3)
    read(p, torch.tensor([0, 1, 2])).add_(1.0)
    assert p.tolist() == [0.0] * 3


def test_indices_have_four_bytes_as_long_as_those_count_the_entries() -> None:
    assert index_type(torch.empty(2**31 - 1, device="meta")) == torch.int32
    assert index_type(torch.empty(2**31, device="meta")) == torch.int64


# One owner ------------------------------------------------------------------------------------------------------------


def of_candidates(model: nn.Module, masks: dict[str, Tensor], units: Any = None) -> SelectiveTuning:
    """A method that selects those of ``masks`` that are about its candidates."""
    units = units or Entries()
    return listed([{name: masks[name] for name in units.bind(model).names}], units=units)


def test_two_selections_of_entries_of_one_parameter_are_refused() -> None:
    model = Everything()
    base = optim.AdamW(model.parameters())
    first = Selective(base, model, listed([drawn(model)]))
    with pytest.raises(ValueError, match=r"both select entries.* give each parameter to one of them"):
        Selective(base, model, listed([drawn(model)]))
    backward(model, windows(1)[0])
    first.step()


@pytest.mark.parametrize("first", ["entries", "layers"])
def test_a_full_precision_copy_of_a_layer_and_entries_of_it_are_refused(first: str) -> None:
    """Also while the layer is frozen, and has no copy yet."""
    net = Net().bfloat16()
    base = optim.AdamW(net.parameters())
    whole = SelectiveTuning(Layers(), Uniform(), Constant(2), Cycle(), Freeze(master="fp32"))
    entries = of_candidates(net, drawn(net), Entries(pattern=r"layers\.3", head="freeze"))
    one, two = (entries, whole) if first == "entries" else (whole, entries)
    held = Selective(base, net, one)
    message = r"`SelectiveTuning` selects entries of layers\.3\..*full-precision copy.*leave `master` out"
    with pytest.raises(ValueError, match=message):
        Selective(base, net, two)
    held.close()


def test_two_selections_of_entries_share_a_model_tensor_by_tensor() -> None:
    """What one of them leaves out the other may select from; what both leave out is frozen."""
    net = Net(dropout=0.0)
    base = optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    masks = drawn(net, 0.5)
    parts = (Entries(pattern="self_attn"), Entries(pattern="mlp"))
    methods = [of_candidates(net, masks, units) for units in parts]
    one, two = (Selective(base, net, method) for method in methods)
    chosen = {n for n, p in net.named_parameters() if "layers" in n and p.ndim == 2}
    assert {*one.selection.bound.names, *two.selection.bound.names} == chosen
    for batch in tokens(8).split(2):
        before = weights(net)
        net.loss(batch).backward()
        one.step()
        one.zero_grad()
        for name, value in weights(net).items():
            whole = torch.ones_like(value) > 0 if name.startswith("lm_head") else torch.zeros_like(value) > 0
            assert torch.equal(value != before[name], masks[name] if name in chosen else whole), name
    two.close()
    before = weights(net)
    net.loss(tokens(2)).backward()
    one.step()
    after = weights(net)
    assert {n for n in after if not torch.equal(after[n], before[n])} == {*one.selection.bound.names, "lm_head.weight"}


@pytest.mark.parametrize("first", ["entries", "layers"])
@pytest.mark.parametrize("state", ["drop", "keep", "offload"])
def test_an_entry_of_a_factor_trains_if_its_layer_and_itself_are_selected(first: str, state: str) -> None:
    """Layers take turns, and of each only the given entries of its LoRA factors train."""
    net: Any = lora_net(dropout=0.0)
    base = optim.AdamW(trainable(net), lr=1e-2, weight_decay=0.1)
    masks = drawn(net, 0.5)
    layers = SelectiveTuning(Layers(), Uniform(), Constant(1), Cycle(), Freeze(state=state), select_when=When(every=1))
    methods = [of_candidates(net, masks), layers]
    if first == "layers":
        methods.reverse()
    one, two = (Selective(base, net, method) for method in methods)
    wide = two if first == "entries" else one
    for step, batch in enumerate(tokens(16).split(2)):
        chosen = set(wide.selection.bound.spread(wide.selection.mask))
        assert chosen
        before = weights(net)
        net.base_model.model.loss(batch).backward()
        # One base optimizer, two wrappers: only one of them steps it, the other one counts along.
        wide.step()
        after = weights(net)
        for name, value in after.items():
            mask = masks[name] if name in chosen else torch.zeros(value.shape, dtype=torch.bool)
            assert torch.equal((value != before[name]) & ~mask, torch.zeros_like(mask)), (step, name)
            assert name not in chosen or bool((value != before[name])[mask].all()), (step, name)
        wide.zero_grad()


def test_moments_of_entries_wait_while_their_layer_is_frozen_and_go_on_afterwards() -> None:
    net: Any = lora_net(dropout=0.0)
    params = trainable(net)
    base = optim.AdamW(params, lr=1e-2)
    optimizer = Selective(base, net, of_candidates(net, drawn(net, 0.5)))  # one that is dropped ends
    owner = optimizer.owner
    covered = {name: p for name, p in net.named_parameters() if p in owner.slots}
    owner.claim("layers", covered, "keep", None)
    p = params[0]

    def step() -> None:
        net.base_model.model.loss(tokens(2)).backward()
        base.step()
        base.zero_grad()

    step()
    saved = {k: v.clone() for k, v in base.state[owner.leaf(p)].items()}
    assert saved["exp_avg"].numel() == owner.narrow(p).index.numel() < p.numel()
    owner.select("layers", params[1:])
    assert owner.leaf(p) not in base.state
    before = p.detach().clone()
    step()
    assert torch.equal(p, before)
    owner.select("layers", params)
    assert all(torch.equal(base.state[owner.leaf(p)][k], v) for k, v in saved.items())


def test_the_selection_can_change_while_its_layer_is_frozen() -> None:
    """Moments that wait are carried over as those of entries at work are."""
    model = nn.Linear(3, 1, bias=False)
    base = optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = Selective(base, model, listed([{"weight": torch.tensor([[True, True, False]])}]))
    owner, p = optimizer.owner, model.weight
    owner.claim("layers", {"weight": p}, "keep", None)
    model(torch.ones(1, 3)).sum().backward()
    base.step()
    kept = base.state[owner.leaf(p)]["exp_avg"].clone()
    owner.select("layers", [])
    owner.move(optimizer._key, {p: torch.tensor([1, 2])}, {})
    owner.select("layers", [p])
    assert base.state[owner.leaf(p)]["exp_avg"].tolist() == [float(kept[1]), 0.0]
    assert index_of(optimizer, p).tolist() == [1, 2]
    model(torch.ones(1, 3)).sum().backward()
    base.step()


@pytest.mark.parametrize("frozen", [True, False])
def test_moments_of_whole_tensors_are_no_moments_of_entries(frozen: bool) -> None:
    """Neither those at work when the entries come, nor those that wait."""
    model = nn.Linear(3, 1, bias=False)
    base = optim.AdamW(model.parameters(), lr=1e-2)
    owner = Owner.of([base])
    owner.claim("layers", {"weight": model.weight}, "keep", None)
    model(torch.ones(1, 3)).sum().backward()
    base.step()
    base.zero_grad()
    if frozen:
        owner.select("layers", [])
    optimizer = Selective(base, model, listed([{"weight": torch.tensor([[True, True, False]])}]))
    assert optimizer.owner is owner
    owner.select("layers", [model.weight])
    assert set(base.state) <= {owner.leaf(model.weight)}
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = base.state[owner.leaf(model.weight)]
    assert state["exp_avg"].shape == (2,)
    assert float(state["step"]) == 1.0


def test_moments_that_are_dropped_take_the_ages_of_their_entries_along() -> None:
    """Otherwise the bias of moments that start anew would be corrected as that of old ones."""
    model = nn.Linear(3, 1, bias=False)
    base = optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    mask = {"weight": torch.tensor([[True, True, False]])}
    optimizer = Selective(base, model, listed([mask], Compact(age="entry")))
    owner, p = optimizer.owner, model.weight
    owner.claim("layers", {"weight": p}, "drop", None)

    def step() -> None:
        model(torch.ones(1, 3)).sum().backward()
        base.step()
        base.zero_grad()

    for _ in range(20):
        step()
    owner.select("layers", [])
    owner.select("layers", [p])
    before = p.detach().clone()
    step()
    assert (before - p).detach()[mask["weight"]].tolist() == pytest.approx([1e-2, 1e-2], rel=1e-4)


def test_a_checkpoint_holds_the_moments_of_entries_whose_layer_is_frozen() -> None:
    """In whichever order the two selections came."""

    kept: list[Selective] = []  # one that is dropped ends

    def build(order: str) -> tuple[Any, optim.Optimizer, Owner]:
        net: Any = lora_net(dropout=0.0)
        base = optim.AdamW(trainable(net), lr=1e-2)
        covered = {name: p for name, p in net.named_parameters() if p.requires_grad}
        if order == "layers first":
            Owner.of([base]).claim("layers", covered, "keep", None)
        kept.append(Selective(base, net, of_candidates(net, drawn(net, 0.5))))
        owner = kept[-1].owner
        if order == "entries first":
            owner.claim("layers", covered, "keep", None)
        return net, base, owner

    for order in ("layers first", "entries first"):
        net, base, owner = build(order)
        net.base_model.model.loss(tokens(2)).backward()
        base.step()
        params = [p for group in owner.full[0] for p in group]
        saved = {k: v.clone() for k, v in base.state[owner.leaf(params[0])].items()}
        owner.select("layers", params[1:])
        state = base.state_dict()
        other, fresh, over = build(order)
        over.select("layers", [p for group in over.full[0] for p in group][1:])
        other.load_state_dict(net.state_dict())
        fresh.load_state_dict(state)
        over.select("layers", [p for group in over.full[0] for p in group])
        found = fresh.state[over.leaf(over.full[0][0][0])]
        assert found, order
        assert all(torch.equal(found[k], v) for k, v in saved.items()), order


def test_ist_over_layers_and_entries_of_the_same_factors_share_one_run() -> None:
    from toys import Task, fit

    task = Task(lora_net(dropout=0.0))
    masks = {f"net.{name}": mask for name, mask in drawn(task.net, 0.5).items()}
    ist = IST(2, probe_interval=2)
    before = weights(task)
    run = fit(task, [ist, of_candidates(task, masks)], steps=6)
    assert run.global_step == 6
    after = weights(task)
    changed = {name: after[name] != before[name] for name in after}
    assert all(not bool((c & ~masks[name]).any()) for name, c in changed.items() if name in masks)
    assert any(bool(c.any()) for c in changed.values())
    assert snapshot(task).keys() == before.keys()
    assert ALL.grain == "entry"
