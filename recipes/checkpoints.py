"""Checkpoints on disk: their tensors by name, read one at a time, and the transformers model that they are of."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor

_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_WEIGHTS = (".safetensors", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json", *_PICKLES)
_FORMS = "a Hugging Face folder with safetensors weights, a .safetensors file or a Lightning .ckpt"


class Shards(Mapping[str, Tensor]):
    """Tensors of safetensors files, each mapped from its file when it is asked for.

    Args:
        files: The files.
        tick: Called at every tensor that is read.

    Raises:
        ValueError: If a file is damaged.
    """

    def __init__(self, files: Sequence[Path], tick: Callable[[], object] = lambda: None) -> None:
        self.tick = tick
        self._files: dict[str, Any] = {}
        for path in files:
            try:
                file = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path} is cut short, altered or no safetensors ({error}).") from None
            self._files.update(dict.fromkeys(file.keys(), file))

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        self.tick()
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def weights(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint by name. Nothing is unpickled but tensors and plain data.

    Raises:
        ValueError: If there is no checkpoint of a known form, or it cannot be read without running what it holds.
    """
    if path.is_dir():
        return Shards(_files_of(path))
    if not path.is_file():
        raise ValueError(f"{path} does not exist; it must be {_FORMS}.")
    if path.suffix == ".safetensors":
        return Shards([path])
    if path.suffix in _PICKLES:
        return _pickled(path)
    raise ValueError(f"{path} must be {_FORMS}.")


def _files_of(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(
            f"{folder} has neither {single.name} nor {index.name}: it must be {_FORMS}. Weights in another format are "
            "converted by loading the model with transformers and saving it again."
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: it maps no tensors to files ({error!r}).") from None
    wrong = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if wrong:
        raise ValueError(f"{index} names {wrong[0]}, which is not in {folder}: the checkpoint is incomplete.")
    return [folder / name for name in names]


def _pickled(path: Path) -> dict[str, Tensor]:
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds more than tensors and plain data, and is not opened: unpickling it could run anything. "
            "Where it was made, write its weights alone with `safetensors.torch.save_model(module, file)`, or train "
            "with hyperparameters that are plain data."
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is cut short or no checkpoint of torch ({str(error).splitlines()[0]}).") from None
    state = held.get("state_dict", held) if isinstance(held, dict) else None
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} has no `state_dict`: it must be {_FORMS}.")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def model_of(folder: Path, other: Path | None = None) -> Any:
    """The model of a Hugging Face folder, built by transformers in the dtype of its weights.

    Args:
        folder: The folder.
        other: Another folder, or ``config.json``, that says what is built from the weights.

    Raises:
        ValueError: If the folder lacks config or weights, or transformers does not have the architecture itself.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json, by which the model is built.")
    _files_of(folder)
    config = transformers.AutoConfig.from_pretrained(str(other or folder), local_files_only=True)
    name = (getattr(config, "architectures", None) or [""])[0]
    kind = getattr(transformers, name, None) if name else None
    if kind is None:
        raise ValueError(
            f"The config names {name or 'no architecture'}, which transformers has not itself: build the model in "
            "Python and use `apportion.delta.apply`, or give another config by `--config`."
        )
    try:
        return kind.from_pretrained(
            str(folder), config=config, dtype="auto", local_files_only=True, use_safetensors=True
        )
    except RuntimeError as error:
        raise ValueError(f"{folder} does not fit its config: {error}") from None


def copy_others(base: Path, out: Path) -> None:
    """Copies what is no weights, unless transformers has written it."""
    for path in sorted(base.rglob("*")):
        inside = path.relative_to(base)
        apart = any(part.startswith((".", "checkpoint-")) for part in inside.parts)
        if path.is_file() and not apart and not path.name.endswith(_WEIGHTS) and not (out / inside).exists():
            (out / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / inside)
