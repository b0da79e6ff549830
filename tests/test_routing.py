"""Routing and adapters: costs, what turns when, budgets met as closely as can be, and an output that stays the same."""

from __future__ import annotations

import copy
import io
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import Net

from apportion.adapt import adapt, matrices
from apportion.bottleneck import Bottleneck, attach
from apportion.plan import Plan
from apportion.routing import Router, Routing, adapter_cost, lora_cost

IDS = torch.arange(10).view(2, 5) % 13

# Costs and thresholds -------------------------------------------------------------------------------------------------


def test_costs_of_the_reference_settings() -> None:
    assert lora_cost(768, 768, 8) / 10 == 1228.8
    assert lora_cost(768, 3072, 8) / 10 == lora_cost(3072, 768, 8) / 10 == 3072
    assert adapter_cost(768, 768, 8) / 10 == adapter_cost(3072, 768, 8) / 10 == 1306.4
    assert adapter_cost(768, 3072, 8) / 10 == 5223.2


@pytest.mark.parametrize(
    ("kind", "shape", "turns_at"),
    [
        ("lora", (768, 768), 1229),
        ("lora", (3072, 768), 3072),
        ("lora", (768, 3072), 3072),
        ("adapter", (768, 768), 1307),
        ("adapter", (3072, 768), 5224),
        ("adapter", (768, 3072), 1307),
    ],
)
def test_matrices_of_the_reference_turn_where_they_should(kind: str, shape: tuple[int, int], turns_at: int) -> None:
    router = Router(rank=8, alpha=10.0, kind=kind)
    for count in (turns_at - 1, turns_at):
        routing = router.route({"w": count}, {"w": shape})
        assert (routing.structured == ("w",)) == (count >= turns_at)
        assert routing.charged == (router.cost(shape) if count >= turns_at else count)


def test_the_boundary_belongs_to_the_adapter() -> None:
    router = Router(rank=1, alpha=2.0)
    assert router.cost((2, 2)) == 4
    assert router.route({"w": 2}, {"w": (2, 2)}) == Routing(("w",), (), {}, 4)
    assert router.route({"w": 1}, {"w": (2, 2)}) == Routing((), (), {"w": 1}, 1)


def test_vectors_turn_only_if_they_may() -> None:
    shapes = {"v": (10,)}
    assert Router(beta=5.0, vectors=True).route({"v": 2}, shapes) == Routing((), ("v",), {}, 10)
    assert Router(beta=5.0, vectors=True).route({"v": 1}, shapes) == Routing((), (), {"v": 1}, 1)
    assert Router(beta=5.0, vectors=False).route({"v": 10}, shapes) == Routing((), (), {"v": 10}, 10)
    assert Router(beta=5.0, vectors=True).route({"v": 0}, shapes) == Routing((), (), {}, 0)


def test_only_the_named_matrices_turn_and_convolutions_never_do() -> None:
    shapes = {"a": (2, 2), "b": (2, 2), "c": (2, 2, 1)}
    counts = {"a": 4, "b": 4, "c": 4}
    routing = Router(rank=1).route(counts, shapes, matrices={"b", "c"})
    assert routing == Routing(("b",), (), {"a": 4, "c": 4}, 12)


shape = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)
routers = st.builds(
    Router,
    rank=st.integers(1, 4),
    alpha=st.floats(0.3, 12.0),
    beta=st.floats(0.3, 12.0),
    kind=st.sampled_from(["lora", "adapter"]),
    vectors=st.booleans(),
)


@given(routers, shape)
def test_what_is_structured_stays_so_and_the_total_never_falls_above_one(
    router: Router, shape: tuple[int, ...]
) -> None:
    turned, last = False, 0
    for count in range(math.prod(shape) + 1):
        routing = router.route({"t": count}, {"t": shape})
        now = bool(routing.structured or routing.dense)
        assert now or not turned
        if router.alpha >= 1.0 and router.beta >= 1.0:
            assert routing.charged >= last
        if now and not turned:
            whole = router.cost(shape) if routing.structured else math.prod(shape)
            assert routing.charged - last == whole - (count - 1)
        turned, last = now, routing.charged
        parts = len(routing.structured) * (router.cost(shape) if len(shape) == 2 else 0)
        assert routing.charged == parts + len(routing.dense) * math.prod(shape) + sum(routing.sparse.values())
        assert len(routing.structured) + len(routing.dense) + len(routing.sparse) == (count > 0)


def test_below_one_the_total_can_fall() -> None:
    router = Router(rank=1, alpha=0.5)  # 4 x 4: cost 8, turns at 16
    totals = [router.route({"w": c}, {"w": (4, 4)}).charged for c in (15, 16)]
    assert totals == [15, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, r"`Router\(rank=0\)`"),
        ({"alpha": 0.0}, r"`Router\(alpha=0\.0\)`"),
        ({"beta": math.inf}, r"`Router\(beta=inf\)`"),
        ({"alpha": math.nan}, r"`Router\(alpha=nan\)`"),
        ({"kind": "magic"}, "'lora' or 'adapter'"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Router(**arguments)


@pytest.mark.parametrize("count", [-1, 5])
def test_impossible_counts_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"{count} of w must lie in \[0, 4\]"):
        Router().route({"w": count}, {"w": (2, 2)})


# Budgets --------------------------------------------------------------------------------------------------------------


def scored(*tensors: Tensor) -> Plan:
    """All entries of some tensors, with their scores."""
    names = "abcdefgh"[: len(tensors)]
    return Plan(
        {n: torch.arange(t.numel()) for n, t in zip(names, tensors, strict=True)},
        {n: tuple(t.shape) for n, t in zip(names, tensors, strict=True)},
        scores={n: t.flatten().float() for n, t in zip(names, tensors, strict=True)},
    )


def test_the_best_entries_of_all_tensors_are_counted_together() -> None:
    plan = scored(torch.tensor([[9.0, 1.0], [4.0, 0.0]]), torch.tensor([16.0, 0.0]))
    routed = Router(rank=1, alpha=1.0).allocate(plan, {}, target=3, steps=6)
    assert {name: index.tolist() for name, index in routed.indices.items()} == {"a": [0, 2], "b": [0]}
    assert {name: s.tolist() for name, s in routed.scores.items()} == {"a": [9.0, 4.0], "b": [16.0]}
    assert routed.config["routing"]["tau"] == 3
    assert routed.count == routed.config["routing"]["charged"] == 3


def test_of_equally_near_totals_the_last_is_taken() -> None:
    ranked = torch.zeros(9, dtype=torch.int64)
    router = Router(rank=1, alpha=1.5)  # 3 x 3: cost 6, turns at 4, so that totals are 1, 2, 3, 6, 6, 6, ...
    shapes = {"w": (3, 3)}
    assert router.fit_budget(ranked, shapes, 6, range(1, 10))[0] == 9
    assert router.fit_budget(ranked, shapes, 3, range(1, 10))[0] == 3
    assert router.fit_budget(ranked, shapes, 100, range(1, 4))[0] == 3
    # With 4 that train besides, totals of 2, 3, 6 and 6 are 6, 7, 10 and 10.
    tau, routing = router.fit_budget(ranked, shapes, 7, [2, 3, 4, 5], extra=4)
    assert (tau, routing.charged) == (3, 3)


@given(st.data(), routers)
def test_the_sweep_finds_what_trying_everything_finds(data: st.DataObject, router: Router) -> None:
    shapes = {"a": (3, 2), "b": (4,), "c": (2, 5)}
    order = data.draw(st.permutations([i for i, s in enumerate(shapes.values()) for _ in range(math.prod(s))]))
    taus = sorted(data.draw(st.sets(st.integers(1, len(order)), min_size=1)))
    target = data.draw(st.integers(0, 40))
    found = router.fit_budget(torch.tensor(order), shapes, target, taus)
    best = None
    for tau in taus:
        counts = {name: order[:tau].count(i) for i, name in enumerate(shapes)}
        charged = router.route(counts, shapes).charged
        if best is None or abs(charged - target) <= abs(best[1] - target):
            best = tau, charged
    assert (found[0], found[1].charged) == best


@pytest.mark.parametrize("taus", [[], [0, 1], [1, 5], [2, 2], [3, 1]])
def test_impossible_sweeps_are_refused(taus: list[int]) -> None:
    with pytest.raises(ValueError, match="must rise strictly"):
        Router().fit_budget(torch.zeros(4, dtype=torch.int64), {"w": (2, 2)}, 3, taus)


def test_ties_and_what_is_no_number_keep_the_order_of_importance() -> None:
    plan = scored(torch.tensor([math.inf, 1.0, 2.0]), torch.tensor([2.0, math.nan, 1.0, -math.inf]))
    picks = []
    for target in range(1, 8):
        routed = Router().allocate(plan, {}, target=target, steps=7)
        picks.append({(name, int(i)) for name, index in routed.indices.items() for i in index})
    order = [next(iter(b - a)) for a, b in zip([set(), *picks], picks, strict=False)]
    assert order == [("a", 2), ("b", 0), ("a", 1), ("b", 2), ("a", 0), ("b", 1), ("b", 3)]


def test_without_a_target_all_entries_are_routed_and_need_no_scores() -> None:
    plan = Plan(
        {"x.weight": torch.arange(3), "y.weight": torch.tensor([5]), "v": torch.tensor([0, 1])},
        {"x.weight": (2, 2), "y.weight": (4, 3), "v": (4,), "head": (2,)},
        dense=("head",),
        config={"counts": {"charged": 2}},
    )
    routed = Router(rank=1, alpha=2.0, beta=2.0, vectors=True).allocate(plan, {"x.weight": (2, 2), "y.weight": (4, 3)})
    assert routed.structured == {"x": "lora"}
    assert routed.dense == ("head", "v")
    assert {name: index.tolist() for name, index in routed.indices.items()} == {"y.weight": [5]}
    assert routed.config["routing"] == {
        "rank": 1,
        "alpha": 2.0,
        "beta": 2.0,
        "kind": "lora",
        "vectors": True,
        "tau": 6,
        "target": None,
        "charged": 4 + 1 + 4 + 2,
    }
    with pytest.raises(ValueError, match=r"`Router\.allocate\(target=5\)`.*keep_scores=True"):
        Router().allocate(plan, {}, target=5)


def test_the_sweep_tries_equal_parts_of_the_plan() -> None:
    plan = scored(torch.rand(100))
    assert Router().allocate(plan, {}, target=38, steps=4).config["routing"]["tau"] == 50
    assert Router().allocate(plan, {}, target=37, steps=4).config["routing"]["tau"] == 25
    assert Router().allocate(plan, {}, target=38, steps=79).config["routing"]["tau"] == 38


# Adapters on a model --------------------------------------------------------------------------------------------------


def plan_for(model: nn.Module, kind: str, rank: int = 2) -> Plan:
    """Every other matrix is structured, the others keep some entries, and the biases and the norms train whole."""
    found = matrices(model)
    structured = {name.removesuffix(".weight"): kind for name in list(found)[::2]}
    left = [name for name in found if name.removesuffix(".weight") not in structured]
    vectors = tuple(name for name, p in model.named_parameters() if p.ndim == 1)
    return Plan(
        {name: torch.tensor([1, 4, 9]) for name in left},
        {name: tuple(model.get_parameter(name).shape) for name in (*found, *vectors)},
        structured,
        vectors,
        {"routing": {"rank": rank}},
        {name: torch.tensor([3.0, 2.0, 1.0]) for name in left},
    )


def run(model: nn.Module) -> Tensor:
    out: Tensor = model(IDS)
    return out


@pytest.mark.parametrize("kind", ["lora", "adapter"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_is_the_same_bit_for_bit_until_something_trains(
    kind: str, training: bool, dtype: torch.dtype
) -> None:
    model = Net(dropout=0.0).to(dtype).train(training)
    before = run(model)
    plan = adapt(model, plan_for(model, kind), dropout=0.5)
    assert torch.equal(run(model), before)
    assert all(m.training == training for m in model.modules())
    names = dict(model.named_parameters())
    fresh = [name for name in plan.dense if "lora_" in name or "bottleneck" in name]
    assert fresh
    assert all(names[name].dtype == torch.float32 for name in fresh)
    with torch.no_grad():
        for name in fresh:
            names[name].add_(0.1)
    assert not torch.equal(run(model), before)
    assert run(model).dtype == dtype


@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_what_is_put_on_costs_what_was_charged(kind: str) -> None:
    model = Net()
    base = {name: tuple(p.shape) for name, p in model.named_parameters()}
    everything = Plan({name: torch.arange(math.prod(s)) for name, s in base.items()}, base)
    routed = Router(rank=2, alpha=1.5, beta=1.0, kind=kind, vectors=True).allocate(everything, matrices(model))
    assert len(routed.structured) > 8
    assert "embed_tokens" not in routed.structured
    before = sum(p.numel() for p in model.parameters())
    adapted = adapt(model, routed)
    sizes = {name: math.prod(routed.shapes[f"{name}.weight"]) for name in routed.structured}
    put = sum(p.numel() for p in model.parameters()) - before
    rest = sum(math.prod(s) for n, s in base.items() if n.removesuffix(".weight") not in sizes)
    assert put + rest == routed.config["routing"]["charged"] == adapted.count


@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_the_plan_has_the_names_of_the_model_as_it_is_now(kind: str) -> None:
    model = Net()
    plan = plan_for(model, kind)
    tensors = dict(model.named_parameters())
    adapted = adapt(model, plan)
    adapted.check(model)
    now = dict(model.named_parameters())
    place = {id(p): name for name, p in now.items()}
    for name, index in plan.indices.items():
        assert torch.equal(adapted.indices[place[id(tensors[name])]], index)
        assert torch.equal(adapted.scores[place[id(tensors[name])]], plan.scores[name])
    assert [place[id(tensors[name])] for name in plan.dense] == list(adapted.dense[: len(plan.dense)])
    assert set(adapted.dense[len(plan.dense) :]) == {
        n for n, p in now.items() if id(p) not in map(id, tensors.values())
    }
    assert adapted.structured == plan.structured
    assert not any(name.removesuffix(".weight") in plan.structured for name in adapted.indices)


@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_only_the_weights_of_structured_matrices_are_frozen(kind: str) -> None:
    model = Net()
    model.norm.weight.requires_grad_(False)
    before = {id(p): p.requires_grad for p in model.parameters()}
    plan = plan_for(model, kind)
    frozen = {id(model.get_parameter(f"{name}.weight")) for name in plan.structured}
    adapt(model, plan)
    for p in model.parameters():
        assert p.requires_grad == (before.get(id(p), True) and id(p) not in frozen)


@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_adapters_get_gradients_and_the_zero_half_moves_first(kind: str) -> None:
    model = Net(dropout=0.0)
    plan = adapt(model, plan_for(model, kind))
    run(model).square().mean().backward()
    names = dict(model.named_parameters())
    last = ("lora_B.default.weight", "bottleneck.up.weight")
    for name in plan.dense:
        if "lora_" in name or "bottleneck.up" in name or "bottleneck.down" in name:
            grad = names[name].grad
            assert grad is not None
            if name.endswith(".weight") and "k_proj" not in name:
                assert bool(grad.any()) == name.endswith(last), name


def test_lora_has_scale_one_or_what_is_asked_for() -> None:
    for alpha, scale in ((None, 1.0), (6.0, 3.0)):
        model = Net()
        plan = adapt(model, plan_for(model, "lora"), alpha=alpha)
        layers: list[Any] = [model.get_submodule(name) for name in plan.structured]
        assert {layer.scaling["default"] for layer in layers} == {scale}
        assert {layer.r["default"] for layer in layers} == {2}


def test_names_that_look_alike_are_not_mistaken_for_one_another() -> None:
    inner = nn.ModuleDict({"proj": nn.Linear(2, 2)})
    model = nn.ModuleDict({"proj": nn.Linear(2, 2), "inner": inner, "innerxproj": nn.Linear(2, 2)})
    adapt(model, Plan({}, {}, {"inner.proj": "lora"}), rank=1)
    assert hasattr(inner["proj"], "lora_A")
    assert type(model["proj"]) is nn.Linear
    assert type(model["innerxproj"]) is nn.Linear
    model = nn.ModuleDict({"proj": nn.Linear(2, 2), "inner": nn.ModuleDict({"proj": nn.Linear(2, 2)})})
    adapt(model, Plan({}, {}, {"proj": "lora"}), rank=1)
    assert [name for name, _ in model.named_modules() if name.endswith("lora_A")] == ["proj.lora_A"]


def test_entries_of_a_bias_stay_selected_beside_the_adapter() -> None:
    model = Net()
    bias = "layers.0.mlp.up_proj.bias"
    index, scores = torch.tensor([1, 3]), torch.tensor([2.0, 1.0])
    plan = Plan({bias: index}, {bias: (16,)}, {"layers.0.mlp.up_proj": "lora"}, scores={bias: scores})
    adapted = adapt(model, plan, rank=2)
    moved = "layers.0.mlp.up_proj.base_layer.bias"
    assert list(adapted.indices) == list(adapted.scores) == [moved]
    assert torch.equal(adapted.indices[moved], index)
    assert torch.equal(adapted.scores[moved], scores)
    assert model.get_parameter(moved).requires_grad
    adapted.check(model)


def test_both_kinds_can_stand_on_one_model() -> None:
    model = Net(dropout=0.0)
    before = run(model)
    plan = Plan({}, {}, {"layers.0.mlp.up_proj": "lora", "layers.0.mlp.down_proj": "adapter"})
    adapt(model, plan, rank=2)
    assert torch.equal(run(model), before)
    assert {n for n, _ in model.named_modules() if n.endswith(("lora_A", "bottleneck"))} == {
        "layers.0.mlp.up_proj.lora_A",
        "layers.0.mlp.down_proj.bottleneck",
    }


def test_first_values_follow_the_seed_alone() -> None:
    def values(seed: int, kind: str) -> list[Tensor]:
        model = Net()
        state = torch.get_rng_state()
        plan = adapt(model, plan_for(model, kind), seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)
        return [model.get_parameter(name) for name in plan.dense if "lora_A" in name or "down.weight" in name]

    for kind in ("lora", "adapter"):
        first, again, other = values(1, kind), values(1, kind), values(2, kind)
        assert first
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


class Encoder(nn.Module):
    """PyTorch's own layer, which has a fused path for eval mode that reads weights past their modules."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_the_fused_path_of_an_encoder_does_not_leave_adapters_out(kind: str) -> None:
    model = Encoder().eval()
    found = matrices(model)
    assert [name.rsplit(".", 2)[1] for name in found] == ["linear1", "linear2"] * 2  # not `out_proj`, never called
    adapt(model, Plan({}, {}, {name.removesuffix(".weight"): kind for name in found}), rank=2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "bottleneck.up" in name:
                nn.init.normal_(p)
    x = torch.rand(2, 3, 8)
    with_gradients = model(x)
    assert with_gradients.requires_grad
    with torch.no_grad():
        assert torch.allclose(model(x), with_gradients, atol=1e-5)


def test_what_can_have_no_adapter_is_refused() -> None:
    model = Net()
    for path in ("embed_tokens", "norm", "layers.0"):
        with pytest.raises(ValueError, match=f"cannot put an adapter on {path}"):
            adapt(model, Plan({}, {}, {path: "lora"}), rank=1)
    with pytest.raises(ValueError, match="the module nowhere is missing"):
        adapt(model, Plan({}, {}, {"nowhere": "lora"}), rank=1)
    with pytest.raises(ValueError, match=r"`adapt\(rank=None\)`"):
        adapt(model, Plan({}, {}, {"lm_head": "lora"}))
    with pytest.raises(ValueError, match=r"encoder\.layers\.0\.self_attn\.out_proj"):
        adapt(Encoder(), Plan({}, {}, {"encoder.layers.0.self_attn.out_proj": "lora"}), rank=1)
    for kind in ("lora", "adapter"):
        twice = Net()
        adapt(twice, Plan({}, {}, {"lm_head": kind}), rank=1)
        with pytest.raises(ValueError, match="cannot put an adapter on lm_head"):
            adapt(twice, Plan({}, {}, {"lm_head": kind}), rank=1)
    tied = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    tied[1].weight = tied[0].weight
    assert matrices(tied) == {}


def test_a_convolution_of_transformers_is_a_matrix_the_other_way_round() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=13, n_positions=8, n_embd=8, n_layer=2, n_head=2)).eval()
    found = matrices(model)
    assert found["transformer.h.0.mlp.c_fc.weight"] == (32, 8)
    assert tuple(model.get_parameter("transformer.h.0.mlp.c_fc.weight").shape) == (8, 32)
    assert "lm_head.weight" not in found  # tied to the embedding
    before = model(IDS).logits
    kinds = dict.fromkeys((name.removesuffix(".weight") for name in found if ".h.0." in name), "lora")
    kinds |= dict.fromkeys((name.removesuffix(".weight") for name in found if ".h.1." in name), "adapter")
    adapted = adapt(model, Plan({}, {}, kinds), rank=2)
    assert torch.equal(model(IDS).logits, before)
    costs = [Router(rank=2, kind=kind).cost(found[f"{name}.weight"]) for name, kind in kinds.items()]
    assert adapted.count == sum(costs)

    model = GPT2LMHeadModel(GPT2Config(vocab_size=13, n_positions=8, n_embd=8, n_layer=2, n_head=2))
    shapes = {name: tuple(model.get_parameter(name).shape) for name in found}
    everything = Plan({name: torch.arange(math.prod(s)) for name, s in shapes.items()}, shapes)
    routed = Router(rank=2, kind="adapter").allocate(everything, matrices(model))
    assert len(routed.structured) == len(found)
    assert adapt(model, routed).count == routed.config["routing"]["charged"]


# Bottlenecks ----------------------------------------------------------------------------------------------------------


def loud(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "bottleneck" in name:
                nn.init.normal_(p, std=0.3)
    return model


def adapted_net() -> Net:
    model = Net(dropout=0.0)
    adapt(model, plan_for(model, "adapter"))
    return model


def test_a_bottleneck_computes_its_formula() -> None:
    linear = nn.Linear(3, 4)
    x = torch.rand(5, 3)
    h = linear(x)
    adapter = attach(linear, rank=2)
    loud(linear)
    narrow = nn.functional.gelu(h @ adapter.down.weight.T + adapter.down.bias)
    assert torch.allclose(linear(x), h + narrow @ adapter.up.weight.T + adapter.up.bias, atol=1e-6)


def test_dropout_stands_in_front_of_the_narrow_path_in_train_mode_only() -> None:
    adapter = Bottleneck(64, 64, dropout=0.5)
    with torch.no_grad():
        adapter.up.weight.copy_(torch.eye(64))
        adapter.down.weight.copy_(torch.eye(64))
        adapter.down.bias.zero_()
    h = torch.full((1, 64), 4.0)
    added = adapter(h) - h
    assert 10 < int((added == 0.0).sum()) < 54
    assert torch.allclose(added[added != 0.0], torch.tensor(8.0), atol=1e-4)  # gelu(8) is 8
    assert not (adapter.eval()(h) == h).any()


def test_bottlenecks_survive_copies_pickles_and_whole_model_files() -> None:
    model = loud(adapted_net())
    before = run(model)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)):
        assert torch.equal(run(other), before)
        with torch.no_grad():
            for name, p in other.named_parameters():
                if "bottleneck" in name:
                    p.zero_()
        assert not torch.equal(run(other), before)
        assert torch.equal(run(model), before)  # the copy has bottlenecks of its own


def test_bottlenecks_are_in_the_state_dict_and_leave_the_other_names_alone() -> None:
    model = loud(adapted_net())
    bare = Net()
    assert set(bare.state_dict()) < set(model.state_dict())
    other = adapted_net()
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(other), run(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((4, 0), "rank=0"), ((0, 4), "width=0"), ((4, 4, 1.0), r"dropout=1\.0"), ((4, 4, -0.1), r"dropout=-0\.1")],
)
def test_bottlenecks_out_of_range_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bottleneck(*arguments)


def test_one_matrix_has_one_bottleneck() -> None:
    linear = nn.Linear(2, 2)
    attach(linear, rank=1)
    with pytest.raises(ValueError, match="has a bottleneck already"):
        attach(linear, rank=1)


def test_a_routed_plan_is_a_file_like_any_other(tmp_path: Path) -> None:
    model = Net()
    plan = plan_for(model, "adapter")
    plan.save(tmp_path / "plan")
    adapted = adapt(model, Plan.load(tmp_path / "plan"))
    adapted.save(tmp_path / "adapted")
    Plan.load(tmp_path / "adapted").check(model)
