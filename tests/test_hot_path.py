"""On a step that selects nothing, our code makes the host wait for the device nowhere.

There is no device here, so what would wait is told by what is called: operators whose result, or whose shape, is
decided by values, and methods that hand values to Python or take them from it. What an optimizer of torch does by
itself is its own business.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import apportion
from apportion.callbacks import ID3, IST, LIFT, LISA, AdaLoRA, BAdam, Random
from apportion.compact import Gathered
from apportion.optim import Selective

# As the interpreter names our files: an editable install may link to where they lie.
OURS = str(Path(apportion.checks.__file__).parent)
# Masks of units, sizes and counts are the host's own: choices of units are made on it.
HOST = ("selection.py", "entry_selection.py", "rank_selection.py", "rules.py", "race.py", "types.py")
WAITING = {
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.nonzero_static",
    "aten.is_nonzero",
    "aten.equal",
    "aten.masked_select",
    "aten._unique2",
    "aten.unique_consecutive",
    "aten.unique_dim",
    "aten.bincount",
}
HANDING = {"tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__"}
TAKING = {"new_tensor", "tensor", "as_tensor"}


def caller() -> str | None:
    """The line of ours that called torch; None if nobody of ours did, or only through an optimizer of torch."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if path.startswith(OURS):
            return None if Path(path).name in HOST else f"{Path(path).name}:{frame.f_lineno}"
        inside = "/torch/" in path and "/torch/optim/" not in path
        if not inside and not (path == __file__ and name in ("caller", "__torch_dispatch__", "__torch_function__")):
            return None
        frame = frame.f_back
    return None


class Operators(TorchDispatchMode):
    """Notes operators that wait."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func.overloadpacket)
        counted = name == "aten.repeat_interleave" and kwargs.get("output_size") is None
        masked = name in ("aten.index", "aten.index_put", "aten.index_put_") and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]
        )
        if name in WAITING or counted or masked:
            where = caller()
            if where is not None:
                self.seen.append(f"{name} at {where}")
        return func(*args, **kwargs)


class Methods(TorchFunctionMode):
    """Notes methods that hand values to Python."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in TAKING or (name in HANDING and args and isinstance(args[0], Tensor)):
            where = caller()
            if where is not None:
                self.seen.append(f"{name} at {where}")
        return func(*args, **(kwargs or {}))


class Layer(nn.Module):
    """A residual block of two matrices."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def model(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(layers=nn.Sequential(*[Layer(16) for _ in range(4)]))).to(dtype)


def adapted() -> Any:
    return get_peft_model(model(), LoraConfig(r=6, target_modules=["up", "down"]))


def ranked() -> Any:
    return get_peft_model(model(), AdaLoraConfig(init_r=6, target_r=3, total_step=100, target_modules=["up", "down"]))


def bf16() -> Any:
    return model(torch.bfloat16)


EVERY = 4
# The model, the method, and the steps that have to do with a selection: that make it, for themselves or for the next
# step, or are the first with it, which lays entries out and looks whether gradients arrive.
AROUND = {0, 3, 4, 7, 8, 11}
METHODS: dict[str, tuple[Callable[[], Any], Callable[[], Any], set[int]]] = {
    "LISA": (model, lambda: LISA(2, interval=EVERY), AROUND),
    "LISA, offloaded": (model, lambda: LISA(2, interval=EVERY, state="offload"), AROUND),
    "LISA, masters": (bf16, lambda: LISA(2, interval=EVERY, master="fp32"), AROUND),
    "BAdam": (bf16, lambda: BAdam(interval=EVERY), AROUND),
    "IST": (adapted, lambda: IST(active=0.5, every=EVERY, probe_interval=EVERY), AROUND),
    "Random": (model, lambda: Random(0.1, train_head=False), {0}),
    "Random, bf16": (bf16, lambda: Random(0.1, train_head=False), {0}),
    "ID3": (model, lambda: ID3(0.1, max_steps=2, train_head=False), {0, 1, 2}),
    "LIFT": (model, lambda: LIFT(amount=0.1, lra_rank=4, interval=EVERY), AROUND),
    "LIFT, by entry": (bf16, lambda: LIFT(amount=0.1, lra_rank=4, interval=EVERY, age="entry"), AROUND),
    "AdaLoRA": (ranked, lambda: AdaLoRA(target=0.5, warmup=2, final=2, every=EVERY), {0, 3, 4, 7, 8, 9, 10}),
}


def waits(name: str, steps: int = 12) -> dict[int, list[str]]:
    """Of each step: what waited in it."""
    build, make, _ = METHODS[name]
    net = build()
    kind = next(net.parameters()).dtype
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1)).to(kind)
    base = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    probe = (lambda: net(x).square().mean()) if name == "IST" else None
    optimizer = Selective(base, net, make(), probe=probe, total_steps=steps)
    found: dict[int, list[str]] = {}
    for step in range(steps):
        seen: list[str] = []
        with Methods(seen), Operators(seen):
            net(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found[step] = seen
    return found


@pytest.mark.parametrize("name", METHODS)
def test_a_step_that_selects_nothing_waits_for_nothing(name: str) -> None:
    found = waits(name)
    selecting = METHODS[name][2]
    assert not {step: seen for step, seen in found.items() if seen and step not in selecting}
    assert len(selecting) < len(found)


def test_what_waits_is_seen() -> None:
    assert any(where.startswith("aten.nonzero at topk.py") for where in waits("ID3", 2)[0])
    assert any(where.startswith("tolist at tiled.py") for where in waits("Random", 1)[0])


@pytest.mark.parametrize(
    ("waiting", "where"),
    [
        (lambda leaf: leaf.detach().sum().item(), "_local_scalar_dense"),
        (lambda leaf: bool((leaf.detach() > 0).any()), "__bool__"),
        (lambda leaf: leaf.detach()[leaf.detach() > 0], "aten.index"),
        (lambda leaf: leaf.detach().tolist(), "tolist"),
        (lambda leaf: leaf.detach().cpu(), "cpu"),
        (lambda leaf: leaf.new_tensor([1.0]), "new_tensor"),
    ],
)
def test_a_wait_in_a_store_of_entries_is_caught(
    waiting: Callable[[Tensor], Any], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Gathered.write_through

    def write_through(self: Gathered, p: nn.Parameter) -> None:
        before(self, p)
        code = compile("waiting(leaf)", str(Path(OURS, "compact.py")), "exec")  # as if it stood there
        exec(code, {"waiting": recompiled, "leaf": self.leaf})

    recompiled = FunctionType(waiting.__code__.replace(co_filename=str(Path(OURS, "compact.py"))), waiting.__globals__)
    monkeypatch.setattr(Gathered, "write_through", write_through)
    assert any(where in seen for seen in waits("Random", 3)[2])


@pytest.mark.parametrize("name", ["LISA", "LIFT", "AdaLoRA"])
def test_the_callback_waits_for_nothing_between_selections(name: str) -> None:
    build, make, selecting = METHODS[name]

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = build()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.model(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    class Watched(pl.Callback):
        def __init__(self) -> None:
            self.found: list[list[str]] = []

        def on_train_batch_start(self, *_: Any) -> None:
            self.found.append([])
            self.modes = (Methods(self.found[-1]), Operators(self.found[-1]))
            for mode in self.modes:
                mode.__enter__()

    class Ended(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            for mode in reversed(watched.modes):
                mode.__exit__(None, None, None)

    watched = Watched()
    trainer = pl.Trainer(
        max_steps=12,
        callbacks=[watched, make(), Ended()],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader(torch.randn(48, 16), batch_size=4))
    assert any(watched.found[step] for step in selecting)
    assert not {step: seen for step, seen in enumerate(watched.found) if seen and step not in selecting}
