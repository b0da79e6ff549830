"""What single entries hold, measured on Llama-shaped models on the CPU.

Matrices and the head are candidates; embeddings and norms are frozen. Weights and tokens are random, in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.optim import AdamW

from apportion.budgets import Constant
from apportion.candidates import Candidates
from apportion.driver import SelectiveTuning
from apportion.effects import Compact
from apportion.entry_units import Entries
from apportion.entrywise import D3
from apportion.memory import Tracker
from apportion.optim import Selective
from apportion.rules import TopK
from apportion.types import When

UNITS = Entries(head="unit")
LR, DECAY = 1e-4, 0.01


@dataclass(frozen=True)
class Size:
    """A Llama-shaped model and a batch of one row."""

    label: str
    hidden: int
    inner: int
    layers: int
    tokens: int
    vocabulary: int = 4096

    def build(self) -> nn.Module:
        """The model with random weights, the same every time, of which embeddings and norms are frozen."""
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=max(1, self.hidden // 64),
            num_key_value_heads=max(1, self.hidden // 64),
            use_cache=False,
        )
        model: nn.Module = transformers.LlamaForCausalLM(config)
        for name, p in model.named_parameters():
            p.requires_grad_(p.ndim > 1 and "embed" not in name)
        return model

    def batches(self) -> Iterator[Tensor]:
        """Random tokens for ever, the same every time; shape (1, tokens)."""
        generator = torch.Generator().manual_seed(1)
        while True:
            yield torch.randint(0, self.vocabulary, (1, self.tokens), generator=generator)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What the optimizer gets."""
    return [p for p in model.parameters() if p.requires_grad]


def backward(model: Any, tokens: Tensor) -> None:
    """Forward and backward on one batch."""
    model(input_ids=tokens, labels=tokens).loss.backward()


def adamw(model: nn.Module, **options: Any) -> AdamW:
    """AdamW over what trains."""
    return AdamW(trainable(model), lr=LR, **{"weight_decay": DECAY, **options})


def memory(size: Size, share: float) -> dict[str, Any]:
    """Bytes of entries at a step that selects ``share`` of them by gradients, and at steps that do not."""
    model = size.build()
    method = SelectiveTuning(UNITS, D3(), Constant(share), TopK(), Compact(), select_when=When(end=1))
    optimizer = Selective(adamw(model), model, method)
    batches = size.batches()
    moments: list[dict[str, int]] = []
    tensors = candidates(optimizer).tensors
    stores = [optimizer.owner.narrow(p) for p in tensors]
    for store in stores:
        store.collect = _after(lambda: moments.append(_held(optimizer)), store.collect)  # type: ignore[method-assign]
    with Tracker(model, optimizer) as tracker:
        for kind in ("selection", "first", "second"):
            moments.clear()
            tracker.mark(f"before the {kind} step")
            backward(model, next(batches))
            moments.append(_held(optimizer))
            optimizer.step()
            moments.append(_held(optimizer))
            optimizer.zero_grad()
            peak = tracker.mark(kind).total
            if kind == "selection":
                at_selection = {"selection_held": max(_sum(m) for m in moments), "selection_peak": peak}
    k = sum(len(store.index) for store in stores)
    largest = max(p.numel() for p in tensors)
    most = max(moments, key=_sum)
    alone = _alone(size)
    allowed = 20 * k + 4 * largest
    return {
        "model": size.label,
        "parameters": sum(p.numel() for p in model.parameters()),
        "share": share,
        "selected": k,
        **most,
        "total": _sum(most),
        "allowed": allowed,
        "ratio": _sum(most) / allowed,
        "entries_ratio": max(_sum(m) - m["dense"] for m in moments) / (20 * k),
        "peak": peak,
        "above_alone": peak - alone,
        **at_selection,
        "selection_above_alone": at_selection["selection_peak"] - alone,
    }


def _sum(parts: dict[str, int]) -> int:
    return sum(parts.values())


def candidates(optimizer: Selective) -> Candidates:
    """What the selection chooses from."""
    bound = optimizer.selection.bound
    assert isinstance(bound, Candidates)
    return bound


def _after(first: Callable[[], None], then: Callable[..., Any]) -> Callable[..., Any]:
    def both(*args: Any) -> Any:
        first()
        return then(*args)

    return both


def _held(optimizer: Selective) -> dict[str, int]:
    """Bytes by part at this moment; what shares a storage counts once."""
    selection: Any = optimizer.selection
    stores = [optimizer.owner.narrow(p) for p in selection.bound.tensors]
    leaves = [store.leaf for store in stores]
    parts: dict[str, list[Any]] = {
        "state": [v for state in optimizer.base.state.values() for v in state.values()],
        "masters": list(leaves),
        "gradients": [leaf.grad for leaf in leaves],
        "indices": [*(store.index for store in stores), *(selection.units or ())],
        "dense": [p.grad for p in selection.bound.tensors],
    }
    return {part: _bytes(tensors) for part, tensors in parts.items()}


def _bytes(tensors: Sequence[Any]) -> int:
    storages = [t.untyped_storage() for t in tensors if isinstance(t, Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}.values())


@cache
def _alone(size: Size) -> int:
    """The peak of forward and backward, with every gradient freed as it arrives."""
    model = size.build()
    batches = size.batches()
    for p in trainable(model):
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with Tracker(model) as tracker:
        backward(model, next(batches))
    return tracker.peak.total
