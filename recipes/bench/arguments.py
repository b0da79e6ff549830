"""The command line that all parts of the benchmark have in common."""

from __future__ import annotations

import argparse
from pathlib import Path


def parser(part: str, about: str | None) -> argparse.ArgumentParser:
    """The command line of a part, with the folder that it writes into.

    Args:
        part: Its name: of its module, and of its JSON file.
        about: The docstring of its module; the first line is shown.

    Example:
        >>> parser("ddp", "What processes send.").parse_args(["--out", "there"]).out
        PosixPath('there')
    """
    made = argparse.ArgumentParser(
        prog=f"python -m apportion.recipes.bench.{part}", description=(about or "").split("\n")[0]
    )
    made.add_argument("--out", type=Path, default=Path("results"), help=f"folder for {part}.json")
    return made
