"""Where the rows of a data set come from: local files, the hub, or the call itself."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apportion.recipes.tasks.formats import READERS, Row, read, text_of

Split = str | Sequence[Mapping[str, Any]] | None
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Source:
    """Three splits of rows, and how many of them to use.

    Args:
        path: Local folder or file, or id of a data set on the hub; None if the splits are files themselves.
        name: Configuration of the data set on the hub, or folder inside a local one.
        train: Split on the hub, file (its ending may be left out), or list of rows. If ``path`` is a file it is that.
        val: The same for validation; None to hold training samples out.
        test: The same for the test; None to test on the validation samples.
        columns: Names of the columns of tables without a header.
        holdout: Training rows kept for validation where ``val`` is None: an int counts them, a float is a fraction.
        split_seed: Of the rows that are held out, and of those that ``limit`` keeps.
        limit: Rows to keep of each split, by its name; they stay in their order.
        running: Column that the whole of a ``.txt`` file becomes; None to read it as a table.

    Raises:
        ValueError: If ``holdout`` or ``limit`` is out of range.

    Example:
        >>> rows = [{"text": letter} for letter in "abcdef"]
        >>> source = Source(train=rows, holdout=2, limit={"train": 3})
        >>> [[row.values["text"] for row in source.read()[split]] for split in ("train", "val", "test")]
        [['a', 'b', 'e'], ['c', 'f'], []]
    """

    train: Split
    val: Split = None
    test: Split = None
    path: str | None = None
    name: str | None = None
    columns: Sequence[str] | None = None
    holdout: int | float = 0
    split_seed: int = 0
    limit: Mapping[str, int] | None = None
    running: str | None = None

    def __post_init__(self) -> None:
        if (isinstance(self.holdout, float) and not 0.0 <= self.holdout < 1.0) or self.holdout < 0:
            raise ValueError(f"`data.holdout={self.holdout}` must be a count from 0, or a fraction in [0, 1).")
        for split, count in (self.limit or {}).items():
            if split not in SPLITS or (count is not None and count < 1):
                raise ValueError(f"`data.limit={{{split}: {count}}}` must hold counts from 1 of {', '.join(SPLITS)}.")

    def read(self) -> dict[str, list[Row]]:
        """The rows of every split.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file cannot be read, or nothing is left to train or to validate on.
        """
        found = {split: self._rows(split) for split in SPLITS}
        if self.val is None:
            found["train"], found["val"] = self._held_out(found["train"])
        for split, count in (self.limit or {}).items():
            if count is not None and count < len(found[split]):
                chosen = self._drawn(len(found[split]), count)
                found[split] = [row for i, row in enumerate(found[split]) if i in chosen]
        return found

    def where(self, split: str) -> str:
        """What the rows of a split are called in messages."""
        value = getattr(self, split)
        if value is None:
            return self.where("train")
        if not isinstance(value, str):
            return f"`data.{split}`"
        if self.path is None:
            return value
        return self.path if Path(self.path).expanduser().is_file() and split == "train" else f"{self.path}, {value}"

    def _held_out(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        count = int(self.holdout * len(rows)) if isinstance(self.holdout, float) else self.holdout
        if not 0 < count < len(rows):
            raise ValueError(
                f"`data.val=null data.holdout={self.holdout}` leaves {max(len(rows) - count, 0)} rows to train on and "
                f"{min(count, len(rows))} to validate on: name a split for `data.val`, or hold some but not all of the "
                f"{len(rows)} training rows out, such as `data.holdout=0.1`."
            )
        held = self._drawn(len(rows), count)
        return [r for i, r in enumerate(rows) if i not in held], [r for i, r in enumerate(rows) if i in held]

    def _drawn(self, total: int, count: int) -> set[int]:
        order = torch.randperm(total, generator=torch.Generator().manual_seed(self.split_seed))
        return set(order[:count].tolist())

    def _rows(self, split: str) -> list[Row]:
        value = getattr(self, split)
        if value is None:
            return []
        if not isinstance(value, str):
            return [Row(f"row {i}", values) for i, values in enumerate(value, 1)]
        if self.path is None:
            return self._read(existing(value, f"`data.{split}={value}`"))
        base = Path(self.path).expanduser()
        if base.is_file() and split == "train":
            return self._read(base)
        if base.exists():
            files = located(base if base.is_dir() else base.parent, self.name, value, f"`data.{split}={value}`")
            return [_in(file, row) if len(files) > 1 else row for file in files for row in self._read(file)]
        if base.is_absolute() or self.path[:1] in ".~":
            raise FileNotFoundError(f"`data.path={self.path}`: there is no folder or file {base.absolute()}.")
        return [Row(f"row {i}", row) for i, row in enumerate(hub(self.path, self.name, value), 1)]

    def _read(self, file: Path) -> list[Row]:
        if self.running is not None and file.suffix == ".txt":
            return [Row("the text", {self.running: text_of(file)})]
        return read(file, self.columns)


def _in(file: Path, row: Row) -> Row:
    return Row(f"{file.name}, {row.place}", row.values, row.problem)


def existing(path: str, call: str) -> Path:
    """The path, or an error that says from which folder a relative path was looked up."""
    found = Path(path).expanduser()
    if not found.is_file():
        raise FileNotFoundError(
            f"{call}: there is no file {found.absolute()}. Give an absolute path, or one relative to the folder "
            "in which the command was started."
        )
    return found


def located(folder: Path, name: str | None, split: str, call: str) -> list[Path]:
    """The files of a split in a local folder: the one of that name, or with an ending, or its numbered shards.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If there are several forms of it.
    """
    places = [folder / name] if name and (folder / name).is_dir() else []
    for place in (*places, folder, folder / "data"):
        if (place / split).is_file():
            return [place / split]
        if found := [place / f"{split}{ending}" for ending in READERS if (place / f"{split}{ending}").is_file()]:
            if len(found) > 1:
                raise ValueError(f"{call} may be {' or '.join(path.name for path in found)} in {place}: say which.")
            return found
        if shards := sorted(p for p in place.glob(f"{split}-*") if p.suffix in READERS and p.is_file()):
            return shards
    there = sorted(path.name for path in folder.iterdir() if path.suffix in READERS)
    raise FileNotFoundError(
        f"{call}: there is no such file in {folder.absolute()}, which holds {', '.join(there) or 'no data files'}."
    )


def hub(path: str, name: str | None, split: str) -> Any:
    """A split of a data set of the hub, or of its local cache.

    Raises:
        ValueError: If it cannot be loaded.
    """
    import datasets  # type: ignore[import-untyped]

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return datasets.load_dataset(path, name, split=split)
    except Exception as error:  # the library raises many kinds
        raise ValueError(
            f"`data.path={path} data.name={name}`: the split {split!r} could not be loaded from the hub ({error}). "
            "Without a network give a local folder: `data.path=/data/my_task data.train=train.jsonl`."
        ) from error
