"""Packages of others that are measured beside ours: fetched from PyPI into a folder of their own, one for each.

A package is installed without its needs, which are ours as well (torch, transformers, Lightning), in the version and
with the hash that are written here. Without a network, or if the hash differs, it cannot be had, and says why.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CACHE = Path.home() / ".cache" / "apportion" / "peers"


@dataclass(frozen=True)
class Package:
    """A release on PyPI.

    Args:
        name: Of the project.
        version: Of the release.
        module: Top-level module that it installs.
        sha256: Hash of its wheel, in hex; None takes what there is.

    Example:
        >>> Package("badam", "1.4", "badam").requirement
        'badam==1.4'
    """

    name: str
    version: str
    module: str
    sha256: str | None = None

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.name}=={self.version}"


BADAM = Package("badam", "1.4", "badam", "7317d86da1fca83473b742bbb92d5b1756f6f39b7bbbbe4636b628cfd8ac9618")
FINETUNING_SCHEDULER = Package(
    "finetuning-scheduler",
    "2.14.1",
    "finetuning_scheduler",
    "3d89ca25f0f699f86858d28c2827cd3907a6cb5f59bd210576822ea52e3572e5",
)
SELECTIVE_OPTIMIZERS = Package(
    "selective-optimizers",
    "0.4",
    "selective_optimizers",
    "9d165e79aa0e220f90186604a8922a0e56e531dc42817ed4757d44c87206636d",
)
PACKAGES = (BADAM, FINETUNING_SCHEDULER, SELECTIVE_OPTIMIZERS)


def folder(package: Package, cache: Path = CACHE) -> Path:
    """Where the package is, or would be."""
    return cache / f"{package.name}-{package.version}"


def fetch(package: Package, cache: Path = CACHE, index: str | None = None) -> Path:
    """The folder that holds the package, which is asked of PyPI if it is not there yet.

    Args:
        package: Which.
        cache: Folder of such folders.
        index: Address of the index; None for pip's own.

    Raises:
        RuntimeError: If it is neither there nor to be had; with the command, and the last thing that pip said.
    """
    target = folder(package, cache)
    if (target / package.module).is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as made:
        wanted = Path(made, "requirements.txt")
        wanted.write_text(package.requirement + (f" --hash=sha256:{package.sha256}" if package.sha256 else "") + "\n")
        options = [
            "--quiet",
            "--disable-pip-version-check",
            "--retries",
            "1",
            "--timeout",
            "20",
            "--no-deps",
            "--only-binary=:all:",
        ]
        options += ["--index-url", index] if index else []
        place = Path(made, "installed")
        pip = [sys.executable, "-m", "pip", "install", *options, "--target", str(place), "--requirement", str(wanted)]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        if done.returncode:
            said = [line for line in done.stderr.strip().splitlines() if "ERROR" in line] or ["pip failed"]
            raise RuntimeError(f"`pip install --no-deps {package.requirement}`: {said[-1]}")
        if not (target / package.module).is_dir():  # another process may have been faster
            shutil.rmtree(target, ignore_errors=True)
            os.replace(place, target)
    return target


@contextmanager
def reachable(package: Package, cache: Path = CACHE) -> Iterator[None]:
    """Lets the package be imported inside, fetched if need be; what is imported stays."""
    path = str(fetch(package, cache))
    sys.path.insert(0, path)
    try:
        yield
    finally:
        sys.path.remove(path)


def module(package: Package, name: str | None = None, cache: Path = CACHE) -> Any:
    """The module called ``name`` of the package, or its top-level one.

    Raises:
        RuntimeError: If the package cannot be had.
    """
    with reachable(package, cache):
        return importlib.import_module(name or package.module)
