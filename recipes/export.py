"""``apportion-export``: what training changed as a small safetensors file, or a merged Hugging Face checkpoint.

apportion-export --base BASE --tuned TUNED --out delta.safetensors
apportion-export --base BASE --tuned TUNED --merge FOLDER
apportion-export --base BASE --apply delta.safetensors --merge FOLDER
apportion-export --show delta.safetensors

BASE and TUNED are a local Hugging Face folder, a .safetensors file or a Lightning .ckpt; to merge, BASE is a folder.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import uuid
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import transformers
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from apportion.categories import matches
from apportion.delta import Delta, apply, difference, load, save
from apportion.named import some
from apportion.recipes.checkpoints import Shards, copy_others, model_of, weights


def compared(options: argparse.Namespace) -> Delta:
    """The delta between ``--base`` and ``--tuned``, under a progress bar; warnings of it are printed."""
    base, tuned = weights(options.base), weights(options.tuned)
    if options.fresh is not None:
        check_fresh(options.fresh, tuned)
    config = {"base": options.base.resolve().name, "tuned": options.tuned.resolve().name}
    console = Console(stderr=True)
    with Progress(console=console, transient=True) as bar, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        task = bar.add_task("comparing", total=len(base))
        if isinstance(base, Shards):
            base.tick = lambda: bar.advance(task)
        delta = difference(
            base, tuned, old_values=options.old_values, fresh=options.fresh, prefix=options.prefix, config=config
        )
    for warning in said:
        console.print(f"Note: {warning.message}", highlight=False, markup=False)
    return delta


def check_fresh(pattern: str, names: Iterable[str]) -> None:
    r"""Refuses a ``--fresh`` that would do nothing.

    Raises:
        ValueError: If it matches none of the names.

    Example:
        >>> check_fresh(r"classifier\..*", ["bert.embed.weight", "classifier.weight"])
    """
    listed = list(names)
    if any(matches(pattern, name) for name in listed):
        return
    near = [name for name in listed if re.search(pattern, name)]
    wider = (rf"{pattern}\..*", f".*(?:{pattern}).*")
    hint = next((f", as `{longer}` does" for longer in wider if any(matches(longer, name) for name in near)), "")
    raise ValueError(
        f"`--fresh {pattern}` matches no tensor of TUNED, which has {some(near or listed)}: it must match the last "
        f"parts of a name as a whole{hint}."
    )


def _pattern(text: str) -> str:
    try:
        re.compile(text)
        matches(text, "")
    except (re.error, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"`--fresh {text}` is no regular expression: {error}") from None
    return text


def merge(delta: Delta, options: argparse.Namespace) -> None:
    """Writes the base with ``delta`` applied as a Hugging Face folder, its tokenizer and other files with it."""
    out, base = options.merge, options.base
    if not base.is_dir():
        raise ValueError(f"`--merge` needs `--base` to be a Hugging Face folder with a config; {base} is none.")
    with Console(stderr=True).status("") as status:
        status.update(f"loading {base} ...")
        model = model_of(base, options.config)
        status.update("applying the delta ...")
        apply(delta, model, options.alpha)
        status.update(f"writing {out} ...")
        partial = out.with_name(f".{out.name}.{uuid.uuid4().hex}")  # renamed when it is complete
        try:
            model.save_pretrained(partial)
            copy_others(base, partial)
            partial.replace(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def rows(delta: Delta) -> list[dict[str, Any]]:
    """What the delta holds of each tensor: entries, density, encoding, bytes, and bytes of the whole tensor."""
    listed = []
    for name, change in delta.changes.items():
        encoding, size = change.encoded()
        about = {"tensor": name, "entries": change.count, "density": change.count / max(1, change.n)}
        listed.append({**about, "encoding": encoding, "bytes": size, "dense": change.n * change.new.element_size()})
    return listed


def show(delta: Delta, as_json: bool = False) -> None:
    """Prints `rows` and their sum."""
    listed = rows(delta)
    entries, size, dense = (sum(row[key] for row in listed) for key in ("entries", "bytes", "dense"))
    if as_json:
        about = {"base_hash": delta.base_hash, "revertible": delta.revertible, "fresh": list(delta.fresh)}
        total = {"entries": entries, "bytes": size, "dense": dense}
        sys.stdout.write(json.dumps({**about, "config": delta.config, "total": total, "tensors": listed}) + "\n")
        return
    made = Table(box=SIMPLE_HEAD, show_footer=True)
    made.add_column("tensor", "total", overflow="fold")
    n = sum(change.n for change in delta.changes.values())
    feet = (f"{entries:,}", f"{100 * entries / max(1, n):.3f}", "", f"{size:,}", f"{dense:,}")
    for heading, foot in zip(("entries", "density %", "indices", "bytes", "dense bytes"), feet, strict=True):
        made.add_column(heading, foot, justify="right", no_wrap=True)
    for row in listed:
        numbers = (f"{row['entries']:,}", f"{100 * row['density']:.3f}", row["encoding"], f"{row['bytes']:,}")
        made.add_row(row["tensor"], *numbers, f"{row['dense']:,}")
    console = Console()
    console.print(made)
    console.print(summary(delta), highlight=False)


def summary(delta: Delta) -> str:
    """The delta in one sentence or two."""
    listed = rows(delta)
    entries, size, dense = (sum(row[key] for row in listed) for key in ("entries", "bytes", "dense"))
    return (
        f"{entries:,} entries in {len(listed)} of {len(delta.names) + len(delta.fresh)} tensors, {size:,} bytes: "
        f"{size / max(1, entries):.2f} bytes an entry, {100 * size / max(1, dense):.2f}% of these tensors as a whole. "
        f"Base {delta.base_hash[:12]}; old values {'kept' if delta.revertible else 'not kept'}."
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    text = (__doc__ or "").split("\n\n", 1)
    made = argparse.ArgumentParser(
        prog="apportion-export",
        description=text[0],
        epilog=text[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--base", type=Path, help="the model that training began with")
    add("--tuned", type=Path, help="the model after training")
    add("--out", type=Path, metavar="FILE", help="writes the delta to this .safetensors file")
    add("--merge", type=Path, metavar="FOLDER", help="writes the merged model to this folder")
    add("--apply", type=Path, metavar="FILE", help="a delta to merge, instead of --tuned")
    add("--show", type=Path, metavar="FILE", help="prints what a delta holds")
    add("--json", action="store_true", help="with --show: as JSON, in bytes")
    add("--no-old-values", dest="old_values", action="store_false", help="half the values, but no `revert`")
    add("--prefix", help="the part of TUNED that is the model, such as 'model.'; found by default")
    add("--fresh", metavar="REGEX", type=_pattern, help="names of TUNED that do not come from BASE, such as a new head")
    add("--config", type=Path, help="with --merge: config of the merged model, if another than that of BASE")
    add("--alpha", type=float, default=1.0, help="with --merge: 0 is the base, 1 the tuned model")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``apportion-export``."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    made = parser()
    options = made.parse_args(arguments)
    try:
        _run(options)
    except (ValueError, OSError) as error:
        made.error(str(error))
    return 0


def _run(options: argparse.Namespace) -> None:
    given = {name for name in ("base", "tuned", "out", "merge", "apply", "show") if getattr(options, name) is not None}
    if given == {"show"}:
        show(load(options.show), options.json)
        return
    if given not in ({"base", "tuned", "out"}, {"base", "tuned", "merge"}, {"base", "apply", "merge"}):
        raise ValueError(
            "Give `--base`, `--tuned` and `--out` for a delta; `--base`, `--merge` and one of `--tuned` and `--apply` "
            "for a merged model; or `--show` alone."
        )
    target: Path = options.out or options.merge
    if target.is_file() or (target.is_dir() and (options.out or any(target.iterdir()))):
        raise ValueError(f"{target} is there already and is not overwritten: remove it, or choose another name.")
    if options.out and options.out.suffix != ".safetensors":
        raise ValueError(f"`--out {options.out}` must end with .safetensors.")
    delta = load(options.apply) if options.apply else compared(options)
    target.parent.mkdir(parents=True, exist_ok=True)
    if options.out:
        save(delta, options.out)
    else:
        merge(delta, options)
    Console().print(f"{target}: {summary(delta)}", highlight=False, markup=False)


if __name__ == "__main__":
    sys.exit(main())
