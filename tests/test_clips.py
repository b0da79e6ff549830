"""Code that clips over the model's own parameters is found where it would clip nothing, and only there."""

from __future__ import annotations

import re
import runpy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toys import Net, Task, adamw, fit, trainable

from apportion.callbacks import LISA, BAdam, Random
from apportion.driver import SelectiveTuning

TELLS = re.escape("nothing would be clipped")
LOOP = """
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from apportion import Selective
from apportion.callbacks import LISA, SPIDER, BAdam, Random

model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)]).to({dtype})
optimizer = Selective(torch.optim.AdamW(model.parameters(), lr=1e-3), model, {method})
model(torch.ones(2, 4, dtype={dtype})).square().mean().backward()
{clip}
optimizer.step()
optimizer.close()
"""
OVER_MODEL = "clip_grad_norm_(model.parameters(), 1.0)"
OVER_OPTIMIZER = "clip_grad_norm_([p for group in optimizer.param_groups for p in group['params']], 1.0)"


def said(tmp_path: Path, method: str, clip: str, dtype: str = "torch.float32") -> list[str]:
    """The warnings of clipping that a loop of one's own, in a file, is given."""
    path = tmp_path / "loop.py"
    path.write_text(LOOP.format(method=method, clip=clip, dtype=dtype))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        runpy.run_path(str(path))
    return [str(w.message) for w in heard if "would be clipped" in str(w.message)]


@pytest.mark.parametrize(
    "clip",
    [
        OVER_MODEL,
        "nn.utils.clip_grad_norm_(\n    model.parameters(),\n    1.0,\n)",
        "clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)",
        "clip_grad_norm_([p for _, p in model.named_parameters()], 1.0)",
        "clip_grad_norm_(list(model.parameters()), 1.0)",
        "clip_grad_norm_(filter(None.__ne__, model.parameters()), 1.0)",
    ],
)
def test_a_loop_that_clips_the_model_is_told_with_its_line(tmp_path: Path, clip: str) -> None:
    (told,) = said(tmp_path, "Random(0.1)", clip)
    assert f"{tmp_path / 'loop.py'}, line 11, clips the gradients of `parameters()`" in told
    assert "`Random`" in told
    assert "optimizer.param_groups" in told


@pytest.mark.parametrize(
    ("method", "dtype", "clip", "count"),
    [
        ("Random(0.1)", "torch.float32", OVER_OPTIMIZER, 0),
        ("Random(0.1)", "torch.float32", f"# {OVER_MODEL}", 0),
        ("SPIDER()", "torch.float32", OVER_MODEL, 0),  # dense gradients, where they always are
        ("LISA(1, 2)", "torch.float32", OVER_MODEL, 0),  # the gradients are where they always are
        ("LISA(1, 2)", "torch.bfloat16", OVER_MODEL, 0),
        ("BAdam(2)", "torch.float32", OVER_MODEL, 0),  # no masters of fp32 weights
        ("BAdam(2)", "torch.bfloat16", OVER_MODEL, 1),
        ("BAdam(2)", "torch.bfloat16", OVER_OPTIMIZER, 0),
    ],
)
def test_it_is_told_only_where_nothing_is_clipped(
    method: str, dtype: str, clip: str, count: int, tmp_path: Path
) -> None:
    assert len(said(tmp_path, method, clip, dtype)) == count


class Clipping(Task):  # type: ignore[misc, valid-type]
    """Clips all parameters of the module before a step."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)


@pytest.mark.parametrize(
    ("make", "dtype", "tells"),
    [
        (lambda: Random(0.1), torch.float32, True),
        (lambda: BAdam(2), torch.bfloat16, True),
        (lambda: LISA(1, 2), torch.float32, False),
    ],
)
def test_a_module_that_clips_itself_is_told(
    make: Callable[[], SelectiveTuning], dtype: torch.dtype, tells: bool
) -> None:
    task = Clipping(Net(dropout=0.0).to(dtype), lambda module: adamw(trainable(module)))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        fit(task, make(), precision="bf16-true" if dtype == torch.bfloat16 else "32-true")
    told = [str(w.message) for w in heard if re.search(TELLS, str(w.message))]
    assert len(told) == int(tells)
    if tells:
        assert "`Clipping.on_before_optimizer_step` clips" in told[0]
        assert "gradient_clip_val" in told[0]
