"""torch.compile: layer by layer it stays at a few graphs; as a whole with a changing set it is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from toys import Net, Task, adamw, fit, moved, weights
from witness import Witness

from apportion.callbacks import HFT, LISA
from apportion.optim import Selective


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No graphs of other tests."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


class Unlogged(Task):  # type: ignore[misc, valid-type]
    """A training step that can be compiled: Lightning's ``log`` cannot."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)


class Counted(Witness):
    """Notes the number of graphs after every step."""

    def __init__(self, *drivers: Any) -> None:
        super().__init__(*drivers)
        self.graphs: list[int] = []

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        self.graphs.append(graphs())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_layers_need_no_more_graphs_after_the_warm_up(in_place: bool, backend: str) -> None:
    task = Task(Net(blocks=6, dropout=0.0))
    for i, layer in enumerate(task.net.layers):
        if in_place:
            layer.compile(backend=backend)
        else:
            task.net.layers[i] = torch.compile(layer, backend=backend)
    driver = LISA(1, 1, train_embeddings=False, without_replacement=True)
    witness = Counted(driver)
    fit(task, [driver, witness], steps=24)
    witness.check()
    assert len({frozenset(step.chosen) for step in witness.steps}) == 6  # every layer had its turn
    assert 0 < witness.graphs[11] <= 4  # does the input need a gradient, does the layer
    assert witness.graphs[-1] == witness.graphs[11]


def test_compiled_layers_give_the_weights_of_uncompiled_ones() -> None:
    plain, compiled = Task(Net(dropout=0.0)), Task(Net(dropout=0.0))
    for layer in compiled.net.layers:
        layer.compile(backend="eager")
    fit(plain, LISA(1, 1), steps=10)
    fit(compiled, LISA(1, 1), steps=10)
    assert not moved(weights(plain), weights(compiled))


def whole(how: str) -> Any:
    task = Unlogged(Net(dropout=0.0))
    if how == "torch.compile(module)":
        return torch.compile(task, backend="eager")
    if how == "attribute":
        task.net = torch.compile(task.net, backend="eager")
    if how == "module.compile()":
        task.net.compile(backend="eager")
    return task


@pytest.mark.parametrize("how", ["torch.compile(module)", "attribute", "module.compile()"])
def test_a_compiled_model_with_a_changing_set_is_refused_with_advice(how: str) -> None:
    with pytest.raises(ValueError, match=r"holds 4 units of `LISA`.*`for layer in layers: layer\.compile\(\)`"):
        fit(whole(how), LISA(1, 1))


@pytest.mark.parametrize("how", ["torch.compile(module)", "attribute", "module.compile()"])
def test_a_compiled_model_with_a_set_that_stays_is_allowed(how: str) -> None:
    task, plain = whole(how), Task(Net(dropout=0.0))
    fit(task, HFT(), steps=4)
    fit(plain, HFT(), steps=4)
    assert not moved(weights(plain), weights(task))
    assert graphs() > 0


def test_a_compiled_layer_with_a_changing_set_of_its_matrices_is_refused() -> None:
    task = Task(Net(dropout=0.0))
    for layer in task.net.layers:
        layer.compile(backend="eager")
    with pytest.raises(ValueError, match=r"holds 8 units of `HFT`"):
        fit(task, HFT(redraw="epoch"))


def test_a_compiled_model_is_refused_without_lightning_too() -> None:
    net = torch.compile(Net(), backend="eager")
    with pytest.raises(ValueError, match="holds 4 units of `LISA`"):
        Selective(adamw(net.parameters()), net, LISA(1, 1))
