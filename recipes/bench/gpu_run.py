"""What a cell of the benchmark on a GPU takes: memory, time, selection, and the estimate beside it.

Peak: ``torch.cuda.max_memory_allocated`` of steps that do not select, and of those that do; on a CPU what
`apportion.memory.Tracker` counts. Reserved: ``torch.cuda.max_memory_reserved`` since the last step began. Tokens a
second: of the median step that does not select. Selection: the median step that selects, less that one. Model FLOP
utilisation: those of training everything, whatever is trained, so that it is a measure of speed,

    6 P + 12 L h T   floating-point operations for a token    P parameters, L layers of width h, T tokens in a row

over the dense bf16 peak of the device. Waits: how often the host waits for the device in one more step that does not
select, by ``torch.cuda.set_sync_debug_mode``; those of ``full`` are the model's own.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from apportion.estimate import estimate
from apportion.memory import Tracker
from apportion.optim import Selective
from apportion.recipes.bench.gpu_cells import METHODS, STEPS, Cell, batch, build, selects, shape_of

_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}  # dense bf16, of the vendor's data sheets


def measured(cell: Cell, device: str) -> dict[str, Any]:
    """Trains `STEPS` steps and says what they took; the cell's estimate beside it."""
    cuda = device == "cuda"
    torch.manual_seed(0)
    with torch.device(device):
        model = build(cell)
    model.train()
    model.config.use_cache = False
    if cell.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    given = batch(cell, device)
    method = METHODS[cell.method](cell.share)
    meter = _Meter(model, cuda)
    seconds: list[float] = []
    peaks: list[int] = []
    with meter:
        began = time.perf_counter()
        optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
        if method is not None:
            probe = (lambda: model(**given).loss) if cell.method == "ist" else None
            optimizer = Selective(optimizer, model, method, probe=probe, total_steps=STEPS + 1)

        def train() -> None:
            model(**given).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        at_set_up = meter.peak()
        set_up = time.perf_counter() - began
        for _ in range(STEPS):
            began = time.perf_counter()
            train()
            peaks.append(meter.peak())
            seconds.append(time.perf_counter() - began)
        waits = _waits(train) if cuda else None
    plain = [step for step in range(2, STEPS) if not selects(cell.method, step)]
    selecting = [step for step in range(1, STEPS) if selects(cell.method, step)]
    step = statistics.median(seconds[i] for i in plain or selecting)
    tokens = cell.batch * cell.length
    return {
        "peak": max(peaks[i] for i in plain or selecting),
        "peak_selecting": max([at_set_up, *(peaks[i] for i in selecting)]),
        "reserved": torch.cuda.max_memory_reserved() if cuda else None,
        "step": step,
        "tokens_per_second": tokens / step,
        "mfu": _utilisation(cell, model, tokens / step) if cuda else None,
        "set_up": set_up,
        "selection": max(0.0, statistics.median(seconds[i] for i in selecting) - step) if selecting and plain else None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "waits": waits,
        "moments": sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.ndim > 0),
    }


def _waits(run: Callable[[], None]) -> int:
    """How often the host waits for the device in a step, the model's own code included."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in said)


class _Meter:
    """The most bytes since it was last asked, of the device's allocator or of what operators ask for on a CPU."""

    def __init__(self, model: Any, cuda: bool) -> None:
        self.cuda = cuda
        self.tracker = Tracker(model)

    def __enter__(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            self.tracker.__enter__()

    def __exit__(self, *error: Any) -> None:
        if not self.cuda:
            self.tracker.__exit__(*error)

    def peak(self) -> int:
        """Waits for the device."""
        if not self.cuda:
            return self.tracker.mark("asked").total
        torch.cuda.synchronize()
        most = int(torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        return most


def _utilisation(cell: Cell, model: Any, tokens_per_second: float) -> float | None:
    name = torch.cuda.get_device_name()
    peak = next((flops for part, flops in _PEAKS.items() if part in name), None)
    if peak is None:
        return None
    config = shape_of(cell).config
    parameters = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)
    flops = 6 * parameters + 12 * config.num_hidden_layers * config.hidden_size * cell.length
    return float(tokens_per_second * flops / peak)


def estimated(cell: Cell) -> dict[str, Any]:
    """The peak by part, on fake tensors."""
    method = METHODS[cell.method](cell.share)
    found = estimate(
        lambda: build(cell),
        batch(cell, "cpu"),
        method="full" if method is None else method,
        optimizer="adamw-fused",
        precision="bf16-true",
        checkpointing=cell.checkpointing,
    )
    return {**found.as_dict(), "parameters": found.parameters, "trains": found.trainable}


def row(cell: Cell, device: str) -> dict[str, Any]:
    """All of a cell: its settings, what was measured, and the estimate, which may be impossible for a method."""
    found: dict[str, Any] = {**asdict(cell), "name": cell.name, "device": device}
    try:
        found["estimate"] = estimated(cell)
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        found["estimate"] = None
        found["no_estimate"] = str(error).splitlines()[0] if str(error) else type(error).__name__
    if cell.only_estimate:
        return {**found, "outcome": "estimated"}
    try:
        found |= {"outcome": "measured", **measured(cell, device)}
    except torch.cuda.OutOfMemoryError as error:
        found |= {"outcome": "out of memory", "reason": str(error).splitlines()[0]}
    return found
