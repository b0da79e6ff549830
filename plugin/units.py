"""Units of a model: its layers, or the matrices inside them, found by structure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from apportion.binding import Search
from apportion.categories import CATEGORIES, GROUPS, parameters, pieces
from apportion.discovery import unwrapped
from apportion.types import Bound, Unit


@dataclass(frozen=True)
class Layers:
    r"""The layers of a model: every block of every layer list, in model order.

    Layers are found by structure: the lists of blocks that hold at least two matrices of a common width and do not lie
    in such a block themselves. Encoder and decoder count, both towers of a CLIP, the blocks of all stages of a Swin.
    Only parameters that require a gradient belong to a unit, so that with adapters a unit is the adapters of a layer;
    layers without any are left out. What stands around the layers (embeddings, head, norms) has a role; the rest trains
    at every step. Tied weights are one tensor, with the role of the embedding; a tensor that several layers share
    belongs to the first.

    Args:
        embeddings: ``train`` them at every step (or True), ``freeze`` them (or False), or make them one more ``unit``,
            the first. What leads from the input to the first layer counts: tokens, positions, patches, a projection.
        head: The same for what leads from the last layer to the output: language model head, classifier, pooler.
        norm: The same for the norms outside the layers.
        pattern: Regular expression that names the layers instead of the search. It must match the last parts of a
            dotted module path as a whole (``layers\.[0-3]`` matches ``model.layers.2``); of nested matches the
            outermost counts.
        exclude: Regular expression, matched in the same way, for layers that are no units; they train at every step. A
            match on a module excludes all that lies in it.
        towers: ``language`` leaves out towers that only feed a language model (they train at every step if they require
            a gradient); ``all`` takes their layers too.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> block = lambda: nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        >>> model = nn.Sequential(nn.Embedding(10, 4), block(), block(), nn.LayerNorm(4), nn.Linear(4, 10))
        >>> bound = Layers(norm="freeze").bind(model)
        >>> bound.names, bound.found["head"], list(bound.never)
        (('1', '2'), ('4.weight', '4.bias'), ['3.weight', '3.bias'])
    """

    embeddings: str | bool = "train"
    head: str | bool = "train"
    norm: str | bool = "train"
    pattern: str | None = None
    exclude: str | None = None
    towers: str = "language"

    def __post_init__(self) -> None:
        kind = type(self).__name__
        for key in ("embeddings", "head", "norm"):
            value = getattr(self, key)
            if isinstance(value, bool):  # a preset's switch
                value = "train" if value else "freeze"
                object.__setattr__(self, key, value)
            if value not in ("train", "freeze", "unit"):
                raise ValueError(
                    f"`{kind}({key}={value!r})` must be 'train' (at every step), 'freeze' (never) or 'unit' (in turn)."
                )
        if self.towers not in ("language", "all"):
            raise ValueError(f"`{kind}(towers={self.towers!r})` must be 'language' or 'all'.")
        for key in ("pattern", "exclude"):
            _compile(f"{kind}({key}={getattr(self, key)!r})", getattr(self, key))

    def bind(self, model: nn.Module) -> Bound:
        """Finds the units in ``model``, which may live on the meta device; runs nothing and changes nothing.

        Raises:
            ValueError: If there is no layer, nothing in the layers requires a gradient, what does is one set that all
                of them hold, or a pattern matches nothing.
        """
        return Search(self, unwrapped(model)).bound()

    def split(self, index: int, name: str, layer: nn.Module) -> Iterator[Unit]:
        """The units of one layer, frozen parameters included."""
        yield Unit(name, parameters(layer, name), layer, index)


@dataclass(frozen=True)
class Modules(Layers):
    """The matrices inside the layers: each with its bias, each norm, each adapter of a matrix is a unit.

    The arguments of `Layers` mean the same; ``exclude`` also applies to the paths of matrices. A fused matrix (query,
    key and value in one, gate and up in one) cannot be split: it is one unit, of category ``qkv`` or ``gate_up``.
    Stacked experts are one unit per tensor. ``block`` is the index of the layer.

    Args:
        categories: Category to a regular expression that the last parts of a matrix's path in its layer must match as a
            whole; the first category that fits counts, ``other`` if none does. None is the table
            `apportion.categories.CATEGORIES`, which ``conf/slots/units/modules.yaml`` spells out.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> block = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        >>> bound = Modules().bind(nn.TransformerEncoder(block, 2, enable_nested_tensor=False))
        >>> [(unit.category, unit.group) for unit in bound.units[:3]], bound.n
        ([('qkv', 'attention'), ('o', 'attention'), ('up', 'ffn')], 12)
    """

    categories: Mapping[str, str] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        table = None if self.categories is None else {str(k): v for k, v in self.categories.items()}
        for category, pattern in (table or {}).items():
            _compile(f"Modules(categories={{{category!r}: {pattern!r}}})", pattern)
        object.__setattr__(self, "categories", None if table == CATEGORIES else table)

    def split(self, index: int, name: str, layer: nn.Module) -> Iterator[Unit]:
        """The units of one layer, frozen parameters included."""
        table = CATEGORIES if self.categories is None else self.categories
        for piece in pieces(layer, name):
            category = piece.category(name, table)
            yield Unit(piece.name, piece.params, piece.module, index, category, GROUPS.get(category, "other"))


def _compile(call: str, pattern: Any) -> None:
    if pattern is None:
        return
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"`{call}` is no regular expression: {error}.") from None
