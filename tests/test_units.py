"""Layers and matrices are found by structure, in every family of the table and in models of no family."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from families import FAMILIES, KINDS, REFUSALS, Family, adapt, adapted, build
from torch import nn

from apportion.categories import CATEGORIES
from apportion.types import Bound
from apportion.units import Layers, Modules

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]


class Odd(pl.LightningModule):
    """Holds a model under a name that nobody would guess."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.xyzzy_7 = model


class Block(nn.Module):
    """A layer of no family."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width, bias=False)
        self.spread = nn.Linear(width, 2 * width)
        self.gather = nn.Linear(2 * width, width)
        self.pre = nn.LayerNorm(width)


class Custom(nn.Module):
    """Blocks with something around them; the head is registered first."""

    def __init__(self, n: int = 3) -> None:
        super().__init__()
        self.answer = nn.Linear(4, 2)
        self.words = nn.Embedding(9, 4)
        self.place = nn.Parameter(torch.zeros(1, 5, 4))
        self.inner = nn.ModuleList(Block() for _ in range(n))
        self.post = nn.LayerNorm(4)
        self.heat = nn.Parameter(torch.zeros(()))


def feed(inner: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, inner), nn.GELU(), nn.Linear(inner, 4))


def lies(name: str, paths: tuple[str, ...]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def held(bound: Bound) -> dict[str, nn.Parameter]:
    return {name: p for unit in bound.units for name, p in unit.params.items()}


def check_partition(bound: Bound, model: nn.Module) -> None:
    """Every trainable tensor has exactly one place."""
    places = [*held(bound).values(), *bound.always.values(), *bound.never.values()]
    assert len({id(p) for p in places}) == len(places)
    assert {id(p) for p in places} == {id(p) for p in model.parameters() if p.requires_grad}


def check_roles(bound: Bound, family: Family, prefix: str) -> None:
    for role in ("embedding", "head", "norm", "other"):
        paths = tuple(prefix + path for path in getattr(family, role))
        for name in bound.found[role]:
            assert lies(name, paths), f"{name} should be no {role}"
        for path in paths:
            assert any(lies(name, (path,)) for name in bound.found[role]), f"no {role} in {path}"


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_and_roles_of_a_family_are_found_plain_and_inside_a_lightning_module(name: str) -> None:
    family, model = FAMILIES[name], build(name)
    for host, prefix in ((model, ""), (Odd(model), "xyzzy_7.")):
        bound = Layers().bind(host)
        assert bound.n == family.n
        assert bound.names == tuple(prefix + layer for layer in family.names)
        assert [unit.block for unit in bound.units] == list(range(family.n))
        assert all(unit.module is host.get_submodule(unit.name) for unit in bound.units)
        assert all(lies(key, (unit.name,)) for unit in bound.units for key in unit.params)
        assert not bound.never
        check_roles(bound, family, prefix)
        check_partition(bound, host)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_units_of_an_adapted_family_are_its_adapters(name: str, kind: str) -> None:
    family, model = FAMILIES[name], adapted(name, kind)
    prefix = "xyzzy_7.base_model.model."
    bound = Layers().bind(Odd(model))
    layers = tuple(prefix + layer for layer in family.names)
    assert bound.names == layers
    wanted = {f"xyzzy_7.{key}" for key in trainable(model) if lies(f"xyzzy_7.{key}", layers)}
    assert set(held(bound)) == wanted
    assert all(("lora_" in key) or ("ia3_" in key) for key in wanted)
    check_roles(bound, family, prefix)
    matrices = Modules().bind(Odd(model))
    assert set(held(matrices)) == wanted
    assert all(re.search(rf"\.({'|'.join(map(re.escape, family.target))})$", unit.name) for unit in matrices.units)
    assert all(len(unit.params) == {"lora": 2, "dora": 3, "ia3": 1}[kind] for unit in matrices.units)


@pytest.mark.parametrize(("name", "kind", "target", "message"), REFUSALS)
def test_what_peft_refuses_is_still_refused(name: str, kind: str, target: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        adapt(build(name), kind, **target)


def test_figures_of_llama_2_7b_and_llama_3_1_8b_hold_on_the_meta_device() -> None:
    import transformers

    common = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    for extra, always, layer in (
        ({"vocab_size": 32000, "intermediate_size": 11008}, 262_148_096, 202_383_360),
        ({"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8}, 1_050_677_248, 218_112_000),
    ):
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, **extra))
        bound = Layers().bind(model)
        assert bound.n == 32
        assert bound.sizes.tolist() == [layer] * 32
        assert sum(p.numel() for p in bound.always.values()) == always
        by_group: dict[str, int] = {}
        for unit, size in zip(Modules().bind(model).units, Modules().bind(model).sizes.tolist(), strict=True):
            by_group[unit.group] = by_group.get(unit.group, 0) + size
        assert set(by_group) == {"attention", "ffn", "norm"}
        assert sum(by_group.values()) == 32 * layer


def test_fake_tensors_are_enough() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = build("gpt2")
        assert Layers().bind(model).n == FAMILIES["gpt2"].n
        assert Modules().bind(model).n == 18


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (lambda: nn.Sequential(*[feed() for _ in range(4)]), ("0", "1", "2", "3")),
        (
            lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)),
            ("0", "2", "4"),
        ),
        (lambda: nn.Sequential(nn.Embedding(9, 4), feed(), feed(), nn.LayerNorm(4), nn.Linear(4, 9)), ("1", "2")),
        (lambda: Custom(), ("inner.0", "inner.1", "inner.2")),
        (lambda: nn.Sequential(Custom(), nn.Identity()), ("0.inner.0", "0.inner.1", "0.inner.2")),
        (lambda: nn.ModuleDict({"7": Block(), "8": Block()}), ("7", "8")),
        (
            lambda: nn.Transformer(8, 2, 1, 2, 16, batch_first=True),
            ("encoder.layers.0", "decoder.layers.0", "decoder.layers.1"),
        ),
        (lambda: nn.ModuleList([nn.LSTM(4, 4), nn.LSTM(4, 4)]), ("0", "1")),
    ],
)
def test_layers_of_models_of_no_family_are_found(model: Callable[[], nn.Module], names: tuple[str, ...]) -> None:
    assert Layers().bind(model()).names == names
    assert Layers().bind(Odd(model())).names == tuple(f"xyzzy_7.{name}" for name in names)


def test_numbered_attributes_serve_where_there_is_no_list() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.out = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1)

    bound = Layers().bind(Plain())
    assert bound.names == ("fc1", "fc2")
    assert bound.found["head"] == ("out.weight", "out.bias")


def test_blocks_of_convolutions_are_layers_and_downsampling_is_not() -> None:
    import transformers

    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[8, 12], depths=[2, 3], layer_type="basic", num_labels=3
    )
    bound = Layers().bind(transformers.ResNetForImageClassification(config))
    stages = (("0", 2), ("1", 3))
    assert bound.names == tuple(f"resnet.encoder.stages.{s}.layers.{i}" for s, n in stages for i in range(n))
    assert bound.found["head"] == ("classifier.1.weight", "classifier.1.bias")
    assert all(lies(name, ("resnet.embedder",)) for name in bound.found["embedding"])


def test_experts_in_a_list_inside_a_layer_are_no_layers() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.o = nn.Linear(4, 4), nn.Linear(4, 4)
            self.gate = nn.Linear(4, 3)
            self.experts = nn.ModuleList(feed() for _ in range(3))

    class Net(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.stack = nn.ModuleList(Sparse() for _ in range(n))

    assert Layers().bind(Net(2)).names == ("stack.0", "stack.1")
    assert Layers().bind(Net(1)).names == ("stack.0",)


def test_sublayers_in_a_list_inside_a_layer_are_no_layers() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.o = nn.Linear(4, 4), nn.Linear(4, 4)

    class Layer(nn.Module):
        def __init__(self, inner: int) -> None:
            super().__init__()
            self.parts = nn.ModuleList([Attention(), feed(inner)])

    assert Layers().bind(nn.ModuleList(Layer(inner) for inner in (6, 7, 8))).names == ("0", "1", "2")


def test_what_stands_around_custom_blocks_has_its_role_whatever_the_order_of_registration() -> None:
    found = Layers().bind(Custom()).found
    assert found["embedding"] == ("place", "words.weight")
    assert found["head"] == ("answer.weight", "answer.bias")
    assert found["norm"] == ("post.weight", "post.bias")
    assert found["other"] == ("heat",)


def test_both_towers_count_on_request_in_a_model_that_reads_images() -> None:
    model = build("llava")
    language, both = Layers().bind(model), Layers(towers="all").bind(model)
    vision = tuple(f"model.vision_tower.encoder.layers.{i}" for i in range(2))
    assert both.names == vision + language.names
    assert any(lies(name, vision) for name in language.always)
    assert "model.vision_tower.embeddings.patch_embedding.weight" in both.found["embedding"]
    check_partition(both, model)


def test_exclude_keeps_a_tower_out_of_the_units() -> None:
    model = build("clip")
    bound = Layers(exclude="vision_model").bind(model)
    assert bound.names == ("text_model.encoder.layers.0", "text_model.encoder.layers.1")
    assert "vision_model.encoder.layers.0.mlp.fc1.weight" in bound.always


def test_roles_say_what_trains() -> None:
    model = build("llama")
    bound = Layers(embeddings="freeze", head="unit", norm="train").bind(model)
    assert list(bound.never) == ["model.embed_tokens.weight"]
    assert list(bound.always) == ["model.norm.weight"]
    assert bound.names == (*FAMILIES["llama"].names, "lm_head")
    assert [unit.category for unit in bound.units] == ["layer"] * 3 + ["head"]
    assert {name for name, _ in bound.covered()} == set(trainable(model)) - {"model.norm.weight"}


def test_embedding_comes_first_and_norm_and_head_last_as_units() -> None:
    bound = Layers(embeddings="unit", head="unit", norm="unit").bind(build("bert"))
    assert [unit.category for unit in bound.units] == ["embedding", "layer", "layer", "layer", "head"]
    head = bound.units[-1]
    assert set(head.params) == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }
    assert {id(p) for p in head.module.parameters()} == {id(p) for p in head.params.values()}
    assert not bound.always
    last = Modules(embeddings="unit", head="unit", norm="unit").bind(build("llama")).units[-2:]
    assert [(unit.name, unit.category, unit.group) for unit in last] == [
        ("model.norm", "norm", "norm"),
        ("lm_head", "head", "other"),
    ]


def test_tied_weights_are_one_tensor_with_the_role_of_the_embedding() -> None:
    model = build("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    frozen = Layers(embeddings="freeze", head="freeze").bind(model)
    assert set(frozen.never) == {"transformer.wte.weight", "transformer.wpe.weight"}
    with pytest.warns(
        UserWarning, match=r"lm_head.weight is tied to the embedding transformer.wte, whose 'freeze' holds"
    ):
        bound = Layers(embeddings="freeze", head="train").bind(model)
    assert set(bound.never) == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert not any(p is model.lm_head.weight for p in bound.always.values())
    check_partition(bound, model)


def test_a_tensor_of_several_layers_belongs_to_the_first_and_is_named_once() -> None:
    model = Custom()
    for block in (model.inner[1], model.inner[2]):
        block.mix.weight = model.inner[0].mix.weight
    for slot in (Layers(), Modules()):
        with pytest.warns(
            UserWarning, match=r"inner.1.mix.weight is a tensor of inner.0\S* too.*\(and 1 more\)"
        ) as caught:
            bound = slot.bind(model)
        assert len(caught) == 1
        assert [name for name in held(bound) if "mix" in name] == ["inner.0.mix.weight"]
        check_partition(bound, model)


def test_layers_without_trainable_parameters_are_left_out() -> None:
    model = build("llama")
    model.model.layers[1].requires_grad_(False)
    bound = Layers().bind(model)
    assert bound.names == ("model.layers.0", "model.layers.2")
    assert [unit.block for unit in bound.units] == [0, 2]
    assert Modules().bind(model).n == 2 * 9
    part = adapt(build("llama"), "lora", ["q_proj"], layers_to_transform=[2])
    assert Layers().bind(part).names == ("base_model.model.model.layers.2",)


def test_a_frozen_model_is_refused_as_frozen() -> None:
    model = build("llama").requires_grad_(False)
    with pytest.raises(ValueError, match=r"`Layers\(\)` found 3 layers, such as model.layers.0, but all .* frozen"):
        Layers().bind(model)
    model.lm_head.requires_grad_(True)
    with pytest.raises(ValueError, match=r"`Modules\(\)` found 3 layers.* frozen"):
        Modules().bind(model)


def test_a_copy_that_peft_saves_has_the_role_of_its_original() -> None:
    model = adapt(build("bert"), "lora", ["query"], modules_to_save=["classifier", "LayerNorm"])
    bound = Layers(head="freeze").bind(model)
    assert set(bound.never) == {
        "base_model.model.classifier.modules_to_save.default.weight",
        "base_model.model.classifier.modules_to_save.default.bias",
    }
    layer = "base_model.model.bert.encoder.layer.0"
    assert f"{layer}.output.LayerNorm.modules_to_save.default.weight" in bound.units[0].params
    assert not any("original_module" in name for name in held(bound))
    norms = [unit for unit in Modules().bind(model).units if unit.category == "norm"]
    assert [unit.name for unit in norms[:2]] == [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    check_partition(bound, model)


def test_a_failed_search_says_what_it_met_and_the_way_out() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.mid, self.out = nn.Linear(3, 4), nn.Bilinear(4, 4, 4), nn.Linear(4, 1)
            self.steps = nn.Sequential(nn.ReLU(), nn.Dropout())

    with pytest.raises(ValueError, match=r"found no layers in `Bare`") as caught:
        Layers().bind(Bare())
    message = str(caught.value)
    assert "steps (2 children)" in message
    pattern = re.search(r"`Layers\(pattern='(.*)'\)`", message)
    assert pattern is not None
    assert Layers(pattern=pattern[1]).bind(Bare()).names == ("into", "mid", "out")


def test_pattern_names_the_layers_by_the_last_parts_of_their_paths() -> None:
    model = build("llama")
    assert Layers(pattern=r"layers\.[02]").bind(model).names == ("model.layers.0", "model.layers.2")
    assert Layers(pattern="mlp").bind(model).names == tuple(f"model.layers.{i}.mlp" for i in range(3))
    assert Layers(pattern="model|mlp").bind(Odd(model)).names == ("xyzzy_7.model",)
    bound = Layers(pattern="mlp", embeddings="freeze").bind(model)
    assert "model.layers.0.self_attn.q_proj.weight" in bound.always
    assert list(bound.never) == ["model.embed_tokens.weight"]
    check_partition(bound, model)


@pytest.mark.parametrize(
    ("slot", "message"),
    [
        (Layers(pattern="layers"), None),
        (
            Layers(pattern="layer"),
            r"matches no module of `LlamaForCausalLM`.*Names: model\.layers\.0, model\.layers\.1, model",
        ),
        (Layers(exclude=r"layers\.7"), "matches none of the 3 units"),
        (Layers(exclude=r"layers"), "matches all of the 3 units"),
        (Modules(exclude=r"w_proj"), "matches none of the 27 units"),
    ],
)
def test_a_pattern_without_a_match_is_an_error(slot: Layers, message: str | None) -> None:
    model = build("llama")
    if message is None:
        assert slot.bind(model).names == ("model.layers",)
        return
    with pytest.raises(ValueError, match=message):
        slot.bind(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layers(embeddings="always"), r"`Layers\(embeddings='always'\)` must be 'train'"),
        (lambda: Modules(head=None), r"`Modules\(head=None\)` must be"),  # type: ignore[arg-type]
        (lambda: Layers(towers="vision"), r"`Layers\(towers='vision'\)` must be 'language' or 'all'"),
        (lambda: Layers(pattern="("), r"`Layers\(pattern='\('\)` is no regular expression"),
        (lambda: Modules(categories={"q": "["}), r"`Modules\(categories=\{'q': '\['\}\)` is no regular expression"),
    ],
)
def test_nonsense_is_refused_at_construction(make: Callable[[], Layers], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


MATRICES: Mapping[str, Mapping[str, str]] = {
    "llama": {
        "self_attn.q_proj": "q",
        "self_attn.k_proj": "k",
        "self_attn.v_proj": "v",
        "self_attn.o_proj": "o",
        "mlp.gate_proj": "gate",
        "mlp.up_proj": "up",
        "mlp.down_proj": "down",
        "input_layernorm": "norm",
        "post_attention_layernorm": "norm",
    },
    "gpt2": {
        "ln_1": "norm",
        "attn.c_attn": "qkv",
        "attn.c_proj": "o",
        "ln_2": "norm",
        "mlp.c_fc": "up",
        "mlp.c_proj": "down",
    },
    "bert": {
        "attention.self.query": "q",
        "attention.self.key": "k",
        "attention.self.value": "v",
        "attention.output.dense": "o",
        "attention.output.LayerNorm": "norm",
        "intermediate.dense": "up",
        "output.dense": "down",
        "output.LayerNorm": "norm",
    },
    "t5": {
        "layer.0.SelfAttention.q": "q",
        "layer.0.SelfAttention.k": "k",
        "layer.0.SelfAttention.v": "v",
        "layer.0.SelfAttention.o": "o",
        "layer.0.SelfAttention.relative_attention_bias": "other",
        "layer.0.layer_norm": "norm",
        "layer.1.DenseReluDense.wi": "up",
        "layer.1.DenseReluDense.wo": "down",
        "layer.1.layer_norm": "norm",
    },
    "vit": {
        "attention.q_proj": "q",
        "attention.k_proj": "k",
        "attention.v_proj": "v",
        "attention.o_proj": "o",
        "layernorm_before": "norm",
        "layernorm_after": "norm",
        "mlp.fc1": "up",
        "mlp.fc2": "down",
    },
    "mixtral": {
        "self_attn.q_proj": "q",
        "self_attn.k_proj": "k",
        "self_attn.v_proj": "v",
        "self_attn.o_proj": "o",
        "mlp.gate": "router",
        "mlp.experts.gate_up_proj": "gate_up",
        "mlp.experts.down_proj": "down",
        "input_layernorm": "norm",
        "post_attention_layernorm": "norm",
    },
    "phi3": {
        "self_attn.o_proj": "o",
        "self_attn.qkv_proj": "qkv",
        "mlp.gate_up_proj": "gate_up",
        "mlp.down_proj": "down",
        "input_layernorm": "norm",
        "post_attention_layernorm": "norm",
    },
    "gpt_neox": {
        "input_layernorm": "norm",
        "post_attention_layernorm": "norm",
        "attention.query_key_value": "qkv",
        "attention.dense": "o",
        "mlp.dense_h_to_4h": "up",
        "mlp.dense_4h_to_h": "down",
    },
    "falcon": {
        "self_attention.query_key_value": "qkv",
        "self_attention.dense": "o",
        "mlp.dense_h_to_4h": "up",
        "mlp.dense_4h_to_h": "down",
        "input_layernorm": "norm",
    },
}
GROUP = {"q": "attention", "k": "attention", "v": "attention", "o": "attention", "qkv": "attention", "norm": "norm"}
GROUP |= {"gate": "ffn", "up": "ffn", "down": "ffn", "gate_up": "ffn", "router": "other", "other": "other"}


@pytest.mark.parametrize("name", MATRICES)
def test_matrices_of_a_layer_have_their_category_and_group(name: str) -> None:
    model = build(name)
    bound = Modules().bind(model)
    first = FAMILIES[name].names[0]
    got = {unit.name.removeprefix(f"{first}."): unit for unit in bound.units if unit.block == 0}
    assert {key: unit.category for key, unit in got.items()} == MATRICES[name]
    assert list(got) == list(MATRICES[name])
    assert all(unit.group == GROUP[unit.category] for unit in bound.units)
    assert {name for name, _ in bound.covered()} == set(held(Layers().bind(model)))
    check_partition(bound, model)


def test_a_bias_belongs_to_its_matrix_and_a_norm_is_one_unit() -> None:
    units = {unit.name: unit for unit in Modules().bind(build("gpt2")).units}
    assert all(set(unit.params) == {f"{name}.weight", f"{name}.bias"} for name, unit in units.items())
    attention = nn.TransformerEncoderLayer(4, 2, 8)
    inside = {unit.name: list(unit.params) for unit in Modules().bind(nn.ModuleList([attention])).units}
    assert inside["0.self_attn.in_proj"] == ["0.self_attn.in_proj_weight", "0.self_attn.in_proj_bias"]


def test_adapters_on_stacked_experts_are_units_of_their_own() -> None:
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = adapt(build("mixtral"), "lora", ["q_proj"], target_parameters=parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bound = Modules().bind(model)
    names = [unit.name.rpartition("layers.0.")[2] for unit in bound.units if unit.block == 0]
    assert sorted(names) == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "self_attn.q_proj"]
    assert {unit.category for unit in bound.units} == {"q", "gate_up", "down"}
    assert all(len(unit.params) == 2 for unit in bound.units)
    check_partition(bound, model)


def test_categories_can_be_given_and_matrices_excluded() -> None:
    model = build("llama")
    bound = Modules(categories={"attention": r"self_attn\.\w+", "rest": ".*"}, exclude=r"o_proj|layers\.1").bind(model)
    assert {unit.category for unit in bound.units} == {"attention", "rest"}
    assert {unit.block for unit in bound.units} == {0, 2}
    assert "model.layers.0.self_attn.o_proj.weight" in bound.always
    assert "model.layers.1.mlp.up_proj.weight" in bound.always
    check_partition(bound, model)


def test_compiled_and_replicated_modules_have_the_names_of_what_they_wrap() -> None:
    model = build("llama")
    plain = Layers().bind(model)
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer)
    assert any("_orig_mod" in name for name, _ in model.named_parameters())
    for host in (model, torch.compile(model), nn.DataParallel(model)):
        bound = Layers().bind(host)
        assert bound.names == plain.names
        assert set(held(bound)) == set(held(plain))
        assert set(bound.always) == set(plain.always)
        assert Modules().bind(host).units[0].name == "model.layers.0.self_attn.q_proj"


def test_binding_leaves_the_model_alone() -> None:
    model = build("bert")
    before = {name: (p.requires_grad, p.grad, p._version) for name, p in model.named_parameters()}
    modules = [name for name, _ in model.named_modules()]
    hooks: list[str] = []
    model.register_forward_pre_hook(lambda *_: hooks.append("ran"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Layers(embeddings="unit", head="unit").bind(model)
        Modules(norm="freeze").bind(model)
    assert {name: (p.requires_grad, p.grad, p._version) for name, p in model.named_parameters()} == before
    assert [name for name, _ in model.named_modules()] == modules
    assert not hooks


@pytest.mark.parametrize(("name", "slot"), [("layers", Layers()), ("modules", Modules())])
def test_the_shipped_configuration_is_the_default(name: str, slot: Layers) -> None:
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    text = (files("apportion.conf") / "slots" / "units" / f"{name}.yaml").read_text()
    assert instantiate(OmegaConf.create(yaml.safe_load(text))) == slot
    plain = {key: value for key, value in yaml.safe_load(text).items() if not key.startswith("_")}
    assert set(plain) == set(vars(slot))
    if name == "modules":
        assert list(plain["categories"].items()) == list(CATEGORIES.items())


@pytest.mark.parametrize("slot", [Layers, Modules])
def test_a_switch_says_whether_what_surrounds_the_layers_trains(slot: type[Layers]) -> None:
    assert slot(True, False, True) == slot("train", "freeze", "train")
    with pytest.raises(ValueError, match=r"head=1\)` must be 'train'"):
        slot(head=1)  # type: ignore[arg-type]
