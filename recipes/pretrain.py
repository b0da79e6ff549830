"""Pre-trains the demo's small vision transformer on printed digits: ``python -m apportion.recipes.pretrain``.

The images are the digits of the fonts that matplotlib ships, drawn at 32 x 32 under random rotation, slant, size, shift
and stroke width, then summed over blocks of 4 x 4 to 8 x 8 as the handwritten digits of scikit-learn were. Nothing is
downloaded, and handwriting is a real shift away from what the model has seen. The weights are kept in half precision.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

WEIGHTS = Path(__file__).parent / "weights" / "printed-digits"
"""Where the weights are kept, in the form that `from_pretrained` reads."""

FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSerif-Bold", "DejaVuSerif-Italic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmb10", "cmr10", "cmtt10"),
)
UNSEEN_FONTS = ("DejaVuSerif", "STIXGeneralBolIta", "cmss10")
"""Fonts kept out of the training, to see whether the model knows digits or fonts."""

CANVAS = 32


def weights() -> str:
    """Folder of the weights, for a config's ``model.path``."""
    return str(WEIGHTS)


def masters(fonts: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """The ten digits of each font, upright and filling the canvas.

    Args:
        fonts: Names of files in matplotlib's font folder.

    Returns:
        Ink in [0, 1], shape (10 * fonts, 1, 32, 32), and the digits, int64, shape (10 * fonts,).

    Example:
        >>> ink, digits = masters(("DejaVuSans",))
        >>> tuple(ink.shape), digits.tolist()
        ((10, 1, 32, 32), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    ink, digits = [], []
    for name in fonts:
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 96)
        for digit in range(10):
            page = Image.new("L", (192, 192))
            ImageDraw.Draw(page).text((48, 32), str(digit), font=font, fill=255)
            glyph = page.crop(page.getbbox())
            width = max(1, round(CANVAS * glyph.width / glyph.height))
            glyph = glyph.resize((min(width, CANVAS), CANVAS), Image.Resampling.LANCZOS)
            canvas = Image.new("L", (CANVAS, CANVAS))
            canvas.paste(glyph, ((CANVAS - glyph.width) // 2, 0))
            ink.append(torch.from_numpy(np.asarray(canvas, dtype=np.float32) / 255.0)[None])
            digits.append(digit)
    return torch.stack(ink), torch.tensor(digits)


def distort(ink: Tensor, generator: torch.Generator) -> Tensor:
    """Random rotation, slant, size, shift, stroke width and smudges, then blocks of 4 x 4 summed to 8 x 8.

    Args:
        ink: Shape (b, 1, 32, 32), in [0, 1].
        generator: Source of the randomness.

    Returns:
        Images of shape (b, 1, 8, 8), in [-1, 1], in steps of 1/8 as scikit-learn's digits are.
    """
    count = ink.shape[0]

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    angle, slant = uniform(-0.2, 0.2), uniform(-0.2, 0.2)
    wide, tall = uniform(1.0, 1.5), uniform(1.0, 1.15)  # the map goes from output to input: above 1 shrinks
    rows = [
        wide * angle.cos(),
        slant - angle.sin(),
        uniform(-0.1, 0.1),
        angle.sin(),
        tall * angle.cos(),
        uniform(-0.06, 0.06),
    ]
    grid = functional.affine_grid(
        torch.stack(rows, dim=1).view(count, 2, 3), [count, 1, CANVAS, CANVAS], align_corners=False
    )
    moved = functional.grid_sample(ink, grid, align_corners=False)
    thick = functional.max_pool2d(moved, 3, stride=1, padding=1)
    thin = -functional.max_pool2d(-moved, 3, stride=1, padding=1)
    width = uniform(-0.8, 1.0).view(count, 1, 1, 1)
    drawn = torch.where(width > 0, moved + width * (thick - moved), moved - width * (thin - moved))
    small = functional.avg_pool2d(drawn, CANVAS // 8)
    small = small + 0.03 * torch.randn(small.shape, generator=generator)
    return (small.clamp(0, 1) * 16).round() / 8 - 1


def build() -> ViTForImageClassification:
    """The demo's model: 8 layers of width 64 over 2 x 2 patches of one 8 x 8 image, 0.4 million parameters."""
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=64,
            num_hidden_layers=8,
            num_attention_heads=4,
            intermediate_size=256,
            num_labels=10,
        )
    )


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: Tensor, digits: Tensor) -> float:
    """Share of ``images`` (n, 1, 8, 8) whose likeliest class is the right one of ``digits`` (n,)."""
    model.eval()
    return float((model(images).logits.argmax(1) == digits).float().mean())


def train(steps: int, batch: int = 128, lr: float = 1e-3, seed: int = 0) -> ViTForImageClassification:
    """Trains `build`'s model from nothing on ``steps`` batches of distorted glyphs, with warm-up and cosine decay."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model, (ink, digits) = build(), masters(FONTS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    warm = max(1, min(100, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))
    )
    columns = (
        TextColumn("pre-training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=steps, loss="")
        model.train()
        for step in range(steps):
            chosen = torch.randint(len(digits), (batch,), generator=generator)
            loss = functional.cross_entropy(model(distort(ink[chosen], generator)).logits, digits[chosen])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress.update(
                bar, advance=1, loss=f"loss {loss.item():.3f}" if step % 20 == 0 else progress.tasks[0].fields["loss"]
            )
    return model


def main() -> None:
    """Trains, reports the accuracy on seen and unseen fonts, and writes the weights."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=1500, help="batches of 128 images (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder of the weights (default: %(default)s)")
    options = parser.parse_args()
    model = train(options.steps)
    model.half().save_pretrained(options.out)
    kept = ViTForImageClassification.from_pretrained(options.out, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for title, fonts in (("fonts it was trained on", FONTS), ("fonts it never saw", UNSEEN_FONTS)):
        ink, digits = masters(fonts)
        images = distort(ink.repeat(40, 1, 1, 1), generator)
        print(f"accuracy on {title}: {accuracy(kept, images, digits.repeat(40)):.3f}")
    print(f"weights written to {options.out.resolve()}")


if __name__ == "__main__":
    main()
