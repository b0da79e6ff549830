"""Presets: they fill slots and nothing else, their YAML mirrors their constructors, and they select what the papers "
"say."""

from __future__ import annotations

import inspect
import pickle
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from gate_methods import GATE_METHODS
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from methods import ENTRY_METHODS, METHODS, PLANNED_METHODS, Method
from omegaconf import DictConfig, OmegaConf
from rank_methods import RANK_METHODS
from torch import nn
from toys import BLOCKS, Net, lora_net
from transformers import LlamaConfig, LlamaForCausalLM

import apportion.callbacks
from apportion.bandit import SuppressionReward, candidate_sets, updated
from apportion.budgets import Constant, Increment, Polynomial
from apportion.callbacks import HFT, IST, LISA, RST, BAdam, OwLore
from apportion.callbacks.badam import block_interval
from apportion.driver import SelectiveTuning
from apportion.effects import Compact, Freeze
from apportion.entry_units import Entries, Rows
from apportion.lamp import Lamp
from apportion.penalties import Nuclear
from apportion.rules import Balanced, Cycle, Sample, TopK
from apportion.scores import Outlier, Uniform, WeightNorm
from apportion.selection import Selection, Slots
from apportion.types import When
from apportion.units import Layers

SLOTS = Path(apportion.callbacks.__file__).parents[1] / "conf" / "slots"
PRESETS = sorted(METHODS)
TABLE: dict[str, Any] = {**METHODS, **ENTRY_METHODS, **PLANNED_METHODS, **RANK_METHODS, **GATE_METHODS}
ALL = sorted(TABLE)


def select(method: SelectiveTuning, model: nn.Module, steps: int, probe: Any = None) -> Selection:
    """Runs a method's selection by itself for some optimizer steps."""
    selection = method.new_selection()
    selection.bind(model)
    for _ in range(steps):
        selection.advance(fresh=selection.step == 0, probe=probe)
        selection.step += 1
    return selection


class Losses:
    """A probe with a loss that depends on what is damped."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def refresh(self) -> None:
        """Nothing to move on to."""

    def loss(self) -> float:
        with torch.no_grad():
            return float(self.model(torch.arange(5)[None]).square().mean())


# Form
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_a_preset_is_only_a_constructor(name: str) -> None:
    preset = TABLE[name].preset
    assert {key for key in vars(preset) if not key.startswith("__")} == set()
    assert "__init__" in vars(preset)
    assert preset.__mro__[1] is SelectiveTuning


def test_the_table_has_every_preset_and_every_preset_a_file() -> None:
    exported = {getattr(apportion.callbacks, name) for name in apportion.callbacks.__all__}
    presets = {kind for kind in exported if isinstance(kind, type) and issubclass(kind, SelectiveTuning)}
    assert {method.preset for method in TABLE.values()} == presets
    for name in ALL:
        assert (SLOTS / "callbacks" / f"{name}.yaml").is_file()


@pytest.mark.parametrize("name", ALL)
def test_docstrings_name_every_argument_the_differences_and_the_source(name: str) -> None:
    doc = inspect.getdoc(TABLE[name].preset) or ""
    for argument in inspect.signature(TABLE[name].preset).parameters:
        assert f"\n    {argument}: " in doc
    for part in ("Example:", "Differences:", "Not shown:", "References:", "https://arxiv.org/abs/"):
        assert part in doc


@pytest.mark.parametrize("name", ALL)
def test_presets_pickle_and_copy(name: str) -> None:
    method = TABLE[name].make()
    for twin in (pickle.loads(pickle.dumps(method)), deepcopy(method)):
        assert twin.slots == method.slots
        assert (twin.seed, twin.name) == (method.seed, method.name)


# YAML
# --------------------------------------------------------------------------------------------------------------------

FILES = sorted(p for p in SLOTS.glob("*/*.yaml") if p.stem != "compose" and p.parent.name != "units")


def node_of(path: Path) -> dict[str, Any]:
    content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    if path.parent.name != "callbacks":
        return dict(content)
    assert list(content) == [path.stem]
    return dict(content[path.stem])


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_file_mirrors_its_constructor(path: Path) -> None:
    node = node_of(path)
    assert node.pop("_convert_") == "all"
    target = node.pop("_target_")
    parameters = inspect.signature(get_class(target)).parameters
    assert list(node) == list(parameters)
    for name, parameter in parameters.items():
        if isinstance(node[name], dict) and "_target_" in node[name]:  # another slot, made anew for every instance
            assert instantiate(node[name]) == getattr(get_class(target)(), name)
        elif parameter.default is not inspect.Parameter.empty:
            assert node[name] == parameter.default
            assert type(node[name]) is type(parameter.default)


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_argument_in_a_file_has_a_comment(path: Path) -> None:
    for line in path.read_text().splitlines():
        key = line.strip().split(":")[0]
        assert line.startswith("#") or key in ("_target_", "_convert_", path.stem) or "  # " in line


@pytest.mark.parametrize("name", ALL)
def test_a_sweep_over_the_seed_of_an_app_reaches_the_draws(name: str) -> None:
    app = OmegaConf.merge({"seed": 5}, OmegaConf.load(SLOTS / "callbacks" / f"{name}.yaml"))
    assert instantiate(app)[name].seed == TABLE[name].preset(seed=5).seed


@pytest.mark.parametrize("name", ALL)
def test_an_instantiated_file_equals_the_constructor(name: str) -> None:
    made = instantiate(OmegaConf.load(SLOTS / "callbacks" / f"{name}.yaml"))[name]
    assert type(made) is TABLE[name].preset
    assert made.slots == TABLE[name].preset().slots
    assert made.seed == TABLE[name].preset().seed
    assert hash(made.slots.score) == hash(TABLE[name].preset().slots.score)  # no list or dict of OmegaConf got in


def foreign(tmp_path: Path, choice: str, *overrides: str) -> DictConfig:
    """The config of another project that only names one of our callbacks."""
    (tmp_path / "app.yaml").write_text(f"defaults:\n  - callbacks: {choice}\n  - _self_\nlr: 0.1\n")
    with initialize_config_dir(str(tmp_path), version_base=None):
        return compose("app", overrides=list(overrides))


def test_slots_compose_in_a_foreign_app_without_python(tmp_path: Path) -> None:
    overrides = ["units=layers", "score=weight_norm", "rule=topk", "effect=freeze", "effect.state=offload"]
    overrides += ["budget.amount=2", "callbacks.compose.select_when.every=20", "callbacks.compose.seed=7"]
    cfg = foreign(tmp_path, "compose", *overrides)
    made = instantiate(cfg.callbacks)["compose"]
    slots = Slots(Layers(), WeightNorm(), Constant(2), TopK(), Freeze("offload"), When(every=20))
    assert (type(made), made.slots, made.seed) == (SelectiveTuning, slots, 7)
    assert cfg.lr == 0.1


def test_the_free_choice_mirrors_the_constructor_of_the_driver(tmp_path: Path) -> None:
    node = foreign(tmp_path, "compose", "callbacks.compose.probe_data=[1,2]").callbacks.compose
    assert type(instantiate(node).probe_data) is list  # not a container of OmegaConf
    assert set(node) - {"_target_", "_convert_"} == set(inspect.signature(SelectiveTuning).parameters)
    assert instantiate(node).slots == Slots(Layers(), Uniform(), Constant(0.25), Sample(), Freeze(), When())


def test_presets_and_a_free_choice_stand_side_by_side_in_a_foreign_app(tmp_path: Path) -> None:
    overrides = ["budget=polynomial", "callbacks.lisa.active_layers=3", "callbacks.compose.name=b"]
    made = instantiate(foreign(tmp_path, "[lisa, compose]", *overrides).callbacks)
    assert list(made) == ["lisa", "compose"]
    assert made["lisa"].slots.budget == Constant(3)
    assert made["compose"].slots.budget == Polynomial(1.0, 0.25)
    assert made["compose"].name == "b"


FITTING: dict[str, dict[str, str]] = {  # what goes with a slot for other units than those of `compose`
    "unit": {},
    "entry": {"units": "entries", "score": "magnitude", "rule": "topk", "effect": "compact"},
    "rank": {"units": "ranks", "score": "sensitivity", "budget": "decay", "rule": "topk", "effect": "prune"},
}


BESIDE = {"grow": {"score": "matrix_sensitivity"}}  # what goes with single slots that do not go with those above


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_slot_can_be_chosen_by_name_in_a_foreign_app(tmp_path: Path, path: Path) -> None:
    if path.parent.name == "callbacks":
        assert list(foreign(tmp_path, path.stem).callbacks) == [path.stem]
    else:
        target = get_class(yaml.safe_load(path.read_text())["_target_"])
        fitting = {**FITTING[getattr(target, "grain", "unit")], **BESIDE.get(path.stem, {})}
        chosen = {**fitting, path.parent.name: path.stem}
        cfg = foreign(tmp_path, "compose", *(f"{group}={option}" for group, option in chosen.items()))
        assert isinstance(getattr(instantiate(cfg.callbacks.compose).slots, path.parent.name), target)


def test_slots_of_entries_compose_in_a_foreign_app_without_python(tmp_path: Path) -> None:
    overrides = ["units=rows", "score=lamp", "budget=increment", "rule=topk", "effect=compact", "units.pool=sum"]
    overrides += ["score.power=1.0", "rule.grow=true", "budget.amount=50"]
    overrides += ["effect.penalty={_target_: apportion.penalties.Nuclear, weight: 0.1}"]
    made = instantiate(foreign(tmp_path, "compose", *overrides).callbacks)["compose"]
    effect = Compact(penalty=Nuclear(0.1))
    assert made.slots == Slots(Rows(pool="sum"), Lamp(power=1.0), Increment(50), TopK(grow=True), effect)


@pytest.mark.parametrize(("name", "slot"), [("entries", Entries()), ("rows", Rows())])
def test_the_files_of_entry_units_are_their_defaults(name: str, slot: Entries) -> None:
    node = OmegaConf.load(SLOTS / "units" / f"{name}.yaml")
    assert instantiate(node) == slot
    assert set(node) - {"_target_", "_convert_"} == set(vars(slot))


# What they select
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_method_selects_its_count_at_its_steps(name: str) -> None:
    method: Method = METHODS[name]
    model = method.net()
    history = select(method.make(), model, 6, Losses(model)).history
    assert tuple(history.steps) == method.switches
    assert history.masks.shape == (len(method.switches), method.units)
    assert set(history.masks.sum(1).tolist()) == {method.selected}


@pytest.mark.parametrize("name", [n for n in PRESETS if METHODS[n].full])
def test_the_full_budget_selects_everything(name: str) -> None:
    method = METHODS[name]
    model = method.net()
    assert bool(select(method.make(**method.full), model, 3, Losses(model)).history.masks.all())


@pytest.mark.parametrize("name", PRESETS)
def test_the_same_seed_gives_the_same_draws_and_another_seed_others(name: str) -> None:
    method = METHODS[name]
    model = method.net()
    first, again, other = (select(method.make(seed=seed), model, 6, Losses(model)).history.masks for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_lisa_fills_the_slots_of_its_paper() -> None:
    slots = LISA().slots
    assert (slots.score, slots.rule, slots.select_when) == (Uniform(), Sample(), When(every=20))
    assert LISA(without_replacement=True).slots.rule == Cycle("shuffled")
    always = LISA().new_selection().bind(Net()).always
    assert set(always) == {"embed_tokens.weight", "norm.weight", "norm.bias", "lm_head.weight"}
    options = {"train_embeddings": False, "train_head": False, "train_norm": False}
    bound = LISA(**options).new_selection().bind(Net())
    assert set(bound.never) == set(always)
    assert not bound.always


def test_lisa_without_replacement_gives_every_layer_its_turn() -> None:
    history = select(LISA(active_layers=2, interval=1, without_replacement=True), Net(), 10).history
    for turn in range(0, 10, 2):
        assert history.masks[turn : turn + 2].sum(0).tolist() == [1] * BLOCKS


def test_ist_and_rst_fill_the_slots_of_their_paper() -> None:
    slots = IST().slots
    assert slots.score == SuppressionReward(10, 3, 0.5, 0.25, 10.0, "released")
    assert (slots.rule, slots.budget, slots.effect) == (Sample("sigmoid"), Constant(0.25), Freeze("offload"))
    assert IST(floor=0.1).slots.rule == Sample("sigmoid", 0.1)
    assert RST().slots == Slots(Layers(), Uniform(), Constant(0.25), Sample(), Freeze("offload"), When())


@pytest.mark.parametrize(("n", "trained", "damped"), [(32, 8, 16), (40, 10, 20), (28, 7, 14)])
def test_ist_trains_a_quarter_of_the_layers_and_damps_half(n: int, trained: int, damped: int) -> None:
    model = lora_net(blocks=n)
    method = IST()
    assert int(select(method, model, 1).history.masks.sum()) == trained
    assert isinstance(method.slots.score, SuppressionReward)
    assert method.slots.score.size(n) == damped


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_ist_with_a_rate_of_zero_is_random_sparse_tuning_draw_by_draw(kind: str) -> None:
    model = lora_net(kind)
    options: dict[str, Any] = {"active": 0.5, "seed": 11}
    ist = select(IST(rate=0.0, probe_interval=1, **options), model, 30, Losses(model)).history
    rst = select(RST(**options), model, 30).history
    assert torch.equal(ist.masks, rst.masks)
    learning = select(IST(rate=1e4, probe_interval=1, **options), model, 30, Losses(model)).history
    assert not torch.equal(learning.masks, rst.masks)


def test_ist_is_random_sparse_tuning_until_its_first_probe() -> None:
    model = lora_net()
    ist = select(IST(active=0.5, probe_interval=10), model, 10).history  # it would fail for want of a probe
    assert torch.equal(ist.masks, select(RST(active=0.5), model, 10).history.masks)


def test_ist_draws_by_the_importance_that_its_probes_taught() -> None:
    model = lora_net()
    selection = select(IST(active=0.5, probe_interval=2), model, 3, Losses(model))
    sets = candidate_sets(torch.zeros(4, dtype=torch.float64), 2, 3, IST().new_selection().probes)
    assert selection.state_dict()["score"]["score"].abs().max() > 0
    kept = sets.all(0) | ~sets.any(0)
    assert bool((selection.state_dict()["score"]["score"][kept].abs() < 1e-12).all())
    zero = updated(torch.zeros(4, dtype=torch.float64), sets, [1.0] * len(sets), 10.0)
    assert not torch.equal(selection.state_dict()["score"]["score"], zero)


def test_ist_on_a_bottleneck_adapter_takes_a_regex() -> None:
    model = Net(adapter=True)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "adapter" in name:
                p.add_(0.3)
    with pytest.raises(ValueError, match="has no adapter whose part could be damped"):
        select(IST(active=0.5, probe_interval=1), model, 2, Losses(model))
    selection = select(IST(active=0.5, probe_interval=1, adapters=r"\.adapter$"), model, 3, Losses(model))
    assert selection.state_dict()["score"]["score"].abs().max() > 0


def test_hft_draws_once_a_round_another_round_draws_anew_and_epochs_may() -> None:
    assert HFT().slots.select_when == When(end=1)
    assert HFT(redraw="epoch").slots.select_when == When(clock="epoch")
    masks = [select(HFT(round=r), Net(), 5).history.masks for r in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    with pytest.raises(ValueError, match=r"`HFT\(redraw='step'\)`"):
        HFT(redraw="step")
    with pytest.raises(ValueError, match=r"`HFT\(round=-1\)`"):
        HFT(round=-1)


def llama(layers: int = 32, kv_heads: int = 32, width: int = 4096, ffn: int = 11008) -> nn.Module:
    """A Llama on the meta device: shapes without memory."""
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32000,
                hidden_size=width,
                intermediate_size=ffn,
                num_hidden_layers=layers,
                num_attention_heads=32,
                num_key_value_heads=kv_heads,
                tie_word_embeddings=False,
            )
        )


def test_hft_trains_the_parameters_of_llama_2_7b_that_the_rule_implies() -> None:
    selection = select(HFT(), llama(), 1)
    assert selection.mask is not None
    chosen = [unit for unit, m in zip(selection.bound.units, selection.mask.tolist(), strict=True) if m]
    trained = sum(p.numel() for unit in chosen for p in unit.params.values())
    always = sum(p.numel() for p in selection.bound.always.values())
    assert trained + always == 3_500_277_760 + 4_096  # the final norm counts
    per_layer = Counter((unit.group, unit.block) for unit in chosen)
    assert {per_layer["attention", b] for b in range(32)} == {2}
    assert {per_layer["norm", b] for b in range(32)} == {1}
    assert Counter(per_layer["ffn", b] for b in range(32)) == {1: 16, 2: 16}


def test_hft_by_size_trains_half_of_grouped_attention_in_every_layer() -> None:
    selection = select(HFT(by="size"), llama(layers=4, kv_heads=8, ffn=14336), 1)
    assert selection.mask is not None
    entries: Counter[int] = Counter()
    for unit, m in zip(selection.bound.units, selection.mask.tolist(), strict=True):
        if m and unit.group == "attention":
            entries[unit.block] += sum(p.numel() for p in unit.params.values())
    assert set(entries.values()) == {(4096 * 4096 + 1024 * 4096)}
    assert HFT(by="size").slots.rule == Balanced(by="size")


def test_badam_gives_every_block_the_same_number_of_steps_from_the_first_on() -> None:
    history = select(BAdam(interval=3), Net(), 24).history
    assert history.steps == list(range(0, 24, 3))
    assert history.masks[:4].sum(0).tolist() == history.masks[4:].sum(0).tolist() == [1] * BLOCKS


def test_badam_trains_nothing_outside_the_layers_unless_told_to() -> None:
    outside = {"embed_tokens.weight", "norm.weight", "norm.bias", "lm_head.weight"}
    bound = BAdam().new_selection().bind(Net())
    assert (set(bound.never), set(bound.always), bound.n) == (outside, set(), BLOCKS)
    bound = BAdam(train_head=True).new_selection().bind(Net())
    assert set(bound.always) == {"lm_head.weight"}
    bound = BAdam(include_embeddings=True, include_head=True).new_selection().bind(Net())
    assert bound.n == BLOCKS + 3
    assert not bound.always
    assert not bound.never
    with pytest.raises(ValueError, match="has no turn"):
        BAdam(include_head=True, train_head=True)


def test_the_steps_per_block_follow_the_rule() -> None:
    assert block_interval(examples=38_400, batch=16, blocks=32) == 75
    assert block_interval(examples=10, batch=16, blocks=32) == 50
    assert block_interval(examples=10**7, batch=16, blocks=32) == 100


def test_owlore_draws_by_outliers_norms_or_evenly() -> None:
    assert OwLore().slots.score == Outlier(5.0, 1)
    assert OwLore(score="norm").slots.score == WeightNorm()
    assert OwLore(score="uniform").slots.score == Uniform()
    with pytest.raises(ValueError, match=r"`OwLore\(score='owl'\)`"):
        OwLore(score="owl")
    model = Net()
    with torch.no_grad():
        for i in (0, 1, 3):  # equal entries: no outliers there
            for name, p in model.layers[i].named_parameters():
                if "proj.weight" in name:
                    p.fill_(0.01)
    history = select(OwLore(active_layers=1, interval=1, threshold=4.0), model, 20, Losses(model)).history
    counts = history.masks.sum(0)
    assert int(counts.argmax()) == 2
    assert int(counts[2]) == 20
    floored = select(OwLore(active_layers=1, interval=1, threshold=4.0, floor=0.9), model, 40, Losses(model)).history
    assert bool((floored.masks.sum(0) > 0).all())
