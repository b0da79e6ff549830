"""Deltas: what was trained goes into a file, onto the base and off again without one bit lost, and nowhere else."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from apportion import deltafile
from apportion.delta import Change, Delta, apply, difference, fingerprint, from_indices, load, revert, save
from apportion.encoding import encode
from apportion.named import first_names
from apportion.naming import Renaming, renaming

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Net(nn.Module):
    """Every kind of tensor: tied, frozen, transposed in memory, a scalar, saved and unsaved buffers, integers."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.conv = nn.Conv1d(8, 8, 3)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.norm = nn.BatchNorm1d(8)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.across = nn.Parameter(torch.randn(8, 6).T)
        self.head = nn.Linear(8, 30, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("cache", torch.randn(4), persistent=False)
        self.to(dtype)


class Wrapped(nn.Module):
    """A model as a LightningModule has it, with something of its own."""

    def __init__(self, model: nn.Module, extra: bool = False) -> None:
        super().__init__()
        self.model = model
        if extra:
            self.loss = nn.Linear(2, 2)


class Lazy(Mapping[str, Tensor]):
    """Tensors that are made when they are asked for, so that one is alive at a time."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.asked = dict(tensors), 0

    def __getitem__(self, name: str) -> Tensor:
        self.asked += 1
        return self.tensors[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def state(model: nn.Module) -> dict[str, bytes]:
    """The model bit for bit."""
    return {
        name: t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in model.state_dict().items()
    }


def tuned(model: nn.Module, share: float = 0.1) -> nn.Module:
    """A copy in which a share of what is not frozen has moved."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            if p.requires_grad:
                p.copy_(torch.where(torch.rand(p.shape) < share, torch.randn(p.shape).to(p.dtype), p))
        other.get_submodule("").register_buffer("cache", torch.randn(4), persistent=False)
    return other


def llama(dtype: torch.dtype = torch.bfloat16, tied: bool = True) -> Any:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=40,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(12)[None]).logits


@pytest.fixture
def base() -> Net:
    return Net()


def same(one: Delta, other: Delta) -> None:
    """Fails unless both hold the same, bit for bit."""
    assert list(one.changes) == list(other.changes) or set(one.changes) == set(other.changes)
    for name, a in one.changes.items():
        b = other.changes[name]
        assert a.shape == b.shape
        for key in ("new", "old", "indices"):
            x, y = getattr(a, key), getattr(b, key)
            assert (x is None) == (y is None)
            if x is not None:
                assert x.dtype == y.dtype
                assert x.shape == y.shape
                assert x.reshape(-1).view(torch.uint8).tolist() == y.reshape(-1).view(torch.uint8).tolist()
    for key in ("names", "base_hash", "config", "prefix", "dropped"):
        assert getattr(one, key) == getattr(other, key)


@pytest.mark.parametrize("old_values", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_makes_the_tuned_model_of_the_base_and_the_base_of_the_tuned(
    dtype: torch.dtype, old_values: bool, tmp_path: Path
) -> None:
    base = Net(dtype)
    goal = tuned(base)
    made = difference(base, goal, old_values=old_values, config={"method": "x", "k": (1, 2)})
    save(made, tmp_path / "d.safetensors")
    delta = load(tmp_path / "d.safetensors")
    same(delta, made)
    assert delta.config == {"method": "x", "k": [1, 2]}
    assert delta.base_hash == fingerprint(base)
    before = state(base)
    apply(delta, base)
    assert state(base) == state(goal) != before
    assert base.head.weight is base.embed.weight
    if old_values:
        revert(delta, base)
        assert state(base) == before
    else:
        with pytest.raises(ValueError, match=r"`revert\(...\)` needs the base's values.*`old_values=True`"):
            revert(delta, base)
        assert state(base) == state(goal)


def test_only_what_moved_is_held_and_tied_weights_once(base: Net) -> None:
    goal = tuned(base)
    delta = difference(base, goal)
    assert not [name for name in delta.changes if name.startswith(("frozen", "cache", "head"))]
    assert "head.weight" not in delta.names
    moved = base.embed.weight != goal.embed.weight
    assert torch.equal(delta.changes["embed.weight"].indices.long(), moved.reshape(-1).nonzero().squeeze(1))
    assert delta.changes["embed.weight"].new.tolist() == goal.embed.weight[moved].tolist()
    assert delta.changes["embed.weight"].old.tolist() == base.embed.weight[moved].tolist()


def test_bits_count_not_values() -> None:
    nan = torch.tensor([0x7FC00001, 0x7FC00002], dtype=torch.int32).view(torch.float32)
    base = nn.ParameterDict({"w": torch.cat([torch.zeros(60), nan])})
    goal = {"w": torch.cat([torch.zeros(60), nan])}
    assert not difference(base, goal).changes
    goal["w"][7], goal["w"][60] = -0.0, nan[1]
    delta = difference(base, goal)
    assert delta.changes["w"].indices.tolist() == [7, 60]
    apply(delta, base)
    assert base["w"].view(torch.int32).tolist() == goal["w"].view(torch.int32).tolist()
    revert(delta, base)
    assert base["w"].view(torch.int32)[60] == 0x7FC00001
    assert not torch.signbit(base["w"][7])


def test_names_count_not_their_order(base: Net) -> None:
    goal = tuned(base)
    expected = difference(base, goal)
    for seed in range(3):
        order = torch.randperm(len(base.state_dict()), generator=torch.Generator().manual_seed(seed)).tolist()
        shuffled = [{list(s)[i]: s[list(s)[i]] for i in order} for s in (base.state_dict(), goal.state_dict())]
        for tensors in shuffled:
            del tensors["head.weight"]
        assert list(shuffled[0]) != sorted(shuffled[0])
        same(difference(*shuffled), expected)
        assert fingerprint(shuffled[0]) == fingerprint(base) != fingerprint(goal)


def test_a_fingerprint_is_of_names_dtypes_shapes_and_bits() -> None:
    values = torch.arange(6).to(torch.float16)
    known = fingerprint({"a": values, "b": values.clone()})
    assert known == fingerprint({"b": values.clone(), "a": nn.Parameter(values.expand(6))})
    for other in (
        {"a": values, "c": values.clone()},
        {"a": values.view(torch.bfloat16), "b": values.clone()},
        {"a": values.reshape(2, 3), "b": values.clone()},
        {"a": values, "b": values.clone().index_fill(0, torch.tensor(0), -0.0)},
        {"a": values},
    ):
        assert fingerprint(other) != known


def test_views_of_one_memory_are_not_one_tensor() -> None:
    x = torch.zeros(3, 3)
    tensors = {"a": x, "b": x.T, "c": x[:2], "d": x.view(torch.int32), "e": x.view(3, 3), "f": x[:0], "g": x[:0]}
    assert first_names(tensors) == {**{name: name for name in tensors}, "e": "a"}


def test_names_that_fit_as_they_are_stay() -> None:
    assert renaming(["a.w"], ["a.w", "ema.a.w"]) == Renaming()
    assert renaming(["a.w"], ["a.w", "ema.a.w"], "ema") == Renaming(added="ema.")
    assert renaming(["m.a.w", "m.b"], ["a.w", "b", "m.a.w"]) == Renaming(stripped="m.")


def test_a_lazy_mapping_is_asked_for_each_tensor_once(base: Net) -> None:
    goal = tuned(base)
    plain = {name: t for name, t in base.state_dict().items() if name != "head.weight"}
    lazy = Lazy(plain)
    delta = difference(lazy, goal)
    same(delta, difference(base, goal))
    assert lazy.asked == len(plain)
    assert fingerprint(Lazy(plain)) == fingerprint(base)


@given(st.integers(0, 2**31), st.sampled_from(DTYPES), st.floats(0, 1), st.booleans())
def test_a_round_trip_at_any_density(seed: int, dtype: torch.dtype, share: float, old_values: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = tuple(torch.randint(0, 12, (int(torch.randint(0, 4, (1,), generator=generator)),), generator=generator))
    shape = tuple(int(s) for s in shape)
    bits = torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)
    values = bits.view(torch.float32) if dtype == torch.float32 else bits.to(torch.int16).view(dtype)
    other = torch.where(torch.rand(shape, generator=generator) < share, values.flip(0) if shape else values, values)
    model = nn.ParameterDict({"w": values.clone(), "still": torch.ones(2)})
    delta = difference(model, {"w": other, "still": torch.ones(2)}, old_values=old_values)
    apply(delta, model)
    assert model["w"].reshape(-1).view(torch.uint8).tolist() == other.reshape(-1).view(torch.uint8).tolist()
    if old_values:
        revert(delta, model)
        assert model["w"].reshape(-1).view(torch.uint8).tolist() == values.reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_alpha_goes_from_the_base_to_the_tuned_model_and_beyond(dtype: torch.dtype) -> None:
    base = Net(dtype)
    goal, before = tuned(base), state(base)
    delta = difference(base, goal)
    for alpha, expected in ((0.0, before), (1.0, state(goal))):
        model = copy.deepcopy(base)
        apply(delta, model, alpha)
        assert state(model) == expected
        revert(delta, model, alpha)
        assert state(model) == before
    for alpha in (0.3, -0.5, 1.7):
        model = copy.deepcopy(base)
        apply(delta, model, alpha)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        old, new = base.embed.weight.detach().to(wide), goal.embed.weight.detach().to(wide)
        assert torch.equal(model.embed.weight.detach(), (old + alpha * (new - old)).to(dtype))
        with pytest.raises(ValueError, match=r"`revert\(alpha=1.0\)`.* do not hold the values"):
            revert(delta, model)
        revert(delta, model, alpha)
        assert state(model) == before


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_alpha_must_be_finite(base: Net, alpha: float) -> None:
    delta, before = difference(base, tuned(base)), state(base)
    for call in (apply, revert):
        with pytest.raises(ValueError, match="must be a finite number"):
            call(delta, base, alpha)
    assert state(base) == before


def test_integers_have_no_in_between(base: Net) -> None:
    goal = tuned(base)
    goal.norm.num_batches_tracked += 5
    goal.norm.running_mean += 1
    delta, before = difference(base, goal), state(base)
    with pytest.raises(
        ValueError, match=r"`apply\(alpha=0.5\)` must be 0 or 1: `norm.num_batches_tracked` hold integers"
    ):
        apply(delta, base, 0.5)
    apply(delta, base)
    assert state(base) == state(goal)
    revert(delta, base)
    assert state(base) == before


def test_a_tensor_with_few_unmoved_entries_is_cheaper_whole() -> None:
    base, goal = {"w": torch.zeros(100)}, {"w": torch.ones(100)}
    assert difference(base, goal).changes["w"].indices is None
    goal["w"][:2] = 0
    whole = difference(base, goal, old_values=False).changes["w"]
    assert (whole.indices, whole.encoded()) == (None, ("whole", 400))
    goal["w"][:4] = 0  # 96 * 4 + 13 bytes of mask are less than 400
    sparse = difference(base, goal, old_values=False).changes["w"]
    assert sparse.encoded() == ("bitmask", 397)


# Prefixes, heads, other sides


@pytest.mark.parametrize("made_wrapped", [True, False])
@pytest.mark.parametrize("applied_wrapped", [True, False])
def test_a_prefix_is_found_on_either_side(base: Net, made_wrapped: bool, applied_wrapped: bool) -> None:
    goal = tuned(base)
    delta = difference(Wrapped(base), Wrapped(goal)) if made_wrapped else difference(base, goal)
    model = copy.deepcopy(base)
    whole = Wrapped(model, extra=not made_wrapped) if applied_wrapped else model
    apply(delta, whole)
    assert state(model) == state(goal)
    revert(delta, whole, prefix="model" if applied_wrapped or made_wrapped else "")
    assert state(model) == state(base)


def test_a_prefix_of_the_tuned_side_is_stripped(base: Net) -> None:
    goal = tuned(base)
    same(difference(base, Wrapped(goal)), difference(base, goal))
    with pytest.raises(
        ValueError, match=r"`loss.bias`, `loss.weight` lie outside `model.`.*`prefix='model.'`.*`fresh=`"
    ):
        difference(base, Wrapped(goal, extra=True))
    same(difference(base, Wrapped(goal, extra=True), prefix="model"), difference(base, goal))


def test_two_parts_with_the_same_names_must_be_told_apart(base: Net) -> None:
    goal = tuned(base)
    both = nn.ModuleDict({"student": goal, "teacher": copy.deepcopy(base)})
    with pytest.raises(ValueError, match=r"under `student.`, `teacher.` alike: say which by `prefix=`"):
        difference(base, both)
    delta = difference(base, both, prefix="student.")
    same(delta, difference(base, goal))
    pair = nn.ModuleDict({"a": copy.deepcopy(base), "b": copy.deepcopy(base)})
    with pytest.raises(ValueError, match=r"2 parts of the model have all names, under `a.`, `b.`"):
        apply(delta, pair)
    apply(delta, pair, prefix="b")
    assert state(pair["b"]) == state(goal)
    assert state(pair["a"]) == state(base)


def test_a_fresh_head_is_held_whole_and_not_part_of_the_base(base: Net) -> None:
    goal, before = tuned(base), fingerprint(base)
    goal.classifier = nn.Linear(8, 3)
    delta = difference(base, goal)
    assert set(delta.fresh) == {"classifier.weight", "classifier.bias"}
    assert delta.base_hash == before
    model = copy.deepcopy(base)
    with pytest.raises(ValueError, match=r"lacks `classifier.bias`, `classifier.weight`, out of"):
        apply(delta, model)
    assert state(model) == state(base)
    model.classifier = nn.Linear(8, 3)  # drawn anew
    apply(delta, model)
    assert state(model) == state(goal)
    revert(delta, model)
    assert state(model) == {**state(base), **{n: b for n, b in state(goal).items() if "classifier" in n}}
    for alpha in (0.0, 0.5):
        model.classifier.reset_parameters()
        apply(delta, model, alpha)
        assert {n: b for n, b in state(model).items() if "classifier" in n}.items() <= state(goal).items()
        revert(delta, model, alpha)
    assert {n: b for n, b in state(model).items() if "classifier" not in n} == state(base)


def test_a_head_that_the_base_draws_at_random_is_named_fresh(base: Net) -> None:
    base.classifier = nn.Linear(8, 3)
    goal = tuned(base)
    goal.classifier.weight.data.normal_()
    anew = copy.deepcopy(base)
    anew.classifier.reset_parameters()
    with pytest.raises(ValueError, match="is not the base of this delta"):
        apply(difference(base, goal), anew)
    delta = difference(base, goal, fresh=r"classifier\.\w+")
    assert delta.base_hash == fingerprint(base, without=r"classifier\.\w+") == fingerprint(anew, r"classifier\.\w+")
    assert delta.changes["classifier.bias"].old is None
    apply(delta, anew)
    assert state(anew) == state(goal)
    with pytest.raises(ValueError, match="must list the base's tensors, at least one"):
        difference(base, goal, fresh=".*")
    with pytest.raises(ValueError, match=r"`fresh='clasifier'` matches no tensor"):
        difference(base, goal, fresh="clasifier")


def test_a_head_beside_the_backbone_keeps_its_name(base: Net, tmp_path: Path) -> None:
    goal = Wrapped(tuned(base), extra=True)
    delta = difference(base, goal, fresh=r"loss\.\w+")
    assert delta.prefix == "model."
    save(delta, tmp_path / "d.safetensors")
    model = nn.ModuleDict({"net": Wrapped(copy.deepcopy(base), extra=True)})
    apply(load(tmp_path / "d.safetensors"), model)
    assert state(model["net"]) == state(goal)


def test_another_shape_is_refused_or_fresh(base: Net) -> None:
    goal = tuned(base)
    goal.conv = nn.Conv1d(8, 4, 3)
    with pytest.raises(ValueError, match=r"`conv.bias` is \(8,\) in the base and \(4,\) in the tuned model.*`fresh=`"):
        difference(base, goal)
    delta = difference(base, goal, fresh=r"conv\.\w+")
    base.conv = nn.Conv1d(8, 4, 3)
    apply(delta, base)
    assert state(base) == state(goal)


def test_tuned_values_are_rounded_to_the_base_with_a_warning(base: Net) -> None:
    low = copy.deepcopy(base).to(torch.bfloat16)
    high = tuned(low.float())
    with pytest.warns(UserWarning, match="rounded to the base's dtype: torch.float32 to torch.bfloat16"):
        delta = difference(low.to(torch.bfloat16), high)
    goal = copy.deepcopy(high).to(torch.bfloat16)
    apply(delta, low)
    assert state(low) == state(goal)
    with pytest.raises(ValueError, match=r"`w` has values that torch.float16 cannot hold"):
        difference({"w": torch.zeros(2, dtype=torch.float16)}, {"w": torch.tensor([0.0, 1e6])})
    with pytest.raises(ValueError, match=r"`w` is torch.int64 in the base and torch.float32"):
        difference({"w": torch.zeros(2, dtype=torch.int64)}, {"w": torch.zeros(2)})


def test_a_model_of_other_names_is_no_tuned_one(base: Net) -> None:
    with pytest.raises(ValueError, match="0 of the base's 12 tensors are found"):
        difference(base, {"a": torch.ones(2)})
    with pytest.raises(ValueError, match="1 of the base's 12 tensors are found"):
        difference(base, {"scale": torch.tensor(1.0), "other": torch.ones(2)})


def test_what_the_tuned_model_has_no_use_for_may_be_there_or_not(base: Net) -> None:
    goal = tuned(base)
    del goal.across
    delta = difference(base, goal)
    assert delta.dropped == ("across",)
    without = copy.deepcopy(base)
    del without.across
    for model in (base, without):
        across = state(model).get("across")
        apply(delta, model)
        assert {**state(model), "across": None} == {**state(goal), "across": None}
        assert state(model).get("across") == across


# Tied weights


def test_ties_may_differ_in_what_the_two_sides_list(base: Net) -> None:
    goal = tuned(base)
    once = {name: t for name, t in base.state_dict().items() if name != "head.weight"}
    by_alias = {name: t for name, t in base.state_dict().items() if name != "embed.weight"}
    twice = {name: t.clone() for name, t in base.state_dict().items()}
    for source in (once, by_alias, twice):
        delta = difference(source, goal)
        model = copy.deepcopy(base)
        apply(delta, model)
        assert state(model) == state(goal)
        revert(delta, model)
        assert state(model) == state(base)


def test_one_tensor_with_two_contents_is_refused(base: Net) -> None:
    goal = tuned(base)
    apart = {name: t.clone() for name, t in goal.state_dict().items()}
    delta = difference({name: t.clone() for name, t in base.state_dict().items()}, apart)
    before = state(base)
    with pytest.raises(ValueError, match=r"`embed.weight` and `head.weight` are one tensor in this model and two"):
        apply(delta, base)
    assert state(base) == before


# Refusals leave the model as it is


def test_another_base_is_refused_whatever_differs(base: Net) -> None:
    delta = difference(base, tuned(base))
    for name, value in base.state_dict().items():
        other = copy.deepcopy(base)
        with torch.no_grad():
            target = other.state_dict()[name]
            target.copy_(value + 1)
        before = state(other)
        with pytest.raises(ValueError, match="is not the base of this delta: its fingerprint differs"):
            apply(delta, other)
        assert state(other) == before
    flipped = copy.deepcopy(base)
    flipped.frozen.weight.data.view(torch.int32)[3, 3] ^= 1
    with pytest.raises(ValueError, match="is not the base"):
        apply(delta, flipped)
    goal = state(tuned(base))
    apply(delta, flipped, verify=False)
    assert state(flipped)["frozen.weight"] != state(base)["frozen.weight"]
    assert state(flipped).keys() == goal.keys()


def test_a_delta_is_applied_once(base: Net) -> None:
    delta = difference(base, tuned(base))
    apply(delta, base)
    once = state(base)
    with pytest.raises(ValueError, match="has this delta already: call `revert` first"):
        apply(delta, base)
    assert state(base) == once
    revert(delta, base)
    with pytest.raises(ValueError, match=r"`revert\(alpha=1.0\)`.*was not applied"):
        revert(delta, base)
    apply(delta, base, 0.5)
    half = state(base)
    with pytest.raises(ValueError, match="is not the base"):
        apply(delta, base, 0.5)
    assert state(base) == half


def test_what_was_trained_on_is_not_reverted(base: Net) -> None:
    delta = difference(base, tuned(base))
    apply(delta, base)
    base.across.data.view(-1) if base.across.is_contiguous() else None
    at = int(delta.changes["across"].indices[0])
    base.across.data[at // 8, at % 8] += 1
    before = state(base)
    with pytest.raises(ValueError, match=r"`across` do not hold the values of this delta"):
        revert(delta, base)
    assert state(base) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.half(),
            r"is torch.float16 in the model and torch.float32 in the delta: load .*`dtype=torch.float32`",
        ),
        (
            lambda m: setattr(m, "across", nn.Parameter(torch.ones(8, 6))),
            r"`across` is \(8, 6\) in the model and \(6, 8\)",
        ),
        (lambda m: delattr(m, "across"), r"The model lacks `across`, out of 12 names; it has"),
        (lambda m: setattr(m, "more", nn.Linear(2, 2)), r"has `more.bias`, `more.weight`, which the base .* has not"),
        (lambda m: m.to("meta"), "cannot be read bit by bit"),
    ],
)
@pytest.mark.parametrize("call", [apply, revert])
def test_a_model_of_another_make_is_refused_untouched(base: Net, change: Any, message: str, call: Any) -> None:
    delta = difference(base, tuned(base))
    if call is revert:
        apply(delta, base)
    change(base)
    before = None if base.scale.is_meta else state(base)
    if call is revert and "more" in message:
        revert(delta, base)  # looks at the delta's entries alone
        return
    with pytest.raises(ValueError, match=message):
        call(delta, base)
    assert before is None or state(base) == before


def test_a_delta_checks_what_it_is_made_of() -> None:
    two = torch.ones(2)
    for make, message in (
        (lambda: Change((2, 2), two), r"must be torch.float32 of shape \(2, 2\)"),
        (lambda: Change((2, 2), two, indices=torch.tensor([3, 1])), "must rise"),
        (lambda: Change((2, 2), two, indices=torch.tensor([3, 4])), r"must lie in \[0, 4\)"),
        (lambda: Change((2,), two, old=two.half()), r"`Change\(old=...\)` is torch.float16"),
        (lambda: Change((4,), two, old=torch.ones(3), indices=torch.tensor([0, 1])), r"of shape \(3,\)"),
        (lambda: Delta({}, ("a",), "abc"), "64 hex digits"),
        (lambda: Delta({}, (), "0" * 64), "at least one, each once"),
        (lambda: Delta({}, ("a", "a"), "0" * 64), "each once"),
        (lambda: Delta({}, ("a",), "0" * 64, prefix="m."), "`a` must begin with `m.`"),
        (lambda: Delta({"b": Change((4,), two, None, torch.tensor([0, 1]))}, ("a",), "0" * 64), "`b` must .* be whole"),
        (lambda: Delta({}, ("a",), "0" * 64, {"f": object()}), "must be what JSON can hold"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


# From indices


@pytest.mark.parametrize("gone", [True, False])
def test_indices_that_a_training_knows(base: Net, gone: bool, tmp_path: Path) -> None:
    known = fingerprint(base)
    indices = {
        "head.weight": torch.tensor([3, 9, 200], dtype=torch.int32),
        "scale": None,
        "frozen.bias": torch.empty(0).long(),
    }
    old = {
        "embed.weight": base.embed.weight.detach().reshape(-1)[[3, 9, 200]].clone(),
        "scale": base.scale.detach().clone(),
    }
    goal = copy.deepcopy(base)
    goal.embed.weight.data.view(-1)[[3, 200]] += 1  # 9 was trained, and came back to where it was
    goal.scale.data += 1
    delta = from_indices(known, goal, indices, old=old) if gone else from_indices(base, goal, indices)
    assert delta.changes["embed.weight"].indices.tolist() == [3, 9, 200]
    assert set(delta.changes) == {"embed.weight", "scale"}
    save(delta, tmp_path / "d.safetensors")
    before = state(base)
    apply(load(tmp_path / "d.safetensors"), base)
    assert state(base) == state(goal)
    revert(load(tmp_path / "d.safetensors"), base)
    assert state(base) == before


def test_indices_have_the_names_of_the_tuned_side(base: Net) -> None:
    goal = copy.deepcopy(base)
    goal.embed.weight.data.view(-1)[[3, 200]] += 1
    delta = from_indices(base, Wrapped(goal), {"model.head.weight": torch.tensor([3, 9, 200])})
    assert delta.changes["embed.weight"].indices.tolist() == [3, 9, 200]


def test_indices_that_miss_a_change_are_refused(base: Net) -> None:
    goal = copy.deepcopy(base)
    goal.embed.weight.data.view(-1)[[3, 5]] += 1
    with pytest.raises(ValueError, match=r"1 entries of `embed.weight` have changed outside its indices"):
        from_indices(base, goal, {"embed.weight": torch.tensor([3])})
    with pytest.raises(ValueError, match=r"2 entries of `embed.weight` have changed outside"):
        from_indices(base, goal, {"scale": None})


def test_indices_are_checked(base: Net) -> None:
    known, at = fingerprint(base), torch.tensor([1])
    for call, message in (
        (lambda: from_indices(known, base, {"nose": at}), "`nose` are not in the tuned model, which has `across`"),
        (lambda: from_indices(known, base, {"scale": at}), r"must lie in \[0, 1\)"),
        (lambda: from_indices(base, base, {"scale": at}), r"must lie in \[0, 1\)"),
        (lambda: from_indices(known, base, {"embed.weight": torch.tensor([2, 1])}), "must rise"),
        (lambda: from_indices(known, base, {"embed.weight": at}, old={}), "lacks the values of `embed.weight`"),
        (lambda: from_indices(known, base, {"embed.weight": at}, old={"embed.weight": at}), "`Change\\(old=...\\)`"),
        (lambda: from_indices(base, base, {}, old={}), "is for a base that is gone"),
        (lambda: from_indices(known, base, {}, prefix="a"), "give the base, not its fingerprint"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_indices_with_a_fresh_head_and_a_fingerprint(base: Net) -> None:
    base.classifier = nn.Linear(8, 3)
    known = fingerprint(base, without=r"classifier\.\w+")
    goal = copy.deepcopy(base)
    goal.classifier.weight.data += 1
    goal.scale.data += 1
    delta = from_indices(known, goal, {"scale": None}, fresh=r"classifier\.\w+")
    base.classifier.reset_parameters()
    apply(delta, base)
    assert state(base) == state(goal)


# The file


def test_an_entry_costs_its_bytes(tmp_path: Path) -> None:
    n, path = 2**20, tmp_path / "d.safetensors"
    for count, kind, each in ((8, "int32", 6.0), (5000, "gaps", 4.0), (n // 10, "bitmask", 2 + n / 8 / (n // 10))):
        old = torch.zeros(n, dtype=torch.bfloat16)
        at = torch.arange(count) * (n // count)
        delta = difference({"w": old}, {"w": old.index_fill(0, at, 1.0)}, old_values=False)
        assert delta.changes["w"].encoded() == (kind, round(each * count))
        save(delta, path)
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert path.stat().st_size - header == round(each * count)
        assert header < 1000
        save(difference({"w": old}, {"w": old.index_fill(0, at, 1.0)}), path)
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert path.stat().st_size - header == round((each + 2) * count)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A file with every kind of content."""
    old = {"w": torch.zeros(300), "v": torch.zeros(64), "u": torch.zeros(2, 2), "z": torch.zeros(9)}
    new = {name: t.clone() for name, t in old.items()}
    new["w"][[3, 250]] = 1.0
    new["v"][::4] = 2.0
    new["u"] += 3
    path = tmp_path / "small.safetensors"
    save(difference(old, {**new, "head": torch.ones(2)}, config={"a": 1}), path)
    assert {c.encoded()[0] for c in load(path).changes.values()} == {"gaps", "bitmask", "whole"}
    return path


def test_a_file_cut_short_anywhere_is_refused(small: Path) -> None:
    whole = small.read_bytes()
    for length in range(0, len(whole), 5):
        small.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"`load\('.*small.safetensors'\)`"):
            load(small)
    small.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="cut short, altered or no safetensors"):
        load(small)


def test_a_flipped_bit_anywhere_is_refused(small: Path) -> None:
    whole = small.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for at in [*range(0, header, 3), *range(header, len(whole))]:
        altered = bytearray(whole)
        altered[at] ^= 1 << at % 8
        small.write_bytes(altered)
        with pytest.raises(ValueError, match="SHA-256 differs" if at >= header else r"`load\("):
            load(small)


def rewritten(path: Path, edit: Any, sign: bool = True) -> None:
    """Edits header and tensors of a file, and signs it again."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["apportion-delta"])
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    written = header.pop("sha256")
    edit(header, tensors)
    digest = deltafile._sha256(header, tensors) if sign else written
    save_file(tensors, path, metadata={"apportion-delta": json.dumps({"sha256": digest, **header})})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda h, t: h.update(version=2), "is of version 2 and this code reads version 1"),
        (lambda h, t: t.pop("new:w"), "lacks 'new'"),
        (lambda h, t: t.pop("gaps:w"), "needs one tensor, 'gaps'"),
        (lambda h, t: t.update({"new:more": torch.ones(2)}), "`new:more`, which no change asks for"),
        (lambda h, t: t.update({"new:w": torch.ones(3)}), r"of shape \(3,\); it must be torch.float32 of shape \(2,\)"),
        (lambda h, t: t.update({"old:w": torch.ones(2).half()}), r"`Change\(old=...\)` is torch.float16"),
        (lambda h, t: t.update({"gaps:w": t["gaps:w"][:1].clone()}), r"count=2\)` found 1"),
        (lambda h, t: h["changes"]["w"].update(shape=[200]), r"must lie in \[0, 200\)"),
        (lambda h, t: h["changes"]["w"].update(shape="big"), r"`load\("),
        (lambda h, t: h["changes"]["w"].update(encoding="runs"), "must be one of int32"),
        (lambda h, t: h["changes"]["w"].pop("count"), "lacks 'count'"),
        (lambda h, t: h["changes"].pop("w"), "which no change asks for"),
        (lambda h, t: h.update(changes=[]), r"`load\("),
        (lambda h, t: h.pop("names"), "lacks 'names'"),
        (lambda h, t: h.update(names=[]), "must list the base's tensors"),
        (lambda h, t: h.update(base_hash="x"), "64 hex digits"),
        (lambda h, t: h.update(base_hash=None), "64 hex digits"),
    ],
)
def test_a_file_that_was_signed_must_still_make_sense(small: Path, edit: Any, message: str) -> None:
    rewritten(small, lambda h, t: None)
    load(small)
    rewritten(small, edit)
    with pytest.raises(ValueError, match=message):
        load(small)


def test_the_header_is_signed_too(small: Path) -> None:
    for edit in (
        lambda h, t: h.update(base_hash="0" * 64),
        lambda h, t: h["config"].update(a=2),
        lambda h, t: h["names"].append("q"),
    ):
        whole = small.read_bytes()
        rewritten(small, edit, sign=False)
        with pytest.raises(ValueError, match="SHA-256 differs"):
            load(small)
        small.write_bytes(whole)


def test_other_files_are_no_deltas(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="a safetensors file, but no delta"):
        load(tmp_path / "plain.safetensors")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.safetensors")


class Evil:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def test_loading_never_unpickles(tmp_path: Path) -> None:
    held = io.BytesIO()
    torch.save({"w": Evil(tmp_path / "ran")}, held)
    for content in (held.getvalue(), pickle.dumps(Evil(tmp_path / "ran"))):
        path = tmp_path / "evil.safetensors"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no safetensors"):
            load(path)
        assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()  # it does run where it is let


def test_a_save_that_fails_leaves_the_old_file_and_no_other(
    small: Path, base: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = small.read_bytes()

    def half(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(deltafile, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        save(difference(base, tuned(base)), small)
    assert small.read_bytes() == before
    assert [path.name for path in small.parent.iterdir()] == [small.name]


def test_the_same_delta_is_the_same_file(base: Net, tmp_path: Path) -> None:
    delta = difference(base, tuned(base))
    for name in ("a", "b"):
        save(delta, tmp_path / name)
    save(load(tmp_path / "a"), tmp_path / "c")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_what_is_loaded_does_not_follow_the_file(small: Path) -> None:
    delta = load(small)
    before = {name: change.new.tolist() for name, change in delta.changes.items()}
    header = 8 + int.from_bytes(small.read_bytes()[:8], "little")
    with small.open("r+b") as file:
        file.seek(header)
        file.write(b"\xff" * (small.stat().st_size - header))
    assert {name: change.new.tolist() for name, change in delta.changes.items()} == before


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    x = torch.arange(8.0)
    shared = {"a": Change((8,), x, x), "b": Change((4,), x[:4]), "c": Change((4,), x[4:], x[:4])}
    delta = Delta(shared, tuple(shared), "0" * 64)
    save(delta, tmp_path / "d")
    same(load(tmp_path / "d"), delta)


# Models of transformers


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_loaded_anew_answers_as_the_tuned_one(tied: bool, tmp_path: Path) -> None:
    llama(tied=tied).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    goal = tuned(base, 0.05)
    save(difference(base, Wrapped(goal)), tmp_path / "d.safetensors")
    delta = load(tmp_path / "d.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    first = logits(model)
    apply(delta, model)
    assert torch.equal(logits(model), logits(goal))
    assert not torch.equal(logits(model), first)
    revert(delta, Wrapped(model))
    assert torch.equal(logits(model), first)
    assert state(model) == state(base)


def test_a_classifier_on_a_pretrained_body(tmp_path: Path) -> None:
    config = BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=40, num_labels=3
    )
    body = BertForMaskedLM(config)
    body.save_pretrained(tmp_path / "base")
    goal = tuned(BertForSequenceClassification.from_pretrained(tmp_path / "base", config=config))
    delta = difference(body, Wrapped(goal))
    assert {name.split(".")[-2] for name in delta.fresh} == {"classifier", "dense"}  # and the pooler's
    assert all(name.startswith("cls.") for name in delta.dropped)
    assert delta.dropped
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base", config=config)
    apply(delta, model)
    assert state(model) == state(goal)
    with pytest.raises(ValueError, match="The model lacks"):
        apply(delta, copy.deepcopy(body))


def test_the_file_says_how_its_indices_are_written(small: Path) -> None:
    delta = load(small)
    with safe_open(small, framework="pt") as file:
        rows = json.loads(file.metadata()["apportion-delta"])["changes"]
    for name, change in delta.changes.items():
        kind = None if change.indices is None else encode(change.indices, change.n)[0]
        assert rows[name] == {"shape": list(change.shape), "count": change.count, "encoding": kind}
