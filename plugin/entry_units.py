"""Entries and rows: single weights, or rows of matrices, of the tensors that are worth choosing from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from apportion.candidates import POOLS, Candidates
from apportion.categories import matches, parameters
from apportion.discovery import beside_language, inside, is_norm, stacks, unwrapped, walk
from apportion.roles import Surroundings
from apportion.types import Unit

ROLES = ("embeddings", "head", "norm", "bias")
_ROLE_OF = {"embedding": "embeddings", "head": "head", "norm": "norm"}  # of the search, to the argument for it
_TREATMENTS = {True: "train", False: "freeze"}


@dataclass(frozen=True)
class Entries:
    r"""Single weights: every entry of every candidate tensor is a unit.

    Candidates are the trainable matrices and convolutions of the model, inside and outside its layers, and whatever a
    role makes ``unit``. Roles are found by structure, as for `Layers`; where a model has no layers, embeddings and
    norms are known by their kind, and there is no head. Tied weights are one tensor, with the role of the embedding.

    Args:
        embeddings: ``freeze`` them (or False), ``train`` all their entries at every step (or True), or make them
            candidates, ``unit``.
        head: The same for what leads from the last layer to the output.
        norm: The same for all norms, inside the layers and outside.
        bias: The same for the other vectors and scalars.
        matrices: ``unit``, or ``freeze`` to leave only what the roles make candidates.
        pattern: Regular expression that must match the last parts of a parameter's dotted path, or of a module that it
            lies in, as a whole; other candidates are frozen. None for all.
        exclude: Regular expression, matched in the same way, for candidates that are frozen.
        dense: Regular expression, matched in the same way, for parameters that train whole at every step, whatever
            their role: a fresh head that the search does not know, adapters.
        charge: Whether the budget pays for what trains whole: its entries come off the count to be selected.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> block = lambda: nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        >>> model = nn.Sequential(nn.Embedding(10, 4), block(), block(), nn.LayerNorm(4), nn.Linear(4, 10))
        >>> bound = Entries().bind(model)
        >>> bound.names, bound.n, list(bound.always)
        (('1.0.weight', '1.2.weight', '2.0.weight', '2.2.weight'), 128, ['4.weight', '4.bias'])
    """

    embeddings: str | bool = "freeze"
    head: str | bool = "train"
    norm: str | bool = "freeze"
    bias: str | bool = "freeze"
    matrices: str = "unit"
    pattern: str | None = None
    exclude: str | None = None
    dense: str | None = None
    charge: bool = False

    grain: ClassVar[str] = "entry"

    def __post_init__(self) -> None:
        kind = type(self).__name__
        for key in ROLES:
            value = getattr(self, key)
            if isinstance(value, bool):
                object.__setattr__(self, key, _TREATMENTS[value])
            elif value not in ("train", "freeze", "unit"):
                raise ValueError(
                    f"`{kind}({key}={value!r})` must be 'train' (all entries, at every step), 'freeze' (none) or "
                    "'unit' (candidates)."
                )
        if self.matrices not in ("unit", "freeze"):
            raise ValueError(f"`{kind}(matrices={self.matrices!r})` must be 'unit' (candidates) or 'freeze'.")
        for key in ("pattern", "exclude", "dense"):
            pattern = getattr(self, key)
            try:
                re.compile(pattern or "")
            except (re.error, TypeError) as error:
                raise ValueError(f"`{kind}({key}={pattern!r})` is no regular expression: {error}.") from None

    def bind(self, model: nn.Module) -> Candidates:
        """Finds the candidates in ``model``, which may live on the meta device; runs nothing and changes nothing.

        Raises:
            ValueError: If there is no candidate, a pattern matches nothing, or a candidate cannot be written into.
        """
        model = unwrapped(model)
        treatments = self._treatments(model)
        groups: dict[str, dict[str, nn.Parameter]] = {"unit": {}, "train": {}, "freeze": {}}
        for name, (p, treatment) in treatments.items():
            groups[treatment][name] = p
        if not groups["unit"]:
            raise ValueError(self._nothing(model, treatments))
        for name, p in groups["unit"].items():
            _check(f"{type(self).__name__}()", name, p)
        layers = [name for stack in stacks(model) for name, _ in stack.blocks]
        owners = dict(walk(model))
        units = tuple(
            Unit(name, {name: p}, owners[_owner(name)], _layer(name, layers), name.rsplit(".", 1)[-1], "tensor")
            for name, p in groups["unit"].items()
        )
        charged = sum(p.numel() for p in groups["train"].values()) if self.charge else 0
        kinds = _roles(model)
        embedded = tuple(name for name, (p, _) in treatments.items() if kinds.get(id(p)) == "embeddings")
        found = {"embedding": embedded}
        return Candidates(units, groups["train"], groups["freeze"], found, charged=charged, pool=self._pool())

    def _pool(self) -> str | None:
        return None

    def _treatments(self, model: nn.Module) -> dict[str, tuple[nn.Parameter, str]]:
        """Each trainable tensor by its first name, with what is done to it."""
        roles = _roles(model)
        seen: dict[int, str] = {}
        found: dict[str, tuple[nn.Parameter, str]] = {}
        matched = {"pattern": 0, "exclude": 0, "dense": 0}
        for name, p in parameters(model, "").items():
            if id(p) in seen or not p.requires_grad:
                continue
            seen[id(p)] = name
            _check_shape(f"{type(self).__name__}()", name, p)
            role = roles.get(id(p), "matrices" if p.ndim > 1 else "bias")
            treatment = getattr(self, role)
            hits = {key: _hit(getattr(self, key), name) for key in matched}
            for key, hit in hits.items():
                matched[key] += hit
            if hits["dense"]:
                treatment = "train"
            elif treatment == "unit" and (hits["exclude"] or (self.pattern is not None and not hits["pattern"])):
                treatment = "freeze"
            found[name] = (p, treatment)
        for key, count in matched.items():
            if getattr(self, key) is not None and count == 0:
                raise ValueError(
                    f"`{type(self).__name__}({key}={getattr(self, key)!r})` matches no trainable parameter of "
                    f"`{type(model).__name__}`: it must match the last parts of a parameter's dotted path, or of a "
                    f"module that it lies in, as a whole. Names: {_shown(list(found))}."
                )
        return found

    def _nothing(self, model: nn.Module, treatments: Mapping[str, tuple[nn.Parameter, str]]) -> str:
        quantized = [name for name, p in parameters(model, "").items() if not p.is_floating_point() and p.ndim > 1]
        hint = (
            f"Its weights are quantized ({quantized[0]}) and single entries of them cannot be written: put adapters on "
            "them and select entries of the adapters."
            if quantized
            else "Set `requires_grad` before the fit, or give the roles (embeddings, head, norm, bias) 'unit'."
        )
        kinds = {kind: [n for n, (_, t) in treatments.items() if t == kind] for kind in ("train", "freeze")}
        return (
            f"`{self!r}` finds no candidate in `{type(model).__name__}`: of its {len(treatments)} trainable tensors "
            f"{len(kinds['train'])} train whole and {len(kinds['freeze'])} are frozen ({_shown(kinds['freeze'])}). "
            f"{hint}"
        )


@dataclass(frozen=True)
class Rows(Entries):
    """Rows of the candidate tensors: all weights into one output (for a convolution, one output channel).

    The arguments of `Entries` mean the same, but ``charge`` has to be False; a vector's rows are its entries. A row's
    score is made of its entries':

        score_i = sum_j s_ij   (sum);   (1 / width) sum_j s_ij   (mean);   |sum_j s_ij|   (abs_sum)

    Args:
        pool: ``mean``, ``sum`` or ``abs_sum``.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> bound = Rows().bind(nn.Sequential(nn.Linear(4, 3, bias=False)))
        >>> bound.n, bound.entries(0, torch.tensor([0, 2]))
        (3, tensor([ 0,  1,  2,  3,  8,  9, 10, 11]))
    """

    pool: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool not in POOLS:
            raise ValueError(f"`Rows(pool={self.pool!r})` must be one of {', '.join(POOLS)}.")
        if self.charge:
            raise ValueError("`Rows(charge=True)` does not go: a budget of rows cannot pay for entries. Leave it out.")

    def _pool(self) -> str | None:
        return self.pool


def _roles(model: nn.Module) -> dict[int, str]:
    """Tensors with a role, by identity."""
    roles: dict[int, str] = {}
    for _, module in walk(model):
        own = [p for p in module._parameters.values() if p is not None]
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            roles.update((id(p), "embeddings") for p in own)
        elif is_norm(module):
            roles.update((id(p), "norm") for p in own)
    found = stacks(model)
    blocks = tuple(block for stack in found for block in stack.blocks)
    side = tuple(block for stack in beside_language(model, found) for block in stack.blocks)
    for part in Surroundings(model, blocks, side).parts() if blocks else ():
        if part.role in _ROLE_OF:
            for p in part.params.values():
                roles.setdefault(id(p), _ROLE_OF[part.role])
    return roles


def _check_shape(call: str, name: str, p: Any) -> None:
    if is_lazy(p):
        raise ValueError(f"`{call}`: {name} has no shape yet: run one batch through the model before the fit.")


def _check(call: str, name: str, p: nn.Parameter) -> None:
    """Refuses what has no entries of its own to write into."""
    plain = type(p.data) is Tensor or type(p.data).__name__ == "FakeTensor"
    if not plain or not p.is_floating_point():
        raise ValueError(
            f"`{call}`: {name} is a `{type(p.data).__name__}` of {p.dtype}, whose entries cannot be written one "
            "by one (quantized or sharded?): put adapters on it and select entries of the adapters, or leave it out by "
            "`exclude=`."
        )


def _hit(pattern: str | None, name: str) -> bool:
    if pattern is None:
        return False
    parts = name.split(".")
    return any(matches(pattern, ".".join(parts[: i + 1])) for i in range(len(parts)))


def _owner(name: str) -> str:
    return name.rsplit(".", 1)[0] if "." in name else ""


def _layer(name: str, layers: list[str]) -> int:
    return next((i for i, layer in enumerate(layers) if inside(name, layer)), 0)


def _shown(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"
