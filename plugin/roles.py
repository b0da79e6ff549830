"""What stands around the layers of a model: embedding, head, norms and the rest, by position and by shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.conv import _ConvNd

from apportion.discovery import Named, children, is_norm, joined, matrices, tokens_in, tokens_out, walk, width

ROLES = ("embedding", "head", "norm", "other")


@dataclass(frozen=True, eq=False)
class Part:
    """A module outside the layers, or one parameter of a module that holds layers, with its role."""

    role: str
    name: str
    module: nn.Module | None
    params: dict[str, nn.Parameter]


@dataclass(frozen=True, eq=False)
class Surroundings:
    """Sorts what stands outside the layers by role; the first line that fits decides.

        stands in a tower that only feeds a language model                other
        is or holds an `Embedding` or the model's input embedding         embedding
        holds nothing but norms                                           norm (embedding, if its name says ``emb``)
        is or holds the model's output embedding                          head
        stands between two parts that hold layers                         other
        its matrices lead from another size to the width of a layer       embedding
        its matrices lead from the width of a layer to another size       head
        other matrices and convolutions before or after the layers        embedding or head
        parameters with several axes beside the layers (tokens, tables)   embedding
        everything else                                                   other

    Before and after mean the order of registration among the siblings.

    Args:
        model: The whole model, without wrappers.
        blocks: Every layer found, selected or not.
        side: Those of them in towers that only feed a language model.
    """

    model: nn.Module
    blocks: tuple[Named, ...]
    side: tuple[Named, ...] = ()
    _holders: dict[int, bool] = field(default_factory=dict, init=False)
    _members: set[int] = field(default_factory=set, init=False)
    _tokens_in: set[int] = field(default_factory=set, init=False)
    _tokens_out: set[int] = field(default_factory=set, init=False)
    _widths: set[int] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self._members.update(id(block) for _, block in self.blocks)
        self._widths.update(width(block) for _, block in self.blocks)
        beside = {name for name, _ in self.side}
        paths = [name for name, _ in self.blocks if name not in beside]
        core = {path[:end] for path in paths for end in _ends(path)}
        both = core | {path[:end] for path in beside for end in _ends(path)}
        for name, module in walk(self.model):
            if name in both:
                self._holders[id(module)] = name in core
            self._tokens_in.update(id(m) for m in [tokens_in(module)] if m is not None)
            self._tokens_out.update(id(m) for m in [tokens_out(module)] if m is not None)

    def parts(self) -> Iterator[Part]:
        """Everything outside the layers, in model order."""
        yield from self._parts("", self.model, (False, False), set())

    def _parts(self, name: str, holder: nn.Module, within: tuple[bool, bool], seen: set[int]) -> Iterator[Part]:
        seen.add(id(holder))
        aside = not self._holders.get(id(holder), True)
        for key, p in holder._parameters.items():
            if p is not None:
                role = "embedding" if p.ndim > 1 and not aside else "other"
                yield Part(role, joined(name, key), None, {joined(name, key): p})
        named = children(holder)
        holds = [id(child) in self._holders or id(child) in self._members for _, child in named]
        for i, (key, child) in enumerate(named):
            path = joined(name, key)
            around = (within[0] or any(holds[:i]), within[1] or any(holds[i + 1 :]))
            if id(child) in seen or id(child) in self._members:
                continue
            if holds[i]:  # in a list of stages, the end of one stage is not the end of the layers
                yield from self._parts(path, child, around if key.isdigit() else within, seen)
                continue
            fresh = [(p, m) for p, m in walk(child, path) if id(m) not in seen]
            seen.update(id(m) for _, m in fresh)
            params = {joined(p, k): v for p, m in fresh for k, v in m._parameters.items() if v is not None}
            if params:
                yield Part("other" if aside else self._role(path, child, *around), path, child, params)

    def _role(self, path: str, module: nn.Module, preceded: bool, followed: bool) -> str:
        within = [m for _, m in walk(module)]
        if any(isinstance(m, nn.Embedding) or id(m) in self._tokens_in for m in within):
            return "embedding"
        if all(is_norm(m) for m in within if any(True for _ in m.parameters(recurse=False))):
            return "embedding" if "emb" in path.rpartition(".")[2].lower() else "norm"
        if any(id(m) in self._tokens_out for m in within):
            return "head"
        shapes = list(matrices(module))
        if (preceded and followed) or not (shapes or any(isinstance(m, _ConvNd) for m in within)):
            return "other"
        reads, writes = (shapes[0][1] in self._widths, shapes[-1][0] in self._widths) if shapes else (False, False)
        if reads != writes:
            return "head" if reads else "embedding"
        return "head" if preceded else "embedding"


def _ends(path: str) -> list[int]:
    """Where the proper prefixes of a dotted path end, the root's included."""
    return [0, *(i for i, letter in enumerate(path) if letter == ".")]
