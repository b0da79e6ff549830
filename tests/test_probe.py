"""Probes: what suppression does to the output of every kind of adapter, and that nothing is left behind."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from toys import Net, lora_net

from apportion.probe import BatchProbe, find_adapters, quiet, suppressed
from apportion.types import Bound, Probe, Unit

LAYERS = "base_model.model.layers"
IDS = torch.arange(10).view(2, 5) % 13


def bound_of(model: nn.Module, path: str = LAYERS) -> Bound:
    layers = model.get_submodule(path)
    return Bound(tuple(Unit(f"{path}.{i}", {}, layer, i) for i, layer in enumerate(layers.children())))


def every(bound: Bound) -> Tensor:
    return torch.ones(bound.n, dtype=torch.bool)


def loud(model: nn.Module) -> nn.Module:
    """Gives adapters values that make a clear difference, and puts the model into eval mode."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator))
    return model.eval()


def two_adapters() -> nn.Module:
    model = lora_net("lora")
    model.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=1, target_modules=["q_proj"]))  # type: ignore[operator]
    model.base_model.set_adapter(["default", "second"])  # type: ignore[union-attr, operator]
    return model


def patterns() -> nn.Module:
    config = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 3},
        alpha_pattern={"down_proj": 9},
        use_rslora=True,
    )
    return peft.get_peft_model(Net(), config)


KINDS: dict[str, Any] = {
    "lora": lambda: lora_net("lora"),
    "dora": lambda: lora_net("dora"),
    "ia3": lambda: lora_net("ia3"),
    "two adapters": two_adapters,
    "rank and alpha patterns": patterns,
    "loha": lambda: peft.get_peft_model(Net(), peft.LoHaConfig(r=2, target_modules=["q_proj", "up_proj"])),
    "adalora": lambda: peft.get_peft_model(
        Net(), peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=["q_proj", "v_proj"])
    ),
    "oft": lambda: peft.get_peft_model(Net(), peft.OFTConfig(r=2, oft_block_size=0, target_modules=["q_proj"])),
    "target parameters": lambda: peft.get_peft_model(
        Net(), peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.up_proj.weight"])
    ),
}


def tuner_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if hasattr(m, "base_layer") and hasattr(m, "disable_adapters")}


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapters_part_of_every_layer_is_scaled_whatever_the_kind(kind: str) -> None:
    model = loud(KINDS[kind]())
    x = {8: torch.randn(2, 3, 8), 16: torch.randn(2, 3, 16)}
    bound = bound_of(model)
    with torch.no_grad():
        for layer in tuner_layers(model).values():
            entered = x[layer.base_layer.in_features]  # type: ignore[union-attr, index]
            out = layer(entered)
            with model.disable_adapter():  # type: ignore[operator]
                base = layer(entered)
            assert not torch.allclose(out, base)
            with suppressed(bound, every(bound), 0.25):
                damped = layer(entered)
            assert torch.allclose(damped, base + 0.25 * (out - base), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_factor_of_zero_gives_the_base_model_and_one_gives_the_whole(kind: str) -> None:
    model = loud(KINDS[kind]())
    bound = bound_of(model)
    with torch.no_grad():
        whole = model(IDS)
        with model.disable_adapter():  # type: ignore[operator]
            base = model(IDS)
        with suppressed(bound, every(bound), 0.0):
            assert torch.allclose(model(IDS), base, atol=1e-5)
        with suppressed(bound, every(bound), 1.0):
            assert torch.allclose(model(IDS), whole, atol=1e-4)
        assert torch.equal(model(IDS), whole)


def test_only_the_selected_units_are_damped() -> None:
    model = loud(lora_net())
    bound = bound_of(model)
    mask = torch.tensor([False, True, False, True])
    seen: dict[str, Tensor] = {}
    layers = tuner_layers(model)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        whole = {name: layer(x) for name, layer in layers.items()}
        with suppressed(bound, mask, 0.5):
            seen = {name: layer(x) for name, layer in layers.items()}
    for name in layers:
        same = torch.equal(seen[name], whole[name])
        assert same == (".layers.0." in name or ".layers.2." in name)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_are_removed_and_no_scale_is_written_also_after_an_exception() -> None:
    model = lora_net()
    bound = bound_of(model)
    scales = [dict(m.scaling) for m in model.modules() if isinstance(m, LoraLayer)]
    with suppressed(bound, every(bound), 0.0):
        assert hooks(model) > 0
        model(IDS)
        assert [dict(m.scaling) for m in model.modules() if isinstance(m, LoraLayer)] == scales
    assert hooks(model) == 0
    with pytest.raises(TypeError), suppressed(bound, every(bound), 0.0):
        model("no tensor")
    assert hooks(model) == 0
    with pytest.raises(ValueError, match="no adapter"), suppressed(bound_of(Net(), "layers"), every(bound), 0.0):
        pass
    assert [dict(m.scaling) for m in model.modules() if isinstance(m, LoraLayer)] == scales


def test_an_attribute_called_scaling_does_not_make_an_adapter() -> None:
    model = Net()
    model.layers[0].self_attn.scaling = 0.5  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"layers\.0 has no adapter whose part could be damped"):
        find_adapters(bound_of(model, "layers").units[0])


def test_the_base_layer_runs_once_where_its_output_can_be_kept() -> None:
    model = lora_net("lora")
    bound = bound_of(model)
    calls: list[int] = []
    layer = next(iter(tuner_layers(model).values()))
    layer.base_layer.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr, operator]
    with suppressed(bound, every(bound), 0.5), torch.no_grad():
        layer(torch.randn(1, 8))
    assert len(calls) == 1


class Odd(nn.Module):
    """An adapter layer of another library, known by its two attributes."""

    disable_adapters = False

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.base_layer = kind, nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "scales the input":
            return self.base_layer(2.0 * x) + 1.0
        out = self.base_layer(x)
        out += 1.0  # in place: what a hook has kept is no base any more
        return out if self.kind == "writes into the result" else out.clone()


@pytest.mark.parametrize("kind", ["scales the input", "writes into the result", "writes into a copied result"])
def test_the_base_is_computed_anew_where_what_was_kept_is_none(kind: str) -> None:
    layer, x = Odd(kind), torch.randn(3, 2)
    bound = Bound((Unit("odd", {}, layer),))
    with torch.no_grad():
        base, out = layer.base_layer(x), layer(x)
        with suppressed(bound, every(bound), 0.25):
            assert torch.allclose(layer(x), base + 0.25 * (out - base), atol=1e-6)


def test_a_bottleneck_adapter_is_damped_as_a_residual_named_by_a_regex() -> None:
    model = loud(Net(adapter=True))
    bound = bound_of(model, "layers")
    adapter, x = model.layers[1].adapter, torch.randn(2, 8)  # type: ignore[union-attr, index]
    with torch.no_grad():
        out = adapter(x)
        with suppressed(bound, every(bound), 0.25, adapters=r"\.adapter$"):
            assert torch.allclose(adapter(x), x + 0.25 * (out - x), atol=1e-6)
        assert torch.equal(adapter(x), out)
    with pytest.raises(ValueError, match=r"`adapters='nothing'` matches no module"):
        find_adapters(bound.units[0], "nothing")


def test_a_delta_adapter_has_a_base_of_zero() -> None:
    model = loud(Net(adapter=True))
    bound = bound_of(model, "layers")
    up, x = model.layers[1].adapter.up, torch.randn(2, 2)  # type: ignore[union-attr, index]
    with torch.no_grad():
        out = up(x)
        with suppressed(bound, every(bound), 0.25, adapters=r"\.adapter\.up$", form="delta"):
            assert torch.allclose(up(x), 0.25 * out)


def test_an_adapter_that_returns_a_tuple_is_damped_in_its_floating_parts() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return 3.0 * x, torch.tensor(7)

    model = nn.Sequential(Pair())
    bound, x = Bound((Unit("0", {}, model[0]),)), torch.ones(2)
    with suppressed(bound, every(bound), 0.5, adapters="0"):
        out, number = model(x)
    assert out.tolist() == [2.0, 2.0]
    assert number.item() == 7


def test_merged_adapters_are_refused() -> None:
    model = lora_net()
    model.merge_adapter()  # type: ignore[operator]
    with pytest.raises(ValueError, match="merged into its weights"):
        find_adapters(bound_of(model).units[0])


def test_compiled_layers_are_damped_too() -> None:
    model = loud(lora_net())
    bound = bound_of(model)
    with torch.no_grad():
        with suppressed(bound, every(bound), 0.0):
            expected = model(IDS)
        for unit in bound.units:
            unit.module.compile(backend="eager")
        whole = model(IDS)
        with suppressed(bound, every(bound), 0.0) as calls:
            assert torch.allclose(model(IDS), expected, atol=1e-6)
        assert set(calls.values()) == {3}
        assert torch.allclose(model(IDS), whole)
        assert not torch.allclose(whole, expected)


# quiet
# -------------------------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Uses every source of state that a forward pass can leave a trace in."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("cache", torch.zeros(2))

    def train(self, mode: bool = True) -> Noisy:
        raise AssertionError("models override this: flags are to be set one by one")

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.cache = torch.rand(2)
        random.random()
        np.random.rand()
        return self.dropout(self.norm(self.linear(x)))


def trace(model: nn.Module) -> Any:
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # type: ignore[union-attr]
    )


def same(a: Any, b: Any) -> bool:
    return (
        all(torch.equal(a[0][k], b[0][k]) for k in a[0])
        and a[1:3] == b[1:3]
        and torch.equal(a[3], b[3])
        and a[4:] == b[4:]
    )


@pytest.mark.parametrize("fails", [False, True])
def test_a_quiet_forward_pass_leaves_no_trace(fails: bool) -> None:
    model = Noisy()
    model.norm.training = False  # a module that the user keeps in eval mode stays there
    model.linear.bias.requires_grad_(False)
    buffer, before = model.cache, trace(model)
    try:
        with quiet(model):
            assert not any(m.training for m in model.modules())
            assert not torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            out = model(torch.randn(4, 3))
            assert not out.requires_grad
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert same(trace(model), before)
    assert model.cache is buffer
    assert torch.is_grad_enabled()


def test_the_trace_itself_sees_a_loud_forward_pass() -> None:
    model = Noisy()
    before = trace(model)
    model(torch.randn(4, 3))
    after = trace(model)
    assert not torch.equal(after[0]["calls"], before[0]["calls"])
    assert not torch.equal(after[0]["norm.running_mean"], before[0]["norm.running_mean"])
    assert not torch.equal(after[3], before[3])
    assert after[4] != before[4]
    assert after[5] != before[5] or np.random.get_state()[2] > 0  # type: ignore[misc]


def test_gradients_of_the_step_in_hand_survive_a_probe() -> None:
    model = Net()
    model.loss(IDS).backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    probe = BatchProbe(model.loss, [IDS], model)
    probe.loss()
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(before) == len(after) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# BatchProbe
# --------------------------------------------------------------------------------------------------------------


def test_losses_between_two_refreshes_are_of_the_same_batch_without_dropout() -> None:
    model = Net(dropout=0.5)
    batches = [torch.randint(0, 13, (2, 6), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    probe = BatchProbe(model.loss, batches, model)
    first = probe.loss()
    assert probe.loss() == first
    probe.refresh()
    second = probe.loss()
    assert second != first
    probe.refresh()  # the data is gone through again
    assert probe.loss() == first
    model.eval()
    with torch.no_grad():
        assert [first, second] == [float(model.loss(batch)) for batch in batches]


def test_refreshing_leaves_the_global_random_numbers_alone() -> None:
    loader = torch.utils.data.DataLoader(list(range(9)), batch_size=2, shuffle=True)
    probe = BatchProbe(lambda batch: batch.float().mean(), loader, nn.Identity())
    state = torch.get_rng_state()
    probe.refresh()
    probe.loss()
    assert torch.equal(torch.get_rng_state(), state)


def test_losses_are_averaged_over_ranks_in_double_precision() -> None:
    seen: list[torch.dtype] = []

    def mean(value: Tensor) -> Tensor:
        seen.append(value.dtype)
        return value + 1.0

    probe: Probe = BatchProbe(lambda batch: torch.tensor(2.0, dtype=torch.bfloat16), lambda: None, nn.Identity(), mean)
    assert probe.loss() == 3.0
    assert seen == [torch.float64]


def test_what_is_no_source_of_batches_or_no_loss_is_refused() -> None:
    with pytest.raises(TypeError, match="function that returns a batch, or an iterable"):
        BatchProbe(lambda batch: 0.0, 3, nn.Identity())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no batch left"):
        BatchProbe(lambda batch: 0.0, [], nn.Identity()).loss()
    with pytest.raises(ValueError, match=r"shape \(2,\): return one number"):
        BatchProbe(lambda batch: torch.zeros(2), [1], nn.Identity()).loss()
