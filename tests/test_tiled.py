"""Gradients of selected entries by tiles and by dot products: what a hook would take out of the whole gradient."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from narrow import drawn, listed, snapshot
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from apportion import sampled, tiled
from apportion.budgets import Increment
from apportion.calibrate import gather
from apportion.candidates import Calibration
from apportion.driver import SelectiveTuning
from apportion.effects import Compact, Hold
from apportion.entry_units import Entries
from apportion.entrywise import D3
from apportion.memory import Tracker
from apportion.optim import Selective
from apportion.rules import TopK
from apportion.sampled import Dots
from apportion.tiled import SparseForward, Tiles, layer_of, layout

LINEAR = Entries(bias="unit")


class Net(nn.Module):
    """Linear layers over the last of several dimensions: one used twice, one without bias, one fed a transposed input.

    Nothing leads to the first layer: its input needs no gradient.
    """

    def __init__(self, checkpointing: str | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.first, self.twice = nn.Linear(5, 8), nn.Linear(8, 8)
            self.turned, self.last = nn.Linear(4, 8, bias=False), nn.Linear(8, 3)
        self.checkpointing = checkpointing

    def block(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return x + self.turned(x.transpose(1, 2)).transpose(1, 2)[..., :4, :].repeat(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.checkpointing is None:
            x = self.block(x)
        else:
            x = checkpoint(self.block, x, use_reentrant=self.checkpointing == "reentrant")
        return self.last(x)


def batches(n: int) -> list[Tensor]:
    """Batches of (3, 4, 5)."""
    return list(torch.randn(n, 3, 4, 5, generator=torch.Generator().manual_seed(9)))


def growing(net: nn.Module, steps: int) -> list[dict[str, Tensor]]:
    """Masks that grow at every second step, from nothing on."""
    noise = {name: mask.float() for name, mask in drawn(net, 1.0).items()}
    for name, p in net.named_parameters():
        noise[name] = torch.rand(p.shape, generator=torch.Generator().manual_seed(len(name)))
    return [{name: z < 0.15 * (step // 2) for name, z in noise.items()} for step in range(steps)]


def trained(
    effect: Any,
    steps: int = 8,
    accumulate: int = 1,
    checkpointing: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[dict[str, Tensor]]:
    """The parameters after every step."""
    net = Net(checkpointing).to(dtype)
    base = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    optimizer = Selective(base, net, listed(growing(net, steps), effect, LINEAR), micro_batches=accumulate)
    after = []
    data = iter(batches(steps * accumulate))
    for _ in range(steps):
        for _ in range(accumulate):
            (net(next(data).to(dtype)).square().mean() / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
        after.append(snapshot(net))
    optimizer.close()
    return after


def one_layer(effect: Any = None, shape: tuple[int, int] = (6, 4), count: int = 5) -> tuple[nn.Linear, Selective]:
    """A linear layer of which the first ``count`` entries are selected."""
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0])
    mask = torch.arange(layer.weight.numel()).view(layer.weight.shape) < count
    base = torch.optim.SGD(layer.parameters(), lr=0.1)
    units = Entries(bias="freeze")
    return layer, Selective(base, layer, listed([{"weight": mask}], effect or Compact(capture="tiled"), units))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of two rows of eight."""
    monkeypatch.setattr(tiled, "TILE", 16)


# The product by tiles -------------------------------------------------------------------------------------------------


@given(st.data())
def test_tiles_and_dots_give_the_entries_of_the_product(data: st.DataObject) -> None:
    height, width, n = (data.draw(st.integers(1, top)) for top in (9, 7, 4))
    seed, size = data.draw(st.integers(0, 2**16)), data.draw(st.integers(1, height * width + 3))
    generator = torch.Generator().manual_seed(seed)
    share = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    mask = torch.rand(height, width, generator=generator) < share
    if data.draw(st.booleans()):  # whole rows
        mask[:] = mask[:, :1]
    index = mask.flatten().nonzero().flatten().to(data.draw(st.sampled_from([torch.int32, torch.int64])))
    gy = torch.randint(-9, 9, (n, height), generator=generator).float()
    x = torch.randint(-9, 9, (n, width), generator=generator).float()
    tiles = Tiles.of(index, (height, width), size)
    assert sampled.possible(index, x.dtype)
    expected = (gy.t() @ x).flatten()[index.long()]
    assert torch.equal(tiles.take(gy, x), expected)
    assert torch.equal(Dots.of(index, (height, width)).take(gy, x), expected)
    assert all((stop - start) * width <= max(size, width) for start, stop, _, _ in tiles.cuts)
    assert [last for *_, last in tiles.cuts[:-1]] == [first for *_, first, _ in tiles.cuts[1:]]


def test_dots_add_up_over_chunks_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled, "CHUNK", 3)
    index = torch.tensor([0, 3, 4, 11], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    gy, x = (torch.randint(-9, 9, (8, n), generator=generator).double() for n in (4, 3))
    assert torch.equal(Dots.of(index, (4, 3)).take(gy, x), (gy.t() @ x).flatten()[index.long()])


def test_dots_are_for_the_cpu_and_full_precision() -> None:
    index = torch.arange(3)
    assert sampled.possible(index, torch.float32)
    assert sampled.possible(index, torch.float64)
    assert not sampled.possible(index, torch.bfloat16)
    assert not sampled.possible(index.to("meta"), torch.float32)
    with FakeTensorMode():
        assert not sampled.possible(torch.arange(3), torch.float32)


def test_a_torch_that_cannot_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("no MKL")

    sampled._works.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch.sparse, "sampled_addmm", broken)
        assert not sampled.possible(torch.arange(3), torch.float32)
        assert layout("sampled", torch.arange(3), (4, 4), torch.float32) is None
    sampled._works.cache_clear()
    assert sampled.possible(torch.arange(3), torch.float32)


def test_rows_without_a_selected_entry_are_not_computed() -> None:
    rows = Tiles.of(torch.tensor([3, 4, 5, 21]), (8, 3), size=6)
    assert rows.rows is not None
    assert rows.rows.tolist() == [1, 7]
    assert rows.cuts == ((0, 2, 0, 4),)
    skipped = Tiles.of(torch.arange(24)[(torch.arange(24) < 15) | (torch.arange(24) > 20)], (8, 3), size=3)
    assert skipped.rows is None
    assert [start for start, *_ in skipped.cuts] == [0, 1, 2, 3, 4, 7]


def test_without_values_entries_are_spread_evenly() -> None:
    with FakeTensorMode():
        tiles = Tiles.of(torch.empty(12, dtype=torch.int32), (8, 3), size=6)
        assert tiles.cuts == ((0, 2, 0, 3), (2, 4, 3, 6), (4, 6, 6, 9), (6, 8, 9, 12))
        assert tiles.take(torch.empty(5, 8), torch.empty(5, 3)).shape == (12,)


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("capture", ["tiled", "sampled"])
def test_training_is_that_of_the_twin_and_of_the_hook(capture: str, accumulate: int, checkpointing: str | None) -> None:
    options: dict[str, Any] = {"accumulate": accumulate, "checkpointing": checkpointing, "dtype": torch.float64}
    ours = trained(Compact(capture=capture), **options)
    for other in (trained(Hold(), **options), trained(Compact(capture="hook"), **options)):
        for now, then in zip(ours, other, strict=True):
            for name in now:
                assert torch.allclose(now[name], then[name], rtol=1e-9, atol=1e-12), name
    assert not torch.equal(ours[-1]["twice.weight"], ours[0]["twice.weight"])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision_are_those_of_the_hook(dtype: torch.dtype, mixed: bool) -> None:
    found: dict[str, tuple[Tensor, ...]] = {}
    for capture in ("hook", "tiled"):
        layer, optimizer = one_layer(Compact(capture=capture), (9, 4), count=30)
        x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
        leaf = optimizer.owner.leaf(layer.weight)
        if not mixed:
            layer.to(dtype)
            x = x.to(dtype)
        with torch.autocast("cpu", dtype, enabled=mixed):
            out = layer(x.requires_grad_())
            loss = out.square().sum() + layer(2 * x).sum()
        if capture == "tiled":  # no copy of the input in full precision is kept
            assert [t.dtype for t in out.grad_fn.saved_tensors] == [dtype, layer.weight.dtype]
        loss.backward()
        assert out.dtype == dtype
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32
        assert x.grad is not None
        found[capture] = (leaf.grad, x.grad, out.detach())
    for by_tiles, hook in zip(found["tiled"], found["hook"], strict=True):
        # Both uses are added up in fp32, where the hook gets their sum in half precision.
        assert torch.allclose(by_tiles, hook, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


def test_a_single_use_in_half_precision_gives_the_same_bits() -> None:
    found = {}
    for capture in ("hook", "tiled"):
        layer, optimizer = one_layer(Compact(capture=capture), (9, 4), count=30)
        with torch.autocast("cpu", torch.bfloat16):
            loss = layer(torch.linspace(-1.0, 1.0, 24).view(6, 4)).square().sum()
        loss.backward()
        found[capture] = optimizer.owner.leaf(layer.weight).grad
    assert torch.equal(found["tiled"], found["hook"])  # type: ignore[arg-type]


def test_autocast_leaves_double_precision_alone() -> None:
    layer, optimizer = one_layer()
    layer.double()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(torch.ones(2, 4, dtype=torch.float64))
    assert out.dtype == torch.float64
    out.sum().backward()
    assert torch.equal(optimizer.owner.leaf(layer.weight).grad, torch.full((5,), 2.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 3, 4), (2, 1, 3, 4), (0, 4)])
@pytest.mark.parametrize("capture", ["tiled", "sampled"])
def test_any_shape_of_input(capture: str, shape: tuple[int, ...]) -> None:
    for stride in (1, 2):
        layer, optimizer = one_layer(Compact(capture=capture))
        twin = copy.deepcopy(layer)
        values = torch.randn((*shape[:-1], stride * shape[-1]), generator=torch.Generator().manual_seed(1))
        ours, theirs = (values.clone().requires_grad_() for _ in range(2))
        one, two = ours[..., ::stride], theirs[..., ::stride]
        out, expected = layer(one), twin(two)
        assert torch.equal(out, expected)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        (out * weights).sum().backward()
        (expected * weights).sum().backward()
        leaf = optimizer.owner.leaf(layer.weight)
        assert layer.weight.grad is None
        assert torch.allclose(leaf.grad, twin.weight.grad.flatten()[:5], rtol=1e-6)  # type: ignore[union-attr,arg-type]
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-6)  # type: ignore[arg-type]


def test_the_bias_trains_beside_it() -> None:
    layer = nn.Linear(4, 6)
    base = torch.optim.SGD(layer.parameters(), lr=0.1)
    mask = torch.ones(6, 4, dtype=torch.bool)
    units = Entries(bias="train")
    optimizer = Selective(base, layer, listed([{"weight": mask}], Compact(capture="tiled"), units))
    twin = nn.Linear(4, 6)
    twin.load_state_dict(layer.state_dict())
    for module in (layer, twin):
        module(torch.arange(8.0).view(2, 4)).square().sum().backward()
    assert torch.equal(layer.bias.grad, twin.bias.grad)  # type: ignore[arg-type]
    assert optimizer.owner.leaf(layer.weight).grad.shape == (24,)  # type: ignore[union-attr]


def test_the_whole_gradient_never_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "TILE", 2**12)
    peaks = {}
    for capture in ("hook", "tiled"):
        layer, optimizer = one_layer(Compact(capture=capture), (256, 128), count=1000)
        with Tracker(layer, optimizer) as tracker:
            for _ in range(2):
                layer(torch.ones(2, 128)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        peaks[capture] = tracker.highest.temporaries
    dense = 4 * 256 * 128
    assert peaks["hook"] >= dense
    assert peaks["tiled"] <= 4 * 2**12 + 40_000 < dense


def test_a_loss_that_is_still_alive_does_not_keep_the_old_size() -> None:
    net = Net()
    masks = growing(net, 6)
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = Selective(base, net, listed(masks, Compact(capture="tiled"), LINEAR))
    alive = []
    for x in batches(6):
        alive.append(net(x).square().mean())
        alive[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(optimizer.owner.narrow(net.twice.weight).index) == int(masks[-1]["twice.weight"].sum()) > 0


def test_nothing_selected_still_leads_through() -> None:
    layer, optimizer = one_layer(count=0)
    before = snapshot(layer)
    layer(torch.ones(2, 4)).sum().backward()
    assert optimizer.owner.leaf(layer.weight).grad.shape == (0,)  # type: ignore[union-attr]
    optimizer.step()
    assert all(torch.equal(before[name], p) for name, p in layer.named_parameters())


def test_without_gradients_it_is_the_layer_itself() -> None:
    layer, _ = one_layer()
    x = torch.randn(3, 4)
    with torch.no_grad():
        out = layer(x)
    assert not out.requires_grad
    assert torch.equal(out, F.linear(x, layer.weight, layer.bias))
    assert torch.equal(layer.eval()(x), out)


# Who else wants the gradient ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_a_selection_by_gradients_sees_them_whole() -> None:
    def growth(capture: str) -> tuple[Any, dict[str, Tensor]]:
        net = Net()
        base = torch.optim.AdamW(net.parameters(), lr=1e-2)
        method = SelectiveTuning(Entries(), D3(), Increment(60), TopK(grow=True), Compact(capture=capture))
        optimizer = Selective(base, net, method, micro_batches=2, total_steps=6)
        for i, x in enumerate(batches(12)):
            net(x).square().mean().backward()
            if i % 2:
                optimizer.step()
                optimizer.zero_grad()
        return optimizer.selection.history.counts, snapshot(net)

    (counts, by_tiles), (expected, hook) = growth("tiled"), growth("hook")
    assert torch.equal(counts, expected)
    assert all(torch.allclose(by_tiles[name], hook[name], rtol=1e-6, atol=1e-8) for name in hook)


def test_a_calibration_in_the_middle_of_training_sees_them_whole() -> None:
    layer, _ = one_layer()
    found = gather(
        layer, lambda x: layer(x).square().mean(), [torch.ones(2, 4)], {"weight": layer.weight},
        lambda grad, weight: grad, Calibration(1, per="batch"),
    )  # fmt: skip
    twin = nn.Linear(4, 6)
    twin.load_state_dict(layer.state_dict())
    twin(torch.ones(2, 4)).square().mean().backward()
    assert torch.equal(found["weight"], twin.weight.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_of_someone_else_sees_it_whole(hook: str) -> None:
    layer, optimizer = one_layer()
    seen: list[Any] = []
    getattr(layer.weight, hook)(lambda value: seen.append(value.shape))
    layer(torch.ones(2, 4)).sum().backward()
    assert seen == [(6, 4)]
    assert torch.equal(optimizer.owner.leaf(layer.weight).grad, torch.full((5,), 2.0))  # type: ignore[arg-type]


def test_a_weight_that_is_used_elsewhere_gets_all_of_its_gradient() -> None:
    layer, optimizer = one_layer()
    x = torch.ones(2, 4)
    (layer(x).sum() + 3 * F.linear(x, layer.weight).sum()).backward()
    assert torch.equal(optimizer.owner.leaf(layer.weight).grad, torch.full((5,), 8.0))  # type: ignore[arg-type]
    assert layer.weight.grad is None


def test_an_exchanged_weight_is_no_concern_of_it() -> None:
    layer, optimizer = one_layer()
    other = {"weight": torch.zeros(6, 4, requires_grad=True)}
    torch.func.functional_call(layer, other, torch.ones(2, 4)).sum().backward()
    assert other["weight"].grad is not None
    assert optimizer.owner.leaf(layer.weight).grad is None
    rows = torch.func.vmap(torch.func.grad(lambda x: layer(x).sum()))(torch.ones(3, 4))
    assert torch.allclose(rows, layer.weight.sum(0).expand(3, 4))


def test_a_weight_that_another_selection_holds_frozen_gets_none() -> None:
    layer, optimizer = one_layer()
    leaf = optimizer.owner.leaf(layer.weight)
    optimizer.owner.claim("other", {"weight": layer.weight}, "drop", None)
    optimizer.owner.select("other", [])
    out = layer(torch.ones(2, 4, requires_grad=True))
    out.sum().backward()
    assert leaf.grad is None
    optimizer.owner.select("other", [layer.weight])
    layer(torch.ones(2, 4)).sum().backward()
    assert leaf.grad is not None


def test_a_gradient_of_the_gradient_is_refused_with_advice() -> None:
    layer, _ = one_layer()
    x = torch.ones(2, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"`create_graph=True`.*`Compact\(capture='hook'\)`"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)


def test_a_forward_pass_that_came_too_early_is_refused_with_advice() -> None:
    layer, optimizer = one_layer()
    loss = layer(torch.ones(2, 4)).sum()
    optimizer.owner.narrow(layer.weight).watch = lambda p: True
    with pytest.raises(RuntimeError, match="run forward after `step`"):
        loss.backward()


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_it_is_the_layer_itself(whole: bool) -> None:
    layer, optimizer = one_layer()
    net = nn.Sequential(layer)
    if whole:
        run: Any = torch.compile(net, backend="eager", fullgraph=True)
    else:
        layer.compile(backend="eager", fullgraph=True)
        run = net
    run(torch.ones(2, 4)).sum().backward()
    assert torch.equal(optimizer.owner.leaf(layer.weight).grad, torch.full((5,), 2.0))  # type: ignore[arg-type]


def test_a_graph_that_is_compiled_knows_no_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = one_layer()
    assert layer(torch.ones(2, 4)).grad_fn.name() == "_LinearBackward"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert layer(torch.ones(2, 4)).grad_fn.name() == "AddmmBackward0"


# On the layer ---------------------------------------------------------------------------------------------------------


def test_copies_have_the_forward_pass_of_their_class() -> None:
    layer, optimizer = one_layer()
    net = nn.Sequential(layer)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), copy.deepcopy(layer), copy.copy(net)):
        assert torch.equal(twin(torch.ones(2, 4)), layer(torch.ones(2, 4)))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    twin[0].weight.data.zero_()
    twin(torch.ones(2, 4)).sum().backward()
    assert twin[0].weight.grad.shape == (6, 4)
    assert torch.equal(twin(torch.ones(2, 4)), layer.bias.expand(2, 6))
    assert optimizer.owner.leaf(layer.weight).grad is None


def test_closing_gives_the_layer_back() -> None:
    layer, optimizer = one_layer()
    assert isinstance(layer.forward, SparseForward)
    optimizer.close()
    assert "forward" not in vars(layer)
    layer(torch.ones(2, 4)).sum().backward()
    assert layer.weight.grad is not None
    layer, optimizer = one_layer()
    theirs = layer.forward = lambda x: x  # type: ignore[assignment,misc]
    optimizer.close()
    assert layer.forward is theirs


def test_only_plain_layers_are_taken() -> None:
    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1.0

    plain, own = nn.Linear(2, 2), Own(2, 2)
    assert layer_of("auto", plain, plain.weight) is plain
    assert layer_of("tiled", plain, plain.weight) is plain
    assert layer_of("hook", plain, plain.weight) is None
    assert layer_of("tiled", plain, plain.bias) is None
    assert layer_of("tiled", own, own.weight) is None
    plain.forward = own.forward  # type: ignore[method-assign]
    assert layer_of("tiled", plain, plain.weight) is None
    norm = nn.LayerNorm(2)
    assert layer_of("tiled", norm, norm.weight) is None


def test_what_costs_least_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "TILE", 32)
    monkeypatch.setattr(sampled, "LEAST", 48)

    def kind(height: int, width: int, index: Tensor, dtype: torch.dtype = torch.float32, capture: str = "auto") -> str:
        return type(layout(capture, index, (height, width), dtype)).__name__

    spread = torch.arange(0, 64, 9)
    assert kind(8, 8, spread) == "Dots"
    assert kind(8, 8, torch.arange(0, 64, 7)) == "Tiles"  # too many
    assert kind(8, 8, spread, torch.bfloat16) == "Tiles"
    assert kind(7, 8, torch.arange(0, 56, 2)) == "NoneType"  # fits into two tiles
    assert kind(5, 8, torch.arange(0, 40, 9)) == "NoneType"
    assert kind(8, 8, torch.arange(8)) == "Tiles"  # a row
    assert kind(5, 8, torch.arange(8)) == "Tiles"
    assert kind(8, 8, torch.tensor([1, 60])) == "Dots"  # two entries of two rows
    assert kind(8, 8, spread[:0]) == "Tiles"
    assert [kind(8, 8, spread, capture=c) for c in ("tiled", "sampled")] == ["Tiles", "Dots"]
    assert kind(8, 8, spread, torch.float16, "sampled") == "NoneType"
    assert kind(2, 2, spread[:1], capture="sampled") == "Dots"


@pytest.mark.parametrize(("count", "name"), [(24, "AddmmBackward0"), (8, "_LinearBackward")])
def test_small_matrices_are_left_to_the_hook_unless_few_rows_are_selected(count: int, name: str) -> None:
    layer, optimizer = one_layer(Compact(), (3, 8), count)
    out = layer(torch.ones(1, 8))
    assert out.grad_fn.name() == name
    out.sum().backward()
    assert torch.equal(optimizer.owner.leaf(layer.weight).grad, torch.ones(count))  # type: ignore[arg-type]


def test_the_precision_of_the_gradient_decides() -> None:
    layer, _ = one_layer(Compact(capture="sampled"))
    x = torch.ones(2, 4)
    assert layer(x).grad_fn.name() == "_LinearBackward"
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).grad_fn.name() == "AddmmBackward0"
    assert layer(x).grad_fn.name() == "_LinearBackward"


def test_unknown_captures_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`Compact\(capture='dense'\)` must be 'auto', 'hook', 'tiled', 'sampled'\."):
        Compact(capture="dense")
