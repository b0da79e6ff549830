"""Tiny models and data that the tests train: real Lightning fits in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import lightning.pytorch
import pytorch_lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apportion.loader import StatefulLoader

VOCABULARY, WIDTH, LENGTH, BLOCKS = 13, 8, 5, 4


class Attention(nn.Module):
    """Single-head attention with the usual four matrices."""

    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, width, bias=False)  # softmax ignores this bias: it would never move
        self.v_proj = nn.Linear(width, width, bias=bias)
        self.o_proj = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q_proj(x) @ self.k_proj(x).transpose(-1, -2) / x.shape[-1] ** 0.5).softmax(-1)
        return self.o_proj(weights @ self.v_proj(x))


class FeedForward(nn.Module):
    """Up, non-linearity, down."""

    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, 2 * width, bias=bias)
        self.down_proj = nn.Linear(2 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.up_proj(x)))


class Bottleneck(nn.Module):
    """A bottleneck adapter: a narrow residual path, the only part of its layer that trains."""

    def __init__(self, width: int, rank: int = 2) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(torch.tanh(self.down(x)))


class Block(nn.Module):
    """A pre-norm transformer layer with dropout and, if asked, a bottleneck adapter."""

    def __init__(self, width: int, dropout: float, adapter: bool, bias: bool, batch_norm: bool) -> None:
        super().__init__()
        self.input_norm = nn.LayerNorm(width)
        self.self_attn = Attention(width, bias)
        self.post_norm = nn.LayerNorm(width)
        self.mlp = FeedForward(width, bias)
        self.dropout = nn.Dropout(dropout)
        self.adapter = Bottleneck(width) if adapter else None
        self.batch_norm = nn.BatchNorm1d(LENGTH) if batch_norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_norm(x)))
        h = self.dropout(self.mlp(self.post_norm(x)))
        if self.adapter is not None:
            h = self.adapter(h)
        if self.batch_norm is not None:
            h = self.batch_norm(h)
        return x + h


class Net(nn.Module):
    """Embedding, layers, norm, head: what a language model has, 2 thousand times smaller than small.

    ``checkpointing``: None, ``reentrant`` or ``non-reentrant`` activation checkpointing around every layer.
    """

    def __init__(
        self,
        blocks: int = BLOCKS,
        width: int = WIDTH,
        dropout: float = 0.1,
        adapter: bool = False,
        bias: bool = True,
        batch_norm: bool = False,
        checkpointing: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed_tokens = nn.Embedding(VOCABULARY, width)
            self.layers = nn.ModuleList([Block(width, dropout, adapter, bias, batch_norm) for _ in range(blocks)])
            self.norm = nn.LayerNorm(width)
            self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        self.checkpointing = checkpointing
        if adapter:
            for name, p in self.named_parameters():
                p.requires_grad_(".adapter." in name)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            if self.checkpointing is not None and self.training:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=self.checkpointing == "reentrant")
            else:
                x = layer(x)
        return self.lm_head(self.norm(x))

    def loss(self, ids: Tensor) -> Tensor:
        """Mean cross entropy of the next token. Shapes: ``ids`` (batch, length + 1)."""
        logits = self(ids[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def lora_net(kind: str = "lora", **options: Any) -> nn.Module:
    """The net in PEFT's hands: ``lora``, ``dora`` or ``ia3``, all adapters at work from the start."""
    from peft import IA3Config, LoraConfig, get_peft_model

    net = Net(**options)
    if kind == "ia3":
        config: Any = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    else:
        config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "up_proj"], use_dora=kind == "dora")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(net, config)
        for name, p in model.named_parameters():
            if p.requires_grad and "lora_B" in name:
                nn.init.normal_(p, std=0.02)
    return model


def adamw(params: Any, **options: Any) -> torch.optim.Optimizer:
    """The optimizer of the contract: AdamW with a decay that would show at once on what must not move."""
    return torch.optim.AdamW(params, **{"lr": 1e-2, "weight_decay": 0.1, **options})


def two_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Vectors without decay and matrices with it, as most people group parameters; only what may train."""
    params = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0, "lr": 2e-2},
        {"params": [p for p in params if p.ndim >= 2]},
    ]


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Parameters that require a gradient, in order."""
    return [p for p in module.parameters() if p.requires_grad]


@cache
def _modules(package: Any) -> tuple[Any, Any, Any]:
    class Task(package.LightningModule):
        """Trains a `Net`; the optimizer and the scheduler come from the test."""

        def __init__(
            self,
            net: nn.Module | None = None,
            optimizer: Callable[[nn.Module], Any] | None = None,
            scheduler: Callable[[Any], Any] | None = None,
        ) -> None:
            super().__init__()
            self.net = Net() if net is None else net
            self.optimizer, self.scheduler = optimizer, scheduler
            self.lr, self.batch_size = 1e-2, 2

        def loss(self, batch: Tensor) -> Tensor:
            net: Any = self.net
            logits = net(batch[:, :-1])
            return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = self.loss(batch)
            self.log("loss", loss)
            return loss

        def train_dataloader(self) -> Any:
            return loader(batch=self.batch_size)

        def configure_optimizers(self) -> Any:
            make = self.optimizer or (lambda module: adamw(trainable(module), lr=self.lr))
            optimizer = make(self)
            if self.scheduler is None:
                return optimizer
            return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer)}

    class ManualTask(Task):  # type: ignore[misc, valid-type]
        """Manual optimization: one or several optimizers, stepped in turn, over ``accumulate`` batches."""

        def __init__(self, *args: Any, accumulate: int = 1, clip: float | None = None, **options: Any) -> None:
            super().__init__(*args, **options)
            self.automatic_optimization = False
            self.accumulate, self.clip = accumulate, clip

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizers = self.optimizers()
            optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
            self.manual_backward(self.loss(batch) / self.accumulate)
            if (batch_idx + 1) % self.accumulate == 0:
                for optimizer in optimizers:
                    if self.clip is not None:
                        self.clip_gradients(optimizer, self.clip, "norm")
                    optimizer.step()
                    optimizer.zero_grad()

    class ValidatedTask(Task):  # type: ignore[misc, valid-type]
        """With a validation and a test loop."""

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch))

        test_step = validation_step

        def val_dataloader(self) -> Any:
            return loader(4, shuffle=False)

        test_dataloader = val_dataloader

    return Task, ManualTask, ValidatedTask


Task, ManualTask, ValidatedTask = _modules(pytorch_lightning)
OtherTask = _modules(lightning.pytorch)[0]


def tokens(n: int = 24, seed: int = 3) -> Tensor:
    """Random token sequences, int64, shape (n, LENGTH + 1)."""
    return torch.randint(0, VOCABULARY, (n, LENGTH + 1), generator=torch.Generator().manual_seed(seed))


def loader(n: int = 24, batch: int = 2, shuffle: bool = True, **options: Any) -> StatefulLoader:
    """Batches of `tokens` from a loader that can stop and go on in mid-epoch."""
    return StatefulLoader(tokens(n), batch_size=batch, shuffle=shuffle, **options)


QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "num_sanity_val_steps": 0,
}


def trainer(callbacks: Any = (), steps: int = 6, package: Any = pytorch_lightning, **options: Any) -> Any:
    """A quiet CPU Trainer of ``package`` for ``steps`` optimizer steps."""
    given = callbacks if not isinstance(callbacks, Sequence) else list(callbacks)
    return package.Trainer(**{**QUIET, "max_steps": steps, "callbacks": given, **options})


def fit(
    module: Any,
    callbacks: Any = (),
    steps: int = 6,
    data: Any = None,
    resume: Any = None,
    seed: int = 11,
    **options: Any,
) -> Any:
    """Fits ``module`` and returns the Trainer."""
    run = trainer(callbacks, steps, **options)
    torch.manual_seed(seed)
    more = {"ckpt_path": resume, "weights_only": True} if resume is not None else {}
    run.fit(module, loader() if data is None else data, **more)
    return run


def named(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name; compiled modules leave no mark on names."""
    return {name.replace("_orig_mod.", ""): p for name, p in module.named_parameters()}


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters by name."""
    return {name: p.detach().clone() for name, p in named(module).items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that differ by at least one bit."""
    return {name for name in before if not torch.equal(before[name], after[name])}
