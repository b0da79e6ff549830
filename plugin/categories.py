"""The matrices of a layer, and what each of them is, by its name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from apportion.discovery import base, children, is_norm, joined, unwrapped, walk

CATEGORIES: Mapping[str, str] = {
    "norm": r"\w*(norm|Norm)\w*|ln_?\w+",
    "router": r"(mlp|moe|block_sparse_moe|feed_forward|ffn)\.gate|router|router\.\w+|shared_expert_gate",
    "mixer": r"mixer\.(in_proj|x_proj|dt_proj|out_proj|conv1d|A_log|D)",
    "qkv": r"(crossattention\.)?c_attn|query_key_value|\w*qkv\w*|(\w*attn|\w*attention)\.in_proj",
    "q": r"q|q_proj|query|query_proj|q_attn|q_lin|to_q|wq",
    "k": r"k|k_proj|key|key_proj|k_lin|to_k|wk",
    "v": r"v|v_proj|value|value_proj|v_lin|to_v|wv",
    "o": r"o|o_proj|out_lin|(\w*attn|\w*attention)\.(out_proj|c_proj|dense|output\.dense|proj|wo|Wo)|to_out(\.0)?",
    "gate_up": r"gate_up_proj|Wi|mlp\.gate_up",
    "gate": r"gate_proj|wi_0|w1",
    "up": r"up_proj|wi|wi_1|w3|c_fc|fc1|fc_in|dense_h_to_4h|intermediate\.dense|ffn|lin1|linear1",
    "down": r"down_proj|wo|Wo|w2|c_proj|fc2|fc_out|dense_4h_to_h|output\.dense|ffn_output|lin2|linear2",
}
"""Category to a regular expression that the last parts of a path must match as a whole; the first that fits counts."""

GROUPS: Mapping[str, str] = (
    dict.fromkeys(("q", "k", "v", "o", "qkv"), "attention")
    | dict.fromkeys(("gate", "up", "down", "gate_up"), "ffn")
    | {"norm": "norm"}
)
"""Category to the family that a balanced rule splits evenly; ``other`` for those that are not named."""


def matches(pattern: str, name: str) -> bool:
    r"""Whether the last parts of the dotted path ``name`` match ``pattern`` as a whole.

    Example:
        >>> [matches(r"layers\.\d+", name) for name in ("model.layers.3", "model.layers.3.mlp", "model.sublayers.3")]
        [True, False, False]
    """
    return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) is not None


@dataclass(frozen=True, eq=False)
class Piece:
    """One matrix with its bias, one norm, one adapter of a matrix, or one tensor that stands alone.

    Attributes:
        name: Path of the matrix, the same with and without an adapter on it.
        module: The module that owns the parameters.
        params: All parameters by name, frozen ones included.
    """

    name: str
    module: nn.Module
    params: dict[str, nn.Parameter]

    def category(self, layer: str, table: Mapping[str, str]) -> str:
        """What the piece is in the layer at path ``layer``."""
        within = self.name.removeprefix(layer).lstrip(".")
        for category, pattern in table.items():
            if matches(pattern, within):
                return category
        return "norm" if is_norm(base(self.module)) and "norm" in table else "other"


def pieces(module: nn.Module, name: str) -> Iterator[Piece]:
    """Everything with parameters inside ``module`` in model order; an adapter belongs to the matrix that it adapts.

    Matrices that a module owns directly, such as the stacked experts of a layer, are pieces of their own: ``X`` or
    ``X_weight`` goes with ``X_bias``.
    """
    if "base_layer" in module._modules:
        yield from _adapted(module, name)
        return
    if "original_module" in module._modules:
        yield Piece(name, module, parameters(module, name))
        return
    parts: dict[str, dict[str, nn.Parameter]] = {}
    for key, p in module._parameters.items():
        if p is not None:
            stem = "" if is_norm(module) else _stem(key)
            parts.setdefault(stem, {})[joined(name, key)] = p
    for stem, params in parts.items():
        yield Piece(joined(name, stem) if stem else name, module, params)
    for key, child in children(module):
        yield from pieces(child, joined(name, key))


def _adapted(module: nn.Module, name: str) -> Iterator[Piece]:
    """An adapter and what it stands on; adapters of several tensors of one module are stacked on each other."""
    inner = unwrapped(module.get_submodule("base_layer"))
    params = parameters(module, name)
    stacked = "base_layer" in inner._modules
    if stacked:
        for piece in _adapted(inner, joined(name, "base_layer")):
            yield piece
            params = {key: p for key, p in params.items() if key not in piece.params}
    tensor: Any = getattr(module, "parameter_name", "")
    path = re.sub(r"(\.base_layer)+$", "", name)
    yield Piece(joined(path, tensor) if tensor else path, module, params)


def parameters(module: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """All parameters inside ``module`` by path; a tensor with several names stands under each."""
    return {joined(path, key): p for path, m in walk(module, name) for key, p in m._parameters.items() if p is not None}


def _stem(key: str) -> str:
    """What the names of a weight and its bias have in common."""
    match = re.fullmatch(r"(?:(\w+)_)?(?:weight|bias)", key) or re.fullmatch(r"(?:weight|bias)_(\w+)", key)
    return (match[1] or "") if match else key
