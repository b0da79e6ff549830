"""transformers' Trainer clips over the model's own parameters: told where that clips nothing, and the way out clips."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from apportion.callbacks import ID3, LIFT, LISA, BAdam, Random
from apportion.optim import Selective

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
ROWS = [{"input_ids": row, "labels": row} for row in torch.arange(128).remainder(31).view(16, 8)]


class Outer(Trainer):
    """A subclass, as in trl."""


class Careful(Trainer):
    """Clips what steps."""

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        limit = self.args.max_grad_norm
        return nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], limit)


class Norms(TrainerCallback):
    """Notes the norm of what steps, as the optimizer finds it; ``limit`` clips it."""

    def __init__(self, limit: float = float("inf")) -> None:
        self.limit = limit
        self.before: list[float] = []
        self.after: list[float] = []

    def on_pre_optimizer_step(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        self.before.append(float(nn.utils.clip_grad_norm_(held, self.limit)))
        self.after.append(float(nn.utils.get_total_norm([p.grad for p in held if p.grad is not None])))


def run(
    folder: Path,
    make: Callable[[], Any],
    kind: type[Trainer] = Trainer,
    limit: float = 1e-3,
    dtype: torch.dtype = torch.float32,
    watch: TrainerCallback | None = None,
) -> list[str]:
    """What a fit of three steps says of clipping."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **SIZES)).to(dtype)
    optimizer = Selective(torch.optim.AdamW(model.parameters(), lr=1e-2), model, make())
    options: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 4, "max_grad_norm": limit}
    arguments = TrainingArguments(str(folder), report_to=[], use_cpu=True, disable_tqdm=True, save_steps=99, **options)
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=ROWS,
        optimizers=(optimizer, LambdaLR(optimizer, lambda step: 1.0)),
        callbacks=[] if watch is None else [watch],
    )
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        trainer.train()
    optimizer.close()
    return [str(w.message) for w in heard if "would be clipped" in str(w.message)]


@pytest.mark.parametrize("kind", [Trainer, Outer])
@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (lambda: LIFT(amount=0.05, lra_rank=2, interval=2), torch.float32),
        (lambda: Random(budget=100), torch.float32),
        (lambda: ID3(budget=60, max_steps=3), torch.float32),
        (lambda: BAdam(interval=2), torch.bfloat16),
    ],
)
def test_the_trainer_that_clips_nothing_of_the_selection_is_told_once(
    make: Callable[[], Any], dtype: torch.dtype, kind: type[Trainer], tmp_path: Path
) -> None:
    watch = Norms()
    (told,) = run(tmp_path, make, kind, dtype=dtype, watch=watch)
    assert f"`{kind.__name__}` of transformers clips" in told
    assert "`max_grad_norm=0.001`" in told
    assert f"`{make().label}` has moved" in told
    assert "on_pre_optimizer_step" in told
    assert min(watch.after) > 1e-2  # indeed it clips nothing


@pytest.mark.parametrize(
    ("make", "kind", "limit", "dtype"),
    [
        (lambda: Random(budget=100), Trainer, 0.0, torch.float32),
        (lambda: Random(budget=100), Careful, 1e-3, torch.float32),
        (lambda: LISA(active_layers=1, interval=2), Trainer, 1e-3, torch.float32),  # its gradients are where they were
        (lambda: LISA(active_layers=1, interval=2), Trainer, 1e-3, torch.bfloat16),
        (lambda: BAdam(interval=2), Trainer, 1e-3, torch.float32),
    ],
)
def test_nothing_is_told_where_it_clips_or_should_not(
    make: Callable[[], Any], kind: type[Trainer], limit: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    watch = Norms()
    assert not run(tmp_path, make, kind, limit, dtype, watch)
    assert (max(watch.after) < 2e-3) == (limit > 0.0)


@pytest.mark.parametrize("make", [lambda: LIFT(amount=0.05, lra_rank=2, interval=2), lambda: ID3(60, max_steps=3)])
def test_the_way_out_clips(make: Callable[[], Any], tmp_path: Path) -> None:
    watch = Norms(limit=1e-3)
    assert not run(tmp_path, make, limit=0.0, watch=watch)
    assert min(watch.before) > 1e-2
    assert max(watch.after) < 2e-3
