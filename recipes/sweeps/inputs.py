"""What a job read from disk: a job that was done with other data is not the same job."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cache
from glob import escape
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

_SPLITS = ("train", "val", "test")


def inputs(cfg: DictConfig) -> dict[str, str]:
    """The data files that a config names on this machine, each with a digest of its content.

    Files are found as the data modules find them: ``data.train`` and so on are files, or files or numbered parts in the
    folder ``data.path``. What comes from the hub, and folders of images, are not among them.

    Args:
        cfg: A composed config.
    """
    data: Any = OmegaConf.to_container(cfg.get("data") or OmegaConf.create({}), resolve=False)
    return {str(path): _digest(path, path.stat().st_mtime_ns) for path in sorted(set(_files(data)))}


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The digests' owners that are not as they were; a file by another name counts by its content alone.

    Example:
        >>> changed({"/a/train.tsv": "12", "/a/dev.tsv": "34"}, {"/b/train.tsv": "12", "/b/dev.tsv": "56"})
        ['/b/dev.tsv']
    """
    known = set(before.values())
    return [name for name, digest in now.items() if digest not in known]


def _files(data: dict[str, Any]) -> Iterator[Path]:
    path = data.get("path")
    folder = Path(path).expanduser() if isinstance(path, str) else None
    if folder is not None and folder.is_file():
        yield folder.absolute()
        folder = folder.parent
    for split in _SPLITS:
        name = data.get(split)
        if not isinstance(name, str) or not name:
            continue
        if folder is None:
            places = [Path(name).expanduser()]
        else:
            subset = data.get("name")
            roots = [folder / subset] if isinstance(subset, str) else []
            roots += [folder, folder / "data"]
            places = [
                found for root in roots if root.is_dir() for found in (root / name, *root.glob(f"{escape(name)}[.-]*"))
            ]
        yield from (place.absolute() for place in places if place.is_file())


@cache
def _digest(path: Path, modified: int) -> str:
    """The first 16 digits of a sha256; read once in a process as long as nobody writes the file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
