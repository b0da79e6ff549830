"""Low-rank adapters of a model in PEFT's hands: the three tensors of each, and what one rank of them is.

SVD form (AdaLoRA)   W = W_0 + c B diag(E) A        rank i: row i of A, entry i of E, column i of B
LoRA and DoRA        W = W_0 + c B A                rank i: row i of A, column i of B
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from apportion.discovery import walk


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapted layer.

    Attributes:
        name: Dotted path of the adapted layer.
        module: The PEFT layer.
        adapter: Name of the adapter in it.
        a: Shape (r, ...): rows lead from the inputs.
        b: Shape (outputs, r, ...): columns lead to the outputs.
        e: Singular values, shape (r, 1), in the SVD form; else None.
        capacity: Ranks that the layer was built with.
    """

    name: str
    module: Any
    adapter: str
    a: nn.Parameter
    b: nn.Parameter
    e: nn.Parameter | None
    capacity: int

    def tensors(self) -> Iterator[tuple[nn.Parameter, int]]:
        """The tensors, each with the dimension along which its ranks lie."""
        yield self.a, 0
        if self.e is not None:
            yield self.e, 0
        yield self.b, 1

    @property
    def entries(self) -> int:
        """Entries of one rank, also of an adapter that has none in memory."""
        return sum(math.prod(p.shape[:dim]) * math.prod(p.shape[dim + 1 :]) for p, dim in self.tensors())

    @property
    def gate(self) -> tuple[nn.Parameter, int]:
        """The tensor that a rank is put out by, with the dimension of its ranks: E, or else B."""
        return (self.b, 1) if self.e is None else (self.e, 0)

    @property
    def gate_name(self) -> str:
        """The name of that tensor in the layer's state dict."""
        return f"lora_E.{self.adapter}" if self.e is not None else f"lora_B.{self.adapter}.weight"

    def names(self) -> Iterator[tuple[str, int]]:
        """Names of the tensors in the layer's state dict, with the dimension of their ranks."""
        ends = ("", "") if self.e is not None else (".weight", ".weight")
        yield f"lora_A.{self.adapter}{ends[0]}", 0
        if self.e is not None:
            yield f"lora_E.{self.adapter}", 0
        yield f"lora_B.{self.adapter}{ends[1]}", 1


def find(model: nn.Module, adapter: str | None = None) -> list[Adapter]:
    """The trainable low-rank adapters of ``model``, in model order.

    Args:
        model: The model, in PEFT's hands or with its layers injected.
        adapter: Name of the adapter, matched exactly; None for the one that trains.

    Raises:
        ValueError: If there is none, or several train and none is named.
    """
    found: list[Adapter] = []
    for name, module in walk(model):
        for key in getattr(module, "lora_A", ()) if hasattr(module, "base_layer") else ():
            if adapter is not None and key != adapter:
                continue
            part = _adapter(name, module, key)
            if part is not None and part.a.requires_grad and part.b.requires_grad:
                found.append(part)
    names = sorted({part.adapter for part in found})
    if not found:
        held = sorted({k for _, m in walk(model) if hasattr(m, "base_layer") for k in getattr(m, "lora_A", ())})
        raise ValueError(
            f"No trainable low-rank adapter{f' {adapter!r}' if adapter else ''} in `{type(model).__name__}`: adapters "
            f"met: {', '.join(held) or 'none'}. Put LoRA, DoRA or AdaLoRA adapters on it with PEFT before the fit."
        )
    if len(names) > 1:
        raise ValueError(
            f"Several adapters train ({', '.join(names)}), and their ranks have budgets of their own: name one, "
            f"`Ranks(adapter={names[0]!r})`, and another callback for the others."
        )
    return found


def _adapter(name: str, module: Any, key: str) -> Adapter | None:
    values = getattr(module, "lora_E", {})
    svd = key in values
    a, b = (module.lora_A[key], module.lora_B[key]) if svd else (module.lora_A[key].weight, module.lora_B[key].weight)
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return None
    for p in (a, b):
        if hasattr(p, "device_mesh"):
            raise ValueError(
                f"The adapter {key!r} of {name} is sharded over devices (`{type(p).__name__}`), which ranks cannot be "
                "taken out of: train adapters with `strategy='ddp'` or on a single device."
            )
    return Adapter(name, module, key, a, b, values[key] if svd else None, a.shape[0])  # type: ignore[arg-type]
