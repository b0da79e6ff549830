"""Bottleneck adapters: a narrow path beside a matrix, from its output back to its output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_NAME = "bottleneck"


class Bottleneck(nn.Module):
    """Two narrow layers with a residual connection; what it adds is zero at first.

        h' = h + up(gelu(down(dropout(h))))      down: width -> rank, up: rank -> width, both with bias

    ``up`` starts at zero, ``down`` as `nn.Linear` does, so the first step moves ``up`` alone. Its parameters are fp32
    whatever the model's precision.

    Args:
        width: Features of h.
        rank: Features in between.
        dropout: Share of the inputs of ``down`` that is dropped in train mode, in [0, 1).

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> adapter = Bottleneck(width=6, rank=2)
        >>> sum(p.numel() for p in adapter.parameters())  # 2 * 6 * 2 + 2 + 6
        32
        >>> h = torch.randn(3, 6)
        >>> torch.equal(adapter(h), h)
        True

    References:
        Houlsby et al., *Parameter-Efficient Transfer Learning for NLP*, ICML 2019, https://arxiv.org/abs/1902.00751
    """

    def __init__(self, width: int, rank: int, dropout: float = 0.0) -> None:
        super().__init__()
        if rank < 1 or width < 1:
            raise ValueError(f"`Bottleneck(width={width}, rank={rank})` must have at least one feature on either side.")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"`Bottleneck(dropout={dropout!r})` must lie in [0, 1): it is a share of the inputs.")
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(width, rank, dtype=torch.float32)
        self.up = nn.Linear(rank, width, dtype=torch.float32)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h: Tensor) -> Tensor:
        """``h`` with what the narrow path adds, shape (..., width), in the precision of ``h``."""
        narrow = nn.functional.gelu(self.down(self.dropout(h.to(self.down.weight.dtype))))
        added: Tensor = self.up(narrow)
        return h + added.to(h.dtype)


def attach(module: nn.Module, rank: int, dropout: float = 0.0) -> Bottleneck:
    """Puts a `Bottleneck` behind a matrix, as its submodule ``bottleneck``.

    The matrix keeps its class and the names of its parameters, so that checkpoints of the bare model still load
    (``strict=False``). The path is taken by a forward hook, a function of this file that looks the submodule up when it
    runs: `state_dict`, pickle and deepcopy need nothing else.

    Args:
        module: An `nn.Linear`, or the `Conv1D` of transformers.
        rank: Features in between.
        dropout: See `Bottleneck`.

    Raises:
        ValueError: If ``module`` has a bottleneck already.

    Example:
        >>> linear = nn.Linear(4, 6)
        >>> _ = attach(linear, rank=2)
        >>> list(dict(linear.named_parameters()))[:3]
        ['weight', 'bias', 'bottleneck.down.weight']
    """
    if hasattr(module, _NAME):
        raise ValueError(f"This `{type(module).__name__}` has a bottleneck already: put one on a model once.")
    weight: Any = module.weight
    adapter = Bottleneck(weight.shape[0] if isinstance(module, nn.Linear) else weight.shape[1], rank, dropout)
    adapter.to(weight.device).train(module.training)
    module.add_module(_NAME, adapter)
    module.register_forward_hook(_through)
    return adapter


def _through(module: nn.Module, args: Any, out: Tensor) -> Any:
    adapter: Any = module.get_submodule(_NAME)
    return adapter(out)
