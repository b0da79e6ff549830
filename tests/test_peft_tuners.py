"""Layer selection over every tuner of PEFT: what it trains layer by layer, and what it refuses, with the reason."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import pytorch_lightning as pl
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from toys import VOCABULARY, Task, fit, moved, named, tokens, trainable, weights
from transformers import LlamaConfig, LlamaForCausalLM
from witness import Step, Witness

from apportion.callbacks import IST, LISA
from apportion.probe import suppressed
from apportion.types import Bound
from apportion.units import Layers, Modules

pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias term"),  # BEFT
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension"),  # BOFT
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),  # FRoD
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),  # LN tuning
    pytest.mark.filterwarnings(
        "ignore:`(LISA|IST)` trains units of which some parameters got no gradient"
    ),  # the idle ones
]

LAYERS, WIDTH = 4, 16
LM: dict[str, Any] = {"task_type": "CAUSAL_LM"}
QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
PROMPT: dict[str, Any] = {**LM, "num_virtual_tokens": 3}


@dataclass(frozen=True)
class Tuner:
    """What is true of a tuner.

    Attributes:
        options: Of its configuration, to fit the tiny model.
        expected: ``layers``: every layer has adapters of its own. ``partly``: the layers share some tensors.
            ``refused``: nothing to select from.
        shared: Regex, searched in names, of the tensors that several layers hold; the first of them owns each.
        outside: The same of what trains outside the layers, at every step.
        idle: The same of what gets no gradient.
        error: What the refusal says.
        probing: What the refusal of a probe says; empty where probes work.
        make: Puts the adapters on a model where one configuration does not do.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    expected: str = "layers"
    shared: str = ""
    outside: str = ""
    idle: str = ""
    error: str = ""
    probing: str = ""
    make: Callable[[Path], nn.Module] | None = None


def llama() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config: Any = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            max_position_embeddings=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            use_cache=False,
        )
        return LlamaForCausalLM(config)


def two_kinds(folder: Path) -> nn.Module:
    """LoRA on queries and LoHa on values, both active."""
    model: Any = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]), "one", mixed=True)
    model.add_adapter("two", peft.LoHaConfig(r=2, target_modules=["v_proj"]))
    model.set_adapter(["one", "two"])
    return model


def experts(folder: Path, **options: Any) -> nn.Module:
    """X-LoRA over two LoRA experts, which it wants on disk."""
    for name in ("0", "1"):
        expert = peft.get_peft_model(llama(), peft.LoraConfig(r=2, init_lora_weights=False, **QV))
        expert.save_pretrained(str(folder / name))
    adapters = {name: str(folder / name) for name in ("0", "1")}
    return peft.get_peft_model(
        llama(), peft.XLoraConfig(hidden_size=WIDTH, adapters=adapters, xlora_depth=1, **LM, **options)
    )


OUTSIDE = r"found 4 layers, such as \S*layers\.0, but all their parameters are frozen .*{}\S*, lies outside"
ONE_SET = r"found {} units that hold the same trainable tensors, such as \S*layers\.\d\.\S*{}"

TUNERS: dict[str, Tuner] = {
    "adalora": Tuner({"init_r": 2, "target_r": 1, "total_step": 100, **QV}),
    "adamss": Tuner({"r": 4, "num_subspaces": 2, **QV}),
    "adaption_prompt": Tuner(
        {"adapter_len": 2, "adapter_layers": LAYERS, **LM}, probing="has no adapter whose part could be damped"
    ),
    "beft": Tuner({"target_modules": ["v_proj"]}),
    "boft": Tuner(QV),
    "c3a": Tuner({"block_size": 4, **QV}),
    "cartridge": Tuner(PROMPT, "refused", outside=r"prompt_encoder\.", error=OUTSIDE.format("prompt_encoder")),
    "cpt": Tuner(
        {"cpt_token_ids": [1, 2, 3], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3], **LM},
        "refused",
        outside=r"prompt_encoder\.",
        error=OUTSIDE.format("prompt_encoder"),
    ),
    "deft": Tuner({"r": 2, **QV}),
    "delora": Tuner({"r": 2, **QV}),
    "fourierft": Tuner({"n_frequency": 10, **QV}),
    "frod": Tuner({"progressbar": False, **QV}),
    "glora": Tuner({"r": 2, **QV}),
    "gralora": Tuner({"r": 4, "gralora_k": 2, **QV}),
    "hira": Tuner({"r": 2, **QV}),
    "hra": Tuner({"r": 2, **QV}),
    "ia3": Tuner({"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "lily": Tuner({"r": 2, "stride_A": 2, **QV}, "partly", shared=r"\.lily_[AB]\."),
    "ln_tuning": Tuner(outside=r"\.model\.norm\."),
    "loha": Tuner({"r": 2, **QV}),
    "lokr": Tuner({"r": 2, **QV}),
    "lora": Tuner({"r": 2, **QV}),
    "miss": Tuner({"r": 2, **QV}),
    "mixed": Tuner(make=two_kinds),
    "multitask_prompt_tuning": Tuner(
        {**PROMPT, "num_tasks": 2}, "refused", outside=r"prompt_encoder\.", error=OUTSIDE.format("prompt_encoder")
    ),
    "oft": Tuner({"oft_block_size": 4, **QV}),
    "osf": Tuner({"effective_rank": 8, **QV}),
    "p_tuning": Tuner(
        {**PROMPT, "encoder_hidden_size": 8},
        "refused",
        outside=r"prompt_encoder\.",
        error=OUTSIDE.format("prompt_encoder"),
    ),
    "peanut": Tuner({"r": 2, **QV}),
    "poly": Tuner({"r": 2, "n_skills": 2, "n_tasks": 2, **LM, **QV}),
    "prefix_tuning": Tuner(PROMPT, "refused", outside=r"prompt_encoder\.", error=OUTSIDE.format("prompt_encoder")),
    "prompt_tuning": Tuner(PROMPT, "refused", outside=r"prompt_encoder\.", error=OUTSIDE.format("prompt_encoder")),
    "psoft": Tuner({"r": 2, **QV}),
    "pvera": Tuner({"r": 4, **QV}),
    "randlora": Tuner({"r": 2, **QV}),
    "road": Tuner({"group_size": 4, **QV}),
    "shadow": Tuner(
        {**LM, "shadow_num_hidden_layers": 1},
        outside=r"\.shadow_backbone\.",
        idle=r"\.layers\.3\.shadow_update_",  # nobody reads what the last layer hands on
        probing="cannot be told from that of its base layer",
    ),
    "shira": Tuner({"r": 2, **QV}),
    "supertuning": Tuner({"sparsity": 0.9, **QV}),
    "tinylora": Tuner(
        {"r": 2, "u": 4, **QV}, "refused", shared=r"\.tinylora_v\.", error=ONE_SET.format(r"\d", "tinylora_v")
    ),
    "trainable_tokens": Tuner(
        {"token_indices": [1, 2], "target_modules": ["embed_tokens"]},
        "refused",
        outside=r"\.embed_tokens\.",
        error=OUTSIDE.format("embed_tokens"),
    ),
    "unilora": Tuner(
        {"r": 2, "theta_d_length": 16, **QV},
        "refused",
        shared="unilora_theta_d",
        error=ONE_SET.format(r"\d", "theta_d"),
    ),
    "vblora": Tuner({"r": 2, "num_vectors": 6, "vector_length": 4, **QV}, "partly", shared="vblora_vector_bank"),
    "vera": Tuner({"r": 4, **QV}),
    "waveft": Tuner({"n_frequency": 10, **QV}),
    "xlora": Tuner(
        expected="refused", outside="internal_xlora_classifier", error=OUTSIDE.format("classifier"), make=experts
    ),
}
TRAINED = [name for name, row in TUNERS.items() if row.expected != "refused"]
REFUSED = [name for name, row in TUNERS.items() if row.expected == "refused"]


def adapted(name: str, folder: Path) -> nn.Module:
    """A model in the tuner's hands, its adapters moved off their start, where many gradients are 0."""
    row = TUNERS[name]
    kinds: Any = peft.PEFT_TYPE_TO_CONFIG_MAPPING
    if name != "mixed" and name.upper() not in kinds:
        pytest.skip(f"peft {peft.__version__} has no {name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if row.make is not None:
            model = row.make(folder)
        else:
            model = peft.get_peft_model(llama(), kinds[name.upper()](**row.options))
        with torch.no_grad():
            for p in trainable(model):
                p += 0.3 * torch.randn_like(p)
    return model


class Language(Task):  # type: ignore[misc, valid-type]
    """Trains a language model by its own loss; tuners with several tasks are told which sequence is of which."""

    def __init__(self, net: nn.Module, tasks: bool = False) -> None:
        super().__init__(net)
        self.tasks = tasks

    def loss(self, batch: Tensor) -> Tensor:
        net: Any = self.net
        more = {"task_ids": torch.arange(len(batch)) % 2} if self.tasks else {}
        loss: Tensor = net(input_ids=batch, labels=batch, **more).loss
        return loss


def task_of(name: str, folder: Path) -> Any:
    return Language(adapted(name, folder), tasks="n_tasks" in TUNERS[name].options)


def matching(pattern: str, names: Any) -> set[str]:
    return {name for name in names if pattern and re.search(pattern, name)}


def in_layers(module: nn.Module) -> list[dict[str, nn.Parameter]]:
    """What trains in each decoder layer, found by name alone; what several layers hold stands in each."""
    found: list[dict[str, nn.Parameter]] = [{} for _ in range(LAYERS)]
    for name, p in module.named_parameters(remove_duplicate=False):
        place = re.search(r"model\.layers\.(\d+)\.", name)
        if place and p.requires_grad:
            found[int(place[1])][name] = p
    return found


def several(found: list[dict[str, nn.Parameter]]) -> set[int]:
    """Ids of the tensors that stand in more than one layer."""
    holders = [{id(p) for p in layer.values()} for layer in found]
    return {i for held in holders for i in held if sum(i in other for other in holders) > 1}


class Gradients(pl.Callback):
    """Notes what had a gradient other than 0 at each step."""

    def __init__(self) -> None:
        self.steps: list[set[str]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.steps.append({n for n, p in named(pl_module).items() if p.grad is not None and bool(p.grad.any())})


def rested(steps: list[Step], idle: str) -> Iterator[set[str]]:
    """Of each step what rests because it never gets a gradient, which then counts as moved."""
    for step in steps:
        resting = matching(idle, step.chosen)
        assert not resting & step.moved
        step.moved |= resting
        yield resting


def test_every_tuner_that_peft_has_stands_in_the_table() -> None:
    registered = {kind.value.lower() for kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING}
    assert not registered - set(TUNERS), "nobody has looked at these tuners: give each a row"
    folders = {module.name for module in pkgutil.iter_modules(peft.tuners.__path__) if module.ispkg}
    assert not folders - set(TUNERS), "nobody has looked at these folders of peft.tuners: give each a row"


@pytest.mark.parametrize("name", TRAINED)
def test_units_are_the_adapters_of_the_layers_and_nothing_else(name: str, tmp_path: Path) -> None:
    row, module = TUNERS[name], task_of(name, tmp_path)
    found = in_layers(module)
    common = several(found)
    assert bool(common) == (row.expected == "partly")
    assert {id(layer[name]) for layer in found for name in matching(row.shared, layer)} == common
    if common:
        with pytest.warns(UserWarning, match=rf"{row.shared}\S* is a tensor of \S*layers\.\d too, and belongs to it"):
            bound = Layers().bind(module)
    else:
        bound = Layers().bind(module)
    first: set[int] = set()
    for unit, layer in zip(bound.units, found, strict=True):
        mine = {id(p) for p in layer.values()} - first
        assert {id(p) for p in unit.params.values()} == mine
        assert mine - common, f"{unit.name} has nothing of its own"
        first |= mine
    assert set(bound.always) == matching(row.outside, [n for n, p in named(module).items() if p.requires_grad])
    assert bool(bound.always) == bool(row.outside)
    assert len(first) + len(bound.always) == len(trainable(module))


@pytest.mark.filterwarnings("ignore:.* is a tensor of .* too")
@pytest.mark.parametrize("name", TRAINED)
def test_selected_adapters_train_and_the_others_do_not_move_by_one_bit(name: str, tmp_path: Path) -> None:
    row, module = TUNERS[name], task_of(name, tmp_path)
    every = {n for n, p in named(module).items() if p.requires_grad}
    before = weights(module)
    driver = LISA(1, 1, without_replacement=True, state="offload")
    witness, gradients = Witness(driver), Gradients()
    run = fit(module, [driver, witness, gradients], steps=6)
    idle = list(rested(witness.steps, row.idle))
    assert any(idle) == bool(row.idle)
    witness.check()
    assert [step.counts for step in witness.steps] == [[1]] * 6
    assert driver.history.masks.shape == (6, LAYERS)
    assert driver.history.masks[:4].sum(0).tolist() == [1] * LAYERS  # every layer has its turn
    for step, moving, resting in zip(witness.steps, gradients.steps, idle, strict=True):
        assert moving == step.chosen - resting  # by a gradient, not by weight decay alone
        assert step.state == step.chosen - resting
    turns = {n: sum(n in step.chosen for step in witness.steps) for n in every}
    assert min(turns.values()) > 0
    assert moved(before, weights(module)) == every - matching(row.idle, every)
    optimizer, params = run.optimizers[0], named(module)
    counted = {n: int(optimizer.state[params[n]]["step"]) if params[n] in optimizer.state else 0 for n in every}
    assert counted == {n: 0 if matching(row.idle, [n]) else count for n, count in turns.items()}


@pytest.mark.filterwarnings("ignore:.* is a tensor of .* too")
@pytest.mark.parametrize("name", TRAINED)
def test_importance_of_adapters_is_probed_or_refused(name: str, tmp_path: Path) -> None:
    row, module = TUNERS[name], task_of(name, tmp_path)
    driver = IST(2, probe_interval=2)
    witness = Witness(driver)
    if row.probing:
        with pytest.raises(ValueError, match=row.probing):
            fit(module, [driver, witness], steps=4)
        return
    fit(module, [driver, witness], steps=4)
    witness.check()
    assert [step.counts for step in witness.steps] == [[2]] * 4
    assert driver.slots.score.read(driver.selection._score).abs().max() > 0, "no probe has moved the importance"


def disabled(bound: Bound) -> list[Any]:
    """Takes the adapters of all units out by PEFT's own switch."""
    found: list[Any] = [m for unit in bound.units for m in unit.module.modules() if isinstance(m, BaseTunerLayer)]
    for layer in found:
        layer.enable_adapters(False)
    return found


@pytest.mark.filterwarnings("ignore:.* is a tensor of .* too")
@pytest.mark.parametrize("name", [name for name in TRAINED if not TUNERS[name].probing])
def test_a_probe_takes_out_all_that_the_adapters_of_the_layers_do(name: str, tmp_path: Path) -> None:
    module, batch = task_of(name, tmp_path).eval(), tokens(4)
    bound = Layers().bind(module)
    with torch.no_grad():
        whole = module.loss(batch)
        with suppressed(bound, torch.ones(bound.n, dtype=torch.bool), 0.0):
            without = module.loss(batch)
        assert torch.equal(whole, module.loss(batch))
        assert disabled(bound)
        base = module.loss(batch)
    assert (whole - base).abs() > 2e-5, "the adapters do nothing here"
    torch.testing.assert_close(without, base, rtol=0.0, atol=2e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_nothing_to_select_from_is_refused_at_the_start(name: str, tmp_path: Path) -> None:
    row, module = TUNERS[name], task_of(name, tmp_path)
    before, found = weights(module), in_layers(module)
    trains = {n for n, p in named(module).items() if p.requires_grad}
    if row.outside:  # no layer holds anything that trains
        assert matching(row.outside, trains) == trains
        assert not any(found)
    else:  # every layer holds all of it
        assert matching(row.shared, trains) == trains
        assert all({id(p) for p in layer.values()} == {id(p) for p in trainable(module)} for layer in found)
    for driver in (LISA(1, 1), LISA(0.25, 1)):
        with pytest.raises(ValueError, match=row.error):
            fit(module, driver, steps=1)
    with pytest.raises(ValueError, match=row.error):
        Modules().bind(module)
    assert not moved(before, weights(module))
    assert {n for n, p in named(module).items() if p.requires_grad} == trains


def test_a_model_that_unfreezes_adapters_in_its_forward_pass_is_refused(tmp_path: Path) -> None:
    module = Language(experts(tmp_path, use_trainable_adapters=True))
    before = weights(module)
    with pytest.raises(RuntimeError, match=r"froze \S*lora_A\S* of \S*layers\.\d, yet it got a gradient"):
        fit(module, LISA(1, 1), steps=2)
    assert not moved(before, weights(module))
