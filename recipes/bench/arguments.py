"""What all parts of the benchmark have in common: the command line that they read and the file that they write."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console


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


def write(out: Path, part: str, result: Mapping[str, Any], shown: Sequence[str] = ()) -> None:
    """Writes the figures of a part, and prints its page.

    Args:
        out: Folder, made if it is missing.
        part: Its name.
        result: The figures.
        shown: Lines of Markdown.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{part}.json").write_text(json.dumps(result, indent=2) + "\n")
    if shown:
        Console().print("\n".join(shown), highlight=False, soft_wrap=True, markup=False)
