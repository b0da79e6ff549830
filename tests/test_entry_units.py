"""Entries and Rows: which tensors are worth choosing from, which train whole, which are frozen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from narrow import ALL, Everything
from torch import nn
from toys import Net, lora_net

from apportion.candidates import Candidates
from apportion.entry_units import Entries, Rows

ROLES = ("embeddings", "head", "norm", "bias")


def names(model: nn.Module, *parts: str) -> list[str]:
    """Parameters that hold one of ``parts`` in their names."""
    return [name for name, _ in model.named_parameters() if any(part in name for part in parts)]


def test_matrices_of_the_layers_are_candidates_the_head_trains_whole_and_the_rest_is_frozen() -> None:
    net = Net()
    bound = Entries().bind(net)
    params = dict(net.named_parameters())
    matrices = [n for n in names(net, "layers") if params[n].ndim == 2]
    assert list(bound.names) == matrices
    assert len(matrices) == 4 * 6
    assert list(bound.always) == ["lm_head.weight"]
    assert set(bound.never) == set(params) - set(matrices) - {"lm_head.weight"}
    assert all(tensor is params[name] for name, tensor in zip(bound.names, bound.tensors, strict=True))
    assert bound.n == sum(params[name].numel() for name in matrices)
    assert [unit.block for unit in bound.units] == [i for i in range(4) for _ in range(6)]
    assert {unit.category for unit in bound.units} == {"weight"}
    assert all(unit.module.weight is unit.params[unit.name] for unit in bound.units)
    assert bound.charged == 0
    assert dict(bound.found) == {"embedding": ("embed_tokens.weight",)}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("value", "where"), [("train", "always"), ("freeze", "never"), ("unit", "names")])
def test_each_role_has_a_treatment_of_its_own(role: str, value: str, where: str) -> None:
    net = Net()
    expected = {
        "embeddings": ["embed_tokens.weight"],
        "head": ["lm_head.weight"],
        "norm": names(net, "norm"),
        "bias": names(net, "proj.bias"),
    }[role]
    assert expected
    bound = Entries(**{role: value}).bind(net)
    assert set(expected) <= set(getattr(bound, where))
    covered = {*bound.names, *bound.always, *bound.never}
    assert covered == set(dict(net.named_parameters()))
    assert len(bound.names) + len(bound.always) + len(bound.never) == len(covered)
    if isinstance(value, str) and value != "unit":
        assert Entries(**{role: value == "train"}) == Entries(**{role: value})


def test_tied_weights_are_one_tensor_with_the_role_of_the_embedding() -> None:
    net = Net()
    net.lm_head.weight = net.embed_tokens.weight
    for value, where in (("freeze", "never"), ("unit", "names"), ("train", "always")):
        bound = Entries(embeddings=value, head="train").bind(net)
        assert "embed_tokens.weight" in getattr(bound, where)
        assert not any("lm_head" in name for name in (*bound.names, *bound.always, *bound.never))


def test_a_model_without_layers_knows_its_tensors_by_their_kind() -> None:
    bound = Entries().bind(Everything())
    assert list(bound.names) == ["conv.weight", "shared.weight", "turned.weight"]
    assert set(bound.never) == {
        "scale", "gain", "embed.weight", "conv.bias", "shared.bias", "turned.bias", "norm.weight", "norm.bias"
    }  # fmt: skip
    assert not bound.always
    assert set(ALL.bind(Everything()).names) == set(dict(Everything().named_parameters()))


def test_only_what_may_train_is_a_candidate() -> None:
    net = lora_net()
    bound = Entries().bind(net)
    assert set(bound.names) == {name for name, p in net.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in bound.names)
    assert not bound.always
    assert not bound.never
    assert {unit.block for unit in bound.units} == {0, 1, 2, 3}


def test_matrices_can_be_left_out_altogether() -> None:
    net = Net()
    bound = Entries(bias="unit", matrices="freeze", head="freeze").bind(net)
    assert list(bound.names) == names(net, "proj.bias")


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"pattern": "mlp"}, ("mlp.up_proj.weight", "mlp.down_proj.weight")),
        ({"pattern": "mlp|self_attn"}, ("mlp", "self_attn")),
        ({"pattern": r"q_proj\.weight"}, ("q_proj.weight",)),
        ({"pattern": r"layers\.[01]"}, ("layers.0", "layers.1")),
        ({"exclude": "self_attn"}, ("mlp",)),
        ({"pattern": "mlp", "exclude": "up_proj"}, ("down_proj",)),
        ({"pattern": "proj"}, None),  # parts as a whole
        ({"pattern": ".*proj"}, ("proj",)),
    ],
)
def test_patterns_choose_among_candidates(options: dict[str, str], kept: tuple[str, ...] | None) -> None:
    net = Net()
    if kept is None:
        with pytest.raises(ValueError, match=r"`Entries\(pattern='proj'\)` matches no trainable parameter of `Net`"):
            Entries(**options).bind(net)
        return
    bound = Entries(**options).bind(net)
    matrices = set(Entries().bind(net).names)
    assert list(bound.names) == [name for name in names(net, *kept) if name in matrices]
    assert matrices - set(bound.names) <= set(bound.never)
    assert list(bound.always) == ["lm_head.weight"]  # no candidate, so no pattern is asked


def test_what_matches_dense_trains_whole_whatever_its_role() -> None:
    net = Net(adapter=True)
    for p in net.parameters():
        p.requires_grad_(True)
    bound = Entries(dense="adapter|input_norm", head="freeze").bind(net)
    assert list(bound.always) == names(net, "adapter", "input_norm")
    assert not set(bound.always) & {*bound.names, *bound.never}


@pytest.mark.parametrize("key", ["exclude", "dense"])
def test_every_pattern_has_to_match_something(key: str) -> None:
    with pytest.raises(ValueError, match=rf"`Entries\({key}='nothing'\)` matches no trainable parameter"):
        Entries(**{key: "nothing"}).bind(Net())


def test_what_trains_whole_is_charged_if_asked() -> None:
    net = Net()
    bound = Entries(charge=True, norm="train").bind(net)
    assert bound.charged == sum(p.numel() for p in bound.always.values())
    assert bound.charged == 13 * 8 + sum(dict(net.named_parameters())[n].numel() for n in names(net, "norm"))


def test_no_candidate_is_an_error_that_says_what_there_is() -> None:
    layer = nn.Linear(3, 3)
    layer.weight.requires_grad_(False)
    message = r"finds no candidate in `Linear`.*of its 1 trainable tensors 0 train whole and 1"
    with pytest.raises(ValueError, match=message):
        Entries().bind(layer)


def test_a_lazy_candidate_is_refused_with_advice() -> None:
    with pytest.raises(ValueError, match=r"`Entries\(\)`: 0\.weight has no shape yet: run one batch"):
        Entries().bind(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3)))


def test_a_candidate_of_another_kind_of_tensor_is_refused_with_advice() -> None:
    class Odd(torch.Tensor):
        pass

    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(torch.zeros(3, 3).as_subclass(Odd))
    with pytest.raises(ValueError, match=r"weight is a `\w+`.*put adapters on it.*`exclude=`"):
        Entries().bind(layer)
    complex_layer = nn.Linear(3, 3, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"torch\.complex64.*put adapters on it"):
        Entries().bind(complex_layer)


def test_quantized_weights_are_refused_with_advice() -> None:
    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
            self.bias = nn.Parameter(torch.zeros(4))

    with pytest.raises(ValueError, match=r"weights are quantized \(weight\).*put adapters on them"):
        Entries().bind(Quantized())


def test_a_model_on_the_meta_device_can_be_met() -> None:
    with torch.device("meta"):
        net = Net()
    assert Entries().bind(net).names == Entries().bind(Net()).names


def test_binding_changes_nothing() -> None:
    net = Net()
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in net.named_parameters()}
    Entries(norm="unit").bind(net)
    assert all(torch.equal(p, before[n][0]) and p.requires_grad == before[n][1] for n, p in net.named_parameters())


# Rows -----------------------------------------------------------------------------------------------------------------


def test_rows_are_what_the_first_dimension_counts() -> None:
    bound = Rows(embeddings="unit", head="unit", norm="unit", bias="unit").bind(Everything())
    sizes = {name: (count, width) for name, count, width in zip(bound.names, bound.counts, bound.widths, strict=True)}
    assert sizes == {
        "scale": (1, 1),
        "gain": (1, 1),
        "embed.weight": (7, 6),
        "conv.weight": (3, 18),
        "conv.bias": (3, 1),
        "shared.weight": (6, 6),
        "shared.bias": (6, 1),
        "turned.weight": (6, 6),
        "turned.bias": (6, 1),
        "norm.weight": (6, 1),
        "norm.bias": (6, 1),
    }
    assert bound.n == sum(count for count, _ in sizes.values())
    assert bound.sizes.tolist() == [count * width for count, width in sizes.values()]


@pytest.mark.parametrize(("pool", "expected"), [("sum", [0.0, 6.0]), ("mean", [0.0, 2.0]), ("abs_sum", [0.0, 6.0])])
def test_a_rows_score_is_made_of_its_entries(pool: str, expected: list[float]) -> None:
    bound = Rows(pool=pool).bind(nn.Linear(3, 2, bias=False))
    assert bound.pooled(0, torch.tensor([[1.0, -3.0, 2.0], [1.0, 2.0, 3.0]])).tolist() == expected
    negative = bound.pooled(0, torch.tensor([[-1.0, -1.0, -1.0], [0.0, 0.0, 0.0]]))
    assert negative.tolist() == {"sum": [-3.0, 0.0], "mean": [-1.0, 0.0], "abs_sum": [3.0, 0.0]}[pool]


def test_rows_spread_over_their_entries_in_the_order_of_the_shape() -> None:
    bound = Rows().bind(nn.Conv2d(2, 4, 3, bias=False))
    entries = bound.entries(0, torch.tensor([1, 3]))
    assert entries.tolist() == [*range(18, 36), *range(54, 72)]
    assert entries.dtype == torch.int64
    single = Entries().bind(nn.Linear(3, 2, bias=False))
    assert single.entries(0, torch.tensor([1, 4])).tolist() == [1, 4]
    assert single.pooled(0, torch.ones(2, 3)).shape == (6,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Entries(head="on"), r"`Entries\(head='on'\)` must be 'train'.*'freeze'.*or 'unit'"),
        (lambda: Rows(norm=3), r"`Rows\(norm=3\)` must be"),  # type: ignore[arg-type]
        (lambda: Entries(matrices="train"), r"`Entries\(matrices='train'\)` must be 'unit'"),
        (lambda: Entries(pattern="("), r"`Entries\(pattern='\('\)` is no regular expression"),
        (lambda: Rows(pool="max"), r"`Rows\(pool='max'\)` must be one of sum, mean, abs_sum"),
        (lambda: Rows(charge=True), r"`Rows\(charge=True\)` does not go.*Leave it out"),
    ],
)
def test_arguments_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_candidates_of_both_are_of_one_kind() -> None:
    for units in (Entries(), Rows()):
        assert isinstance(units.bind(Net()), Candidates)
        assert units.grain == "entry"
