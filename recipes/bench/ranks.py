"""What rank budgets cost beside PEFT's own, and what is left of an adapter's memory when its ranks are chosen.

    python -m apportion.recipes.bench.ranks        writes results/ranks.json

Time: 96 matrices of a model of 50 million parameters, the forward pass left out. PEFT's share of a step is
`update_and_allocate`, and its penalty with the backward pass of it; ours is all that a selection of ranks does around a
step. Both work on equal gradients, one after the other, in turns; the ratio is the median over pairs.

Memory: bytes of adapter parameters, gradients and optimizer state after the final choice, against LoRA adapters that
were built with those ranks.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from rich.console import Console
from torch import Tensor, nn

from apportion.callbacks import AdaLoRA
from apportion.kinds import stage_of
from apportion.optim import Selective
from apportion.owner import Owner
from apportion.recipes.bench.arguments import parser, write

BAR, MEMORY_BAR = 0.30, 0.02
BARRED = 12  # the rank that the bar is for; at 32 matrix products are most of it, of which the penalty has two of three
TOTAL = 10**6  # steps of the schedule: the measured ones all lie where the budget falls
WARM_UP = 5


class Block(nn.Module):
    """The six matrices of a transformer layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o"):
            self.add_module(name, nn.Linear(width, width, bias=False))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)


def adapted(rank: int, every: int, width: int = 512, blocks: int = 16) -> Any:
    """The model with AdaLoRA adapters on every matrix, with gradients on all of them."""
    torch.manual_seed(0)
    model = nn.Sequential(*[Block(width) for _ in range(blocks)])
    config = AdaLoraConfig(
        init_r=rank,
        target_r=rank // 3,
        total_step=TOTAL,
        deltaT=every,
        orth_reg_weight=0.1,
        target_modules=["q", "k", "v", "o", "up", "down"],
    )
    found = get_peft_model(model, config)
    for p in found.parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p)
    return found


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Peft:
    """PEFT's way."""

    def __init__(self, rank: int, every: int, device: str) -> None:
        self.model = adapted(rank, every).to(device)
        self.step_number = 0

    def step(self) -> None:
        """Penalty, scores and budget of one step."""
        self.step_number += 1
        tuner = self.model.base_model
        norms: Any = 0
        count = 0
        for name, p in tuner.model.named_parameters():  # as in the forward pass of PEFT's tuner
            if ("lora_A" in name or "lora_B" in name) and tuner.trainable_adapter_name in name:
                gram = p @ p.T if "lora_A" in name else p.T @ p
                identity = torch.eye(*gram.size(), out=torch.empty_like(gram))
                count += 1
                norms = norms + torch.norm(gram - identity, p="fro")
        (0.1 * norms / count).backward()
        tuner.update_and_allocate(self.step_number)


class Ours:
    """Our way: the windows of a selection of ranks, as the callback goes through them."""

    def __init__(self, rank: int, every: int, device: str) -> None:
        self.model = adapted(rank, every).to(device)
        method = AdaLoRA(rank // 3, warmup=0, final=0, every=every)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad])
        self.owner = Owner.of([self.optimizer])
        self.selection: Any = method.new_selection()
        bound = self.selection.bind(self.model)
        method.slots.effect.open(self.owner, "bench", bound)
        self.stage = stage_of(self.owner, "bench", self.selection)
        self.stage.begin(self.clock)
        self.selection.advance()

    @staticmethod
    def clock() -> tuple[int, None]:
        """Steps of the run."""
        return TOTAL, None

    def step(self) -> None:
        """Penalty, scores and budget of one step."""
        self.stage.finish(1.0)
        self.owner.stepped["bench"](self.optimizer)
        self.selection.step += 1
        self.stage.after_step(self.clock)


def paired(rank: int, every: int, pairs: int, device: str) -> dict[str, Any]:
    """Median milliseconds of both ways and the median of their ratios, over ``pairs`` pairs of steps.

    Args:
        rank: Of the adapters at first.
        every: Steps between choices.
        pairs: Pairs of ``every`` steps, so that every pair holds one choice.
        device: Where the model is.
    """
    ways: list[Any] = [Peft(rank, every, device), Ours(rank, every, device)]
    took: list[list[float]] = [[], []]
    for pair in range(pairs + WARM_UP):
        for i in (0, 1) if pair % 2 else (1, 0):
            _wait()
            began = time.perf_counter()
            for _ in range(every):
                ways[i].step()
            _wait()
            took[i].append(1e3 * (time.perf_counter() - began) / every)
    theirs, ours = (times[WARM_UP:] for times in took)
    return {
        "rank": rank,
        "every": every,
        "pairs": pairs,
        "peft_ms": statistics.median(theirs),
        "ours_ms": statistics.median(ours),
        "ratio": statistics.median(o / p for o, p in zip(ours, theirs, strict=True)),
    }


def _bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    params = [p for p in model.parameters() if p.requires_grad]
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    tensors = [*params, *(p.grad for p in params if p.grad is not None), *state]
    return sum(t.numel() * t.element_size() for t in tensors)


def memory(rank: int = 12, width: int = 64, blocks: int = 4, steps: int = 12) -> dict[str, Any]:
    """Bytes of adapters, gradients and state after the final choice, of PEFT's way, ours, and LoRA with those ranks."""

    def loss(model: nn.Module, step: int) -> Tensor:
        x = torch.randn(8, width, generator=torch.Generator().manual_seed(step))
        for block in model.base_model.model:  # type: ignore[union-attr]
            x = x + block.down(torch.tanh(block.up(x))) + block.o(block.q(x) * block.k(x) + block.v(x))
        return x.square().mean()

    found: dict[str, Any] = {}
    model = adapted(rank, 1, width, blocks)
    model.zero_grad()
    optimizer = Selective(
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]),
        model,
        AdaLoRA(rank // 3, warmup=1, final=4, every=1),
        total_steps=steps,
    )
    for step in range(steps):
        if step == steps // 2:
            found["before"] = _bytes(model, optimizer.base)
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
    found["ours"] = _bytes(model, optimizer.base)
    selection: Any = optimizer.selection
    start = len("base_model.model.")
    ranks = {name[start:]: r for name, r in selection.per_adapter.items() if r}
    optimizer.close()
    plain = nn.Sequential(*[Block(width) for _ in range(blocks)])
    config = LoraConfig(target_modules=list(ranks), rank_pattern={f"^{k}$": v for k, v in ranks.items()})
    lora = get_peft_model(plain, config)
    base = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad])
    loss(lora, 0).backward()
    base.step()
    found["lora"] = _bytes(lora, base)
    found["excess"] = found["ours"] / found["lora"] - 1.0
    found["peft"] = found["before"]  # it frees nothing
    return found


def section(result: dict[str, Any]) -> list[str]:
    """The table as Markdown."""
    weighed = result["memory"]
    lines = [
        "## Ranks beside PEFT's AdaLoRA",
        "",
        "Penalty, scores and budget of a step, 96 matrices of 51 M parameters, medians of pairs.",
        "",
        "| rank | a choice every | ours, ms | PEFT, ms | ratio |",
        "|---|---|---|---|---|",
    ]
    for t in result["time"]:
        cells = f"{t['ours_ms']:.1f} | {t['peft_ms']:.1f} | {t['ratio']:.3f}"
        lines.append(f"| {t['rank']} | {t['every']} | {cells} |")
    lines += [
        "",
        f"After the final choice adapters, gradients and state take {weighed['ours']:,} bytes; a LoRA of those ranks "
        f"{weighed['lora']:,} ({weighed['excess']:+.2%}), PEFT's AdaLoRA {weighed['peft']:,}.",
        "",
    ]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures time and memory, writes ``ranks.json``, and fails if a bar is missed."""
    made = parser("ranks", __doc__)
    made.add_argument("--pairs", type=int, default=20, help="pairs that the medians are over")
    made.add_argument("--device", default="cpu", help="where the model is")
    options = made.parse_args(arguments)
    console = Console()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        times = [paired(rank, every, options.pairs, options.device) for rank in (12, 32) for every in (1, 10)]
        weighed = memory()
    for took in times:
        told = f"{took['ours_ms']:.1f} ms against {took['peft_ms']:.1f}, ratio {took['ratio']:.3f}"
        console.print(f"rank {took['rank']}, a choice every {took['every']}: {told}", highlight=False)
    console.print(f"memory: {weighed['ours']} bytes against LoRA's {weighed['lora']}, {weighed['excess']:+.2%}")
    passed = (
        all(took["ratio"] <= BAR for took in times if took["rank"] == BARRED) and abs(weighed["excess"]) <= MEMORY_BAR
    )
    device = torch.cuda.get_device_name() if options.device != "cpu" else f"CPU, {torch.get_num_threads()} threads"
    report = {"torch": torch.__version__, "python": platform.python_version(), "device": device}
    bars = {"bar": BAR, "bar_rank": BARRED, "memory_bar": MEMORY_BAR, "passed": passed}
    write(options.out, "ranks", {**report, **bars, "time": times, "memory": weighed})
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
