"""Labelled images from folders, the hub, or the call."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apportion.recipes.tasks.columns import BadRow, label, value
from apportion.recipes.tasks.data import RowData, Sample
from apportion.recipes.tasks.formats import Row
from apportion.recipes.tasks.source import Source, Split
from apportion.recipes.tasks.text import check_labels

_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff")


class ImageFolders(Source):
    """Rows of local folders that hold one folder of images for each class; else those of any other source."""

    def folder(self, split: str) -> Path | None:
        """The local folder of a split, if it is one."""
        found = getattr(self, split)
        if not isinstance(found, str):
            return None
        path = Path(self.path or ".").expanduser() / found
        return path if path.is_dir() else None

    def _rows(self, split: str) -> list[Row]:
        folder = self.folder(split)
        if folder is None:
            return super()._rows(split)
        files = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in _ENDINGS)
        if not files:
            raise ValueError(f"`data.{split}`: {folder} has no images in folders named after their classes.")
        return [Row(str(p.relative_to(folder)), {"image": str(p), "label": p.parent.name}) for p in files]


class ImageData(RowData):
    """Images of one size, scaled to [0, 1], less a mean and over a deviation for each channel.

    Images are read when they are drawn; that each can be opened is checked at set-up. Grey levels of 16 bits, also
    those that Pillow holds as 32, are scaled from [0, 65535]. There is no augmentation.

    Args:
        train: Split on the hub, folder with a folder for each class, or list of rows; in a row an image is a path, a
            picture of Pillow, or rows of grey levels from 0 to 255.
        val: The same for validation; None to hold training samples out.
        test: The same for the test; None to test on the validation samples.
        image: Name of the column with the image.
        label: Name of the column with the class.
        labels: Names of the classes in order; None for the sorted names of the training folders, or integers from 0.
        classes: Number of classes, to check labels by; None for that of the model.
        size: Side of the square images, in pixels; others are stretched to it (bicubic).
        channels: 1 for grey levels, 3 for colours.
        mean: Of each channel.
        std: Of each channel.
        **options: Of `apportion.recipes.tasks.data.RowData`: ``batch_size``, ``seed``, ``path`` ...

    Raises:
        ValueError: If ``channels``, ``size``, ``mean`` or ``std`` is out of range, or ``labels`` names a class twice.
    """

    def __init__(
        self,
        train: Split,
        val: Split = None,
        test: Split = None,
        image: str = "image",
        label: str = "label",
        labels: Sequence[str] | None = None,
        classes: int | None = None,
        size: int = 224,
        channels: int = 3,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        **options: Any,
    ) -> None:
        super().__init__(train, val, test, reader=ImageFolders, **options)
        check_labels(labels, classes)
        if size < 1 or channels not in (1, 3):
            raise ValueError(f"`data.size={size} data.channels={channels}` must be at least 1, and 1 or 3.")
        if len(mean) < channels or len(std) < channels or min(std) <= 0:
            raise ValueError(
                f"`data.mean={list(mean)} data.std={list(std)}` must hold {channels} numbers each, and deviations "
                "above 0."
            )
        self.image, self.label, self.labels, self.classes = image, label, labels, classes
        self.look = Look(size, channels, tuple(mean[:channels]), tuple(std[:channels]))

    def prepare(self) -> None:
        """Names the classes after the training folders, where they have no other names."""
        self.classes = self.classes or self.model_setting("num_labels")
        folder = self.source.folder("train") if isinstance(self.source, ImageFolders) else None
        if self.labels is None and folder is not None:
            self.labels = sorted(path.name for path in folder.iterdir() if path.is_dir())
            check_labels(self.labels, self.classes)

    def samples(self, row: Row, split: str) -> Iterable[Sample]:
        """The image as it came, and its label."""
        found = value(row, self.image)
        try:
            with opened(found) as picture:
                wide = picture.mode in ("I", "F")
                picture.verify()
            if wide:
                with opened(found) as picture:  # again, since a verified picture cannot be read
                    eight_bits(picture)
        except BadRow:
            raise
        except Exception as error:  # Pillow raises what the format's reader raises
            raise BadRow(f"holds no image in column {self.image!r}: {error}") from error
        yield {"image": found, "labels": torch.tensor(label(row, self.label, self.labels, self.classes))}

    def arrange(self, samples: list[Sample], split: str) -> list[Sample]:
        """The images, read when they are drawn."""
        return Drawn(samples, self.look)  # type: ignore[return-value]


@dataclass(frozen=True)
class Look:
    """What a picture becomes: a square of one size, ``(pixel / 255 - mean) / std`` in each channel.

    Args:
        size: Side of the square, in pixels.
        channels: 1 for grey levels, 3 for colours.
        mean: Of each channel.
        std: Of each channel.
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, picture: Any) -> Tensor:
        """Float32, shape (channels, size, size)."""
        from PIL import Image

        shaped = eight_bits(picture).convert("L" if self.channels == 1 else "RGB")
        shaped = shaped.resize((self.size, self.size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(shaped, dtype=np.float32).reshape(self.size, self.size, self.channels))
        return ((pixels / 255.0 - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(2, 0, 1).contiguous()


def eight_bits(picture: Any) -> Any:
    """A picture whose grey levels have 16 bits with levels of 8; any other as it is.

        round(level / 257)      65535 becomes 255

    Pillow would cut the levels at 255 instead. Mode ``I`` is what it reads some files of 16 bits as.

    Raises:
        BadRow: If levels are fractions, whose white is not known, or do not have 16 bits.

    Example:
        >>> from PIL import Image
        >>> eight_bits(Image.new("I;16", (1, 1), 257 * 9)).getpixel((0, 0))
        9
    """
    from PIL import Image

    if picture.mode == "F":
        raise BadRow("holds an image of fractions (mode F), whose white is not known: save it with 8 or 16 bits")
    if picture.mode != "I" and not picture.mode.startswith("I;16"):
        return picture
    levels = np.asarray(picture)
    if levels.min() < 0 or levels.max() > 65535:
        raise BadRow(
            f"holds an image with grey levels from {levels.min()} to {levels.max()} (mode {picture.mode}), which must "
            "lie in [0, 65535]: save it with 8 or 16 bits"
        )
    return Image.fromarray(np.rint(levels / 257.0).astype(np.uint8))


class Drawn(Sequence[Sample]):
    """Samples whose images are read when they are asked for.

    Args:
        samples: Each with an ``image`` and ``labels``.
        look: Makes the pixels.
    """

    def __init__(self, samples: Sequence[Sample], look: Look) -> None:
        self._samples, self._look = samples, look

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: Any) -> Any:
        sample = self._samples[i]
        with opened(sample["image"]) as picture:
            return {"pixel_values": self._look(picture), "labels": sample["labels"]}


def opened(image: Any) -> Any:
    """The picture of Pillow behind a path, the bytes of a file, rows of grey levels, or a picture."""
    from PIL import Image

    if isinstance(image, str | Path):
        return Image.open(image)
    if isinstance(image, Mapping):
        return Image.open(io.BytesIO(image["bytes"]))
    if isinstance(image, Sequence):
        return Image.fromarray(np.asarray(image, dtype=np.uint8))
    return image.copy()
