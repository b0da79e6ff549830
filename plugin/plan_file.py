"""A plan: what a selection chose, as one file that can be inspected and used again."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from apportion.categories import parameters
from apportion.discovery import unwrapped, walk

KINDS = ("lora", "adapter")
_FORMAT = "apportion-plan-1"


@dataclass(frozen=True, eq=False)
class Plan:
    """Which entries of a model train, and what is put beside its matrices.

    Attributes:
        indices: Sorted flat indices of the selected entries, by parameter name; int32, int64 for tensors of 2^31
            entries and more. A tensor without selected entries is missing.
        shapes: Shape of every tensor that was chosen from or trains whole, by parameter name.
        structured: Modules whose weight stays as it is and gets a ``lora`` or an ``adapter`` instead, by module name.
        dense: Names of the parameters that train whole.
        config: How the plan came about, as plain data.
        scores: fp32 scores of the selected entries, in the order of ``indices``, where they were kept.

    Raises:
        ValueError: If the parts do not fit together.

    Example:
        >>> plan = Plan({"weight": torch.tensor([0, 3])}, {"weight": (2, 2), "bias": (2,)}, dense=("bias",))
        >>> plan.count, plan.density()
        (4, 0.6666666666666666)
    """

    indices: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    structured: dict[str, str] = field(default_factory=dict)
    dense: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes = {str(name): tuple(int(d) for d in shape) for name, shape in self.shapes.items()}
        for name in (*self.indices, *self.dense):
            if name not in shapes:
                raise ValueError(f"`Plan(shapes=...)` lacks {name}, of which entries are selected.")
        for name in self.indices:
            if name in self.dense or name.removesuffix(".weight") in self.structured:
                raise ValueError(f"`Plan(indices=...)` selects entries of {name}, which trains whole or is structured.")
        for name, kind in self.structured.items():
            if kind not in KINDS:
                raise ValueError(f"`Plan(structured={{{name!r}: {kind!r}}})` must be 'lora' or 'adapter'.")
        indices = {
            name: _checked(name, self.indices[name], prod(shapes[name])) for name in shapes if name in self.indices
        }
        for name, scores in self.scores.items():
            if name not in indices or scores.shape != indices[name].shape:
                raise ValueError(f"`Plan(scores=...)` of {name} must be one score for each of its selected entries.")
        object.__setattr__(self, "shapes", shapes)
        object.__setattr__(self, "indices", {name: index for name, index in indices.items() if len(index)})
        object.__setattr__(self, "scores", {n: s.float() for n, s in self.scores.items() if len(s)})
        object.__setattr__(self, "dense", tuple(self.dense))
        object.__setattr__(self, "config", json.loads(json.dumps(self.config)))

    @property
    def count(self) -> int:
        """Entries that train: the selected ones and those of whole tensors."""
        return sum(map(len, self.indices.values())) + sum(prod(self.shapes[name]) for name in self.dense)

    def density(self) -> float:
        """The share of entries that train among those of all tensors of the plan."""
        return self.count / max(1, sum(map(prod, self.shapes.values())))

    def describe(self) -> str:
        """A table: entries and density of each tensor, structured modules, and totals."""
        rows = [("tensor", "shape", "entries", "density")]
        for name, shape in self.shapes.items():
            size = prod(shape)
            count = size if name in self.dense else len(self.indices.get(name, ()))
            rows.append((name, " x ".join(map(str, shape)), f"{count:,}", f"{count / max(1, size):.3%}"))
        total = sum(map(prod, self.shapes.values()))
        rows.append(("total", f"{total:,}", f"{self.count:,}", f"{self.density():.3%}"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}".rstrip() for a, b, c, d in rows
        ]
        lines += [f"{kind} on {name}" for name, kind in self.structured.items()]
        lines += [f"{key}: {value}" for key, value in self.config.items()]
        return "\n".join(lines)

    def check(self, model: nn.Module) -> None:
        """Refuses a ``model`` that does not have the plan's tensors and modules.

        Raises:
            ValueError: With what differs.
        """
        model = unwrapped(model)
        found = {name: tuple(p.shape) for name, p in parameters(model, "").items()}
        wrong = [
            f"{name} is {found[name]} and was {shape}" if name in found else f"{name} is missing"
            for name, shape in self.shapes.items()
            if found.get(name) != shape
        ]
        modules = {name for name, _ in walk(model)}
        wrong += [f"the module {name} is missing" for name in self.structured if name not in modules]
        if wrong:
            more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise ValueError(
                f"The plan was made for another model than this `{type(model).__name__}`: "
                f"{'; '.join(wrong[:5])}{more}. Its names begin at the module that it was made for: hand that one "
                "over, or make the plan anew."
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, whole or not at all; what ``path`` held before is replaced."""
        tensors = {f"indices/{name}": index.cpu().clone() for name, index in self.indices.items()}
        tensors |= {f"scores/{name}": scores.cpu().clone() for name, scores in self.scores.items()}
        rest = {key: getattr(self, key) for key in ("shapes", "structured", "dense", "config")}
        content = to_bytes(tensors, {"format": _FORMAT, "plan": json.dumps(rest)})
        handle, part = tempfile.mkstemp(dir=Path(path).parent, prefix=f".{Path(path).name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            os.unlink(part)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Reads what `save` wrote; runs nothing that the file brings.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds no plan, or a damaged one.
        """
        try:
            with safe_open(os.fspath(path), "pt") as file:
                told = file.metadata() or {}
                if told.get("format") != _FORMAT:
                    raise ValueError(f"its format is {told.get('format')!r}, not {_FORMAT!r}")
                parts: dict[str, dict[str, Any]] = {"indices": {}, "scores": {}}
                for key in file.keys():  # noqa: SIM118 - a file is no mapping
                    part, name = key.split("/", 1)
                    parts[part][name] = file.get_tensor(key).clone()
            return cls(**(json.loads(told["plan"]) | parts))
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"`Plan.load({os.fspath(path)!r})` found no plan that can be used: {error}") from error


def _checked(name: str, index: Tensor, size: int) -> Tensor:
    """``index`` in the smallest type, if it is sorted and in range."""
    if index.ndim != 1 or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"`Plan(indices=...)` of {name} must be flat int32 or int64, not {index.dtype}.")
    if len(index) and (int(index[0]) < 0 or int(index[-1]) >= size or bool((index[1:] <= index[:-1]).any())):
        raise ValueError(f"`Plan(indices=...)` of {name} must rise strictly and lie in [0, {size}).")
    return index.to(torch.int64 if size >= 2**31 else torch.int32)
