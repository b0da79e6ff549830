"""What tests of single entries share: given masks, a model with every kind of tensor, a plain twin to compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apportion.candidates import Site
from apportion.driver import SelectiveTuning
from apportion.effects import Compact
from apportion.entry_units import Entries
from apportion.optim import Selective
from apportion.rules import TopK
from apportion.types import When

Masks = Mapping[str, Tensor]
"""Bool masks by parameter name, each in its parameter's shape."""

VOCABULARY, WIDTH = 7, 6


class Everything(nn.Module):
    """Every kind of tensor that can be a candidate, and every way in which one can be used.

    A tied embedding, a convolution in channels-last memory, a linear layer that is used twice, one whose weight lies
    transposed in memory, a norm, biases, a scalar and a vector of one entry.
    """

    def __init__(self, checkpointing: str | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.embed = nn.Embedding(VOCABULARY, WIDTH)
            self.conv = nn.Conv2d(2, 3, 3, padding=1)
            self.shared = nn.Linear(WIDTH, WIDTH)
            self.turned = nn.Linear(WIDTH, WIDTH)
            self.norm = nn.LayerNorm(WIDTH)
            self.scale = nn.Parameter(torch.tensor(0.7))
            self.gain = nn.Parameter(torch.tensor([1.3]))
            self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
            self.head.weight = self.embed.weight
            for p in self.parameters():
                p.data.add_(0.3 * torch.randn_like(p))
        self.to(dtype)
        self.conv.weight = nn.Parameter(self.conv.weight.data.contiguous(memory_format=torch.channels_last))
        self.turned.weight = nn.Parameter(self.turned.weight.data.t().contiguous().t())
        assert not self.conv.weight.is_contiguous()
        assert not self.turned.weight.is_contiguous()
        self.checkpointing = checkpointing

    def block(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.shared(self.norm(x)))
        return x + self.scale * torch.tanh(self.shared(x)) + self.gain * torch.tanh(self.turned(x))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.conv(torch.stack([x, x.flip(-1)], 1)).mean(1)
        for _ in range(2):
            if self.checkpointing is None:
                x = self.block(x)
            else:
                x = torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=self.checkpointing == "reentrant")
        return self.head(x)

    def loss(self, ids: Tensor) -> Tensor:
        """Mean cross entropy of the next token. Shapes: ``ids`` (batch, length + 1)."""
        return F.cross_entropy(self(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


ALL = Entries(embeddings="unit", head="unit", norm="unit", bias="unit")
"""Every trainable tensor is a candidate."""


def windows(n: int, accumulate: int = 1, seed: int = 3) -> list[list[Tensor]]:
    """Micro-batches of token ids for each of ``n`` optimizer steps."""
    ids = torch.randint(0, VOCABULARY, (n * accumulate, 3, 6), generator=torch.Generator().manual_seed(seed))
    return [list(ids[i * accumulate : (i + 1) * accumulate]) for i in range(n)]


def drawn(model: nn.Module, share: float = 0.3, seed: int = 0) -> dict[str, Tensor]:
    """A random mask of every trainable tensor."""
    generator = torch.Generator().manual_seed(seed)
    params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {name: torch.rand(p.shape, generator=generator) < share for name, p in params}


@dataclass(frozen=True, eq=False)
class Listed:
    """A score that knows what shall be selected: the masks of the present step, the last ones in the end."""

    plan: Sequence[Masks]

    needs: ClassVar[frozenset[str]] = frozenset()

    def __repr__(self) -> str:
        return f"Listed({len(self.plan)})"

    def now(self, step: int) -> Masks:
        return self.plan[min(step, len(self.plan) - 1)]

    def entries(self, site: Site) -> Tensor:
        return self.now(site.step)[site.name].float()


@dataclass(frozen=True, eq=False)
class Everyone:
    """The budget that goes with `Listed`."""

    listed: Listed

    def at(self, step: int, total: int | None) -> int:
        return sum(int(mask.sum()) for mask in self.listed.now(step).values())


def listed(plan: Sequence[Masks], effect: Any = None, units: Any = ALL, every: int = 1) -> SelectiveTuning:
    """A method that selects exactly the masks of ``plan``, one for each step, and takes them out of dense gradients."""
    score = Listed(plan)
    end = 1 if len(plan) == 1 else None
    return SelectiveTuning(
        units, score, Everyone(score), TopK(), effect or Compact(capture="hook"), select_when=When(every=every, end=end)
    )


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def stepped(params: Any) -> list[nn.Parameter]:
    """What an optimizer steps now."""
    return [p for group in params.param_groups for p in group["params"]]


class Masked:
    """Masked-dense training, the obvious way: dense gradients times the mask, a dense step, the rest put back."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.base = model, optimizer

    def step(self, masks: Masks, clip: Callable[[list[Tensor]], Any] | None = None) -> None:
        params = dict(self.model.named_parameters())
        for name, p in params.items():
            if p.grad is not None:
                p.grad.mul_(masks[name])
        if clip is not None:
            clip(list(params.values()))
        before = snapshot(self.model)
        self.base.step()
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(torch.where(masks[name], p, before[name]))
        self.base.zero_grad()


def backward(model: Any, micro_batches: Sequence[Tensor]) -> None:
    """The gradient of one optimizer step."""
    for batch in micro_batches:
        (model.loss(batch) / len(micro_batches)).backward()


def state_of(optimizer: Selective, p: nn.Parameter) -> dict[str, Any]:
    """The optimizer's state for the selected entries of ``p``."""
    return optimizer.base.state[optimizer.owner.leaf(p)]


def index_of(optimizer: Selective, p: nn.Parameter) -> Tensor:
    """Flat indices of the selected entries of ``p``."""
    return optimizer.owner.narrow(p).index.long()
