"""The owner of the param groups: who trains, where the state of the others is, and what a checkpoint holds of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from apportion.owner import Owner

POLICIES = ("drop", "keep", "offload")


def model(n: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(3, 3) for _ in range(n)])


def named(module: nn.Module, *layers: int) -> dict[str, nn.Parameter]:
    return {n: p for n, p in module.named_parameters() if not layers or int(n.split(".")[0]) in layers}


def owned(policy: str = "drop", **options: Any) -> tuple[nn.Sequential, torch.optim.Optimizer, Owner]:
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1, **options)
    owner = Owner([optimizer])
    owner.claim("a", named(module), policy, None)
    return module, optimizer, owner


def step(module: nn.Module, optimizer: torch.optim.Optimizer, value: float = 1.0) -> None:
    module(torch.full((2, 3), value)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def select(owner: Owner, module: nn.Module, *layers: int, key: str = "a") -> None:
    owner.select(key, named(module, *layers).values())


def test_what_is_not_selected_has_no_gradient_no_place_and_no_state() -> None:
    module, optimizer, owner = owned()
    step(module, optimizer)
    module(torch.ones(2, 3)).sum().backward()
    select(owner, module, 1)
    for name, p in module.named_parameters():
        chosen = name.startswith("1.")
        assert p.requires_grad is chosen
        assert (p in optimizer.state) is chosen
        assert chosen or p.grad is None
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in module[1].parameters()]


@pytest.mark.parametrize("policy", POLICIES)
def test_state_of_a_parameter_that_comes_back_follows_the_policy(policy: str) -> None:
    module, optimizer, owner = owned(policy)
    step(module, optimizer)
    before = {k: v.clone() for k, v in optimizer.state[module[0].weight].items()}
    select(owner, module, 1)
    assert module[0].weight not in optimizer.state
    step(module, optimizer)
    select(owner, module, 0)
    after = optimizer.state.get(module[0].weight, {})
    if policy == "drop":
        assert not after
    else:
        assert set(after) == set(before)
        assert all(torch.equal(after[k], before[k]) for k in before)


def test_a_returning_parameter_takes_adams_first_step_after_drop_and_goes_on_after_keep() -> None:
    steps = {}
    for policy in ("drop", "keep"):
        module, optimizer, owner = owned(policy)
        for _ in range(3):
            step(module, optimizer)
        select(owner, module, 1)
        select(owner, module, 0)
        step(module, optimizer)
        steps[policy] = float(optimizer.state[module[0].weight]["step"])
    assert steps == {"drop": 1.0, "keep": 4.0}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_state_dict_has_the_positions_of_the_untouched_optimizer(policy: str) -> None:
    module, optimizer, owner = owned(policy)
    step(module, optimizer)
    select(owner, module, 1, 3)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["params"] == list(range(8))
    assert set(saved["state"]) == ({2, 3, 6, 7} if policy == "drop" else set(range(8)))
    plain = torch.optim.AdamW(copy.deepcopy(module).parameters())
    plain.load_state_dict(saved)  # a run without any selection takes it
    for i, p in enumerate(module.parameters()):
        if i in saved["state"]:
            source = optimizer.state[p] or owner.slots[p].parked
            assert source is not None
            assert torch.equal(plain.state_dict()["state"][i]["exp_avg"], source["exp_avg"])


@pytest.mark.parametrize("policy", POLICIES)
def test_saved_and_loaded_in_another_process_goes_on_bit_for_bit(policy: str) -> None:
    def run(stop: int | None) -> list[torch.Tensor]:
        module, optimizer, owner = owned(policy)
        for i in range(6):
            select(owner, module, i % 4, (i + 1) % 4)
            if i == stop:
                weights, saved = copy.deepcopy(module.state_dict()), copy.deepcopy(optimizer.state_dict())
                module, optimizer, owner = owned(policy)
                module.load_state_dict(weights)
                select(owner, module, i % 4, (i + 1) % 4)
                optimizer.load_state_dict(saved)
            step(module, optimizer, value=float(i))
        return [p.detach() for p in module.parameters()]

    whole = run(None)
    for stop in range(6):
        assert all(torch.equal(a, b) for a, b in zip(whole, run(stop), strict=True)), f"stopped before step {stop}"


def test_state_of_a_plain_run_loads_under_a_selection() -> None:
    module = model()
    plain = torch.optim.AdamW(module.parameters(), lr=1e-2)
    step(module, plain)
    for policy in POLICIES:
        fresh, optimizer, owner = owned(policy)
        select(owner, fresh, 2)
        optimizer.load_state_dict(plain.state_dict())
        assert set(optimizer.state) == set(fresh[2].parameters())
        select(owner, fresh, 0)
        assert (fresh[0].weight in optimizer.state) is (policy != "drop")


def test_a_checkpoint_with_other_groups_is_refused() -> None:
    _, optimizer, _ = owned()
    other = torch.optim.AdamW([{"params": [p]} for p in model().parameters()])
    with pytest.raises(ValueError, match=r"groups of \[1, 1, 1, 1, 1, 1, 1, 1\] parameters, this one of \[8\]"):
        optimizer.load_state_dict(other.state_dict())


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
def test_release_leaves_groups_hooks_and_flags_as_found(policy: str, final: bool) -> None:
    module = model()
    module[3].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([{"params": module[:2].parameters(), "lr": 0.1}, {"params": module[2:].parameters()}])
    groups = [list(g["params"]) for g in optimizer.param_groups]
    hooks = [len(getattr(optimizer, k)) for k in vars(optimizer) if k.endswith("_hooks")]
    owner = Owner([optimizer])
    owner.claim("a", {n: p for n, p in named(module).items() if p.requires_grad}, policy, None)
    select(owner, module, 1)
    step(module, optimizer)
    select(owner, module, 2)
    owner.release("a", final)
    assert [list(map(id, g["params"])) for g in optimizer.param_groups] == [list(map(id, g)) for g in groups]
    assert [p.requires_grad for p in module.parameters()] == [True] * 7 + [False]
    assert [len(getattr(optimizer, k)) for k in vars(optimizer) if k.endswith("_hooks")] == hooks
    assert not hasattr(optimizer, "_apportion_owner")
    assert (module[1].weight in optimizer.state) is (policy != "drop")


def test_a_parameter_trains_if_every_claim_over_it_selects_it() -> None:
    module, _, owner = owned()
    owner.claim("b", named(module, 0, 1, 2), "drop", None)
    select(owner, module, 0, 3)
    select(owner, module, 0, 1, key="b")
    assert [layer.weight.requires_grad for layer in module] == [True, False, False, True]
    owner.release("a")
    assert [layer.weight.requires_grad for layer in module] == [True, True, False, True]
    owner.release("b")
    assert all(p.requires_grad for p in module.parameters())


def test_two_effects_over_one_parameter_are_refused() -> None:
    module, _, owner = owned("drop")
    with pytest.raises(ValueError, match=r"`b` and `a` both decide about 0\.weight.*give both the same effect"):
        owner.claim("b", named(module, 0), "keep", None)
    with pytest.raises(ValueError, match=r"master='fp32'"):
        owner.claim("b", named(module, 0), "drop", "fp32")


def test_an_optimizer_that_lacks_parameters_is_refused_by_their_names() -> None:
    module = model()
    owner = Owner([torch.optim.SGD(module[:2].parameters(), lr=0.1)])
    with pytest.raises(ValueError, match=r"holds 4 of the 8 parameters.*2\.weight, 2\.bias, 3\.weight"):
        owner.claim("a", named(module), "drop", None)


def test_lbfgs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`LBFGS` keeps its own list of parameters.*AdamW"):
        Owner([torch.optim.LBFGS(model().parameters())])


def test_a_parameter_in_two_optimizers_is_refused() -> None:
    module = model()
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1), torch.optim.SGD(module[1:].parameters(), lr=0.1)]
    with pytest.raises(ValueError, match=r"6 parameters.*more than one optimizer"):
        Owner(optimizers)


def test_selections_share_the_owner_of_their_optimizers() -> None:
    _, optimizer, owner = owned()
    assert Owner.of([optimizer]) is owner
    with pytest.raises(ValueError, match="only in part"):
        Owner.of([optimizer, torch.optim.SGD(model().parameters(), lr=0.1)])
    owner.release("a")
    assert Owner.of([optimizer]) is not owner


def test_parameter_names_follow_their_parameters() -> None:
    module = model()
    optimizer = torch.optim.AdamW(module.named_parameters(), lr=1e-2)
    owner = Owner([optimizer])
    owner.claim("a", named(module), "keep", None)
    select(owner, module, 1)
    assert optimizer.param_groups[0]["param_names"] == ["1.weight", "1.bias"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == list(named(module))
    step(module, optimizer)
    fresh = model()
    other = torch.optim.AdamW(fresh.named_parameters(), lr=1e-2)
    owner_of_other = Owner([other])
    owner_of_other.claim("a", named(fresh), "keep", None)
    select(owner_of_other, fresh, 2)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["param_names"] == ["2.weight", "2.bias"]
    owner.release("a")
    assert optimizer.param_groups[0]["param_names"] == list(named(module))


def test_a_selection_finds_the_model_as_its_user_left_it() -> None:
    module, _, owner = owned()
    module[3].weight.requires_grad_(False)
    select(owner, module, 1, 3)
    module[3].weight.requires_grad_(False)
    with owner.thawed():
        assert [p.requires_grad for p in module.parameters()] == [True] * 6 + [False, True]
    assert [p.requires_grad for p in module.parameters()] == [False, False, True, True, False, False, False, True]


def test_offloaded_state_is_told_apart_from_kept_state() -> None:
    for policy, expected in (("drop", 0), ("keep", 0), ("offload", 3 * 6)):
        module, optimizer, owner = owned(policy)
        step(module, optimizer)
        select(owner, module, 1)
        assert len(list(owner.offloaded())) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloaded_state_leaves_the_device_and_comes_back() -> None:
    module = model().cuda()
    optimizer = torch.optim.AdamW(module.parameters())
    owner = Owner([optimizer])
    owner.claim("a", named(module), "offload", None)
    module(torch.ones(2, 3, device="cuda")).sum().backward()
    optimizer.step()
    before = optimizer.state[module[0].weight]["exp_avg"].clone()
    select(owner, module, 1)
    assert all(t.device.type == "cpu" for t in owner.offloaded())
    select(owner, module, 0)
    after = optimizer.state[module[0].weight]["exp_avg"]
    assert after.device == before.device
    assert torch.equal(after, before)


@pytest.mark.parametrize("names", [False, True])
def test_a_group_that_is_added_later_trains_beside_what_is_selected(names: bool) -> None:
    def group_of(extra: nn.Module) -> dict[str, Any]:
        found = list(extra.named_parameters())
        return {"params": found if names else [p for _, p in found], "lr": 3e-3}

    runs = []
    for selecting in (True, False):
        module, extra = model(2), model(1)
        given = module.named_parameters() if names else module.parameters()
        optimizer = torch.optim.AdamW(given, lr=1e-2, weight_decay=0.1)
        owner = Owner([optimizer])
        if selecting:
            owner.claim("a", named(module, 0), "drop", None)
            select(owner, module, 0)
        both = nn.Sequential(module, extra)
        for turn in range(4):
            if turn == 1:
                optimizer.add_param_group(group_of(extra))
            if turn == 2 and selecting:
                select(owner, module, 0)
            step(both, optimizer)
        if selecting:
            assert list(owner.training()) == [*module.parameters(), *extra.parameters()]
        runs.append((copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in both.parameters()]))
    (ours, here), (plain, there) = runs
    assert ours["param_groups"] == plain["param_groups"]
    assert ours["state"].keys() == plain["state"].keys()
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_a_group_of_what_is_held_back_is_refused_and_left_out_again() -> None:
    module, optimizer, owner = owned()
    select(owner, module, 1)
    extra = model(1)
    optimizer.add_param_group({"params": list(extra.parameters())})
    optimizer.add_param_group({"params": list(module[0].parameters())})
    before = [p.detach().clone() for p in module.parameters()]
    nn.Sequential(module, extra)(torch.ones(2, 3)).sum().backward()
    with pytest.raises(
        ValueError, match=r"`add_param_group\(...\)` was given 2 .* shape \(3, 3\), that have their place"
    ):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert len(optimizer.param_groups) == 2
    step(nn.Sequential(module, extra), optimizer)
    owner.release("a")
    assert [len(group["params"]) for group in optimizer.param_groups] == [8, 2]
    assert all(p.requires_grad for p in module.parameters())


def test_a_selection_covers_what_was_added_before_it() -> None:
    _, optimizer, owner = owned()
    extra = model(1)
    optimizer.add_param_group({"params": list(extra.parameters())})
    owner.claim("b", named(extra), "drop", None)
    owner.select("b", [])
    assert [len(group["params"]) for group in optimizer.param_groups] == [8, 0]


def test_a_checkpoint_with_an_added_group_is_taken_in_where_it_was_added_again() -> None:
    module, optimizer, owner = owned()
    extra = model(1)
    optimizer.add_param_group({"params": list(extra.parameters())})
    select(owner, module, 1)
    step(nn.Sequential(module, extra), optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    again, other, twin = owned()
    more = model(1)
    other.add_param_group({"params": list(more.parameters())})
    other.load_state_dict(saved)
    select(twin, again, 1)
    assert other.state.keys() == {*again[1].parameters(), *more.parameters()}


def test_what_another_optimizer_s_selection_holds_is_refused_until_that_has_ended() -> None:
    module, _, owner = owned()
    select(owner, module, 1)
    second = Owner([torch.optim.SGD(module.parameters(), lr=0.1)])
    with pytest.raises(ValueError, match=r"`b` selects from 0.weight, which `a` around another optimizer selects from"):
        second.claim("b@7f", named(module), "drop", None)
    assert not second.claims
    owner.release("a")
    second.claim("b@7f", named(module), "drop", None)
    second.release("b@7f")


def test_selections_of_different_parameters_have_optimizers_of_their_own() -> None:
    module = model()
    owners = [Owner([torch.optim.SGD(part.parameters(), lr=0.1)]) for part in (module[:2], module[2:])]
    for at, owner in enumerate(owners):
        owner.claim("a", named(module, 2 * at, 2 * at + 1), "drop", None)
        select(owner, module, 2 * at)
    assert [p.requires_grad for p in module.parameters()] == [True, True, False, False] * 2


@pytest.mark.parametrize("first", ["training", "state_dict"])
def test_whoever_asks_first_sees_a_group_that_was_added(first: str) -> None:
    module, optimizer, owner = owned()
    select(owner, module, 1)
    extra = model(1)
    optimizer.add_param_group({"params": list(extra.parameters())})
    if first == "training":
        assert list(owner.training()) == [*module[1].parameters(), *extra.parameters()]
    else:
        assert [group["params"] for group in optimizer.state_dict()["param_groups"]] == [[*range(8)], [8, 9]]
