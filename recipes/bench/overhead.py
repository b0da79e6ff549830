"""What the callback's own hooks cost: their share of a training step, as the median over thirty steps.

    python -m apportion.recipes.bench.overhead        writes results/overhead.json

A Llama-shaped model of 31 million parameters is trained with selections that switch before every step, which is the
most that a method can ask for, and with one that never does. A step runs from the start of one batch to the start of
the next. Time in hooks is all that passes inside the callback's methods and the hooks that its owner of the param
groups puts on the optimizer.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from torch.utils.data import DataLoader

from apportion.callbacks import HFT, LISA, RST, BAdam
from apportion.driver import SelectiveTuning
from apportion.recipes.bench.arguments import parser, write

HOOKS = ("on_train_batch_start", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end")
METHODS: dict[str, Callable[[], SelectiveTuning]] = {
    "LISA, 2 layers, every step": lambda: LISA(2, interval=1),
    "RST, 25%, every step, offload": lambda: RST(0.25, every=1),
    "HFT, half of the matrices, once": lambda: HFT(0.5),
    "BAdam, 1 layer, every step": lambda: BAdam(interval=1),
}
WARM_UP, BAR = 3, 0.02


class HookTime(pl.Callback):
    """Adds up what passes inside the hooks of one callback, step by step.

    Args:
        driver: The callback; its hook methods are wrapped on the instance.

    Attributes:
        hooks: Seconds inside hooks, for each step.
        steps: Seconds from batch to batch, for each step.
    """

    def __init__(self, driver: SelectiveTuning) -> None:
        self.driver = driver
        self.hooks: list[float] = []
        self.steps: list[float] = []
        self._spent, self._began = 0.0, 0.0
        for name in HOOKS:
            setattr(driver, name, self._timed(getattr(driver, name)))

    def _timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            _wait()
            began = time.perf_counter()
            try:
                return hook(*args, **kwargs)
            finally:
                _wait()
                self._spent += time.perf_counter() - began

        return run

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Wraps the hooks that the owner has put on the optimizer by now."""
        for optimizer in trainer.optimizers:
            hooks = optimizer._optimizer_step_post_hooks
            for key, hook in hooks.items():
                hooks[key] = self._timed(hook)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """Closes a step; it stands after the callback that it times."""
        now = time.perf_counter()
        if self._began:
            self.hooks.append(self._spent)
            self.steps.append(now - self._began)
        self._spent, self._began = 0.0, now


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class _Language(pl.LightningModule):
    """A Llama-shaped model with random weights on random tokens."""

    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=4096,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=8,
        )
        self.model = LlamaForCausalLM(config)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """Loss on one batch of tokens."""
        loss: torch.Tensor = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over everything that may train."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def measure(
    method: Callable[[], SelectiveTuning], steps: int = 30, hidden: int = 384, layers: int = 12
) -> dict[str, float]:
    """Median seconds of a step, of the hooks in it, and their share.

    Args:
        method: Makes the callback.
        steps: Steps to take the median of, after a short warm-up.
        hidden: Width of the model.
        layers: Depth of the model.
    """
    driver = method()
    clock = HookTime(driver)
    tokens: Any = torch.randint(0, 4096, (2, 256), generator=torch.Generator().manual_seed(1)).repeat(steps + 10, 1)
    trainer = pl.Trainer(
        max_steps=steps + WARM_UP + 1,
        callbacks=[driver, clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*many workers.*")  # Lightning's own
        warnings.filterwarnings("ignore", ".*LeafSpec.*")
        trainer.fit(_Language(hidden, layers), DataLoader(tokens, batch_size=2))
    hooks, whole = clock.hooks[WARM_UP:], clock.steps[WARM_UP:]
    return {
        "step_ms": 1e3 * statistics.median(whole),
        "hooks_ms": 1e3 * statistics.median(hooks),
        "hooks_share": statistics.median(h / s for h, s in zip(hooks, whole, strict=True)),
        "steps": len(whole),
    }


def section(result: dict[str, Any]) -> list[str]:
    """The table as Markdown."""
    lines = [
        "## The callback's own hooks",
        "",
        "Llama-shaped, 31 M parameters, selections that switch before every step; medians.",
        "",
        "| method | step, ms | hooks, ms | share |",
        "|---|---|---|---|",
    ]
    for name, m in result["methods"].items():
        lines.append(f"| {name} | {m['step_ms']:.0f} | {m['hooks_ms']:.2f} | {m['hooks_share']:.2%} |")
    return [*lines, ""]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures every method, writes ``overhead.json``, and fails if the bar is missed."""
    made = parser("overhead", __doc__)
    made.add_argument("--steps", type=int, default=30, help="steps that the medians are over")
    options = made.parse_args(arguments)
    console, figures = Console(), {}
    for name, method in METHODS.items():
        figures[name] = measure(method, options.steps)
        took = figures[name]
        share = f"{took['hooks_share']:.2%}"
        console.print(f"{name}: {took['hooks_ms']:.2f} ms of {took['step_ms']:.0f} ms, {share}", highlight=False)
    passed = all(took["hooks_share"] <= BAR and took["step_ms"] >= 300.0 for took in figures.values())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    report = {"torch": torch.__version__, "python": platform.python_version(), "device": device, "bar": BAR}
    write(options.out, "overhead", {**report, "passed": passed, "methods": figures})
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
