"""Tensors by name: which names are one tensor, what their bits are, and what a whole model is known by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from apportion.categories import matches

Source = Mapping[str, Tensor] | nn.Module
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def table(source: Source) -> Mapping[str, Tensor]:
    """Parameters and saved buffers of a module under all their names; a mapping as it is.

    A mapping that is no ``dict`` may read a tensor only when it is asked for, and is asked for one at a time.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2, affine=False))
        >>> list(table(model))
        ['0.weight', '1.running_mean', '1.running_var', '1.num_batches_tracked']
    """
    if not isinstance(source, nn.Module):
        return source
    found: dict[str, Tensor] = {}
    for path, module in source.named_modules(remove_duplicate=False):
        saved = {k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for name, tensor in (*module._parameters.items(), *saved.items()):
            if tensor is not None:
                found[f"{path}.{name}" if path else name] = tensor
    return found


def first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Every name to the first name of the same tensor: tied weights have several.

    In a mapping that is no ``dict`` every name counts as a tensor of its own.

    Example:
        >>> a, b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        >>> b.weight = a.weight
        >>> first_names(table(nn.Sequential(a, b)))
        {'0.weight': '0.weight', '1.weight': '0.weight'}
    """
    if not isinstance(tensors, dict):
        return {name: name for name in tensors}
    seen: dict[tuple[object, ...], str] = {}
    first: dict[str, str] = {}
    for name, t in tensors.items():
        usual = t.numel() > 0 and t.layout == torch.strided and not t.is_meta
        key = (t.data_ptr(), t.dtype, t.device, t.shape, t.stride()) if usual else (name,)
        first[name] = seen.setdefault(key, name)
    return first


def bits(tensor: Tensor) -> Tensor:
    """The tensor's memory as integers of the same width, sharing it: -0.0 is not 0.0, and a NaN equals itself.

    Raises:
        ValueError: If the tensor has no dense memory of its own on this process.
    """
    whole = tensor.layout == torch.strided and not tensor.is_meta and not hasattr(tensor, "device_mesh")
    if not whole or tensor.element_size() not in _BITS:
        raise ValueError(
            f"A {type(tensor).__name__} of {tensor.dtype} on {tensor.device} cannot be read bit by bit: give dense "
            "tensors with data; gather a sharded model to full tensors first."
        )
    return tensor.detach().view(_BITS[tensor.element_size()])


class Digest:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, added one at a time."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes in one tensor, copied to the CPU if it lies elsewhere."""
        self._hash.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        self._hash.update(bits(tensor).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def text(self) -> str:
        """The digest so far, 64 hexadecimal digits."""
        return self._hash.hexdigest()


def fingerprint(source: Source, without: str | None = None) -> str:
    """What a model is known by: SHA-256 over its tensors' names, dtypes, shapes and bytes, by sorted name.

    Every byte is read, one tensor at a time, so any other model has another fingerprint. Tied weights count once, under
    their first name; device, order and `requires_grad` do not count.

    Args:
        source: A model, or its tensors by name.
        without: Regular expression on the last parts of names that are left out, such as a head drawn at random.

    Example:
        >>> fingerprint({"a": torch.zeros(1)}) == fingerprint({"a": torch.zeros(1)})
        True
        >>> fingerprint({"a": torch.zeros(1)}) == fingerprint({"a": -torch.zeros(1)})
        False
    """
    tensors, digest = table(source), Digest()
    for name in sorted(set(first_names(tensors).values())):
        if without is None or not matches(without, name):
            digest.add(name, tensors[name])
    return digest.text()


def some(names: Iterable[str]) -> str:
    """The first three of many names, for an error."""
    listed = sorted(names)
    return ", ".join(f"`{n}`" for n in listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def take(tensor: Tensor, indices: Tensor | None) -> Tensor:
    """A contiguous copy of the values at flat indices (row-major, whatever the strides), or of all for None.

    Example:
        >>> take(torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T, torch.tensor([1]))
        tensor([3.])
    """
    if indices is None:
        return tensor.detach().clone(memory_format=torch.contiguous_format)
    return bits(tensor).reshape(-1)[indices.to(tensor.device).long()].view(tensor.dtype)


def put(tensor: Tensor, indices: Tensor | None, values: Tensor) -> None:
    """Writes values of the tensor's dtype at flat indices, or over the whole tensor, in place and bit for bit."""
    target, source = bits(tensor), bits(values.to(tensor.device))
    if indices is None:
        target.copy_(source)
    elif target.is_contiguous():
        target.view(-1)[indices.to(tensor.device).long()] = source
    else:
        target[torch.unravel_index(indices.to(tensor.device).long(), target.shape)] = source
