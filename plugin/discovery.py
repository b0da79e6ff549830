"""Finds the layers of a model by its structure: no table of class names, no forward pass, no look at values.

A layer list is a `ModuleList`, a `Sequential` or any module with numbered children, whose children are blocks. A block
holds at least two matrices that share a width; where a model has none, at least two convolutions, one of which mixes
positions; where it has none either, any matrix at all. Lists inside a block (experts, sublayers) are parts of that
block. A list of stages, as in a hierarchical vision model, is passed over for the lists inside the stages.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

Named = tuple[str, nn.Module]
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_MEDIA_TOKEN = re.compile(r"(image|video|audio|speech|vision)\w*token\w*")


@dataclass(frozen=True, eq=False)
class Stack:
    """A list of blocks: its dotted path and its blocks with theirs, in model order."""

    name: str
    blocks: tuple[Named, ...]


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside wrappers that compile, checkpoint, shard or replicate it."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        inner = next((module._modules[key] for key in _WRAPPERS if module._modules.get(key) is not None), None)
        if inner is None:
            return module
        module = inner


def joined(name: str, child: str) -> str:
    """The dotted path of ``child`` in the module called ``name``."""
    return f"{name}.{child}" if name else child


def inside(name: str, folder: str) -> bool:
    """Whether the path ``name`` is ``folder`` or lies in it; everything lies in the root, ``''``."""
    return not folder or name == folder or name.startswith(f"{folder}.")


def children(module: nn.Module) -> list[Named]:
    """Names and modules of the children, without wrappers."""
    return [(name, unwrapped(child)) for name, child in module.named_children()]


def walk(module: nn.Module, name: str = "", seen: set[int] | None = None) -> Iterator[Named]:
    """Every module once, parents first, as ``named_modules`` but with paths that leave wrappers out."""
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    yield name, module
    for child_name, child in children(module):
        yield from walk(child, joined(name, child_name), seen)


def base(module: nn.Module) -> nn.Module:
    """What an adapter stands on: the adapted layer, or the module that an adapter library keeps beside its copy."""
    for key in ("base_layer", "original_module"):
        inner = module._modules.get(key)
        if inner is not None:
            return base(unwrapped(inner))
    return module


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a leaf that owns nothing but vectors, one of them its weight or scale."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    leaf = not module._modules and not isinstance(module, nn.PReLU)
    return leaf and all(p.ndim == 1 for p in own.values()) and bool({"weight", "scale", "gamma"} & set(own))


def matrices(module: nn.Module) -> Iterator[tuple[int, int]]:
    """(outputs, inputs) of every matrix inside ``module``, adapters left out; stacked experts count as one matrix."""
    module = base(module)
    features = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    if isinstance(features[0], int) and isinstance(features[1], int):
        yield features[0], features[1]
    elif isinstance(module, _ConvNd):
        if max(module.kernel_size) == 1:
            yield module.out_channels, module.in_channels
    elif not isinstance(module, nn.Embedding | nn.EmbeddingBag):
        transposed = hasattr(module, "nf") and hasattr(module, "nx")  # transformers' Conv1D stores (inputs, outputs)
        for p in module._parameters.values():
            if p is not None and p.ndim in (2, 3) and min(p.shape[-2:]) > 1:
                yield (p.shape[-1], p.shape[-2]) if transposed else (p.shape[-2], p.shape[-1])
    for _, child in children(module):
        yield from matrices(child)


def _touched(module: nn.Module) -> Counter[int]:
    counts: Counter[int] = Counter()
    for shape in matrices(module):
        counts.update(set(shape))
    return counts


def width(block: nn.Module) -> int:
    """The size that most matrices of ``block`` read or write; 0 without a matrix."""
    return max(_touched(block).items(), key=lambda item: (item[1], -item[0]), default=(0, 0))[0]


def _dense(block: nn.Module) -> bool:
    return max(_touched(block).values(), default=0) >= 2


def _convolves(block: nn.Module) -> bool:
    def mixes(m: _ConvNd) -> bool:  # a convolution with a stride only brings an input down to size
        return max(m.kernel_size) > 1 and max(m.stride) == 1

    kernels = [m for _, m in walk(block) if isinstance(m, _ConvNd)]
    return len(kernels) > 1 and any(mixes(m) for m in kernels)


def _weighs(block: nn.Module) -> bool:
    return next(matrices(block), None) is not None or any(isinstance(m, _ConvNd) for _, m in walk(block))


Test = Callable[[nn.Module], bool]


def stacks(model: nn.Module) -> tuple[Stack, ...]:
    """All layer lists of ``model`` in model order; empty where there is none."""
    order = {name: i for i, (name, _) in enumerate(walk(unwrapped(model)))}
    for is_block in (_dense, _convolves, _weighs):
        for numbered in (_lists, _attributes):
            found = _find(unwrapped(model), "", is_block, numbered, set())
            if found:
                return tuple(sorted(found, key=lambda stack: order[stack.blocks[0][0]]))
    return ()


def _lists(module: nn.Module) -> dict[str, list[Named]]:
    """The children, where all of them are numbered."""
    named = children(module)
    return {"": named} if named and all(name.isdigit() for name, _ in named) else {}


def _attributes(module: nn.Module) -> dict[str, list[Named]]:
    """Children called ``block1``, ``block2`` and so on, by the common part of their names."""
    groups: dict[str, list[Named]] = {}
    for name, child in children(module):
        match = re.fullmatch(r"(.*?)_?\d+", name)
        if match:
            groups.setdefault(match[1], []).append((name, child))
    return {stem: group for stem, group in groups.items() if len(group) > 1}


def _find(module: nn.Module, name: str, is_block: Test, numbered: Callable[..., Any], seen: set[int]) -> list[Stack]:
    if id(module) in seen or "base_layer" in module._modules:
        return []
    seen.add(id(module))
    found: list[Stack] = []
    taken: set[int] = set()
    for stem, group in numbered(module).items():
        fresh = [(n, m) for n, m in group if id(m) not in seen and not isinstance(m, nn.ModuleList)]
        blocks = [(joined(name, n), child) for n, child in fresh if is_block(child)]
        if blocks and not _are_stages(module, [block for _, block in blocks], is_block):
            found.append(Stack(joined(name, stem) if stem else name, tuple(blocks)))
            taken.update(id(block) for _, block in blocks)
    for child_name, child in children(module):
        if id(child) not in taken:
            found += _find(child, joined(name, child_name), is_block, numbered, seen)
    return found


def _are_stages(holder: nn.Module, blocks: list[nn.Module], is_block: Test) -> bool:
    """Whether these hold layers rather than be layers: whole models, or stages, little more than a list of blocks.

    Stages that have the same matrices as each other are groups of layers, which count as one.
    """
    inner = [_find(block, "", is_block, _lists, set()) for block in blocks]
    if any(lists and _holds_table(block) for block, lists in zip(blocks, inner, strict=True)):
        return True
    if not any(len(stack.blocks) > 1 and _alike(stack) for lists in inner for stack in lists):
        return False
    if len(blocks) == 1 and isinstance(
        holder, nn.Sequential
    ):  # a pipeline of one model and what goes before and after it
        return True
    if len(blocks) > 1 and len({tuple(matrices(block)) for block in blocks}) == 1:
        return False
    return all(_rest(block, lists) < 2 for block, lists in zip(blocks, inner, strict=True))


def _holds_table(block: nn.Module) -> bool:
    size = width(block)
    return any(isinstance(m, nn.Embedding) and m.embedding_dim == size for _, m in walk(block))


def _alike(stack: Stack) -> bool:
    return len({_kind(block) for _, block in stack.blocks}) == 1


def _kind(module: nn.Module) -> tuple[Any, ...]:
    return (type(module), *(_kind(child) for _, child in children(module) if isinstance(module, nn.Sequential)))


def _rest(block: nn.Module, lists: list[Stack]) -> int:
    """Matrices of ``block`` outside ``lists``."""
    listed = sum(1 for stack in lists for _, child in stack.blocks for _ in matrices(child))
    return sum(1 for _ in matrices(block)) - listed


def tokens_in(module: nn.Module) -> nn.Module | None:
    """The input embedding that the module itself names, if it does."""
    return _asked(module, "get_input_embeddings")


def tokens_out(module: nn.Module) -> nn.Module | None:
    """The output embedding that the module itself names, if it does."""
    return _asked(module, "get_output_embeddings")


def _asked(module: nn.Module, method: str) -> nn.Module | None:
    try:
        answer = getattr(module, method)()
    except (AttributeError, NotImplementedError, TypeError, KeyError):
        return None
    return unwrapped(answer) if isinstance(answer, nn.Module) else None


def beside_language(model: nn.Module, found: tuple[Stack, ...]) -> tuple[Stack, ...]:
    """Those of the lists that only feed a language model, such as the vision tower of a model that reads images.

    The language stack is the smallest part of the model that holds both its input embedding and layers. Encoder-decoder
    models and models of two equal towers have no such part that excludes the other.
    """
    root = unwrapped(model)
    paths = {id(module): name for name, module in walk(root)}
    side: list[Stack] = []
    for name, module in walk(root):
        tokens = tokens_in(module) if _reads_media(module) else None
        if tokens is None or id(tokens) not in paths:
            continue
        core = paths[id(tokens)]
        while core and not any(inside(stack.name, core) for stack in found):
            core = core.rpartition(".")[0]
        side += [stack for stack in found if inside(stack.name, name) and not inside(stack.name, core)]
    return tuple(stack for stack in found if stack in side)


def _reads_media(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    if config is None or (getattr(config, "is_encoder_decoder", False) and not hasattr(config, "text_config")):
        return False
    return tokens_out(module) is not None or any(_MEDIA_TOKEN.fullmatch(key) for key in vars(config))
