"""The cells of the benchmark on a GPU: a model's shape with random bf16 weights, a method, and a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apportion.callbacks import ID3, IST, LIFT, LISA, AdaLoRA
from apportion.recipes.bench.peers_layers import LINEAR
from apportion.recipes.shapes import Shape, config_of

LENGTH, STEPS = 1024, 9
_EVERY = 4  # steps between switches and refreshes
_GROWTH = 2  # steps that ID3 selects at
_TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


@dataclass(frozen=True)
class Cell:
    """What is measured.

    Args:
        shape: ``llama-2-7b``, ``llama-2-13b``, ``llama-2-70b`` or ``tiny``.
        method: Name in `METHODS`.
        share: Share of the entries, for methods that select entries.
        batch: Rows of a batch.
        length: Tokens of a row.
        checkpointing: Whether activations are made again in the backward pass.
        only_estimate: Whether nothing is run, as no device holds it.

    Example:
        >>> Cell("llama-2-7b", "lift", 0.01, batch=8).name
        'llama-2-7b-lift-1-8x1024-all'
    """

    shape: str
    method: str
    share: float = 0.0
    batch: int = 1
    length: int = LENGTH
    checkpointing: bool = False
    only_estimate: bool = False

    @property
    def name(self) -> str:
        """For files."""
        share = f"-{100 * self.share:g}" if self.share else ""
        kept = "checkpointing" if self.checkpointing else "all"
        said = "-estimate" if self.only_estimate else ""
        return f"{self.shape}-{self.method}{share}-{self.batch}x{self.length}-{kept}{said}"


def _lisa(**options: Any) -> Callable[[float], Any]:
    return lambda share: LISA(2, interval=_EVERY, **options)


METHODS: dict[str, Callable[[float], Any]] = {
    "full": lambda share: None,
    "lora": lambda share: None,
    "lisa": _lisa(),
    "lisa-layers": _lisa(train_embeddings=False, train_head=False),
    "ist": lambda share: IST(probe_interval=_EVERY),
    "id3": lambda share: ID3(share, exp=1.0, max_steps=_GROWTH, train_head=False),
    "lift": lambda share: LIFT(amount=share, lra_rank=32, interval=_EVERY),
    "adalora": lambda share: AdaLoRA(target=0.5, warmup=_EVERY, final=0, every=1),
}
_RANKS = {"lora": 64, "ist": 64}


def selects(method: str, step: int) -> bool:
    """Whether the choice for this step, or the next, falls into it."""
    return {
        "lisa": (step + 1) % _EVERY == 0,
        "lisa-layers": (step + 1) % _EVERY == 0,
        "lift": (step + 1) % _EVERY == 0,
        "ist": (step + 1) % _EVERY == 0,
        "id3": step < _GROWTH,
        "adalora": step >= _EVERY,
    }.get(method, False)


def shape_of(cell: Cell) -> Shape:
    """The model and its batches, with adapters where the method works on them."""
    config = config_of("llama-2-7b" if cell.shape == "tiny" else cell.shape)
    config.update(_TINY if cell.shape == "tiny" else {})
    config._attn_implementation = "sdpa"
    return Shape(config, _RANKS.get(cell.method, 0), tuple(LINEAR))


def build(cell: Cell) -> Any:
    """The model in bf16 on the default device; of entries, with what is no candidate frozen."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = shape_of(cell).build()
    finally:
        torch.set_default_dtype(before)
    if cell.method == "adalora":
        from peft import AdaLoraConfig, get_peft_model

        model = get_peft_model(
            model, AdaLoraConfig(init_r=64, target_r=32, total_step=STEPS, target_modules=list(LINEAR))
        )
    return model.to(torch.bfloat16)


def batch(cell: Cell, device: str) -> dict[str, Tensor]:
    vocabulary = shape_of(cell).config.vocab_size
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, vocabulary, (cell.batch, cell.length), generator=generator).to(device)
    return {"input_ids": tokens, "labels": tokens}
