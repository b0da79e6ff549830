"""What processes send each other at a step, and how long the step takes: selection against DistributedDataParallel.

    python -m apportion.recipes.bench.ddp        writes results/ddp.json

Two processes, gloo on the CPU with one thread each, NCCL with a GPU each (``--device cuda``, left out where there are
fewer). All train the same model on tokens of their own: DistributedDataParallel with AdamW on everything, LISA of two
layers, and fixed entries. Bytes are what a rank hands to the process group in a step; the floor is 4 bytes for each
entry that trains. Times are of steps that all ranks begin together, turn by turn; median and range of the ratios.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from apportion.callbacks import LISA
from apportion.optim import Selective
from apportion.recipes.bench.arguments import parser, write
from apportion.recipes.bench.entry_bars import DECAY, LR, Size, backward
from apportion.recipes.bench.field import quiet
from apportion.recipes.bench.scale import fixed

RANKS = 2
BAR = 1.001
_FLAGS = 4096  # one number rides along with each tensor
_MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    size: Size = Size("30 M", 512, 1376, 8, tokens=128)  # noqa: RUF009
    share: float = 0.01
    turns: int = 7
    device: str = "cpu"


class Party:
    """One way to train on several processes.

    Attributes:
        bytes: Bytes that this rank has handed to the process group so far.
        trains: Entries that the last step trained.
    """

    name = ""
    bytes = 0
    trains = 0

    def step(self, tokens: Tensor) -> None:
        """Forward, backward, and the optimizer's step."""
        raise NotImplementedError


class Everything(Party):
    """DistributedDataParallel and AdamW."""

    name = "DDP, AdamW on everything"

    def __init__(self, model: nn.Module) -> None:
        self.model = DistributedDataParallel(model)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
        self.trains = sum(p.numel() for p in model.parameters())
        self.model.register_comm_hook(None, lambda state, bucket: self._reduce(bucket))

    def _reduce(self, bucket: Any) -> Any:
        """The average that the wrapper takes itself, counted."""
        flat = bucket.buffer()
        self.bytes += flat.numel() * flat.element_size()
        work = dist.all_reduce(flat.div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    def step(self, tokens: Tensor) -> None:
        """See `Party`."""
        backward(self.model, tokens)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Chosen(Party):
    """A method of ours, without a wrapper."""

    def __init__(self, name: str, model: nn.Module, method: Any) -> None:
        self.name, self.model = name, model
        params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = Selective(torch.optim.AdamW(params, lr=LR, weight_decay=DECAY), model, method)

    def step(self, tokens: Tensor) -> None:
        """See `Party`."""
        self.trains = sum(p.numel() for p in self.optimizer.owner.training())
        backward(self.model, tokens)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.bytes = self.optimizer._reducer.bytes


def parties(plan: Plan) -> list[Party]:
    """All of them, on copies of one model."""

    def model(frozen: bool) -> nn.Module:
        made = plan.size.build()
        return (made if frozen else made.requires_grad_(True)).to(plan.device)

    return [
        Everything(model(frozen=False)),
        Chosen("apportion, LISA(2)", model(frozen=False), LISA(2, interval=3)),
        Chosen(f"apportion, {plan.share:.0%} of the entries", model(frozen=True), fixed(plan.share)),
    ]


def take_part(plan: Plan) -> list[dict[str, Any]]:
    """What a rank of a running process group does; a row for each party, the same on all ranks but for the times."""
    rivals, rank = parties(plan), dist.get_rank()
    batches = list(islice(plan.size.batches(), (plan.turns + 2) * RANKS))[rank::RANKS]
    seconds: list[list[float]] = [[] for _ in rivals]
    sent: list[int] = [0] * len(rivals)
    for turn, tokens in enumerate(batches):
        for place in range(len(rivals)):
            i = (turn + place) % len(rivals)
            before = rivals[i].bytes
            _meet(plan)
            began = time.perf_counter()
            rivals[i].step(tokens.to(plan.device))
            _meet(plan)
            if turn >= 2:  # DDP builds its buckets anew in the first
                seconds[i].append(time.perf_counter() - began)
            sent[i] = rivals[i].bytes - before
    rows = []
    for i, party in enumerate(rivals):
        ratios = sorted(a / b for a, b in zip(seconds[i], seconds[0], strict=True))
        rows.append(
            {
                "name": party.name,
                "trains": party.trains,
                "bytes": sent[i],
                "floor": 4 * party.trains,
                "step": statistics.median(seconds[i]),
                "ratio": statistics.median(ratios),
                "lowest": ratios[0],
                "highest": ratios[-1],
            }
        )
    return rows


def _meet(plan: Plan) -> None:
    """Waits for the device, and for the other ranks."""
    if plan.device == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    if plan.device == "cuda":
        torch.cuda.synchronize()


def _rank(rank: int, plan: Plan, meeting: str, out: str) -> None:
    quiet()
    torch.set_num_threads(1)
    cuda = plan.device == "cuda"
    if cuda:
        torch.cuda.set_device(rank)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("nccl" if cuda else "gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    rows = take_part(plan)
    if rank == 0:
        Path(out).write_text(json.dumps(rows))
    dist.destroy_process_group()


def spawned(plan: Plan) -> list[dict[str, Any]]:
    """`take_part` in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "rows.json")
        torch.multiprocessing.spawn(_rank, (plan, str(Path(folder, "meeting")), str(out)), RANKS)  # type: ignore[attr-defined]
        rows: list[dict[str, Any]] = json.loads(out.read_text())
        return rows


def section(result: dict[str, Any]) -> list[str]:
    """The table as Markdown."""
    lines = ["## Processes", ""]
    if not result["run"]:
        return [*lines, f"Not run: {result['reason']}.", ""]
    lines += [
        f"{RANKS} processes, {result['backend']}, {result['model']}, {result['tokens']} tokens each. Floor: 4 bytes "
        "for each entry that trains. Step: median and range of the ratios to DDP's.",
        "",
        "| | trains | MiB a step | floor, MiB | step, ms | to DDP |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['name']} | {row['trains']:,} | {row['bytes'] / _MIB:.2f} | {row['floor'] / _MIB:.2f} "
            f"| {1e3 * row['step']:.0f} | {row['ratio']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f}) |"
        )
    return [*lines, ""]


def main(
    arguments: Sequence[str] | None = None,
    plan: Plan | None = None,
    run: Callable[[Plan], list[dict[str, Any]]] = spawned,
) -> int:
    """Measures and writes ``ddp.json``; fails if more is sent than the bar allows."""
    made = parser("ddp", __doc__)
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the ranks compute")
    options = made.parse_args(arguments)
    plan = plan or Plan(device=options.device)
    backend = "nccl" if plan.device == "cuda" else "gloo"
    result: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version(), "backend": backend}
    if plan.device == "cuda" and torch.cuda.device_count() < RANKS:
        result |= {"run": False, "passed": None, "reason": f"{torch.cuda.device_count()} CUDA devices of {RANKS}"}
    else:
        with Console(stderr=True).status(f"{RANKS} processes"):
            rows = run(plan)
        passed = all(row["bytes"] <= BAR * row["floor"] + _FLAGS for row in rows)
        size = {"model": plan.size.label, "tokens": plan.size.tokens}
        result |= {"run": True, "passed": passed, **size, "rows": rows}
    write(options.out, "ddp", result, section(result))
    return 1 if result["passed"] is False else 0


if __name__ == "__main__":
    sys.exit(main())
